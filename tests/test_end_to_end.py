"""The commands as a user types them, on the tiny T5 and the small world."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import TASKS_FILE, Result, files_in, run_ipt

import ipt

Cli = Callable[..., Result]
DIMS = ("--dim", 6, "--dim", 4)
SHORT = ("--steps", 6, "--evaluations", 3, "--batch-size", 3)
COMMANDS = ("collect", "fit-subspace", "tune", "eval", "run", "tasks")
PACE = 3.0
"""Seconds that a help text may take here, six times the promise: other work may fill the machine."""


def assert_one_error(result: Result, *parts: str) -> None:
    """Check that a command ended in one sentence on stderr that holds these words."""
    assert result.code == 1, result
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert result.err.splitlines()[-1] == errors[0]
    assert "Traceback" not in result.err
    for part in parts:
        assert re.search(part, errors[0]), f"{part!r} not in {errors[0]!r}"


def assert_done(result: Result) -> Result:
    assert result.code == 0, result.err
    return result


# --- The four commands one after the other -------------------------------------------------------


@pytest.fixture(scope="module")
def finished(shared_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cli]:
    """Return a cache in which all stages were done, and a way to run further commands on it."""
    cache = tmp_path_factory.mktemp("finished")

    def cli(command: str, *arguments: object) -> Result:
        return run_ipt(command, *shared_options, "--cache", cache, *arguments)

    assert_done(cli("collect", *SHORT, "--learning-rate", 0.1, "--learning-rate", 0.3))
    assert_done(cli("fit-subspace", *DIMS, "--subspace-steps", 5))
    assert_done(cli("tune", *SHORT, *DIMS, "--seen", "--data-seed", 21))
    assert_done(cli("tune", *SHORT, "--dim", 6, "--unseen"))
    assert_done(cli("tune", *SHORT, "--dim", 6, "--unseen", "--start", "seen"))
    assert_done(cli("tune", *SHORT, "--dim", 6, "--unseen", "--space", "random"))
    assert_done(cli("tune", *SHORT, "--dim", 4, "--task", "day-then-count", "--space", "linear"))
    assert_done(cli("eval"))
    return cache, cli


def test_every_stage_leaves_its_files_and_nothing_else(finished: tuple[Path, Cli]) -> None:
    (folder,) = finished[0].iterdir()
    counts = {kind.name: len(list(kind.iterdir())) for kind in folder.iterdir()}
    scores = counts.pop("scores")
    # 7 tasks at 2 learning rates; 5 tasks at 2 dims, then 2 unseen ones three times, then one
    assert counts == {"soft-prompts": 14, "subspaces": 2, "intrinsic-vectors": 5 * 2 + 2 * 3 + 1}
    assert scores == 7 + 7 + 2 * 7 + 17  # prompts, no prompt, reconstructions, vectors


def test_the_files_hold_what_they_say(finished: tuple[Path, Cli]) -> None:
    sizes = {"soft-prompts": {"soft_prompt": (3, 16)}, "intrinsic-vectors": {"intrinsic_vector": None}}
    (folder,) = finished[0].iterdir()
    for kind, expected in sizes.items():
        for path in (folder / kind).iterdir():
            header, record = ipt.read_metadata(path)
            tensors = safetensors.torch.load_file(path)
            assert {name: shape or (header["dim"],) for name, shape in expected.items()} == {
                name: tuple(tensor.shape) for name, tensor in tensors.items()
            }
            assert path.name.startswith(f"{header['task']}-")
            assert record["steps"] == 6 and 0 < record["best_step"] <= 6
            assert -1 <= record["validation"] <= 1


def test_prompt_tuning_lowers_the_training_loss(cli: Cli, tmp_path: Path) -> None:
    assert_done(cli("collect", "--task", "count-next", "--task", "mood-good", "--steps", 60, "--learning-rate", 0.3))
    records = [ipt.read_metadata(path)[1] for path in (tmp_path / "cache").glob("*/soft-prompts/*")]
    assert len(records) == 2
    assert all(record["last_loss"] < record["first_loss"] for record in records)


KEYS = {
    "quantity", "space", "start", "dim", "data_seed", "n_tasks", "n_excluded", "e_rel", "e_rel_low", "e_rel_high", "mean_score",
    "mean_prompt_tuning", "ratio_of_means",
}  # fmt: skip


def test_eval_prints_one_json_object_with_exactly_the_promised_keys(finished: tuple[Path, Cli], t5_folder: Path) -> None:
    report = json.loads(assert_done(finished[1]("eval", "--json")).out)
    assert report.keys() == {"backbone", "split", "prompt_tuning", "rows"}
    assert (report["backbone"], report["split"]) == (str(t5_folder), "tiny")
    assert {place: row["n_tasks"] for place, row in report["prompt_tuning"].items()} == {"seen": 5, "unseen": 2}
    assert all(row.keys() == KEYS for row in report["rows"])


def test_eval_has_a_row_for_all_that_the_cache_holds(finished: tuple[Path, Cli]) -> None:
    rows = json.loads(assert_done(finished[1]("eval", "--json")).out)["rows"]
    found = [(r["quantity"], r["space"], r["start"], r["dim"], r["data_seed"]) for r in rows]
    assert sorted(map(str, found)) == sorted(map(str, [
        *(("T_train(MSF)", "subspace", None, dim, 100) for dim in (6, 4)),
        *(("T_test(MSF)", "subspace", None, dim, 100) for dim in (6, 4)),
        *(("T_train_diff(IST)", "subspace", "random", dim, 21) for dim in (6, 4)),
        ("T_test(IST)", "subspace", "random", 6, 100),
        ("T_test(IST)", "subspace", "seen", 6, 100),
        ("T_test(IST)", "random", "random", 6, 100),
        ("T_test(IST)", "linear", "random", 4, 100),
    ]))  # fmt: skip
    assert {(r["n_tasks"] + r["n_excluded"]) for r in rows if "train" in r["quantity"]} == {5}


def test_the_scores_of_eval_are_those_of_a_plain_loop_over_the_files(
    finished: tuple[Path, Cli], t5: ipt.Backbone, tasks: dict[str, ipt.Task]
) -> None:
    """Soft prompts are read without ipt, the best of the grid is chosen, options and words are answered row by row."""
    report = json.loads(assert_done(finished[1]("eval", "--json", "--per-task")).out)
    told = {s["task"]: s["value"] for s in report["scores"] if s["quantity"] == "prompt tuning"}
    best: dict[str, tuple[tuple[float, float], torch.Tensor]] = {}
    for path in finished[0].glob("*/soft-prompts/*"):
        header, record = ipt.read_metadata(path)
        rank = (record["validation"], -record["validation_loss"])
        if header["task"] not in best or rank > best[header["task"]][0]:
            best[header["task"]] = rank, safetensors.torch.load_file(path)["soft_prompt"]
    assert told.keys() == best.keys() == tasks.keys()
    for name in ("mood-good", "animal-class", "mood-opposite-choice", "even-or-good"):
        rows, guesses = tasks[name].source.sample(100, shots=4, test_rows=10).test, []
        for row in rows:
            ids = torch.tensor(t5.tokenizer(row.input).input_ids)
            inputs = torch.cat([best[name][1], t5.model.get_input_embeddings()(ids)])[None]
            with torch.no_grad():
                losses = [
                    float(t5.model(inputs_embeds=inputs, labels=torch.tensor([t5.tokenizer(option).input_ids])).loss)
                    for option in row.options
                ]  # all options are one word, so the mean over tokens ranks like the sum
            guesses.append(row.options[losses.index(min(losses))])
        assert told[name] == pytest.approx(ipt.METRICS[tasks[name].metric](guesses, [row.answers for row in rows]))


def test_the_table_for_people_shows_the_figures_of_the_json(finished: tuple[Path, Cli]) -> None:
    text = assert_done(finished[1]("eval", "--per-task")).out
    report = json.loads(assert_done(finished[1]("eval", "--json")).out)
    for row in report["rows"]:
        begin = [row["quantity"], str(row["dim"]), row["space"], row["start"] or "-"]
        (line, *_) = [line for line in text.splitlines() if line.split()[:4] == begin]
        assert f"{row['mean_score']:.3f}" in line
        assert ("-" if row["e_rel"] is None else f"{row['e_rel']:.3f}") in line
    for task in ("mood-good", "day-then-count"):
        assert re.search(rf"^{task} +prompt tuning ", text, re.MULTILINE)


def test_the_seen_tasks_are_also_told_without_those_the_backbone_was_trained_on(finished: tuple[Path, Cli]) -> None:
    """One of the five seen tasks is marked so."""
    text = assert_done(finished[1]("eval")).out
    _, mark, rest = text.partition("seen tasks without the 1 whose very question the backbone was trained on")
    lines = [line.split() for line in rest.splitlines() if line.startswith("T_")]
    assert mark and lines
    assert {line[0].partition("(")[0] for line in lines} == {"T_train", "T_train_diff"}
    assert {int(line[5]) + int(line[6]) for line in lines} == {4}


def test_doing_it_all_again_does_nothing(finished: tuple[Path, Cli]) -> None:
    cache, cli = finished
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    table = assert_done(cli("eval")).out
    assert_done(cli("collect", *SHORT, "--learning-rate", 0.3, "--learning-rate", 0.1))
    assert_done(cli("fit-subspace", *DIMS, "--subspace-steps", 5))
    assert_done(cli("tune", *SHORT, *DIMS, "--seen", "--data-seed", 21))
    assert assert_done(cli("eval")).out == table
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_dry_run_tells_the_plan_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    for command in ("collect", "run"):
        result = assert_done(cli(command, "--dry-run", *SHORT, *(DIMS if command == "run" else ())))
        assert re.search(r"plan: 7 .*[1-9]\d* rows, [\d.]+ million tokens; [\d.]+ minutes .* MB of files", result.err)
    assert re.search(r"plan: subspaces of dim 6 and 4 .* minutes", result.err)
    assert re.search(r"plan: 28 intrinsic vectors .* minutes", result.err)
    assert re.search(r"plan: 56 prompts to score.* minutes", result.err)
    assert re.search(r"plan: all of it, if no job ends early; [\d.]+ minutes", result.err)
    assert not (tmp_path / "cache").exists()


def test_only_the_named_tasks_are_collected(cli: Cli, tmp_path: Path) -> None:
    assert_done(cli("collect", *SHORT, "--task", "count-next", "--task", "even-or-good"))
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "cache").glob("*/soft-prompts/*"))
    assert names == ["count-next", "even-or-good"]


def test_asking_for_the_unseen_tasks_of_a_split_without_any_is_refused(
    cli: Cli, tmp_path: Path, shared_options: list[object]
) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(TASKS_FILE.replace("{tiny: unseen}", "{other: unseen}"), encoding="utf-8")
    assert_one_error(cli("collect", *SHORT, "--tasks-file", file, "--unseen"), "unseen", "tiny")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# --- All in one ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(shared_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object], Result]:
    cache = tmp_path_factory.mktemp("run")
    arguments = ["run", *shared_options, *SHORT, *DIMS, "--subspace-steps", 5, "--slots", 3, "--cache", cache]
    return cache, arguments, assert_done(run_ipt(*arguments))


def test_run_announces_its_plan_and_prints_the_table(whole_run: tuple[Path, list[object], Result]) -> None:
    _, _, result = whole_run
    assert re.search(r"^plan: 7 .*minutes", result.err, re.MULTILINE)
    for quantity in ("T_train(MSF)", "T_test(MSF)", "T_train_diff(IST)", "T_test(IST)"):
        assert quantity in result.out
    assert re.search(r"^T_test\(IST\) +6 +random ", result.out, re.MULTILINE)


def test_a_dry_run_tells_what_a_stopped_run_has_left(whole_run: tuple[Path, list[object], Result], tmp_path: Path) -> None:
    cache, arguments, _ = whole_run
    shutil.copytree(cache, tmp_path / "cache")

    def plans() -> list[str]:
        done = assert_done(run_ipt(*arguments[:-1], tmp_path / "cache", "--dry-run"))
        return [line for line in done.err.splitlines() if line.startswith("plan: ")]

    nothing = "plan: 0 jobs to tune, 7 done before"
    assert plans() == [nothing]
    for score in list(tmp_path.glob("cache/*/scores/*"))[:5]:
        score.unlink()
    first, scores = plans()
    assert first == nothing
    assert scores.startswith("plan: 5 prompts to score, 51 scored before")
    for vector in list(tmp_path.glob("cache/*/intrinsic-vectors/*"))[:3]:
        vector.unlink()
    first, *others = plans()
    assert first == nothing
    assert sum(int(re.search(r"plan: (\d) jobs to tune", line)[1]) for line in others) == 3
    next(tmp_path.glob("cache/*/subspaces/4-*")).unlink()
    first, subspace = plans()
    assert first == nothing
    assert subspace.startswith("plan: subspaces of dim 4 from 5 prompts")


def test_running_again_does_nothing_and_prints_the_same_table(whole_run: tuple[Path, list[object], Result]) -> None:
    cache, arguments, first = whole_run
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    second = assert_done(run_ipt(*arguments))
    assert second.out == first.out
    assert "done in" not in second.err
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_run_gives_the_files_of_the_four_commands(whole_run: tuple[Path, list[object], Result], cli: Cli, tmp_path: Path) -> None:
    short = [*SHORT, "--slots", 3]
    assert_done(cli("collect", *short))
    assert_done(cli("fit-subspace", *DIMS, "--subspace-steps", 5))
    commands: list[Any] = [(*DIMS, "--start", "random"), ("--dim", 6, "--start", "seen"), ("--dim", 6, "--space", "random")]
    for more in commands:
        assert_done(cli("tune", *short, "--seen", "--data-seed", 21, *more))
        assert_done(cli("tune", *short, "--unseen", *more))
    table = assert_done(cli("eval")).out
    assert table == whole_run[2].out
    own, theirs = files_in(tmp_path / "cache"), files_in(whole_run[0])
    assert own.keys() == theirs.keys()
    assert_same_tensors(own, theirs)


def test_what_other_settings_left_in_the_cache_changes_no_result(
    whole_run: tuple[Path, list[object], Result], shared_options: list[object], tmp_path: Path
) -> None:
    """A quick run, then the real one: the table must be that of the real one alone."""
    cache, arguments, expected = whole_run
    again = [tmp_path if argument == cache else argument for argument in arguments]
    assert_done(run_ipt(*again, "--steps", 4))
    assert assert_done(run_ipt(*again)).out == expected.out


def test_a_quick_run_takes_some_of_the_tasks(cli: Cli, tmp_path: Path) -> None:
    result = assert_done(cli("run", "--quick", *SHORT, "--dim", 4, "--subspace-steps", 5))
    prompts = list((tmp_path / "cache").glob("*/soft-prompts/*"))
    assert 2 <= len(prompts) < 7
    assert "T_test(IST)" in result.out


# --- Interruptions -------------------------------------------------------------------------------


def assert_same_tensors(own: dict[str, bytes], theirs: dict[str, bytes]) -> None:
    for name in own:
        if name.endswith(".safetensors"):
            a, b = safetensors.torch.load(own[name]), safetensors.torch.load(theirs[name])
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-4)


def raise_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGINT)
        return function(*arguments, **named)

    return counted


@pytest.fixture(scope="module")
def uninterrupted(shared_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    cache = tmp_path_factory.mktemp("uninterrupted")
    assert_done(run_ipt("collect", *shared_options, *SHORT, "--slots", 3, "--cache", cache))
    return files_in(cache)


@pytest.mark.parametrize("call", [7, 12, 17])
def test_ctrl_c_in_the_middle_of_a_step_loses_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes], call: int
) -> None:
    """Steps 1 to 4 are the plan's; the next six are those of the first three jobs."""
    monkeypatch.setattr(torch.autograd, "grad", raise_at(call, torch.autograd.grad))
    assert cli("collect", *SHORT, "--slots", 3).code != 0
    monkeypatch.undo()
    monkeypatch.setenv("IPT_CACHE", str(tmp_path / "cache"))
    left = files_in(tmp_path / "cache")
    under_way = call != 17  # the last job had not taken a step
    assert any("unfinished" in name for name in left) == under_way
    assert len(left) - under_way == {7: 0, 12: 3, 17: 6}[call]
    assert_done(cli("collect", *SHORT, "--slots", 3))
    assert files_in(tmp_path / "cache") == uninterrupted


