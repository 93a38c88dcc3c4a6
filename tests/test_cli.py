"""The commands as a user types them, on the tiny T5 and the small world."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import typer
from conftest import SHORT, TASKS_FILE, Cli, Result, commands, files_in, run_ipt

import ipt
from intrinsic_prompt_tuning.backbone import Backbone
from intrinsic_prompt_tuning.context import Options, Rates
from intrinsic_prompt_tuning.evaluation import GROUP, dimensions_needed, result_rows
from intrinsic_prompt_tuning.files import read_file
from intrinsic_prompt_tuning.finding import SubspaceConfig
from intrinsic_prompt_tuning.lazy import datasets
from intrinsic_prompt_tuning.metrics import METRICS
from intrinsic_prompt_tuning.settings import TESTBED_SETTINGS
from intrinsic_prompt_tuning.tasks import Task
from intrinsic_prompt_tuning.tuning import TuneConfig

DIMS = ("--dim", 6, "--dim", 4)
COMMANDS = tuple(str(command.name) for command in ipt.app.registered_commands)
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


def backbone_folder(cache: Path) -> Path:
    """Return where the results of the one backbone are: rows that were drawn, and the options of commands, lie beside it."""
    (folder,) = (path for path in cache.iterdir() if path.name not in ("samples", "commands"))
    return folder


def results_in(cache: Path) -> dict[str, bytes]:
    """Return the files of the results of all backbones: all but the rows that were drawn, and the options of commands."""
    return {name: content for name, content in files_in(cache).items() if not name.startswith(("samples", "commands"))}


def report_of(cli: Cli, *arguments: object) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(assert_done(cli("eval", "--json", *arguments)).out)
    return report


def row_names(report: dict[str, Any]) -> set[tuple[Any, ...]]:
    """Return what the rows of a report are of."""
    return {tuple(row[name] for name in ("quantity", "space", "start", "dim", "data_seed", "subspace")) for row in report["rows"]}


# --- The four commands one after the other -------------------------------------------------------


@pytest.fixture(scope="module")
def finished(shared_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cli]:
    """Return a cache in which all stages were done, and a way to run further commands on it."""
    cache = tmp_path_factory.mktemp("finished")
    cli = commands(*shared_options, "--cache", cache)

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
    folder = backbone_folder(finished[0])
    counts = {kind.name: len(list(kind.iterdir())) for kind in folder.iterdir()}
    scores = counts.pop("scores")
    # 7 tasks at 2 learning rates; the random and the linear space; 5 tasks at 2 dims, then 2 unseen ones three times, then one
    assert counts == {"soft-prompts": 14, "subspaces": 2 + 2, "intrinsic-vectors": 5 * 2 + 2 * 3 + 1}
    # prompts, no prompt, one answer for all, reconstructions, vectors, mean and nearest of the seen prompts on 2 unseen tasks
    assert scores == 3 * 7 + 2 * 7 + 17 + 2 * 2
    assert {path.suffix for path in folder.glob("*/*")} == {".safetensors"}


def test_the_files_hold_what_they_say(finished: tuple[Path, Cli]) -> None:
    sizes = {"soft-prompts": {"soft_prompt": (3, 16)}, "intrinsic-vectors": {"intrinsic_vector": None}}
    for kind, expected in sizes.items():
        for path in (backbone_folder(finished[0]) / kind).iterdir():
            header, record, _ = read_file(path)
            tensors = safetensors.torch.load_file(path)
            assert {name: shape or (header["dim"],) for name, shape in expected.items()} == {
                name: tuple(tensor.shape) for name, tensor in tensors.items()
            }
            assert path.name.startswith(f"{header['task']}-")
            assert record["steps"] == 6 and 0 < record["best_step"] <= 6
            assert -1 <= record["validation"] <= 1


def test_scores_are_files_without_tensors(finished: tuple[Path, Cli]) -> None:
    for path in (backbone_folder(finished[0]) / "scores").iterdir():
        _, record, tensors = read_file(path)
        assert record.keys() == {"score", "n"} and not tensors
        assert -1 <= record["score"] <= 1 and record["n"] == 10


def test_prompt_tuning_lowers_the_training_loss(cli: Cli, tmp_path: Path) -> None:
    assert_done(cli("collect", "--task", "count-next", "--task", "mood-good", "--steps", 60, "--learning-rate", 0.3))
    records = [read_file(path)[1] for path in (tmp_path / "cache").glob("*/soft-prompts/*")]
    assert len(records) == 2
    assert all(record["last_loss"] < record["first_loss"] for record in records)


KEYS = {
    "quantity", "space", "start", "dim", "data_seed", "subspace", "numbers", "candidates", "n_tasks", "n_excluded", "e_rel",
    "e_rel_low", "e_rel_high", "median_ratio", "gain", "gain_low", "gain_high", "mean_score", "mean_prompt_tuning", "ratio_of_means",
}  # fmt: skip


def test_eval_prints_one_json_object_with_exactly_the_promised_keys(finished: tuple[Path, Cli], t5_folder: Path) -> None:
    report = report_of(finished[1])
    assert report.keys() == {
        "backbone", "split", "prompt_tuning", "no_better_than_no_prompt", "imported", "rows", "dimensions_needed", "rows_without_pretrained",
        "subspaces",
    }  # fmt: skip
    assert (report["backbone"], report["split"]) == (str(t5_folder), "tiny")
    assert {role: row["n_tasks"] for role, row in report["prompt_tuning"].items()} == {"seen": 5, "unseen": 2}
    for row in report["prompt_tuning"].values():
        assert row.keys() == {"n_tasks", "mean_score", "no_prompt", "one_answer"}
    assert all(row.keys() == KEYS for row in [*report["rows"], *report["rows_without_pretrained"]])
    with_scores = report_of(finished[1], "--per-task")
    scores = with_scores.pop("scores")
    assert with_scores == report
    for score in scores:
        assert score.keys() == {
            "quantity", "role", "task", "space", "start", "dim", "data_seed", "subspace", "candidates", "value", "n",
        }  # fmt: skip


def test_eval_has_a_row_for_all_that_the_cache_holds(finished: tuple[Path, Cli]) -> None:
    rows = report_of(finished[1])["rows"]
    found = [(r["quantity"], r["space"], r["start"], r["dim"], r["data_seed"]) for r in rows]
    assert sorted(map(str, found)) == sorted(map(str, [
        *(("T_train(MSF)", "subspace", None, dim, 100) for dim in (6, 4)),
        *(("T_test(MSF)", "subspace", None, dim, 100) for dim in (6, 4)),
        *(("T_train_diff(IST)", "subspace", "random", dim, 21) for dim in (6, 4)),
        ("T_test(IST)", "subspace", "random", 6, 100),
        ("T_test(IST)", "subspace", "seen", 6, 100),
        ("T_test(IST)", "random", "random", 6, 100),
        ("T_test(IST)", "linear", "random", 4, 100),
        ("T_test(mean)", "mean", None, 0, 100),
        ("T_test(nearest)", "nearest", None, 0, 100),
    ]))  # fmt: skip
    assert {(r["n_tasks"] + r["n_excluded"]) for r in rows if "train" in r["quantity"]} == {5}
    assert all(r["numbers"] == r["dim"] for r in rows)


def test_the_scores_of_eval_are_those_of_a_plain_loop_over_the_files(
    finished: tuple[Path, Cli], t5: Backbone, tasks: dict[str, Task]
) -> None:
    """Soft prompts are read without ipt, the best of the grid is chosen, options and words are answered row by row."""
    report = report_of(finished[1], "--per-task")
    told = {s["task"]: s["value"] for s in report["scores"] if s["quantity"] == "prompt tuning"}
    assert {s["candidates"] for s in report["scores"] if s["quantity"] == "prompt tuning"} == {2}
    best: dict[str, tuple[tuple[float, float], torch.Tensor]] = {}
    for path in finished[0].glob("*/soft-prompts/*"):
        header, record, _ = read_file(path)
        rank = (record["validation"], -record["validation_loss"])
        if header["task"] not in best or rank > best[header["task"]][0]:
            best[header["task"]] = rank, safetensors.torch.load_file(path)["soft_prompt"]
    assert told.keys() == best.keys() == tasks.keys()
    for name in ("mood-good", "animal-class", "mood-opposite-choice", "even-or-good"):
        rows, guesses = tasks[name].sample(100, shots=4, test_rows=10).test, []
        for row in rows:
            ids = torch.tensor(t5.tokenizer(row.input).input_ids)
            inputs = torch.cat([best[name][1], t5.model.get_input_embeddings()(ids)])[None]
            with torch.no_grad():
                losses = [
                    float(t5.model(inputs_embeds=inputs, labels=torch.tensor([t5.tokenizer(option).input_ids])).loss)
                    for option in row.options
                ]  # all options are one word, so the mean over tokens ranks like the sum
            guesses.append(row.options[losses.index(min(losses))])
        assert told[name] == pytest.approx(METRICS[tasks[name].metric](guesses, [row.answers for row in rows]))


def test_the_table_for_people_shows_the_figures_of_the_json(finished: tuple[Path, Cli]) -> None:
    text = assert_done(finished[1]("eval", "--per-task")).out
    report = report_of(finished[1])
    for row in report["rows"]:
        begin = [row["quantity"], row["space"], str(row["dim"]), str(row["numbers"]), row["start"] or "-"]
        (line, *_) = [line for line in text.splitlines() if line.split()[:5] == begin]
        assert f"{row['mean_score']:.3f} / {row['mean_prompt_tuning']:.3f}" in line
        assert ("-" if row["e_rel"] is None else f"{row['e_rel']:.3f}") in line
    for role, row in report["prompt_tuning"].items():
        figures = " +".join(f"{row[name]:.3f}" for name in ("mean_score", "no_prompt", "one_answer"))
        assert re.search(rf"^{role} tasks +{row['n_tasks']} +{figures}$", text, re.MULTILINE)
    for task in ("mood-good", "day-then-count"):
        assert re.search(rf"^{task} +prompt tuning ", text, re.MULTILINE)


def test_the_wide_table_has_every_column(finished: tuple[Path, Cli]) -> None:
    narrow, wide = (assert_done(finished[1]("eval", *more)).out for more in ((), ("--wide",)))
    (head, *_) = [line for line in wide.splitlines() if line.startswith("quantity")]
    columns = [
        "quantity", "space", "dim", "numbers", "start", "data seed", "subspace", "n", "E_rel", "excluded", "median",
        "ratio of means", "candidates", "gain", "mean / prompt tuning",
    ]  # fmt: skip
    assert re.split(r"  +", head) == columns
    assert "excluded" not in narrow


def test_a_table_without_rows_alike_has_the_few_columns_that_every_reader_needs(cli: Cli) -> None:
    assert_done(cli("collect", *SHORT))
    assert_done(cli("fit-subspace", *DIMS, "--subspace-steps", 2))
    text = assert_done(cli("eval")).out
    (head,) = [line for line in text.splitlines() if line.startswith("quantity")]
    assert re.split(r"  +", head) == ["quantity", "space", "dim", "numbers", "n", "E_rel", "gain", "mean / prompt tuning"]
    assert max(len(line) for line in text.splitlines() if line.startswith("T_")) <= 100


def test_the_seen_tasks_are_also_told_without_those_the_backbone_was_trained_on(finished: tuple[Path, Cli]) -> None:
    """One of the five seen tasks is marked so."""
    rows = report_of(finished[1])["rows_without_pretrained"]
    assert {row["quantity"] for row in rows} == {"T_train(MSF)", "T_train_diff(IST)"}
    assert {row["n_tasks"] + row["n_excluded"] for row in rows} == {4}
    mark = "seen tasks without those whose very question the backbone was trained on"
    _, found, rest = assert_done(finished[1]("eval", "--wide")).out.partition(mark)
    assert found and [line.split()[0] for line in rest.splitlines() if line.startswith("T_")] == [r["quantity"] for r in rows]
    assert mark not in assert_done(finished[1]("eval")).out


def test_doing_it_all_again_does_nothing(finished: tuple[Path, Cli]) -> None:
    cache, cli = finished
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    table = assert_done(cli("eval")).out
    assert_done(cli("collect", *SHORT, "--learning-rate", 0.3, "--learning-rate", 0.1))
    assert_done(cli("fit-subspace", *DIMS, "--subspace-steps", 5))
    assert_done(cli("tune", *SHORT, *DIMS, "--seen", "--data-seed", 21))
    assert_done(cli("tune", *SHORT, "--dim", 4, "--task", "day-then-count", "--space", "linear"))
    assert_done(cli("tune", *SHORT, "--learning-rate", 0.3, "--space", "prompt"))
    assert assert_done(cli("eval")).out == table
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_one_more_collection_at_another_learning_rate_leaves_all_rows_of_eval(
    finished: tuple[Path, Cli], cli: Cli, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "cache")
    before = report_of(cli)
    assert_done(cli("collect", *SHORT, "--learning-rate", 0.5))
    after = report_of(cli)
    assert row_names(after) == row_names(before)
    scored = {name: [(row["mean_score"], row["candidates"]) for row in r["rows"] if name in row["quantity"]]
              for name in ("train(MSF)", "IST") for r in (before,)}  # fmt: skip
    for name, expected in scored.items():
        assert [(row["mean_score"], row["candidates"]) for row in after["rows"] if name in row["quantity"]] == expected
    assert_done(cli("tune", *SHORT, "--dim", 6, "--unseen"))


def test_a_dry_run_tells_the_plan_and_writes_nothing_but_rows(cli: Cli, tmp_path: Path) -> None:
    measured = r"at most [1-9][\d,]* rows, [\d.]+ million tokens; [\d hmins]+ by steps just measured"
    for command in ("collect", "run"):
        result = assert_done(cli(command, "--dry-run", *SHORT, *(DIMS if command == "run" else ())))
        assert re.search(
            rf"^plan: 7 soft prompts to make, 0 made before; {measured}; [\d.]+ [kM]?B of files$", result.err, re.MULTILINE
        )
        assert not result.out
    assert re.search(rf"^plan: 4 subspaces to make, 0 made before; {measured}; [\d.]+ [kM]?B of files$", result.err, re.MULTILINE)
    for about in ("subspace, dim 6", "subspace, dim 4", "random, dim 6", "random, dim 4"):
        assert re.search(rf"^plan: 7 intrinsic vectors \({about}\) to make, 0 made before; {measured}", result.err, re.MULTILINE)
    scores = 3 * 7 + 2 * 7 + 4 * 7 + 2 * 2
    assert re.search(rf"^plan: {scores} scores to make, 0 made before; {measured}$", result.err, re.MULTILINE)
    assert re.search(r"^plan: all of it, if no job ends early; [\d hmins]+$", result.err, re.MULTILINE)
    assert "plan: 7 soft prompts to make" in assert_done(cli("collect", "--dry-run", "--quiet", *SHORT)).err
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["samples"]


def test_a_real_run_measures_no_pace(cli: Cli) -> None:
    done = assert_done(cli("collect", *SHORT, "--task", "count-next"))
    assert re.search(
        r"^plan: 1 soft prompts to make, 0 made before; at most [\d,]+ rows, .* [kM]?B of files$", done.err, re.MULTILINE
    )
    assert "just measured" not in done.err


def test_only_the_named_tasks_are_collected(cli: Cli, tmp_path: Path) -> None:
    assert_done(cli("collect", *SHORT, "--task", "count-next", "--task", "even-or-good"))
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "cache").glob("*/soft-prompts/*"))
    assert names == ["count-next", "even-or-good"]


def test_asking_for_the_unseen_tasks_of_a_split_without_any_is_refused(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(TASKS_FILE.replace("{tiny: unseen}", "{other: unseen}"), encoding="utf-8")
    assert_one_error(cli("collect", *SHORT, "--tasks-file", file, "--unseen"), "unseen", "tiny")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# --- Two subspaces of one dim --------------------------------------------------------------------


@pytest.fixture(scope="module")
def twice(shared_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cli, dict[bool, str]]:
    """Return a cache with two subspaces of one dim, learned with the tasks' loss and without, and their names."""
    cache = tmp_path_factory.mktemp("twice")
    cli = commands(*shared_options, "--cache", cache)

    assert_done(cli("collect", *SHORT))
    assert_done(cli("fit-subspace", "--dim", 6, "--subspace-steps", 5))
    assert_done(cli("fit-subspace", "--dim", 6, "--subspace-steps", 5, "--no-lm-loss"))
    headers = {path: read_file(path)[0] for path in cache.glob("*/subspaces/*")}
    names = {header["config"]["lm_loss"]: path.stem.rpartition("-")[2] for path, header in headers.items()}
    assert len(headers) == len(names) == 2
    return cache, cli, names


