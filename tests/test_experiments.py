"""The experiments' scripts run, on tiny models: what they print in earnest stands in tests/experiments/README.md."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from test_causal import save_model

from intrinsic_prompt_tuning import Experiment
from intrinsic_prompt_tuning.files import read_file
from intrinsic_prompt_tuning.tasks import Task, World

EXPERIMENTS = Path(__file__).parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))  # as when a script is run
NAMES = ("mood-good", "thing-plural", "even-or-good")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where a dataclass looks for it
    spec.loader.exec_module(module)
    return module


def tiny_llama(folder: Path, world: World, *, chat: bool = False) -> Path:
    (model := folder / "model").mkdir()
    return save_model(model, "llama", world, chat=chat)


def asked(script: ModuleType, part: str, model: Path, folder: Path, data: list[str], *more: object) -> argparse.Namespace:
    """Return what a command line asks the script for."""
    words = [part, "--backbone", model, "--cache", folder / "cache", "--data", *(folder / name for name in data), *more]
    arguments: argparse.Namespace = script.parser().parse_args([str(word) for word in words])
    return arguments


def write_few_shot(folder: Path, task: Task, k: int, seeds: tuple[int, ...]) -> None:
    """Write a task's rows as few-shot files that call their number K."""
    own = folder / task.name
    own.mkdir(parents=True)
    for seed in seeds:
        sample = task.sample(seed, 4, 6)
        names = (f"{k}_{seed}_train", f"{k}_{seed}_dev", "test")
        for name, rows in zip(names, sample, strict=True):
            lines = [json.dumps({"input": e.input, "output": e.answers[0], "options": list(e.options)}) for e in rows]
            (own / f"{task.name}_{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_real_language_prints_a_table_after_each_part(
    tmp_path: Path, world: World, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_language = script("real_language")
    model = tiny_llama(tmp_path, world)
    write_few_shot(tmp_path / "first", tasks[NAMES[0]], 32, (100, 21, 42))
    for name in NAMES:
        write_few_shot(tmp_path / "second", tasks[name], 16, (100, 21, 42))
    usual = real_language.settings
    fewer = {"steps": 2, "evaluations": 1, "subspace_steps": 1, "test_rows": 4}
    monkeypatch.setattr(real_language, "settings", lambda arguments: usual(arguments) | fewer)
    monkeypatch.setattr(real_language, "split_by_validation", lambda x: {"seen": [*NAMES[:2]], "unseen": [NAMES[2]]})
    monkeypatch.setattr(real_language, "SPACES", (("random", 4), ("subspace", 4), ("subspace", 2)))
    command = ("subspaces", model, tmp_path, ["first", "second"], "--tasks", 3)
    real_language.subspaces(asked(real_language, *command, "--seeds", 2))
    printed = capsys.readouterr().out
    assert sorted(json.loads((tmp_path / "cache" / "candidates.yaml").read_text(encoding="utf-8"))["seen"]) == sorted(NAMES)
    assert printed.count("T_test(IST)") >= 2 * 3 and printed.count("T_train_diff(IST)") >= 2 * 3
    assert printed.index("seed 0") < printed.index("seed 1") < printed.index("over runs with other orders")
    own = (tmp_path / "cache" / "data" / NAMES[0] / f"{NAMES[0]}_32_100_train.jsonl").resolve()
    assert own == (tmp_path / "first" / NAMES[0] / own.name).resolve()  # the first folder's, where both have a task
    real_language.subspaces(asked(real_language, *command, "--seeds", 2))
    assert capsys.readouterr().out == printed  # all was there
    real_language.subspaces(asked(real_language, *command, "--spaces", 0))
    (only,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unseen tasks ")]
    assert only in printed  # prompt tuning beside no prompt and one answer for all


def test_real_language_has_every_task_unseen_once(
    tmp_path: Path, world: World, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_language = script("real_language")
    model = tiny_llama(tmp_path, world)
    names = [*NAMES, *[task for task in tasks if task not in NAMES][:5]]
    for name in names:
        write_few_shot(tmp_path / "first", tasks[name], 32, (100, 21))
    monkeypatch.setattr(real_language, "FEW_STEPS", real_language.FEW_STEPS | {"evaluations": 1})
    monkeypatch.setattr(real_language, "split_by_validation", lambda x: {"seen": names[:6], "unseen": names[6:]})
    monkeypatch.setattr(real_language, "FOLD_SPACES", (("subspace", 4), ("low-rank", 8)))
    command = ("folds", model, tmp_path, ["first"], "--tasks", 9, "--steps", 2, "--subspace-steps", 1, "--test-rows", 4, "--also")
    real_language.folds(asked(real_language, *command, "--splits", 2))
    ways, counts = pairs_of(capsys.readouterr().out)
    assert counts == {"4"} and {"no prompt", "one answer for all"} <= ways and not any("nearest prompt" in way for way in ways)
    real_language.folds(asked(real_language, *command, "nearest", "other-data"))
    printed = capsys.readouterr().out
    rates = [line for line in printed.splitlines() if ": validation rate 0.3 " in line and ", rate 3 " in line]
    assert [line.split()[0] for line in rates] == ["low-rank", "linear", "subspace", "prompt"]
    assert all(line.endswith("(n=2)") for line in rates)
    printed, _, known = printed.partition("other data of the first split's seen tasks")
    records = printed.partition("best step\n")[2].splitlines()
    assert {line.split("  ")[0] for line in records[:4]} == {line.split(":")[0] for line in rates}
    ways, counts = pairs_of(known)
    assert counts == {str(len(names) - 2)} and {"prompt tuning", "T_train_diff(IST) subspace 4"} <= ways
    ways, counts = pairs_of(printed)
    assert counts == {str(len(names))}
    assert {
        "prompt tuning",
        "T_test(IST) subspace 4",
        f"T_test(IST) linear {len(names) - 3}",
        "T_test(nearest) nearest 0",
    } <= ways
    assert any(way.startswith("T_test(warm start), nearest prompt") for way in ways)
    unseen = [json.loads(file.read_text(encoding="utf-8"))["unseen"] for file in (tmp_path / "cache").glob("fold-*.yaml")]
    assert sorted(task for fold in unseen for task in fold) == sorted(names)


def test_real_language_compares_settings_task_by_task(
    tmp_path: Path, world: World, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_language = script("real_language")
    model = tiny_llama(tmp_path, world, chat=True)
    for name in NAMES:
        write_few_shot(tmp_path / "data", tasks[name], 32, (100,))
    (tmp_path / "split.yaml").write_text(json.dumps({"seen": NAMES}), encoding="utf-8")
    usual = real_language.settings
    monkeypatch.setattr(real_language, "settings", lambda arguments: usual(arguments) | {"split": str(tmp_path / "split.yaml")})
    monkeypatch.setattr(real_language, "DEFAULTS_TASKS", NAMES)
    monkeypatch.setattr(real_language, "CHANGES", ({"steps": 2}, {"steps": 2, "chat": True}))
    arguments = asked(real_language, "defaults", model, tmp_path, ["data"])
    real_language.defaults(arguments)
    plain, written = capsys.readouterr().out.splitlines()
    assert plain.startswith('{"steps": 2}: validation 0.') and written.startswith('{"steps": 2, "chat": true}: validation 0.')
    assert plain.count("(n=3)") == written.count("(n=3)") == 7  # four of the records, three of the test rows
    real_language.chat(arguments)
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told[:3]] == ["plain", "chat template", "validation"] and len(told) == 2 + 7
    loss = {line.split(": ")[0]: float(line.split("validation_loss ")[1].split()[0]) for line in told[:2]}
    (more,) = [float(line.split()[1]) for line in told if line.startswith("validation_loss: ")]
    assert more == pytest.approx(loss["chat template"] - loss["plain"], abs=2e-3) and more != 0


def few_tasks(usual: Callable[..., Experiment], unseen: int) -> Callable[..., Experiment]:
    """Return what makes the testbed's experiment with little to do."""

    def small(cache: Path, **given: Any) -> Experiment:
        x = usual(cache, **{"steps": 2, "evaluations": 1, "subspace_steps": 1, "test_rows": 4} | given)
        x.roles = {task: x.roles[task] for task in x.named("seen")[:3] + x.named("unseen")[:unseen]}
        return x

    return small


def test_the_testbed_tells_what_is_above_what_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    testbed = script("testbed")
    monkeypatch.setattr(testbed, "experiment", few_tasks(testbed.experiment, unseen=2))
    monkeypatch.setattr(testbed, "SEEDS_SPACES", (("random", 4), ("low-rank", 250)))
    testbed.seeds(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("prompt tuning  n ") == 3 and printed.index("mean +- standard deviation") > 0
    above = [line.split() for line in printed.splitlines() if line.startswith("random 4 ")]
    assert [(line[2:-3], line[-3]) for line in above] == [
        (["low-rank", "250"], "3"), (["prompt", "tuning"], "3"), (["low-rank", "250"], "2"), (["prompt", "tuning"], "2"),
    ]  # fmt: skip


def test_the_testbed_pools_splits_in_which_other_tasks_are_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    testbed = script("testbed")
    usual, kept = testbed.experiment, list[str]()

    def small(cache: Path, **given: Any) -> Experiment:
        x: Experiment = usual(cache, steps=2, evaluations=1, subspace_steps=1, test_rows=4, **given)
        if not given:
            composed = [task for task in x.roles if not x.task(task).pretrained]
            kept[:] = composed[:8]
        x.roles = {task: role for task, role in x.roles.items() if task in kept}
        return x

    monkeypatch.setattr(testbed, "experiment", small)
    monkeypatch.setattr(testbed, "FOLD_SPACES", (("subspace", 4), ("low-rank", 250)))
    testbed.folds(tmp_path)
    printed = capsys.readouterr().out
    ways, counts = pairs_of(printed[printed.rindex("means over the runs") :])
    assert {"T_test(IST), nearest subspace 4", "T_test(warm start), nearest prompt 3072", "prompt tuning"} <= ways
    assert counts == {"8"}
    told = printed[printed.rindex("over runs with other") : printed.rindex("means over the runs")]
    (learned,) = [line.split() for line in told.splitlines() if line.startswith("T_test(IST) ") and " subspace " in line]
    means = re.findall(r"^prompt tuning: mean score ([\d.]+), .* n=8$", printed, re.MULTILINE)
    first, second, of_two, third, of_three = map(float, means)
    assert learned[3] == "3" and of_two == pytest.approx((first + second) / 2, abs=1e-3)
    assert of_three == pytest.approx((first + second + third) / 3, abs=1e-3)
    testbed.grids(tmp_path)
    printed = capsys.readouterr().out
    assert pairs_of(printed)[1] == {"8"}
    rates = {read_file(path)[0]["learning_rate"] for path in tmp_path.glob("*/intrinsic-vectors/*")}
    assert rates == {0.1, 0.3, 1.0} and "T_test(warm start), nearest" in printed
    spaces = sorted(tmp_path.glob("*/subspaces/*"))
    monkeypatch.setattr(testbed, "SHOTS", (2,))
    testbed.shots(tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("2 rows per label") and pairs_of(printed)[1] == {"8"}
    assert spaces == sorted(tmp_path.glob("*/subspaces/*")), "the spaces are those of prompts with all their rows"
    for seed in range(3):
        files = sorted(tmp_path.glob(f"fold-{seed}-*.yaml"))
        unseen = [yaml.safe_load(file.read_text(encoding="utf-8"))["unseen"] for file in files]
        assert sorted(itertools.chain(*unseen)) == sorted(kept) and len(unseen) == 4


def pairs_of(printed: str) -> tuple[set[str], set[str]]:
    """Return the ways that the last table compares, and its numbers of tasks."""
    lines = [re.split("  +", line) for line in printed[printed.rindex("way ") :].splitlines()[1:] if line]
    return {way for line in lines for way in line[:2]}, {line[2] for line in lines}


def test_the_testbed_compares_known_tasks_with_prompts_of_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    testbed = script("testbed")
    monkeypatch.setattr(testbed, "experiment", few_tasks(testbed.experiment, unseen=1))
    testbed.nearby(tmp_path)
    means, pairs = capsys.readouterr().out.partition("way  ")[2].split("\n\n")[:2]
    ways = [re.split(r"  +", line)[0] for line in means.splitlines()[1:]]
    about = [f"T_train_diff(IST) subspace {dim} {start}" for dim in (10, 250) for start in ("nearest", "random")]
    assert sorted(ways) == sorted(
        ["prompt tuning, the same rows", "prompt tuning", "T_train_diff(warm start) prompt 3072 nearest", *about]
    )
    assert len(pairs.strip().splitlines()) == 1 + 21


def test_the_testbed_compares_ten_runs_of_each_task_and_what_goes_on_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    testbed = script("testbed")
    small = few_tasks(testbed.experiment, unseen=2)
    monkeypatch.setattr(testbed, "experiment", lambda cache, **given: small(cache, **{"steps": 4} | given))
    testbed.stability(tmp_path)
    printed = capsys.readouterr().out
    told = [
        [re.split("  +", line)[0] for line in table.split("\n\n")[0].splitlines()[1:]]
        for table in re.split("^way ", printed, flags=re.MULTILINE)[1:]
    ]
    tuned = ["prompt tuning", "subspace 250", "subspace 10", "random 250", "random 10"]
    two_stage = ["two-stage, 4 steps", "two-stage, 1 steps", "prompt tuning twice"]
    nearest = [f"{way}, nearest start" for way in tuned[:3]]
    assert told[0] == [*tuned, *two_stage, *(f"{way}, 8 steps" for way in tuned if "10" not in way), *nearest]
    assert told[2] == [*tuned[:4], *nearest]
    assert told[1][0] == told[3][0] == "prompt tuning" and pairs_of(printed)[1] == {"3"}
    headers = [read_file(path)[0] for path in tmp_path.glob("*/soft-prompts/*")]
    begun = [header["start_prompt"] for header in headers if header.get("start") == "subspace"]
    vectors = {path.stem.rpartition("-")[2] for path in tmp_path.glob("*/intrinsic-vectors/*")}
    assert len(begun) == 2 * 2 * 10 and len({*begun}) == 2 * 10 and {*begun} <= vectors
    seeds = [header["seed"] for header in headers if header.get("start") == "nearest"]
    assert sorted(seeds) == sorted([*range(10)] * (2 + 3))


def test_every_part_of_the_testbed_s_script_is_told() -> None:
    parts = set(re.findall(r"testbed\.py (\w+) --cache", (EXPERIMENTS / "testbed.py").read_text(encoding="utf-8")))
    text = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    assert parts <= set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^#.*", text, re.MULTILINE))))


def test_mean_scores_are_of_one_space_and_over_runs() -> None:
    testbed = script("testbed")

    def run(learned: float, random: float) -> dict[str, list[dict[str, object]]]:
        shared = {"quantity": "T_test(IST)", "task": "a"}
        return {
            "scores": [
                shared | {"space": "subspace", "dim": 4, "value": learned},
                shared | {"space": "random", "dim": 4, "value": random},
            ]
        }

    runs = [run(0.5, 0.1), run(1.0, 0.2)]
    assert testbed.mean_scores(runs, "T_test(IST)", "subspace", 4) == {"a": 0.75}
    assert testbed.mean_scores(runs, "T_test(IST)", "subspace", 5) == testbed.mean_scores(runs, "T_test(MSF)", "random", 4) == {}
