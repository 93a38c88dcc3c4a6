"""Looking into the cache: what a file is, which files there are, which of them go, and which test rows are answered wrong."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SHORT, Cli, Result, files_in, run_ipt
from safetensors.torch import save_file
from test_cli import assert_one_error

import ipt
from intrinsic_prompt_tuning import report
from intrinsic_prompt_tuning.backbone import Backbone
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.files import read_file, write_file
from intrinsic_prompt_tuning.results import Claims
from intrinsic_prompt_tuning.shelf import cache_files, remove


@pytest.fixture(scope="module")
def made(shared_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cli]:
    """Return a cache in which all stages were done, and a way to run further commands on it."""
    cache = tmp_path_factory.mktemp("shelf")

    def cli(command: str, *arguments: object) -> Result:
        own = ["--cache", cache] if command == "cache" else [*shared_options, "--cache", cache]
        return run_ipt(command, *own, *arguments)

    for command in (
        ("collect", *SHORT),
        ("fit-subspace", "--dim", 4, "--subspace-steps", 3),
        ("tune", "--unseen", "--dim", 4, *SHORT),
        ("fit-subspace", "--dim", 9, "--subspace-steps", 3),
        ("tune", "--task", "day-then-count", "--dim", 9, *SHORT),
        *(("tune", "--task", "day-then-count", "--dim", 4, *SHORT, "--space", space) for space in ("linear", "low-rank")),
        ("eval",),
    ):
        done = cli(*command)
        assert done.code == 0, done.err
    return cache, cli


@pytest.fixture
def copied(made: tuple[Path, Cli], tmp_path: Path) -> Path:
    return shutil.copytree(made[0], tmp_path / "cache")


def one(cache: Path, pattern: str) -> Path:
    return sorted(cache.glob(pattern))[0]


def shown(cli: Cli, *arguments: object) -> dict[str, Any]:
    done = cli("show", *arguments, "--json")
    assert done.code == 0, done.err
    about: dict[str, Any] = json.loads(done.out)
    return about


# --- One file


def test_the_nearest_words_of_a_prompt_are_those_of_a_plain_loop(made: tuple[Path, Cli], t5: Backbone) -> None:
    path = one(made[0], "*/soft-prompts/count-next-*")
    about = shown(made[1], path)
    header, record, tensors = read_file(path)
    assert (about["header"], about["record"], about["tensors"]) == (header, record, {"soft_prompt": "3 x 16"})
    assert path.stem.endswith(about["name"])
    embeddings = t5.model.get_input_embeddings().weight
    for row, words in zip(tensors["soft_prompt"], about["nearest words"], strict=True):
        cosines = {
            t5.tokenizer.convert_ids_to_tokens(n): float(row @ own / row.norm() / own.norm()) for n, own in enumerate(embeddings)
        }
        best = sorted(cosines, key=lambda word: -cosines[word])[:5]
        assert list(words) == best
        assert all(words[word] == pytest.approx(cosines[word], abs=1e-3) for word in best)


def test_with_another_backbone_the_rest_is_shown_and_why_there_are_no_words(made: tuple[Path, Cli]) -> None:
    path = one(made[0], "*/soft-prompts/count-next-*")
    done = run_ipt("show", path)
    assert done.code == 0, done.err
    about = yaml.safe_load(done.out)
    assert about["header"]["task"] == "count-next"
    assert about["nearest words"].startswith(f"its backbone is {about['header']['backbone'][:8]}, but testbed is ")


def test_a_subspace_tells_its_tasks_spectrum_and_unexplained_share(made: tuple[Path, Cli]) -> None:
    path = next(p for p in made[0].glob("*/subspaces/4-*") if read_file(p)[0]["space"] == "subspace")
    about = shown(made[1], path)
    header, record, w = read_file(path)
    assert about["tasks"] == list(header["prompts"]) and len(about["tasks"]) == 5
    assert about["record"]["unexplained"] == record["unexplained"]
    slope = 1 - torch.tanh(w["hidden.bias"]).square()
    jacobian = w["out.weight"] @ (slope[:, None] * w["hidden.weight"])
    values = torch.linalg.svdvals(jacobian) / 48**0.5
    assert about["singular values"] == pytest.approx(values.tolist(), abs=1e-4)
    held = values.square().cumsum(0) / values.square().sum()
    for share, count in about["directions with so much of the squares"].items():
        part = float(share.removesuffix(" %")) / 100
        assert held[count - 1] >= part and (count == 1 or held[count - 2] < part)


def test_a_space_with_free_numbers_has_a_spectrum_too_and_they_are_tuned(made: tuple[Path, Cli], tmp_path: Path) -> None:
    path = one(made[0], "*/subspaces/9-*")
    about, (header, _, weights) = shown(made[1], path), read_file(path)
    assert len(about["singular values"]) == header["dim"] == 9 and min(about["singular values"]) > 0
    assert header["free"] == 0.5 and weights["free.weight"].shape == (48, 5)
    (vector,) = (p for p in made[0].glob("*/intrinsic-vectors/day-then-count-*") if read_file(p)[0]["dim"] == 9)
    assert read_file(vector)[2]["intrinsic_vector"][4:].abs().min() > 0.1, "N(0, 0.02) at the start"
    other = ("fit-subspace", "--dim", 9, "--subspace-steps", 3, "--free", 0)
    assert made[1](*other, "--cache", shutil.copytree(made[0], tmp_path / "cache")).code == 0
    paper = next(p for p in (tmp_path / "cache").glob("*/subspaces/9-*") if p.name != path.name)
    assert "free.weight" not in read_file(paper)[2] and "free" not in read_file(paper)[0]


def test_an_exported_prompt_has_the_words_of_the_collected_one(made: tuple[Path, Cli], tmp_path: Path) -> None:
    assert made[1]("export", "--task", "count-next", "--from", "prompt", "--out", tmp_path / "adapter").code == 0
    exported, collected = (
        shown(made[1], path)
        for path in (tmp_path / "adapter" / "adapter_model.safetensors", one(made[0], "*/soft-prompts/count-next-*"))
    )
    assert exported["nearest words"] == collected["nearest words"] and len(exported["nearest words"]) == 3


@pytest.mark.parametrize("space", ["linear", "low-rank"])
def test_spaces_without_a_hidden_layer_have_a_spectrum_too(made: tuple[Path, Cli], space: str) -> None:
    path = next(p for p in made[0].glob("*/subspaces/*") if read_file(p)[0]["space"] == space)
    about = shown(made[1], path)
    assert len(about["singular values"]) == about["header"]["dim"]
    if space == "linear":
        values = torch.linalg.svdvals(read_file(path)[2]["out.weight"]) / 48**0.5
        assert about["singular values"] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize(("kind", "field"), [("scores", "score"), ("intrinsic-vectors", "validation")])
def test_scores_and_vectors_are_shown_by_the_beginning_of_their_names(made: tuple[Path, Cli], kind: str, field: str) -> None:
    path = one(made[0], f"*/{kind}/day-then-count-*")
    for beginning in (path.stem[-16:][:12], path.name, path.stem[:-2]):
        about = shown(made[1], beginning)
        assert (about["file"], about["name"]) == (str(path), path.stem[-16:])
    assert about["record"][field] == read_file(path)[1][field]


def test_an_unfinished_score_tells_its_answers(made: tuple[Path, Cli], tmp_path: Path) -> None:
    header = read_file(next(made[0].glob("*/scores/*.safetensors")))[0]
    path = tmp_path / "count-next-0123456789abcdef.unfinished"
    for answers in (["one", "two"], []):
        write_file(path, header, {}, {"said": torch.tensor(list(json.dumps(answers).encode()))})
        assert shown(made[1], path)["unfinished"] == f"{len(answers)} answers"


def test_an_unfinished_state_tells_its_step(made: tuple[Path, Cli], tmp_path: Path) -> None:
    header = read_file(one(made[0], "*/soft-prompts/*"))[0]
    path = tmp_path / "count-next-0123456789abcdef.unfinished"
    write_file(path, header, {}, {"step": torch.tensor(4.0), "theta": torch.zeros(48)})
    about = shown(made[1], path)
    assert about["unfinished"] == "at step 4" and "nearest words" not in about


def test_few_shot_files_tell_their_task_seed_and_answers(made: tuple[Path, Cli], tmp_path: Path) -> None:
    path = one(made[0], "samples/mood-good-*/*/*_100_train.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    about = shown(made[1], path)
    assert (about["task"], about["k"], about["seed"], about["part"]) == ("mood-good", "4", "100", "train")
    assert about["file"] == str(path)
    assert about["rows"] == len(rows) and about["answers"] == Counter(row["output"] for row in rows)
    assert [row["input"] for row in about["first"]] == [row["input"] for row in rows[:5]]
    tsv = tmp_path / "anli_16_13_dev.tsv"
    tsv.write_text("a claim\tyes\nanother\tno\n", encoding="utf-8")
    assert shown(made[1], tsv)["answers"] == {"yes": 1, "no": 1}


def test_what_cannot_be_shown_is_told_in_one_sentence(made: tuple[Path, Cli], tmp_path: Path) -> None:
    good = one(made[0], "*/scores/*")
    (tmp_path / "bent.safetensors").write_bytes(good.read_bytes().replace(b"score", b"scone", 1))
    (tmp_path / "cut.unfinished").write_bytes(good.read_bytes()[:40])
    save_file({"a": torch.zeros(2)}, tmp_path / "others.safetensors")
    header = read_file(one(made[0], "*/subspaces/*"))[0]
    write_file(tmp_path / "empty.safetensors", header, {}, {})
    write_file(tmp_path / "old.safetensors", header | {"version": 1}, {}, {})
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "a_16_100_dev.jsonl").write_text("{}\n", encoding="utf-8")
    for name, part in {
        "bent.safetensors": "damaged", "cut.unfinished": "damaged", "others.safetensors": "not a file of ipt",
        "empty.safetensors": "not what its header says", "old.safetensors": "file version 1, expected 2",
        "notes.txt": "is no file of ipt", "a_16_100_dev.jsonl": "line 1: expected a JSON object", "absent.safetensors": "is no file",
        "": "is no file", "x" * 5000: "is no file", "nul\0.safetensors": "is no file",
    }.items():  # fmt: skip
        assert_one_error(made[1]("show", f"{tmp_path}/{name}"), part)
    assert_one_error(made[1]("show", "0123"), "nor the beginning of one result's name")


# --- All files


def listed(cache: Path, query: str = "*") -> set[str]:
    return {path.as_posix() for path in cache_files(cache, query)}


def test_the_cache_is_listed_by_backbone_and_kind_with_a_total(made: tuple[Path, Cli]) -> None:
    done = made[1]("cache")
    assert done.code == 0, done.err
    rows = {tuple(re.split(r"  +", line)[:2]): re.split(r"  +", line)[2:] for line in done.out.splitlines()[1:]}
    (folder,) = {name.partition("/")[0] for name in files_in(made[0])} - {"samples", "commands"}
    for kind in ("soft-prompts", "subspaces", "intrinsic-vectors", "scores"):
        assert rows[folder, kind][0] == str(len(list(made[0].glob(f"*/{kind}/*"))))
    assert rows["samples", "samples"][0] == str(len([name for name in files_in(made[0]) if name.startswith("samples")]))
    assert int(re.search(r"(?m)^all +(\d+)", done.out)[1]) == len(files_in(made[0]))  # type: ignore[index]


def test_leftovers_unfinished_states_have_kinds_and_strangers_are_not_listed(copied: Path, tmp_path: Path) -> None:
    folder = one(copied, "*/scores").parent
    name = "count-next-0123456789abcdef.safetensors"
    places = {
        folder / "scores" / f".{name}.123": "leftovers", folder / "scores" / f".{name}.124": None,
        folder / "soft-prompts" / "count-next-0123456789abcdef.unfinished": "unfinished",
        folder / ".claims": None, folder / "budgets" / "node-cpu.json": "budgets",
        folder / "scores" / "notes.txt": None, copied / "photo.jpg": None, copied / "mine" / "scores" / name: None,
    }  # fmt: skip
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    os.utime(folder / "scores" / f".{name}.123", (time.time() - 3600,) * 2)
    outside = shutil.copytree(folder / "scores", tmp_path / "outside")
    (copied / "linked-0123abcd").mkdir()
    (copied / "linked-0123abcd" / "scores").symlink_to(outside)
    (folder / "scores" / f"link-{'1' * 16}.safetensors").symlink_to(outside / name)
    found = cache_files(copied)
    for path, kind in places.items():
        assert found.get(path.relative_to(copied), (None, 0)) == (kind, 5 if kind else 0)
    assert not [path for path in found if "link" in str(path)]
    before = files_in(outside)
    remove(copied, found)
    assert files_in(outside) == before
    left = {path for path, kind in places.items() if kind is None} - {folder / ".claims"}  # nobody alive has claims
    assert {path for path in copied.rglob("*") if path.is_file() and not path.is_symlink()} == left


def test_where_a_metric_is_of_all_rows_a_reference_is_right(made: tuple[Path, Cli]) -> None:
    found = json.loads(made[1]("eval", "--wrong", "animal-class", "--json").out)
    assert found["metric"] == "Classification-F1" and found["rows"]
    assert all(not set(row["wrong"].values()) & set(row["right"]) for row in found["rows"])


def test_what_a_query_means(made: tuple[Path, Cli]) -> None:
    cache = made[0]
    (folder,) = {name.partition("/")[0] for name in files_in(cache)} - {"samples", "commands"}
    scores = {path.relative_to(cache).as_posix() for path in cache.glob("*/scores/*")}
    assert listed(cache, "scores") == listed(cache, "*/scores") == listed(cache, f"{folder}/scores/") == scores
    assert listed(cache, "*/count-next-*") == {name for name in files_in(cache) if "/count-next-" in name}
    sample = one(cache, "samples/count-next-*").relative_to(cache).as_posix()
    assert listed(cache, sample) == {name for name in files_in(cache) if name.startswith(sample)}
    for query in ("nothing", "", "samples/*_train.jsonl"):
        with pytest.raises(IptError, match="holds no file of ipt that"):
            cache_files(cache, query)
    for query in ("../x", "scores/../..", str(cache)):
        with pytest.raises(IptError, match="leads out of the cache"):
            cache_files(cache, query)


def test_removing_asks_and_refuses_where_nobody_can_be_asked(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_in(copied)

    def rm(answer: str | None, *arguments: str) -> Result:
        told = io.StringIO(answer or "")
        monkeypatch.setattr(told, "isatty", lambda: answer is not None)
        monkeypatch.setattr(sys, "stdin", told)
        return run_ipt("cache", "rm", "scores", "--cache", copied, *arguments)

    assert_one_error(rm(None), "nothing was removed.*--yes")
    assert rm("n\n").code == 0
    assert files_in(copied) == before
    done = rm("y\n")
    assert done.code == 0 and "Remove them?" in done.err
    scores = {name for name in before if "/scores/" in name}
    assert all(name in done.out for name in scores)
    assert files_in(copied).keys() == before.keys() - scores
    assert_one_error(rm(None, "--yes"), "holds no file of ipt that 'scores' means")


def test_what_a_living_process_makes_is_left_alone(copied: Path) -> None:
    claimed, *others = sorted(copied.glob("*/soft-prompts/*"))
    arguments = ["cache", "rm", "soft-prompts", "--yes", "--cache", copied]
    claims = Claims(claimed.parents[1] / ".claims")
    assert claims.take(claimed.stem[-16:])
    try:  # a process of its own, as locks are a process's
        done = subprocess.run([sys.executable, ipt.__file__, *map(str, arguments)], capture_output=True, text=True, check=False)
    finally:
        claims.give_back()
    assert done.returncode == 0 and f"removed {len(others)} of {len(others) + 1} files" in done.stderr
    assert sorted(copied.glob("*/soft-prompts/*")) == [claimed]


def test_a_sample_that_was_removed_is_drawn_again_the_same(copied: Path, shared_options: list[object]) -> None:
    before = files_in(copied)
    assert run_ipt("cache", "rm", "samples", "--yes", "--cache", copied).code == 0
    done = run_ipt("collect", *shared_options, "--cache", copied, *SHORT)
    assert done.code == 0, done.err
    drawn = {name: content for name, content in before.items() if name.startswith("samples") and "_100_" in name}
    assert drawn.items() <= files_in(copied).items()


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_cache_is_one_sentence(tmp_path: Path, exists: bool) -> None:
    cache = tmp_path if exists else tmp_path / "absent"
    assert_one_error(run_ipt("cache", "--cache", cache), "holds no file of ipt")


def test_a_large_cache_is_listed_quickly_without_anything_heavy(tmp_path: Path) -> None:
    folder = tmp_path / "testbed-0123abcd" / "scores"
    folder.mkdir(parents=True)
    for n in range(1000):
        (folder / f"task-{n:016x}.safetensors").touch()
    code = "import sys, ipt\ntry: ipt.main()\nfinally: print({'torch', 'transformers', 'datasets', 'safetensors'} & set(sys.modules))"
    begin = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    done = subprocess.run([sys.executable, "-c", code, "cache", "--cache", tmp_path], check=True, capture_output=True, text=True)
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - begin < 3  # seconds of a core; the promise is one
    assert "1000" in done.stdout and done.stdout.splitlines()[-1] == "set()"


# --- Test rows


@pytest.mark.parametrize("task", ["even-or-good", "day-then-count"])
def test_the_wrong_rows_of_every_prompt_add_up_to_its_score(made: tuple[Path, Cli], task: str) -> None:
    done = made[1]("eval", "--wrong", task, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    report = json.loads(made[1]("eval", "--per-task", "--json").out)
    shown = [s for s in report["scores"] if s["task"] == task and s["quantity"] != "one answer for all"]
    assert sorted((p["quantity"], p["value"]) for p in found["prompts"].values()) == sorted(
        (s["quantity"], s["value"]) for s in shown
    )
    assert len(shown) >= 6
    for number, prompt in found["prompts"].items():
        wrong = [row for row in found["rows"] if number in row["wrong"]]
        assert all(row["wrong"][number] not in row["right"] for row in wrong)
        assert 1 - len(wrong) / prompt["n"] == pytest.approx(prompt["value"])


def test_wrong_rows_are_the_same_for_people_and_machines(made: tuple[Path, Cli]) -> None:
    done = made[1]("eval", "--wrong", "day-then-count")
    found = yaml.safe_load(done.out)
    whole = json.loads(made[1]("eval", "--wrong", "day-then-count", "--json").out)
    assert [row["row"] for row in found["rows"]] == [row["row"] for row in whole["rows"]]


def test_a_task_that_is_not_there_is_told_before_any_work(made: tuple[Path, Cli], tmp_path: Path) -> None:
    assert_one_error(made[1]("eval", "--wrong", "day-then-coun"), "no task 'day-then-coun'; did you mean 'day-then-count'")
    mine = tmp_path / "mine.yaml"
    mine.write_text("{seen: [mood-good], unseen: [count-next]}", encoding="utf-8")
    assert_one_error(made[1]("eval", "--wrong", "animal-class", "--split", mine), "'animal-class' is not in the split")
    assert_one_error(made[1]("eval", "--wrong", "count-next", "--cache", tmp_path / "new"), "holds no soft prompt of count-next")


def test_the_words_of_rm_list_with_ls_what_would_go(made: tuple[Path, Cli], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # nobody can be asked, so that nothing goes
    for query in ("scores", "*/count-next-*"):
        totals = [made[1]("cache", do, query).out.splitlines()[-1].split() for do in ("ls", "rm")]
        assert totals[0] == totals[1] and totals[0][:2] == ["all", str(len(cache_files(made[0], query)))]


def test_the_state_of_what_a_living_process_makes_is_left_alone(copied: Path) -> None:
    folder, name = one(copied, "*/soft-prompts").parent, "0123456789abcdef"
    state = folder / "soft-prompts" / f"count-next-{name}.unfinished"
    state.write_bytes(b"half way")
    claims, command = Claims(folder / ".claims"), ["cache", "rm", "unfinished", "--yes", "--cache", str(copied)]
    assert claims.take(name)
    try:  # a process of its own, as locks are a process's
        done = subprocess.run([sys.executable, ipt.__file__, *command], capture_output=True, text=True, check=False)
    finally:
        claims.give_back()
    assert done.returncode == 0 and "removed 0 of 1 files" in done.stderr and state.exists()


def test_an_answer_is_right_if_the_metric_gives_it_full_marks(made: tuple[Path, Cli], monkeypatch: pytest.MonkeyPatch) -> None:
    """QA-F1: an article counts for nothing, and half of the words right is not right."""

    def said(x: Any, scores: Any) -> dict[str, list[str]]:
        rows = x.sample("thing-plural", 100).test
        return {s.name: [f"The {e.answers[0]}!" if n % 2 else f"{e.answers[0]} and" for n, e in enumerate(rows)] for s in scores}

    monkeypatch.setattr(report, "answers_of", said)
    found = json.loads(made[1]("eval", "--wrong", "thing-plural", "--json").out)
    assert found["metric"] == "QA-F1" and [row["row"] for row in found["rows"]] == [1, 3, 5, 7, 9]
    assert all(row["wrong"].keys() == found["prompts"].keys() for row in found["rows"])


def test_long_wrong_rows_for_people_are_cut_to_the_terminal(made: tuple[Path, Cli], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the small world fit into 120 columns: here there are 40."""
    monkeypatch.setattr(ipt.stderr, "width", 40)
    told = yaml.safe_load(made[1]("eval", "--wrong", "day-then-count").out)["rows"]
    whole = json.loads(made[1]("eval", "--wrong", "day-then-count", "--json").out)["rows"]
    assert told and [row["input"] for row in told] == [row["input"][:29] for row in whole]
    assert all(len(row["input"]) > 29 for row in whole)


def test_the_beginning_of_several_names_is_none_of_one(made: tuple[Path, Cli]) -> None:
    assert len([name for name in files_in(made[0]) if "/count-next-" in name]) > 1
    assert_one_error(made[1]("show", "count-next-"), "nor the beginning of one result's name")


def test_a_vector_of_the_dim_that_is_named_is_exported_and_answers(made: tuple[Path, Cli], tmp_path: Path) -> None:
    line = json.dumps({"input": "the glad fox sees one cups on monday", "options": ["monday one", "tuesday two"]})
    (tmp_path / "line").write_text(line, encoding="utf-8")
    shares = set()
    for dim in (4, 9):
        named = ("--task", "day-then-count", "--from", "vector", "--dim", dim)
        assert made[1]("export", *named, "--out", tmp_path / f"{dim}").code == 0
        assert read_file(tmp_path / f"{dim}" / "adapter_model.safetensors")[0]["dim"] == dim
        by_name, by_file = (
            json.loads(made[1]("predict", *source, "--input", tmp_path / "line", "--json").out)
            for source in (named, (*named[:3], tmp_path / f"{dim}"))
        )
        assert by_name == by_file
        shares.add(by_name["options"]["monday one"])
    assert len(shares) == 2