def test_tuning_in_one_of_two_subspaces_is_refused_and_both_are_named_with_what_differs(
    twice: tuple[Path, Cli, dict[bool, str]],
) -> None:
    cache, cli, names = twice
    before = results_in(cache)
    told = [rf"{names[lm_loss][:8]} \(lm_loss {lm_loss}\)" for lm_loss in (True, False)]
    assert_one_error(cli("tune", *SHORT, "--dim", 6, "--unseen"), "2 subspaces of dim 6", "--subspace", *told)
    assert_one_error(cli("tune", *SHORT, "--dim", 6, "--unseen", "--subspace", "zz"), "--subspace", *told)
    assert results_in(cache) == before


def test_a_subspace_that_is_named_is_tuned_in_and_eval_tells_two_of_one_dim_apart(
    twice: tuple[Path, Cli, dict[bool, str]], cli: Cli, tmp_path: Path
) -> None:
    _, _, names = twice
    shutil.copytree(twice[0], tmp_path / "cache")
    for name in (names[True][:8], names[False]):
        assert_done(cli("tune", *SHORT, "--dim", 6, "--unseen", "--subspace", name))
    tuned = [read_file(path)[0]["subspace"] for path in (tmp_path / "cache").glob("*/intrinsic-vectors/*")]
    assert sorted(tuned) == sorted(2 * list(names.values()))
    report = report_of(cli)
    for quantity in ("T_train(MSF)", "T_test(MSF)", "T_test(IST)"):
        rows = [row["subspace"] for row in report["rows"] if (row["quantity"], row["space"]) == (quantity, "subspace")]
        assert sorted(rows) == sorted(names.values())
    assert report["subspaces"] == {names[True]: "lm_loss True", names[False]: "lm_loss False"}
    text = assert_done(cli("eval")).out
    for lm_loss, name in names.items():
        assert re.search(rf"^T_test\(IST\) +subspace +6 .* {name[:8]} ", text, re.MULTILINE)
        assert f"subspace {name[:8]}: lm_loss {lm_loss}" in text


