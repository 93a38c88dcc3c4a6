"""Using what was tuned: answers to new inputs."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, Cli, commands, run_ipt
from helpers import hub_rows

import ipt
from intrinsic_prompt_tuning.backbone import Answer, Backbone
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.files import read_file, write_file
from intrinsic_prompt_tuning.tasks import Example, load_tasks
from intrinsic_prompt_tuning.tasks.checks import places
from intrinsic_prompt_tuning.tasks.folders import parse_input
from intrinsic_prompt_tuning.using import _prediction


@pytest.fixture(scope="module")
def tuned(shared_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cli]:
    cache = tmp_path_factory.mktemp("tuned")
    cli = commands(*shared_options, "--cache", cache)

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


def test_of_what_answers_all_validation_rows_right_that_with_the_least_loss_answers(
    shared_options: list[object], tmp_path: Path
) -> None:
    """A grid ends at the first rate that does; prompts and vectors are no grid."""
    cli = commands(*shared_options, "--cache", tmp_path / "cache")

    for command in (("collect", *SHORT), ("fit-subspace", "--dim", 4, "--subspace-steps", 2), ("tune", "--dim", 4, *SHORT)):
        assert cli(*command).code == 0
    kinds = ("soft-prompts", "intrinsic-vectors")
    for best in kinds:
        for kind in kinds:
            (path,) = tmp_path.glob(f"cache/*/{kind}/count-next-*.safetensors")
            header, record, tensors = read_file(path)
            write_file(path, header, record | {"validation": 1.0, "validation_loss": 0.1 if kind == best else 0.2}, tensors)
        assert cli("export", "--task", "count-next", "--out", tmp_path / best).code == 0
        vector = "intrinsic_vector" in read_file(tmp_path / best / "adapter_model.safetensors")[2]
        assert vector == (best == "intrinsic-vectors")


def test_a_bad_line_is_said_with_its_number_and_the_others_are_answered(tuned: tuple[Path, Cli], tmp_path: Path) -> None:
    lines = ['{"input": 5}', "the glad fox", '{"task": "mood-good"}', '{"input": "the fox", "task": "count-next"}', "the owl"]
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    done = tuned[1]("predict", "--task", "mood-good", "--input", tmp_path / "lines.txt")
    assert done.code == 1
    assert len(done.out.splitlines()) == 2 and set(done.out.split()) <= {"yes", "no"}
    for number in (1, 3, 4):
        assert f"not answered: line {number}: " in done.err
    assert "3 lines were not answered" in done.err.splitlines()[-1]


def test_a_line_can_call_its_input_as_one_s_own_table_does(
    shared_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"the {mood} fox sees {n} cups on {day},{label}" for n in ("one", "two", "six") for day in ("monday", "sunday", "tuesday")
            for mood, label in (("glad", "yes"), ("sorry", "no"))]  # fmt: skip
    (tmp_path / "moods.csv").write_text("\n".join(["review,label", *rows]), encoding="utf-8")
    own = ("--data", tmp_path / "moods.csv", "--columns", "review,label", "--split", "own", "--shots", 2, "--test-rows", 2)
    cli = commands(*shared_options, "--cache", tmp_path / "cache", *own)

    assert cli("collect", "--steps", 2, "--evaluations", 1).code == 0
    say(monkeypatch, '{"review": "the glad eel"}\n{"input": "the glad eel"}\n{"text": "the glad eel"}\n{"review": 5}\n')
    done = cli("predict", "--task", "moods", "--json")
    first, second = (json.loads(line) for line in done.out.splitlines())
    assert first == second and first["input"] == "the glad eel" and first["answer"] in ("yes", "no")
    assert done.code == 1 and "not answered: line 3: expected text in input" in done.err and "line 4: expected" in done.err


def test_neither_a_prompt_nor_a_file_has_a_dim(tuned: tuple[Path, Cli]) -> None:
    for source in ("prompt", next(tuned[0].glob("*/intrinsic-vectors/*"))):
        done = tuned[1]("predict", "--task", "mood-good", "--from", source, "--dim", 4)
        assert done.code == 1 and f"--from {source} has no --dim" in done.err


def test_a_task_without_anything_tuned_names_the_command_that_makes_it(
    shared_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "the fox")
    done = run_ipt("predict", *shared_options, "--cache", tmp_path, "--task", "mood-good")
    assert done.code == 1
    assert "no tuned prompt or vector of task 'mood-good': run 'ipt collect --task mood-good'" in done.err


HOSTILE = [
    b"\xff\xfe the fox", b'{"input": "\\ud800"}', b'{"input": ["the fox"]}', b'{"input": "the fox", "options": "yes"}', b'{"input": "the fox", "options": [1]}',
    b'{"input": "the fox", "task": 5}', b'{"input": "the fox", "task": ["mood-good"]}', b"{", b"{}", b'{"input": null}', b"{" * 100_000, b'{"input": "\xff"}',
]  # fmt: skip


def test_what_cannot_be_a_line_is_said_with_its_number_wherever_it_comes_from(
    tuned: tuple[Path, Cli], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        b"\xef\xbb\xbfthe glad fox",
        *HOSTILE,
        b"",
        b"the glad \x0b fox\r",
        b'{"input": "the fox", "options": ["yes", "yes"]}',
    ]
    (tmp_path / "lines").write_bytes(b"\n".join(lines))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines))))
    for more in (("--input", tmp_path / "lines"), ()):
        done = tuned[1]("predict", "--task", "mood-good", "--json", *more)
        assert done.code == 1 and "12 lines were not answered" in done.err
        for number in range(2, 14):
            assert f"not answered: line {number}: " in done.err
        told = [json.loads(line) for line in done.out.splitlines()]
        assert [row["input"] for row in told] == ["the glad fox", "", "the glad \x0b fox", "the fox"]
        assert told[-1]["options"] == {"yes": 1.0}


@pytest.mark.parametrize("closed", ["<&-", "| head -1", ">&-"])
def test_a_reader_or_writer_that_has_left_is_no_mistake(
    shared_options: list[object], tuned: tuple[Path, Cli], closed: str
) -> None:
    options = shlex.join(map(str, [*shared_options, "--cache", tuned[0], "--task", "mood-good"]))
    lines = "" if closed == "<&-" else "yes the glad fox | head -500 | "
    command = f"{lines}{sys.executable} -W ignore {Path(ipt.__file__)} predict {options} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_an_input_that_is_not_there_is_said(tuned: tuple[Path, Cli], tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        done = tuned[1]("predict", "--task", "mood-good", "--input", path)
        assert done.code == 2 and "Traceback" not in done.err


TEMPLATES = """
tasks:
  talk: {dataset: csv, data_files: {train: rows.csv, validation: rows.csv}, template: "the {mood} {animal} sees {count}", answer: label,
         verbalizer: {0: "no", 1: "yes"}, metric: ACC, clean: {mood: strip, label: strip}, replace: {X: glad}, splits: {tiny: seen}}
  choose: {dataset: csv, data_files: {train: rows.csv, validation: rows.csv}, template: "{mood} {options}", options: options, answer: label,
           pick: index, metric: ACC, splits: {tiny: seen}}
