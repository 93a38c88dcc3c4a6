"""Using what was tuned: answers to new inputs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, run_ipt

from intrinsic_prompt_tuning.backbone import Backbone
from intrinsic_prompt_tuning.files import read_file
from intrinsic_prompt_tuning.tasks import Example

Cli = Callable[..., Result]
SHORT = ("--steps", 6, "--evaluations", 3, "--batch-size", 3)


@pytest.fixture(scope="module")
def tuned(shared_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cli]:
    cache = tmp_path_factory.mktemp("tuned")

    def cli(command: str, *arguments: object) -> Result:
        return run_ipt(command, *shared_options, "--cache", cache, *arguments)

    for command in (("collect", *SHORT), ("fit-subspace", "--dim", 4, "--subspace-steps", 2), ("tune", "--dim", 4, *SHORT)):
        done = cli(*command)
        assert done.code == 0, done.err
    return cache, cli


def say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape"))))


def prompt_of(cache: Path, task: str) -> torch.Tensor:
    (path,) = cache.glob(f"*/soft-prompts/{task}-*.safetensors")
    return read_file(path)[2]["soft_prompt"]


def test_lines_are_answered_in_order_as_the_backbone_answers_them(
    tuned: tuple[Path, Cli], t5: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "the glad fox sees one cups on monday",
        "the wild eel sees two keys on sunday",
        "the sorry owl sees six toys on tuesday",
    ]
    say(monkeypatch, "\n".join(lines * 30) + "\n")
    done = tuned[1]("predict", "--task", "mood-good", "--from", "prompt", "--json")
    assert done.code == 0, done.err
    told = [json.loads(line) for line in done.out.splitlines()]
    assert [row["input"] for row in told] == lines * 30
    examples = [Example(line, ("yes",), ("yes", "no")) for line in lines]
    rows = [(0, row) for row in t5.encode(examples, prompt_length=3)]
    answers = t5.answer(prompt_of(tuned[0], "mood-good")[None], rows)
    assert [row["answer"] for row in told[:3]] == [answer.text for answer in answers]
    for row, answer in zip(told[:3], answers, strict=True):
        weights = torch.tensor([-loss for loss in answer.option_losses]).softmax(0).tolist()
        assert row["options"] == pytest.approx(dict(zip(("yes", "no"), weights, strict=True)), abs=1e-4)
        assert max(row["options"], key=row["options"].__getitem__) == row["answer"]


def test_a_vector_answers_through_its_subspace_and_many_tasks_mix(
    tuned: tuple[Path, Cli], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"input": "the glad fox sees one cups on monday", "task": task} for task in ("count-next", "mood-good")]
    say(monkeypatch, "\n".join(map(json.dumps, rows)) + "\nthe glad fox sees one cups on monday")
    done = tuned[1]("predict", "--task", "mood-good", "--task", "count-next", "--from", "vector", "--dim", 4, "--json")
    assert done.code == 0, done.err
    told = [json.loads(line) for line in done.out.splitlines()]
    assert [row["task"] for row in told] == ["count-next", "mood-good", "mood-good"]
    assert "options" not in told[0] and told[1] == told[2] | {"input": told[1]["input"]}


def test_a_bad_line_is_said_with_its_number_and_the_others_are_answered(tuned: tuple[Path, Cli], tmp_path: Path) -> None:
    lines = ['{"input": 5}', "the glad fox", '{"task": "mood-good"}', '{"input": "the fox", "task": "count-next"}', "the owl"]
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    done = tuned[1]("predict", "--task", "mood-good", "--input", tmp_path / "lines.txt")
    assert done.code == 1
    assert len(done.out.splitlines()) == 2 and set(done.out.split()) <= {"yes", "no"}
    for number in (1, 3, 4):
        assert f"not answered: line {number}: " in done.err
    assert "3 lines were not answered" in done.err.splitlines()[-1]


def test_a_task_without_anything_tuned_names_the_command_that_makes_it(
    shared_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "the fox")
    done = run_ipt("predict", *shared_options, "--cache", tmp_path, "--task", "mood-good")
    assert done.code == 1
    assert "no tuned prompt or vector of task 'mood-good': run 'ipt collect --task mood-good'" in done.err