# --- All in one ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(shared_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object], Result]:
    cache = tmp_path_factory.mktemp("run")
    arguments = ["run", *shared_options, *SHORT, *DIMS, "--subspace-steps", 5, "--slots", 3, "--cache", cache]
    return cache, arguments, assert_done(run_ipt(*arguments))


def test_run_announces_its_plan_and_prints_the_table(whole_run: tuple[Path, list[object], Result]) -> None:
    _, _, result = whole_run
    assert re.search(r"^plan: 7 soft prompts to make, .* million tokens; .* [kM]?B of files$", result.err, re.MULTILINE)
    for quantity in ("T_train(MSF)", "T_test(MSF)", "T_train_diff(IST)", "T_test(IST)"):
        assert quantity in result.out
    for space in ("subspace", "random"):
        for dim in (6, 4):
            assert re.search(rf"^T_test\(IST\) +{space} +{dim} +{dim} ", result.out, re.MULTILINE)


def test_a_dry_run_tells_what_a_stopped_run_has_left(whole_run: tuple[Path, list[object], Result], tmp_path: Path) -> None:
    cache, arguments, _ = whole_run
    shutil.copytree(cache, tmp_path / "cache")

    def plans() -> dict[str, tuple[int, int]]:
        done = assert_done(run_ipt(*arguments[:-1], tmp_path / "cache", "--dry-run"))
        found = re.findall(r"^plan: (\d+) ([a-z ]+?)(?: \(.*\))? to make, (\d+) made before", done.err, re.MULTILINE)
        kinds = dict.fromkeys(kind for _, kind, _ in found)
        return {
            kind: (sum(int(a) for a, k, _ in found if k == kind), sum(int(b) for _, k, b in found if k == kind)) for kind in kinds
        }

    scores = 3 * 7 + 2 * 7 + 4 * 7 + 2 * 2
    nothing = {"soft prompts": (0, 7), "subspaces": (0, 4), "intrinsic vectors": (0, 28), "scores": (0, scores)}
    assert plans() == nothing
    for score in list(tmp_path.glob("cache/*/scores/*"))[:5]:
        score.unlink()
    assert plans() == nothing | {"scores": (5, scores - 5)}
    for vector in list(tmp_path.glob("cache/*/intrinsic-vectors/*"))[:3]:
        vector.unlink()
    assert plans() == nothing | {"scores": (5, scores - 5), "intrinsic vectors": (3, 25)}
    next(tmp_path.glob("cache/*/subspaces/4-*")).unlink()
    assert plans()["subspaces"] == (1, 3)