"""


def test_columns_of_the_template_make_the_input(
    shared_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks.yaml").write_text(TEMPLATES)
    rows = [f"  mild ,fox,one,{n % 2}" for n in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["mood,animal,count,label", *rows]))
    options = [*shared_options, "--tasks-file", tmp_path / "tasks.yaml", "--cache", tmp_path / "cache", "--task", "talk"]
    assert (done := run_ipt("collect", *options, *SHORT)).code == 0, done.err
    given = [
        {"mood": "  X ", "animal": "fox", "count": ["one", "two"], "options": []},
        {"mood": "glad", "animal": 7, "count": None, "task": "talk", "other": {"a": 1}, "options": ["six", 7]},
        {"mood": "glad", "animal": "fox"},
        {"input": "the glad fox", "options": ["one", "two"]},
        {"mood": {"a": "b"}, "animal": "fox", "count": 1},
    ]
    say(monkeypatch, "\n".join(map(json.dumps, given)))
    done = run_ipt("predict", *options, "--json")
    told = [json.loads(line) for line in done.out.splitlines()]
    assert [row["input"] for row in told[:3]] == ["the glad fox sees one two", "the glad 7 sees ", "the glad fox"]
    assert [set(row["options"]) for row in told[:2]] == [{"no", "yes"}, {"six", "7"}]
    assert set(told[2]["options"]) == {"one", "two"}
    assert (
        done.code == 1
        and "line 3: " in done.err
        and "template names 'count', which the data lacks; its columns are mood, animal" in done.err
    )


def test_options_of_a_template_are_the_object_s_own(tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text(TEMPLATES)
    tasks = load_tasks(tmp_path / "tasks.yaml")
    task, row = parse_input(tasks, "choose", json.dumps({"mood": "which", "options": ["fox", "owl"]}))
    assert (task, row) == ("choose", Example("which  (A) fox (B) owl", ("",), ("fox", "owl"), row.tail))
    with pytest.raises(IptError, match="options names 'options', which the data lacks"):
        parse_input(tasks, "choose", '{"mood": "which"}')
    with pytest.raises(IptError, match="template names 'animal'"):
        parse_input(tasks, "choose", '{"mood": "which", "task": "talk"}')


def test_a_line_keeps_its_tail_and_that_it_is_cut_is_told(
    tuned: tuple[Path, Cli], tasks_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the rows that `eval` scores: the options at their end are the last that may go."""
    tasks = load_tasks(tasks_file)
    line = json.dumps({"input": "which | fox | owl", "tail": 12})
    _, row = parse_input(tasks, "mood-good", line)
    assert (row.input, row.tail) == ("which | fox | owl", 12)
    for wrong in (99, -1, "x"):
        with pytest.raises(IptError, match="expected a tail within the input"):
            parse_input(tasks, "mood-good", json.dumps({"input": "which", "tail": wrong}))
    (path,) = tuned[0].glob("*/soft-prompts/mood-good-*")
    for most, told in ((60, 0), (8, 1)):
        say(monkeypatch, f"{line}\n{line}\n")
        done = tuned[1]("predict", "--task", "mood-good", "--from", path, "--max-length", most)
        assert done.code == 0 and done.err.count("lines that are too long are cut to 8 tokens") == told, done.err


