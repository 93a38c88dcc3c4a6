"""The experiments' scripts run, on tiny models: what they print in earnest stands in tests/experiments/README.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from test_causal import save_model

from intrinsic_prompt_tuning.tasks import Task, World

EXPERIMENTS = Path(__file__).parent / "experiments"
NAMES = ("mood-good", "thing-plural", "even-or-good")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    (model := tmp_path / "model").mkdir()
    save_model(model, "llama", world)
    write_few_shot(tmp_path / "first", tasks[NAMES[0]], 32, (100, 21, 42))
    for name in NAMES:
        write_few_shot(tmp_path / "second", tasks[name], 16, (100, 21, 42))
    usual = real_language.settings
    fewer = {"steps": 2, "evaluations": 1, "subspace_steps": 1, "test_rows": 4}
    monkeypatch.setattr(real_language, "settings", lambda arguments: usual(arguments) | fewer)
    monkeypatch.setattr(real_language, "split_by_validation", lambda x: {"seen": [*NAMES[:2]], "unseen": [NAMES[2]]})
    monkeypatch.setattr(real_language, "SPACES", (("random", 4), ("subspace", 4), ("subspace", 2)))
    about = {"backbone": str(model), "cache": tmp_path / "cache", "precision": "fp32", "tasks": 3, "seeds": 2, "gpu_share": 1.0}
    about |= {"challenges": ["seen", "unseen"], "spaces": 9}
    arguments = argparse.Namespace(data=[tmp_path / "first", tmp_path / "second"], **about)
    real_language.subspaces(arguments)
    printed = capsys.readouterr().out
    assert sorted(json.loads((tmp_path / "cache" / "candidates.yaml").read_text(encoding="utf-8"))["seen"]) == sorted(NAMES)
    assert printed.count("T_test(IST)") >= 2 * 3 and printed.count("T_train_diff(IST)") >= 2 * 3
    assert printed.index("seed 0") < printed.index("seed 1") < printed.index("over runs with other starts")
    own = (tmp_path / "cache" / "data" / NAMES[0] / f"{NAMES[0]}_32_100_train.jsonl").resolve()
    assert own == (tmp_path / "first" / NAMES[0] / own.name).resolve()  # the first folder's, where both have a task
    real_language.subspaces(arguments)
    assert capsys.readouterr().out == printed  # all was there
    arguments.spaces, arguments.seeds = 0, 1
    real_language.subspaces(arguments)
    (only,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unseen tasks ")]
    assert only in printed  # prompt tuning beside no prompt and one answer for all