def test_running_again_does_nothing_and_prints_the_same_table(whole_run: tuple[Path, list[object], Result]) -> None:
    cache, arguments, first = whole_run
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    second = assert_done(run_ipt(*arguments))
    assert second.out == first.out
    assert "done in" not in second.err
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_runs_with_other_seeds_are_told_with_their_spread(whole_run: tuple[Path, list[object], Result], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(whole_run[0], cache)
    arguments = [*whole_run[1][:-1], cache, "--seeds", 2]
    told = json.loads(assert_done(run_ipt(*arguments, "--json")).out)
    first, second = told["runs"]
    assert len(told["runs"]) == 2 and first["rows"] == json.loads(assert_done(run_ipt(*whole_run[1], "--json")).out)["rows"]
    assert {row["data_seed"] for row in second["rows"] if row["quantity"] == "T_train_diff(IST)"} == {13}
    of_seen, of_unseen = (("prompt tuning, seen", None, None), ("prompt tuning, unseen", None, None))
    wanted = {("T_test(IST)", "subspace", 6), ("T_train_diff(IST)", "random", 4), of_seen, of_unseen}
    spread = {(row["quantity"], row["space"], row["dim"]): row for row in told["spread"]}
    assert wanted <= spread.keys() and all(row["n_runs"] == 2 for row in spread.values())
    for key in wanted - {of_seen, of_unseen}:
        one, other = (
            [row["gain"] for row in run["rows"] if (row["quantity"], row["space"], row["dim"]) == key] for run in told["runs"]
        )
        if None in (*one, *other):
            assert spread[key]["gain"] is None, "a mean is of all runs"
        else:
            assert spread[key]["gain"] == pytest.approx((one[0] + other[0]) / 2)
            assert spread[key]["gain_sd"] == pytest.approx(abs(one[0] - other[0]) / 2**0.5)
    tuned = [{s["task"]: s["value"] for s in run["scores"] if s["quantity"] == "prompt tuning"} for run in told["runs"]]
    assert tuned[0] != tuned[1] and tuned[0].keys() == tuned[1].keys()
    for key, role in ((of_seen, "seen"), (of_unseen, "unseen")):
        own = {s["task"] for s in first["scores"] if s["role"] == role}
        assert spread[key]["mean_score"] == pytest.approx(sum(run[task] for run in tuned for task in own) / (2 * len(own)))
        mean = sum(abs(tuned[0][task] - tuned[1][task]) / 2**0.5 for task in own) / len(own)
        assert spread[key]["task_sd"] == pytest.approx(mean)
    table = assert_done(run_ipt(*arguments)).out
    assert re.search(r"^T_test\(IST\) +subspace +6 +2 ", table, re.MULTILINE) and max(map(len, table.splitlines())) <= 110
    wide = assert_done(run_ipt(*arguments, "--wide")).out
    assert wide.endswith(table) and wide.count(", test scores; baselines") == 2 and "ratio of means" in wide


def test_run_gives_the_files_of_the_four_commands(whole_run: tuple[Path, list[object], Result], cli: Cli, tmp_path: Path) -> None:
    short = [*SHORT, "--slots", 3]
    assert_done(cli("collect", *short))
    assert_done(cli("fit-subspace", *DIMS, "--subspace-steps", 5))
    for more in (DIMS, (*DIMS, "--space", "random")):
        assert_done(cli("tune", *short, "--seen", "--data-seed", 21, *more))
        assert_done(cli("tune", *short, "--unseen", *more))
    table = assert_done(cli("eval")).out
    own, theirs = results_in(tmp_path / "cache"), results_in(whole_run[0])
    assert own.keys() == theirs.keys()
    assert_same_tensors(own, theirs)
    assert table == whole_run[2].out


def test_eval_after_run_prints_the_table_of_run(
    whole_run: tuple[Path, list[object], Result], shared_options: list[object]
) -> None:
    before = files_in(whole_run[0])
    assert assert_done(run_ipt("eval", *shared_options, "--cache", whole_run[0])).out == whole_run[2].out
    assert files_in(whole_run[0]) == before


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


def undo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("IPT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("call", [3, 8, 13])
def test_ctrl_c_in_the_middle_of_a_step_loses_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes], call: int
) -> None:
    """Steps 1 to 6 are those of the first three jobs, and so on."""
    monkeypatch.setattr(torch.autograd, "grad", raise_at(call, torch.autograd.grad))
    assert cli("collect", *SHORT, "--slots", 3).code != 0
    undo(monkeypatch, tmp_path)
    left = [path.suffix for path in (tmp_path / "cache").glob("*/soft-prompts/*")]
    # The last job had not taken a step.
    assert (left.count(".safetensors"), left.count(".unfinished")) == {3: (0, 3), 8: (3, 3), 13: (6, 0)}[call]
    assert not list((tmp_path / "cache").glob("*/.claims"))
    assert_done(cli("collect", *SHORT, "--slots", 3))
    assert files_in(tmp_path / "cache") == uninterrupted


@pytest.mark.parametrize("call", range(1, 10))
def test_ctrl_c_while_validation_rows_are_scored_loses_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes], call: int
) -> None:
    """Three jobs score three times: the third time ends them, and what comes between a step and its score must be done again."""
    counted = raise_at(call, lambda score: score)
    for name, metric in list(METRICS.items()):
        monkeypatch.setitem(METRICS, name, lambda p, r, metric=metric: counted(metric(p, r)))
    assert cli("collect", *SHORT, "--slots", 3).code != 0
    undo(monkeypatch, tmp_path)
    assert not list((tmp_path / "cache").glob("*/soft-prompts/*.safetensors"))
    assert_done(cli("collect", *SHORT, "--slots", 3))
    for path in (tmp_path / "cache").glob("*/soft-prompts/*"):
        assert read_file(path)[1]["steps"] == 6, "a job goes on beyond its last step"
    assert sorted(map(len, files_in(tmp_path / "cache").values())) == sorted(map(len, uninterrupted.values()))
    assert prompts_of(files_in(tmp_path / "cache")) == prompts_of(uninterrupted)


def prompts_of(files: dict[str, bytes]) -> set[bytes]:
    prompts = [safetensors.torch.load(content)["soft_prompt"] for name, content in files.items() if "soft-prompts" in name]
    return {prompt.numpy().tobytes() for prompt in prompts}


@pytest.mark.parametrize("call", range(1, 9))
def test_ctrl_c_while_a_file_is_written_loses_no_other_file_and_leaves_no_half_of_one(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes], call: int
) -> None:
    assert_done(cli("collect", *SHORT, "--dry-run"))  # the rows are drawn and kept
    monkeypatch.setattr(os, "fsync", raise_at(call, os.fsync))
    assert cli("collect", *SHORT, "--slots", 3).code != 0
    undo(monkeypatch, tmp_path)
    prompts = list((tmp_path / "cache").glob("*/soft-prompts/*.safetensors"))
    assert len(prompts) == max(0, call - 2), "before the prompts stands the file of options"
    for path in prompts:
        read_file(path)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith(".")]
    assert_done(cli("collect", *SHORT, "--slots", 3))
    left = files_in(tmp_path / "cache")
    assert left.keys() == uninterrupted.keys()
    assert_same_tensors(left, uninterrupted)


def interrupted_collection(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int = 5) -> list[Path]:
    """Interrupt a collection in a step, and return the states that it leaves."""
    monkeypatch.setattr(torch.autograd, "grad", raise_at(call, torch.autograd.grad))
    assert cli("collect", *SHORT, "--slots", 3).code != 0
    undo(monkeypatch, tmp_path)
    states = sorted((tmp_path / "cache").glob("*/soft-prompts/*.unfinished"))
    assert len(states) == 3
    return states