@pytest.mark.parametrize("call", range(1, 10))
def test_ctrl_c_while_validation_rows_are_scored_loses_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes], call: int
) -> None:
    """Three jobs score three times: the third time ends them, and what comes between a step and its score must be done again."""
    for name in ("ACC", "Classification-F1", "EM", "QA-F1"):
        monkeypatch.setitem(ipt.METRICS, name, ipt.METRICS[name])
    counted = raise_at(call, lambda score: score)
    for name, metric in list(ipt.METRICS.items()):
        monkeypatch.setitem(ipt.METRICS, name, lambda p, r, metric=metric: counted(metric(p, r)))
    assert cli("collect", *SHORT, "--slots", 3).code != 0
    monkeypatch.undo()
    monkeypatch.setenv("IPT_CACHE", str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*/soft-prompts/*"))
    assert_done(cli("collect", *SHORT, "--slots", 3))
    for path in (tmp_path / "cache").glob("*/soft-prompts/*"):
        assert ipt.read_metadata(path)[1]["steps"] == 6, "a job goes on beyond its last step"
    assert sorted(map(len, files_in(tmp_path / "cache").values())) == sorted(map(len, uninterrupted.values()))
    whole = {safetensors.torch.load(content)["soft_prompt"].numpy().tobytes() for content in uninterrupted.values()}
    mine = {safetensors.torch.load(content)["soft_prompt"].numpy().tobytes() for content in files_in(tmp_path / "cache").values()}
    assert mine == whole


@pytest.mark.parametrize("call", range(1, 8))
def test_ctrl_c_while_a_file_is_written_loses_no_other_file_and_leaves_no_half_of_one(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes], call: int
) -> None:
    monkeypatch.setattr(os, "fsync", raise_at(call, os.fsync))
    assert cli("collect", *SHORT, "--slots", 3).code != 0
    monkeypatch.undo()
    monkeypatch.setenv("IPT_CACHE", str(tmp_path / "cache"))
    prompts = list((tmp_path / "cache").glob("*/soft-prompts/*.safetensors"))
    assert len(prompts) == call - 1
    for path in prompts:
        ipt.read_metadata(path)
    assert_done(cli("collect", *SHORT, "--slots", 3))
    left = files_in(tmp_path / "cache")
    assert left.keys() == uninterrupted.keys()
    assert_same_tensors(left, uninterrupted)


def interrupted_collection(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Interrupt a collection in a step, and return the checkpoint that it leaves."""
    monkeypatch.setattr(torch.autograd, "grad", raise_at(9, torch.autograd.grad))
    assert cli("collect", *SHORT, "--slots", 3).code != 0
    monkeypatch.undo()
    monkeypatch.setenv("IPT_CACHE", str(tmp_path / "cache"))
    (checkpoint,) = (tmp_path / "cache").glob("*/unfinished/*")
    return checkpoint


def test_another_command_between_interruption_and_resumption_loses_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes]
) -> None:
    checkpoint = interrupted_collection(cli, tmp_path, monkeypatch)
    states = checkpoint.read_bytes()
    assert_done(cli("collect", *SHORT, "--slots", 3, "--task", "even-or-good", "--data-seed", 13))
    assert checkpoint.exists() and checkpoint.read_bytes() == states


def test_a_damaged_checkpoint_is_named_and_nothing_else_is_touched(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = interrupted_collection(cli, tmp_path, monkeypatch)
    checkpoint.write_bytes(b"half")
    before = files_in(tmp_path / "cache")
    assert_one_error(cli("collect", *SHORT, "--slots", 3), r"safetensors is not a file of ipt, or is damaged")
    assert files_in(tmp_path / "cache") == before


# --- Tasks ---------------------------------------------------------------------------------------


def test_tasks_lists_every_task_with_kind_metric_place_and_a_short_source(cli: Cli) -> None:
    lines = assert_done(cli("tasks")).out.splitlines()
    assert lines[0].split() == ["task", "kind", "metric", "place", "source"]
    rows = {line.split()[0]: line.split()[1:4] for line in lines[1:]}
    assert len(rows) == 7
    assert rows["animal-class"] == ["classification", "Classification-F1", "seen"]
    assert rows["day-then-count"] == ["transformation", "EM", "unseen"]
    assert max(map(len, lines)) < 200
    assert re.search(r"day-then-count .*day next then count next", "\n".join(lines))


def test_tasks_shows_the_rows_of_a_task(cli: Cli) -> None:
    text = assert_done(cli("tasks", "animal-class", "--show")).out
    assert re.search(r"train: 12 rows, 0 truncated", text)
    assert re.search(r"the \w+ (fox|cow) sees .* -> .*beast", text)


# --- Help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_says_what_the_command_does_and_shows_an_example_that_parses(cli: Cli, command: str) -> None:
    text = run_ipt(command, "--help").out
    (example,) = re.findall(r"Example: ipt (.+)", text)
    assert example.split()[0] == command
    for option in re.findall(r"--[\w-]+", example):
        assert option in text.replace(example, "")
    assert "--backbone" in text and "--cache" in text
    assert len(re.findall(r"--[\w-]+", text)) > 10


def test_the_help_tells_the_defaults_on_the_testbed_and_elsewhere() -> None:
    help_of = {command: re.sub(r"[\s│]+", " ", run_ipt(command, "--help").out) for command in ("collect", "fit-subspace", "run")}
    for name in ("prompt_length", "test_rows", "steps", "batch_size", "evaluations"):
        here, elsewhere = ipt.PRESETS[name]
        assert f"default: ({here} on the testbed, else {elsewhere})" in help_of["collect"], name
    assert "default: ($IPT_CACHE or the user's)" in help_of["collect"]
    assert "default: (250)" in help_of["fit-subspace"] and "default: (250 and 10)" in help_of["run"]


def test_the_help_lists_all_commands() -> None:
    text = run_ipt("--help").out
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", text)
    assert run_ipt("--help").code == 0


@pytest.mark.parametrize("arguments", [(), ("run",)])
def test_help_answers_quickly_because_nothing_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    program = "import sys, ipt\ntry: ipt.main()\nfinally: print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(Path(ipt.__file__).parent)}
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        command = [sys.executable, "-c", program, *arguments, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=60)
        seconds.append(time.perf_counter() - begin)
        assert done.stdout.splitlines()[-1] == "[]"
    assert min(seconds) < PACE


# --- Bad input -----------------------------------------------------------------------------------


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_an_unknown_task_is_named_with_the_nearest_names(cli: Cli, cache_folder: Path) -> None:
    for command in ("collect", "tune", "tasks"):
        argument = ("mood-god",) if command == "tasks" else ("--task", "mood-god")
        assert_one_error(cli(command, *argument), "'mood-god'", "did you mean 'mood-good'")
    assert not cache_folder.exists()


def test_an_unknown_split_is_named_with_the_nearest_names(cli: Cli, cache_folder: Path) -> None:
    for command in ("collect", "fit-subspace", "eval", "run", "tasks"):
        assert_one_error(cli(command, "--split", "tinny"), "'tinny'; did you mean 'tiny'")
    assert not cache_folder.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (None, None, r"there is no file .*own\.yaml.*--tasks-file"),
        ("tasks:", "tasks: ]", r"own\.yaml is not readable as YAML.*line"),
        ("  animal-class:", "  mood-good:", r"own\.yaml: 'mood-good' stands twice.*line \d+"),
        ("question: mood good", "question: no", r"own\.yaml: task mood-good: 'question' is False"),
        ("  animal-class:", "  no:", r"own\.yaml: False cannot be a task's name.*quote"),
    ],
)
def test_a_missing_or_broken_tasks_file_is_refused(
    cli: Cli, tmp_path: Path, cache_folder: Path, old: str | None, new: str, message: str
) -> None:
    file = tmp_path / "own.yaml"
    if old:
        file.write_text(TASKS_FILE.replace(old, new, 1), encoding="utf-8")
    assert_one_error(cli("collect", "--tasks-file", file), message)
    assert not cache_folder.exists()


def test_a_backbone_that_is_not_there_is_refused(cli: Cli, cache_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "nowhere", tmp_path / "empty", "nobody/nothing-of-this-name", "not a name at all"):
        assert_one_error(cli("collect", "--backbone", name), "cannot load the backbone", str(name), "Expected a Hub id")
    assert not cache_folder.exists()


def test_a_prompt_too_long_for_the_backbone_is_refused(cli: Cli, cache_folder: Path, bart_folder: Path) -> None:
    result = cli("collect", "--backbone", bart_folder, "--prompt-length", 29, *SHORT)
    assert_one_error(result, "29 tokens leaves no room", "--prompt-length")
    assert not cache_folder.exists()


def test_too_few_rows_are_named_with_the_task_and_what_there_is(cli: Cli, cache_folder: Path) -> None:
    result = cli("collect", "--task", "mood-good", "--shots", 800)
    assert_one_error(result, "'mood good'", "too few rows")
    assert not list(cache_folder.rglob("*.safetensors"))


@pytest.mark.parametrize("command", ["fit-subspace", "tune"])
def test_a_stage_before_its_turn_says_which_command_comes_first(cli: Cli, cache_folder: Path, command: str) -> None:
    assert_one_error(cli(command, "--dim", 4), "no soft prompt", "run 'ipt collect'")
    assert not cache_folder.exists()


def test_eval_of_an_empty_cache_says_which_command_comes_first(cli: Cli, cache_folder: Path) -> None:
    assert_one_error(cli("eval"), "no soft prompt", "run 'ipt collect'")
    assert not cache_folder.exists()


def test_tuning_before_the_subspace_is_found_says_so(finished: tuple[Path, Cli]) -> None:
    before = files_in(finished[0])
    assert_one_error(finished[1]("tune", "--dim", 5, "--unseen"), "0 subspaces of dim 5", "run 'ipt fit-subspace --dim 5'")
    assert files_in(finished[0]) == before


def test_a_missing_prompt_of_a_seen_task_is_named_and_never_filled_in(cli: Cli, cache_folder: Path) -> None:
    assert_done(cli("collect", *SHORT, "--task", "mood-good", "--task", "count-next"))
    assert_one_error(cli("fit-subspace", "--dim", 2), "3 seen tasks", "animal-class")
    assert not list(cache_folder.glob("*/subspaces/*"))


@pytest.mark.parametrize("arguments", [("fit-subspace",), ("tune", "--space", "random"), ("tune", "--space", "linear")])
def test_a_dim_larger_than_the_prompt_is_refused(finished: tuple[Path, Cli], arguments: tuple[str, ...]) -> None:
    before = files_in(finished[0])
    assert_one_error(finished[1](*arguments, "--dim", 49), "49", "smaller --dim")
    assert files_in(finished[0]) == before


def test_run_refuses_a_dim_larger_than_the_prompt_before_it_tunes_anything(cli: Cli, cache_folder: Path) -> None:
    assert_one_error(cli("run", *SHORT, "--dim", 49), "--dim 49")
    assert not list(cache_folder.rglob("*.safetensors"))


def test_both_losses_off_is_refused(finished: tuple[Path, Cli]) -> None:
    result = finished[1]("fit-subspace", "--dim", 5, "--no-lm-loss", "--no-reconstruction-loss")
    assert_one_error(result, "both losses are switched off")


def test_a_loss_that_is_not_finite_names_task_step_and_learning_rate(cli: Cli, cache_folder: Path) -> None:
    result = cli("collect", *SHORT, "--task", "count-next", "--learning-rate", "1e39")
    assert_one_error(result, r"count-next .*learning rate 1e\+39", r"by step \d")
    assert not list(cache_folder.rglob("*.safetensors"))


def test_a_file_made_with_another_backbone_is_refused_and_stays(
    cli: Cli, cache_folder: Path, bart_folder: Path, t5_folder: Path
) -> None:
    assert_done(cli("collect", *SHORT, "--task", "count-next"))
    assert_done(cli("collect", *SHORT, "--task", "count-next", "--backbone", bart_folder))
    one, two = sorted(cache_folder.glob("*/soft-prompts/*"))
    two.with_name("foreign-0123456789abcdef.safetensors").write_bytes(one.read_bytes())
    (cache_folder / one.parts[-3] / "soft-prompts" / "count-next-0123456789abcdef.safetensors").write_bytes(two.read_bytes())
    before = files_in(cache_folder)
    backbone = {t5_folder.name: t5_folder, bart_folder.name: bart_folder}[one.parts[-3].rpartition("-")[0]]
    assert_one_error(cli("eval", "--backbone", backbone), "count-next-0123456789abcdef", "another backbone")
    assert {name: content for name, content in files_in(cache_folder).items() if name in before} == before


def test_a_damaged_file_is_named_with_what_to_do(cli: Cli, cache_folder: Path) -> None:
    assert_done(cli("collect", *SHORT, "--task", "count-next"))
    (path,) = cache_folder.glob("*/soft-prompts/*")
    path.write_bytes(path.read_bytes()[:-5])
    assert_one_error(cli("eval"), path.name, "damaged", "remove it")


def test_a_metric_that_the_tasks_file_no_longer_names_gives_no_score(cli: Cli, tmp_path: Path) -> None:
    """A score is of a metric: after the metric of a task was changed, the old figure must not stand under the new name."""
    file = tmp_path / "own.yaml"
    file.write_text(TASKS_FILE, encoding="utf-8")
    options = ("--tasks-file", file, "--test-rows", 40)
    assert_done(cli("collect", *options, *SHORT, "--task", "animal-class"))
    first = json.loads(assert_done(cli("eval", *options, "--json", "--per-task")).out)["scores"]
    file.write_text(TASKS_FILE.replace("metric: Classification-F1", "metric: ACC"), encoding="utf-8")
    assert_done(cli("collect", *options, *SHORT, "--task", "animal-class"))
    second = json.loads(assert_done(cli("eval", *options, "--json", "--per-task")).out)["scores"]
    floors = [{s["quantity"]: s["value"] for s in scores if s["quantity"] == "majority answer"} for scores in (first, second)]
    assert floors[0] != floors[1]
    without = [{s["quantity"]: s["value"] for s in scores if s["quantity"] == "no prompt"} for scores in (first, second)]
    assert without[0] != without[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--decoding", "beam"), "--decoding is 'beam', expected options, generate"),
        (("--precision", "fp8"), "--precision is 'fp8'"),
        (("--space", "flat"), "--space is 'flat'"),
        (("--start", "here"), "--start is 'here'"),
        (("--device", "toaster"), "toaster"),
        (("--learning-rate", "nan"), "--learning-rate"),
        (("--learning-rate", "-0.1"), "--learning-rate"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(cli: Cli, cache_folder: Path, arguments: Any, message: str) -> None:
    assert_one_error(cli("tune", *arguments), message)
    assert not cache_folder.exists()


@pytest.mark.parametrize("arguments", [("--shots", 0), ("--no-such-option",), ("--dim", "many"), ("--prompt-length", 0)])
def test_a_wrong_use_ends_with_code_2(cli: Cli, arguments: Any) -> None:
    result = cli("tune", *arguments)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_a_cache_that_cannot_be_written_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = cli("collect", *SHORT, "--task", "count-next", "--cache", tmp_path / "file")
    assert_one_error(result, "cannot write", "--cache")


def test_tasks_whose_rows_cannot_be_had_are_told_and_the_others_done(cli: Cli, tmp_path: Path, cache_folder: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(TASKS_FILE.replace("question: animal class,", "question: mood good and mood bad,"), encoding="utf-8")
    options = ("--tasks-file", file)
    result = cli("collect", *options, *SHORT)
    assert_one_error(result, "1 tasks? w(as|ere) left out", "mood good and mood bad")
    assert len(list(cache_folder.glob("*/soft-prompts/*"))) == 6