def test_the_probabilities_of_options_add_up_to_one_though_the_data_repeat_one() -> None:
    told = _prediction("t", Example("x", ("",), ("red", "red", "blue")), Answer("red", math.nan, (1.0, 1.0, 1.0)))
    assert told.options == pytest.approx({"red": 0.5, "blue": 0.5})
    assert _prediction("t", Example("x", ("",)), Answer("red", math.nan)).options is None


def test_every_template_that_ships_renders_a_record_without_its_answer() -> None:
    """The rows of tasks.yaml, on records of the columns that their templates and options name."""
    shipped = hub_rows().values()
    assert len(shipped) == 147
    for row in shipped:
        paths = {*places(row.template), *([row.options] if isinstance(row.options, str) else row.options), row.option_labels}
        paths |= {path for new in row.replace.values() for path in places(new)}
        record: dict[str, Any] = {}
        for path in sorted(paths - {""} - ({"options"} if row.options else set())):
            put(record, path.split("."), f"<{path}>")
        if row.options == "options":
            record["options"] = ["<one>", "<two>"]
        example = row.render(record)
        assert example.answers == ("",) and (example.options or row.pick == "free"), row.where
        for path in places(row.template):
            assert path == "options" or re.sub(r"[^a-z]", "", path) in re.sub(r"[^a-z]", "", example.input), row.where


def put(record: dict[str, Any], steps: list[str], value: str) -> None:
    """Put a value where a path of tasks.yaml leads; a number in it is a place of a list."""
    step, *others = steps
    if not others:
        record[step] = value
    elif others[0].isdigit():
        record.setdefault(step, [{} if others[1:] else value for _ in range(9)])
        if others[1:]:
            put(record[step][int(others[0])], others[1:], value)
    else:
        put(record.setdefault(step, {}), others, value)