def counted_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every step of all slots."""
    steps: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *arguments, **named: (steps.append(1), grad(*arguments, **named))[1])
    return steps


def test_a_resumed_run_goes_on_at_the_newest_state(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, bytes]
) -> None:
    interrupted_collection(cli, tmp_path, monkeypatch, call=3)
    states = interrupted_collection(cli, tmp_path, monkeypatch, call=4)
    assert [float(read_file(path)[2]["step"]) for path in states] == [5, 5, 5]
    steps = counted_steps(monkeypatch)
    assert_done(cli("collect", *SHORT, "--slots", 3))
    undo(monkeypatch, tmp_path)
    assert len(steps) == 1 + 6 + 6
    assert files_in(tmp_path / "cache") == uninterrupted


# --- Several processes ---------------------------------------------------------------------------


def test_two_collections_on_one_cache_at_once_give_every_file_once(
    shared_options: list[object], tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    arguments = ["collect", *shared_options, *SHORT, "--slots", 3, "--cache", tmp_path / "cache", "--processes", 1]
    command, environment = [sys.executable, ipt.__file__, *map(str, arguments)], os.environ | {"OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    left = files_in(tmp_path / "cache")
    assert left.keys() == uninterrupted.keys()
    assert_same_tensors(left, uninterrupted)
    assert not list((tmp_path / "cache").glob("*/.claims"))


# --- Tasks ---------------------------------------------------------------------------------------


def test_tasks_lists_every_task_with_kind_metric_role_and_a_short_source(cli: Cli) -> None:
    lines = assert_done(cli("tasks")).out.splitlines()
    assert lines[0].split() == ["task", "kind", "metric", "role", "source"]
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


def test_an_output_that_has_no_such_letter_is_told(shared_options: list[object], tmp_path: Path) -> None:
    rows = [f"the glad fox sees {n} cups,{'good' if n % 2 else 'bad'}" for n in range(20)]
    (tmp_path / "気分.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    command = [sys.executable, ipt.__file__, "tasks", *map(str, shared_options), "--data", str(tmp_path / "気分.csv")]
    for encoding, code in (("latin-1", 1), ("utf-8", 0)):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
        assert done.returncode == code and b"Traceback" not in done.stderr, done.stderr
    assert done.stdout.decode().splitlines()[1].startswith("気分 ")


# --- Help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_says_what_the_command_does_and_shows_an_example_that_parses(command: str) -> None:
    text = run_ipt(command, "--help").out
    (example,) = re.findall(r"Example: ipt (.+)", text)
    assert example.split()[0] == command
    for option in re.findall(r"--[\w-]+", example):
        assert option in text.replace(example, "")
    typer.main.get_command(ipt.app).commands[command].make_context(command, shlex.split(example)[1:])  # type: ignore[attr-defined]
    assert ("--backbone" in text or command == "cache") and "--cache" in text


def test_the_help_tells_the_defaults_on_the_testbed_and_elsewhere() -> None:
    help_of = {command: re.sub(r"[\s│]+", " ", run_ipt(command, "--help").out) for command in ("collect", "fit-subspace", "run")}
    defaults = {f.name: f.default for kind in (Options, TuneConfig, SubspaceConfig) for f in fields(kind)}
    for name in ("test_rows", "batch_size", "evaluations"):
        assert f"default: ({TESTBED_SETTINGS[name]} on the testbed, else {defaults[name]})" in help_of["collect"], name
    subspace_steps = f"({TESTBED_SETTINGS['subspace_steps']} on the testbed, else {defaults['subspace_steps']})"
    assert f"default: {subspace_steps}" in help_of["fit-subspace"] and f"default: {subspace_steps}" in help_of["run"]
    assert "default: (24 on the testbed, else 10 behind the input, 100 in front)" in help_of["collect"]
    assert "default: (400 on the testbed, else 200 behind the input, 1000 in front)" in help_of["collect"]
    assert "default: (0.3)" in help_of["collect"] and "default: (0.1 on the testbed, else 0.3)" in help_of["run"]
    assert "default: ($IPT_CACHE or the user's)" in help_of["collect"]
    assert "default: (250)" in help_of["fit-subspace"] and "default: (250 and 10)" in help_of["run"]


def test_the_help_lists_all_commands() -> None:
    text = run_ipt("--help").out
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", text)
    assert run_ipt("--help").code == 0


def test_options_come_from_flags_then_the_environment_then_a_file_then_defaults(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "steps: 2\nevaluations: 1\nlearning_rate: 0.5\nsubspace-steps: 3\ncollect: {task: mood-good, batch-size: 2}\n"
    )
    monkeypatch.setenv("IPT_EVALUATIONS", "2")
    monkeypatch.setenv("IPT_BATCH_SIZE", "3")
    assert_done(cli("collect", "--config", config, "--learning-rate", 0.25))
    (path,) = (tmp_path / "cache").glob("*/soft-prompts/*")
    header = read_file(path)[0]
    assert header["task"] == "mood-good" and header["learning_rate"] == 0.25
    assert {name: header["tuning"][name] for name in ("steps", "evaluations", "batch_size")} == {
        "steps": 2, "evaluations": 2, "batch_size": 3,
    }  # fmt: skip


def test_an_option_of_a_file_may_have_a_command_s_name(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IPT_CACHE")
    (tmp_path / "mine.yaml").write_text(f"cache: {tmp_path / 'own'}\nreport: {{quantity: gain}}\n", encoding="utf-8")
    assert_done(cli("collect", *SHORT, "--task", "mood-good", "--config", tmp_path / "mine.yaml"))
    assert list((tmp_path / "own").glob("*/soft-prompts/*"))


def test_what_a_file_says_to_all_commands_stops_none_that_it_is_not_for(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPT_TASK", "mood-good")
    (config := tmp_path / "mine.yaml").write_text("dim: [250, 10]\nshow: true\n", encoding="utf-8")
    assert_done(cli("collect", *SHORT, "--config", config))  # its --dim is one number
    (path,) = (tmp_path / "cache").glob("*/soft-prompts/mood-good-*")
    assert "mood-good" in assert_done(run_ipt("show", path, "--config", config)).out  # it has no --show
    assert "kind" in assert_done(cli("tasks")).out.splitlines()[0], "an argument is no option of the environment"
    config.write_text("show: false\n", encoding="utf-8")
    assert_done(cli("collect", *SHORT, "--config", config, "--dry-run"))
    config.write_text("collect: {dim: [250, 10], start: subspace}\n", encoding="utf-8")
    assert cli("collect", "--config", config).code == 2
    for wrong in ("data: [moods.csv]", "tries: [2]", "columns: [text, stars]"):  # of which no command takes several
        config.write_text(f"{wrong}\n", encoding="utf-8")
        assert cli("collect", "--config", config, "--dry-run").code, wrong


def test_what_is_tuned_as_prompts_is_reproduced_by_its_file(cli: Cli, tmp_path: Path) -> None:
    assert_done(cli("tune", *SHORT, "--task", "mood-good", "--space", "prompt"))
    (kept,) = (tmp_path / "cache" / "commands").iterdir()
    assert "plan: 0 soft prompts to make" in assert_done(run_ipt("tune", "--config", kept, "--dry-run")).err


def test_a_backbone_in_the_folder_of_the_command_has_a_name(
    cli: Cli, t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(t5_folder)
    assert_done(cli("collect", *SHORT, "--task", "mood-good", "--backbone", "."))
    (path,) = (tmp_path / "cache").glob("*/soft-prompts/*")
    assert path.parents[1].name.startswith(f"{t5_folder.name}-")


def test_a_start_of_vectors_is_none_of_prompts(cli: Cli) -> None:
    told = cli("tune", *SHORT, "--task", "mood-good", "--space", "prompt", "--start", "nearest")
    assert_one_error(told, "--start, --dim and --subspace are for vectors: 'ipt collect --start' is for prompts")
    for more in (("--dim", 6), ("--subspace", "abc")):
        told = cli("tune", *SHORT, "--task", "mood-good", "--space", "prompt", *more)
        assert_one_error(told, "--start, --dim and --subspace are for vectors")
    told = cli("collect", *SHORT, "--task", "mood-good", "--start", "nearest", "--dim", 4)
    assert_one_error(told, "--dim is of the vectors that prompts start from: it needs --start subspace")


def test_an_option_s_variable_is_named_after_its_flag(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_done(cli("collect", *SHORT, "--task", "mood-good"))
    monkeypatch.setenv("IPT_JSON", "1")
    (path,) = (tmp_path / "cache").glob("*/soft-prompts/*")
    assert json.loads(assert_done(cli("show", path)).out)["header"]["task"] == "mood-good"
    monkeypatch.setenv("IPT_LEARNING_RATE", "0.25")
    assert_done(cli("tune", *SHORT, "--task", "mood-good", "--space", "prompt"))
    rates = [read_file(path)[0]["learning_rate"] for path in (tmp_path / "cache").glob("*/soft-prompts/*")]
    assert sorted(rates) == [0.25, 0.3]


def test_several_values_of_a_variable_stand_apart_by_spaces(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPT_LEARNING_RATE", "0.1 0.3")
    assert_done(cli("collect", *SHORT, "--task", "mood-good"))
    assert {read_file(path)[0]["learning_rate"] for path in (tmp_path / "cache").glob("*/soft-prompts/*")} == {0.1, 0.3}


@pytest.mark.parametrize("command", [command.name for command in ipt.app.registered_commands])
def test_no_command_gives_a_setting_s_name_to_something_else(command: str) -> None:
    """What a command is given makes the experiment, too."""
    settings = {f.name: kind for kind in (Options, TuneConfig, SubspaceConfig, Rates) for f in dataclasses.fields(kind)}
    (function,) = [c.callback for c in ipt.app.registered_commands if c.name == command]
    for name, parameter in inspect.signature(inspect.unwrap(function), eval_str=True).parameters.items():
        if name in settings:
            told = ipt.option(settings[name], name).__metadata__[0]
            assert parameter.annotation.__metadata__[0].help == told.help, name


def test_a_prompt_of_one_s_own_table_can_be_exported_and_drawn(cli: Cli, tmp_path: Path) -> None:
    days = ("monday", "sunday", "tuesday")
    rows = [f"the {mood} {who} sees one cups on {day},{label}" for day in days for who in ("fox", "owl", "eel", "bat")
            for mood, label in (("glad", "good"), ("sorry", "bad"))]  # fmt: skip
    (tmp_path / "moods.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    own = ("--data", tmp_path / "moods.csv", "--split", "own", "--shots", 2, "--test-rows", 4)
    assert_done(cli("collect", *SHORT, *own))
    assert_done(cli("export", *own, "--task", "moods", "--out", tmp_path / "moods", "--format", "peft"))
    assert (tmp_path / "moods" / "adapter_config.json").exists()


def test_options_that_are_the_same_tokens_are_told(cli: Cli, tmp_path: Path) -> None:
    days = ("monday", "sunday", "tuesday")
    rows = [f"the {mood} {who} sees one cups on {day},{label}" for day in days for who in ("fox", "owl", "eel", "bat")
            for mood, label in (("glad", "spam"), ("sorry", "ham"))]  # fmt: skip
    (tmp_path / "mail.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    told = assert_done(
        cli("collect", *SHORT, "--data", tmp_path / "mail.csv", "--split", "own", "--shots", 2, "--test-rows", 4)
    ).err
    assert "mail: some of the options ham, spam are the same tokens to " in told and told.count("cannot tell them apart") == 1


def test_what_a_command_was_told_is_kept_in_a_file_that_reproduces_it(cli: Cli, tmp_path: Path) -> None:
    assert_done(cli("collect", *SHORT, "--task", "mood-good", "--learning-rate", 0.3))
    (kept,) = (tmp_path / "cache" / "commands").iterdir()
    again = assert_done(run_ipt("collect", "--config", kept, "--cache", tmp_path / "again"))
    assert files_in(tmp_path / "again") == files_in(tmp_path / "cache") and again.code == 0
    assert_done(cli("collect", *SHORT, "--task", "mood-good", "--learning-rate", 0.3, "--dry-run"))
    assert list((tmp_path / "cache" / "commands").iterdir()) == [kept]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("stepz: 4", "there is no option --stepz; did you mean '--steps'"),
        ("collect: {alpha: 4}", "there is no option --alpha"),
        ("config: other.yaml", "there is no option --config"),
        ("collect: {config: other.yaml}", "there is no option --config"),
        ("alpha: 3\ncollect: {alpha: 4}", "there is no option --alpha"),
        ("- steps", "expected a mapping, got a list"),
        ("steps: [", "is not readable as YAML"),
        ("tune: {steps: 4}\nrun: {}", "holds options of tune and run, none of collect"),
        ("collect: 5", "'collect' must be a mapping, not 5 (quote it)"),
        (None, "there is no file"),
    ],
)
def test_a_file_of_options_that_is_wrong_is_told(cli: Cli, tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "mine.yaml").write_text(content)
    assert_one_error(cli("collect", "--config", tmp_path / "mine.yaml"), "mine.yaml", re.escape(told))


def test_a_value_of_a_file_is_checked_as_on_the_command_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("steps: many\n")
    result = cli("collect", "--config", tmp_path / "mine.yaml")
    assert result.code == 2 and "--steps" in result.err


def test_a_log_holds_a_line_per_validation_and_result(cli: Cli, tmp_path: Path) -> None:
    options = ("--task", "mood-good", *SHORT, "--learning-rate", 0.3, "--log", tmp_path / "log.jsonl", "--quiet")
    assert not assert_done(cli("collect", *options)).err
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["validation"] * 3 + ["made"]
    assert [event["step"] for event in events[:3]] == [2, 4, 6] and {event["task"] for event in events[:3]} == {"mood-good"}
    assert max(event["score"] for event in events[:3]) == events[3]["validation"]
    assert "score" in assert_done(cli("collect", *options[:-1], "--seed", 1, "--verbose")).err
    assert_one_error(
        cli("collect", *options[:2], *SHORT, "--seed", 2, "--log", tmp_path / "no" / "log.jsonl"), "no.log.jsonl.*--log"
    )


def test_the_version_is_told_with_those_of_what_it_stands_on() -> None:
    done = assert_done(run_ipt("--version"))
    assert re.fullmatch(
        r"ipt \d\S*, torch \d\S*, transformers \d\S*, datasets \d\S*, safetensors \d\S*, Python 3\S*, .+\n", done.out
    )


@pytest.mark.parametrize("arguments", [(), ("run",)])
def test_help_answers_quickly_because_nothing_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'safetensors'}"
    program = f"import sys, ipt\ntry: ipt.main()\nfinally: print(sorted({heavy} & set(sys.modules)))"
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


def test_what_a_person_wrote_is_told_as_it_was_written(cli: Cli) -> None:
    """Not as markup, and not with pictures in the place of words between colons."""
    assert "there is no task '[b]:cat:'" in cli("collect", "--task", "[b]:cat:").err


def test_an_unknown_split_is_named_with_the_nearest_names(cli: Cli, cache_folder: Path) -> None:
    for command in ("collect", "fit-subspace", "eval", "run", "tasks"):
        assert_one_error(cli(command, "--split", "tinny"), "'tinny'; did you mean 'tiny'")
    assert not cache_folder.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (None, None, r"there is no file .*own\.yaml"),
        ("tasks:", "tasks: ]", r"own\.yaml is not readable as YAML.*line"),
        ("  animal-class:", "  mood-good:", r"own\.yaml: 'mood-good' stands twice.*line \d+"),
        ("question: mood good", "question: no", r"own\.yaml: task mood-good: field 'question' must be text, not false"),
        ("  animal-class:", "  no:", r"own\.yaml: 'False' cannot be a task's name.*quote"),
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


@pytest.mark.parametrize("command", ["collect", "fit-subspace", "tune", "eval", "run"])
def test_a_backbone_that_is_not_there_is_refused_before_any_data_set_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The split `random` is of tasks on the Hub."""
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("no data set may be asked for")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = ("--backbone", tmp_path / "nowhere", "--device", "cpu", "--cache", tmp_path / "cache")
    assert_one_error(run_ipt(command, *arguments), "cannot load the backbone", "nowhere")
    assert not asked
    assert not (tmp_path / "cache").exists()


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


SPACES: Any = [("fit-subspace",), *(("tune", "--space", space) for space in ("subspace", "random", "linear", "low-rank"))]


@pytest.mark.parametrize("arguments", SPACES)
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
    assert not list(cache_folder.glob("*/.claims"))


def test_a_file_made_with_another_backbone_is_left_out_by_name_and_stays(
    cli: Cli, cache_folder: Path, bart_folder: Path, t5_folder: Path
) -> None:
    assert_done(cli("collect", *SHORT, "--task", "count-next"))
    assert_done(cli("collect", *SHORT, "--task", "count-next", "--backbone", bart_folder))
    one, two = sorted(cache_folder.glob("*/soft-prompts/*"))
    two.with_name("foreign-0123456789abcdef.safetensors").write_bytes(one.read_bytes())
    (cache_folder / one.parts[-3] / "soft-prompts" / "count-next-0123456789abcdef.safetensors").write_bytes(two.read_bytes())
    before = files_in(cache_folder)
    backbone = {t5_folder.name: t5_folder, bart_folder.name: bart_folder}[one.parts[-3].rpartition("-")[0]]
    result = cli("eval", "--backbone", backbone)
    assert_one_error(result, "count-next-0123456789abcdef", "another backbone")
    assert re.search(r"^seen tasks +1 ", result.out, re.MULTILINE), "the rest is shown"
    assert {name: content for name, content in files_in(cache_folder).items() if name in before} == before


def spoil(cache: Path, task: str, content: Callable[[bytes], bytes]) -> Path:
    (path,) = cache.glob(f"*/soft-prompts/{task}-*.safetensors")
    path.write_bytes(content(path.read_bytes()))
    return path


def version_1(content: bytes) -> bytes:
    return safetensors.torch.save(safetensors.torch.load(content), {"ipt": '{"header": {"version": 1}, "record": {}}'})


@pytest.mark.parametrize(
    ("content", "message"),
    [(lambda whole: whole[:-5], "damaged .*: remove it"), (version_1, "has file version 1, expected 2: remove it")],
)
def test_a_file_that_cannot_be_used_is_named_and_eval_shows_the_rest(
    cli: Cli, cache_folder: Path, content: Callable[[bytes], bytes], message: str
) -> None:
    assert_done(cli("collect", *SHORT, "--task", "count-next", "--task", "mood-good"))
    path = spoil(cache_folder, "count-next", content)
    before = path.read_bytes()
    for _ in range(2):
        result = cli("eval", "--per-task")
        assert_one_error(result, rf"1 were left out: {re.escape(str(path))} .*{message}")
        assert re.search(r"^seen tasks +1 ", result.out, re.MULTILINE)
        assert "mood-good" in result.out and "count-next" not in result.out
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [("predict", "--input", "lines"), ("export", "--out", "adapter"), ("tune", "--space", "random", "--dim", 2, *SHORT)],
)
def test_every_command_tells_by_its_exit_code_that_something_was_left_out(
    cli: Cli, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines").write_text("the happy fox\n", encoding="utf-8")
    assert_done(cli("collect", *SHORT, "--task", "count-next", "--task", "mood-good"))
    path = spoil(cache_folder, "count-next", lambda whole: whole[:-5])
    result = cli(*arguments, "--task", "mood-good", "--skip-missing")
    assert_one_error(result, r"\d were left out: ", rf"{re.escape(str(path))} .*damaged")
    made = [*tmp_path.glob("adapter/*.safetensors"), *cache_folder.glob("*/intrinsic-vectors/*")]
    assert result.out if arguments[0] == "predict" else made


@pytest.mark.parametrize("rank", [0, 1])
def test_what_was_left_out_is_the_first_process_s_to_tell(
    cli: Cli, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Another's exit code would end the first, while it draws pictures or writes a page."""
    assert_done(cli("collect", *SHORT, "--task", "count-next", "--task", "mood-good"))
    spoil(cache_folder, "count-next", lambda whole: whole[:-5])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    assert cli("eval").code == (1 if rank == 0 else 0)


def test_where_no_file_can_be_used_all_are_named(cli: Cli, cache_folder: Path) -> None:
    assert_done(cli("collect", *SHORT, "--task", "count-next", "--task", "mood-good"))
    paths = [spoil(cache_folder, "count-next", lambda whole: whole[:-5]), spoil(cache_folder, "mood-good", version_1)]
    for command in ("eval", "fit-subspace", "tune"):
        result = cli(command, *(("--dim", 3) if command != "eval" else ()))
        assert_one_error(result, "no soft prompt", *(re.escape(str(path)) for path in paths))


def test_no_prompt_is_scored_anew_at_another_prompt_length_and_at_another_maximal_length(cli: Cli, cache_folder: Path) -> None:
    changes: list[Any] = [(), ("--prompt-length", 4), ("--max-length", 12)]
    for change in changes:
        assert_done(cli("collect", *SHORT, "--task", "count-next", *change))
        assert_done(cli("eval", *change))
    headers = [read_file(path)[0] for path in cache_folder.glob("*/scores/*")]
    without = [(header["prompt_length"], header["max_length"]) for header in headers if header["stage"] == "no prompt"]
    assert sorted(without) == [(3, 12), (3, 512), (4, 512)]


def test_a_metric_that_the_tasks_file_no_longer_names_gives_no_score(cli: Cli, tmp_path: Path) -> None:
    """A score is of a metric: after the metric of a task was changed, the old figure must not stand under the new name."""
    file = tmp_path / "own.yaml"
    file.write_text(TASKS_FILE, encoding="utf-8")
    options = ("--tasks-file", file, "--test-rows", 40)
    assert_done(cli("collect", *options, *SHORT, "--task", "animal-class"))
    first = report_of(cli, *options, "--per-task")["scores"]
    file.write_text(TASKS_FILE.replace("metric: Classification-F1", "metric: ACC"), encoding="utf-8")
    assert_done(cli("collect", *options, *SHORT, "--task", "animal-class"))
    second = report_of(cli, *options, "--per-task")["scores"]
    for quantity in ("one answer for all", "no prompt"):
        before, after = ({s["quantity"]: s["value"] for s in scores}[quantity] for scores in (first, second))
        assert before != after
    assert {s["candidates"] for s in second} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "toaster"), "toaster"),
        (("--learning-rate", "nan"), "--learning-rate"),
        (("--learning-rate", "-0.1"), "--learning-rate"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(cli: Cli, cache_folder: Path, arguments: Any, message: str) -> None:
    assert_one_error(cli("tune", *arguments), message)
    assert not cache_folder.exists()


WRONG: Any = [
    ("--decoding", "beam"), ("--precision", "fp8"), ("--space", "flat"), ("--start", "here"), ("--shots", 0), ("--data-seed", -1),
    ("--seed", -1), ("--slots", 0), ("--test-rows", 0), ("--steps", 0), ("--no-such-option",), ("--dim", "many"), ("--dim", 0),
    ("--prompt-length", 0),
    ("--shots", 100_000), ("--test-rows", 10**7), ("--prompt-length", 10**6), ("--batch-size", 10**6), ("--processes", 0),
    ("--processes", 65), ("--seed", 2**32), ("--data-seed", 2**32), ("--patience", 10**7), ("--learning-rate", "fast"),
]  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_use_ends_with_code_2_and_names_the_option(cli: Cli, cache_folder: Path, arguments: Any) -> None:
    result = cli("tune", *arguments)
    assert result.code == 2
    assert "Traceback" not in result.err
    assert arguments[0] in result.err.partition("Error")[2]
    assert not cache_folder.exists()


@pytest.mark.parametrize("command", ["collect", "tune", "run", "tasks"])
def test_a_data_seed_below_0_is_a_wrong_use(cli: Cli, cache_folder: Path, command: str) -> None:
    assert cli(command, "--data-seed", -1).code == 2
    assert not cache_folder.exists()


@pytest.mark.parametrize(("arguments", "ends"), [
    (("--learning-rate", 1e30), None), (("--learning-rate", 1e308), "training loss of task count-next .* is nan by step"),
    (("--learning-rate", 1e-300), None), (("--learning-rate", "inf"), "--learning-rate is inf, expected a number above 0"),
    (("--learning-rate", 0), "--learning-rate is 0.0"), (("--patience", 10**6), None), (("--slots", 10**30), None),
    (("--evaluations", 10**30), None), (("--max-length", 10**30), None), (("--seed", 2**32 - 1), None),
    (("--data-seed", 2**32 - 1), None), (("--shots", 10_000), "too few rows"), (("--test-rows", 1_000_000), "too few rows"),
    (("--shots", 1), None), (("--batch-size", 4096), None), (("--prompt-length", 100_000), "leaves no room for the input"),
])  # fmt: skip
def test_an_option_at_its_limit_is_done_or_ends_in_one_sentence(
    cli: Cli, tmp_path: Path, arguments: Any, ends: str | None
) -> None:
    """Whatever is done is finite; a rate far too large gives a prompt that is as bad as its validation score says."""
    result = cli("collect", "--steps", 2, "--evaluations", 1, "--batch-size", 1, "--task", "count-next", *arguments)
    if ends:
        assert_one_error(result, ends)
        assert not list(tmp_path.rglob("soft-prompts/*"))
        return
    assert_done(result)
    (path,) = tmp_path.rglob("soft-prompts/*")
    _, record, tensors = read_file(path)
    assert torch.isfinite(tensors["soft_prompt"]).all() and 0 <= record["validation"] <= 1


@pytest.mark.parametrize(("arguments", "ends"), [
    (("--alpha", "inf"), "the loss is not finite at step 1"), (("--alpha", "1e300"), "the loss is not finite"), (("--noise", "1e300"), "not finite"),
    (("--dim", 10**30), "--dim 1000000000000000000000000000000 is larger than the prompt itself, 48 numbers"),
])  # fmt: skip
def test_an_option_of_subspaces_beyond_all_limits_ends_in_one_sentence(
    finished: tuple[Path, Cli], arguments: Any, ends: str
) -> None:
    before = files_in(finished[0])
    assert_one_error(finished[1]("fit-subspace", "--subspace-steps", 2, "--dim", 5, *arguments), ends)
    assert files_in(finished[0]) == before
    for option, value in (("--alpha", "nan"), ("--noise", "nan"), ("--noise", -1), ("--subspace-seed", 2**32)):
        assert finished[1]("fit-subspace", option, value).code == 2


def test_a_cache_that_cannot_be_written_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = cli("collect", *SHORT, "--task", "count-next", "--cache", tmp_path / "file")
    assert_one_error(result, "cannot write", "--cache")


def test_tasks_whose_rows_cannot_be_had_are_told_before_any_work_and_the_others_done_when_asked(
    cli: Cli, cache_folder: Path, impossible: Path
) -> None:
    cannot = ("1 tasks cannot be had, leave them out with --skip-missing", "mood good and mood bad")
    for command in ("collect", "run"):
        assert_one_error(cli(command, "--tasks-file", impossible, *SHORT, *(DIMS if command == "run" else ())), *cannot)
    assert not list(cache_folder.rglob("*.safetensors"))
    result = cli("collect", "--tasks-file", impossible, *SHORT, "--skip-missing")
    assert_one_error(result, "1 were left out", "mood good and mood bad")
    assert result.err.count("left out: ") == 2
    assert len(list(cache_folder.glob("*/soft-prompts/*"))) == 6


def test_fitting_with_a_task_whose_rows_cannot_be_had_is_refused_and_done_without_it_when_asked(
    cli: Cli, cache_folder: Path, impossible: Path
) -> None:
    assert_done(cli("collect", *SHORT))
    fit = ("fit-subspace", "--tasks-file", impossible, "--dim", 3, "--subspace-steps", 2)
    assert_one_error(cli(*fit), "1 tasks cannot be had, leave them out with --skip-missing", "mood good and mood bad")
    assert not list(cache_folder.glob("*/subspaces/*"))
    result = cli(*fit, "--skip-missing")
    assert_one_error(result, "1 were left out: .*mood good and mood bad")
    (path,) = cache_folder.glob("*/subspaces/*")
    assert sorted(read_file(path)[0]["prompts"]) == ["count-next", "mood-good", "mood-opposite-choice", "thing-plural"]
    result = cli("eval", "--tasks-file", impossible, "--skip-missing")
    assert_one_error(result, "1 were left out: .*mood good and mood bad")
    assert re.search(r"^T_train\(MSF\) +subspace +3 +3 ", result.out, re.MULTILINE)


def test_a_whole_run_does_without_tasks_that_cannot_be_had_when_asked(cli: Cli, impossible: Path) -> None:
    result = cli("run", "--tasks-file", impossible, *SHORT, "--dim", 3, "--subspace-steps", 2, "--skip-missing")
    assert_one_error(result, "1 were left out: .*mood good and mood bad")
    assert re.search(r"^seen tasks +4 ", result.out, re.MULTILINE)


def test_the_dimensions_needed_stand_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    needed = {"subspace": {"T_test(IST)": 7.25}, "random": {"T_test(IST)": None}}
    report = {"backbone": "b", "split": "s", "prompt_tuning": {}, "rows": [], "dimensions_needed": needed, "subspaces": {}}
    ipt.print_report(report | {"no_better_than_no_prompt": []}, False, per_task=False, wide=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["subspace", "T_test(IST)", "7.2"] in lines and ["random", "T_test(IST)", "more"] in lines


def test_one_task_on_which_prompt_tuning_does_nothing_is_one_task(capsys: pytest.CaptureFixture[str]) -> None:
    report = {"backbone": "b", "split": "s", "prompt_tuning": {}, "rows": [], "dimensions_needed": {}, "subspaces": {}}
    for poor, told in ((["one"], "on 1 task: one\n"), (["one", "two"], "on 2 tasks: one, two\n")):
        ipt.print_report(report | {"no_better_than_no_prompt": poor}, False, per_task=False, wide=False)
        assert told in capsys.readouterr().out


def test_where_the_smallest_dim_that_was_run_suffices_at_most_that_many_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    about = {"task": "t", "candidates": 1, "quantity": "T_test(IST)", "space": "subspace", "start": "random", "data_seed": 100}
    rows = result_rows([about | {"dim": dim, "value": 1.0} for dim in (4, 8)], {"t": 1.0}, {"t": 0.0})
    report = {"backbone": "b", "split": "s", "prompt_tuning": {}, "rows": rows, "dimensions_needed": dimensions_needed(rows)}
    ipt.print_report(report | {"subspaces": {}, "no_better_than_no_prompt": []}, False, per_task=False, wide=False)
    assert re.search(r"^subspace +T_test\(IST\) +at most 4\.0$", capsys.readouterr().out, re.MULTILINE)


def test_ctrl_c_says_how_to_go_on_and_exits_with_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd, "grad", raise_at(2, torch.autograd.grad))
    result = cli("collect", *SHORT, "--slots", 3)
    assert result.code == 130
    assert "stopped: what is done is kept, and the same command goes on from here" in result.err
    assert "Traceback" not in result.err


def test_the_figures_of_a_report_follow_from_the_scores_of_its_tasks(finished: tuple[Path, Cli]) -> None:
    """Worked out by hand: what all else is compared with, gain, and on which tasks a prompt adds nothing."""
    report = report_of(finished[1], "--per-task")
    tuned, floor, one = (
        {s["task"]: s["value"] for s in report["scores"] if s["quantity"] == stage}
        for stage in ("prompt tuning", "no prompt", "one answer for all")
    )
    unseen = {"even-or-good", "day-then-count"}
    for role, own in (("seen", tuned.keys() - unseen), ("unseen", unseen)):
        means = [sum(side[task] for task in own) / len(own) for side in (tuned, floor, one)]
        told = report["prompt_tuning"][role]
        assert [told[name] for name in ("mean_score", "no_prompt", "one_answer")] == pytest.approx(means)
    poor = {task for task in tuned if tuned[task] <= floor[task]}
    assert {*report["no_better_than_no_prompt"]} == poor and 0 < len(poor) < len(tuned)
    gains = []
    for row in report["rows"]:
        own = {s["task"]: s["value"] for s in report["scores"] if all(s[name] == row[name] for name in GROUP)}
        gained, possible = (sum(side[task] - floor[task] for task in own) for side in (own, tuned))
        gains += [(row["gain"], pytest.approx(gained / possible))] if possible > 1e-6 else []
        assert row["mean_score"] == pytest.approx(sum(own.values()) / len(own))
    assert gains and all(told == right for told, right in gains)


def test_every_run_of_several_has_a_data_seed_of_its_own(cli: Cli, tmp_path: Path) -> None:
    assert_done(cli("run", *SHORT, "--dim", 4, "--seeds", 4, "--dry-run"))
    drawn = {path.name.split("_")[2] for path in (tmp_path / "cache").glob("samples/mood-good-*/*/*_train.jsonl")}
    assert drawn == {"100", "21", "13", "42", "87"}


def test_a_quick_run_is_of_17_tasks_and_80_steps_unless_others_are_asked_for(tmp_path: Path) -> None:
    rows = []
    for steps in ((), ("--steps", 80), ("--steps", 5)):
        plan = assert_done(run_ipt("run", "--quick", "--dry-run", "--processes", 1, "--cache", tmp_path, *steps)).err
        rows += re.findall(r"^plan: 17 soft prompts to make, 0 made before; at most ([\d,]+) rows", plan, re.MULTILINE)
    quick, same, few = (int(count.replace(",", "")) for count in rows)
    assert quick == same == few + 17 * (80 - 5)
