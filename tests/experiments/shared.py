"""What both scripts of experiments do: make and tell scores, draw splits, compare ways of tuning task by task."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import ipt
from intrinsic_prompt_tuning import Experiment
from intrinsic_prompt_tuning.evaluation import relative_performance
from intrinsic_prompt_tuning.files import write_bytes
from intrinsic_prompt_tuning.report import make_report, needed_text, table_text
from intrinsic_prompt_tuning.results import Choice, Result
from intrinsic_prompt_tuning.spaces import SpaceKind

Spaces = tuple[tuple[SpaceKind, int], ...]


def every(choices: Iterable[Choice]) -> list[Result]:
    """Return all results of choices."""
    return [result for choice in choices for result in choice]


def reported(x: Experiment, prompts: Mapping[str, Choice], spaces: Sequence[Result], vectors: Sequence[Choice]) -> dict[str, Any]:
    """Make prompts, spaces, vectors and their scores; print the table and return it."""
    scores = x.scores(prompts, spaces, vectors)
    x.make([*every([*prompts.values(), *vectors]), *spaces, *scores])
    report = make_report(x, scores)
    ipt.print_report(report, as_json=False, per_task=False, wide=True)
    return report


def write_split(cache: Path, name: str, seen: Sequence[str], unseen: Sequence[str]) -> Path:
    """Write a split, which `--split` takes, beside the results."""
    file = cache / f"{name}.yaml"
    write_bytes(file, json.dumps({"seen": list(seen), "unseen": list(unseen)}, indent=1).encode())
    return file


def splits_drawn(cache: Path, tasks: Sequence[str], every_task: Sequence[str]) -> list[Path]:
    """Write four splits, drawn by seed 0, in each of which a fourth of some tasks is unseen, and every other task seen."""
    drawn = random.Random(0).sample(tasks, len(tasks))
    folds = [drawn[n::4] for n in range(4)]
    return [
        write_split(cache, f"fold-{n}", [task for task in every_task if task not in unseen], unseen)
        for n, unseen in enumerate(folds)
    ]


def pooled_text(told: Sequence[dict[str, Any]]) -> str:
    """Write what unseen tasks of several splits score together, and what is above what, task by task."""
    floor, baseline = (
        {s["task"]: s["value"] for s in told if s["quantity"] == stage} for stage in ("no prompt", "prompt tuning")
    )
    by_way, rows = {"prompt tuning": baseline}, dict[str, dict[str, Any]]()
    for score in told:
        if score["space"]:
            way = f"{score['quantity']} {score['space']} {score['dim']}" + " nearest" * (score["start"] == "nearest")
            by_way.setdefault(way, {})[score["task"]] = score["value"]
            rows[way] = {name: score[name] for name in ("quantity", "space", "dim", "start")}
    lines = []
    for way, own in by_way.items():
        told_of = relative_performance(own, baseline, floor)
        figures = [told_of[f"{name}{bound}"] for name in ("e_rel", "gain") for bound in ("", "_low", "_high")]
        lines.append([way, len(own), told_of["mean_score"], pstdev(own.values()), *figures])
        rows.get(way, {})["gain"] = told_of["gain"]
    text = table_text("way|n|mean score|over tasks|E_rel|from|to|gain|from|to", lines)
    return text + needed_text([*rows.values()]) + pairs_text(by_way)


def pairs_text(by_way: Mapping[str, Mapping[str, float]]) -> str:
    """Write how much each way scores above each other one, task by task."""
    pairs = []
    for one, other in itertools.combinations(by_way, 2):
        more = [score - by_way[other][task] for task, score in by_way[one].items()]
        pairs.append([one, other, len(more), *mean_with_error(more)])
    return table_text("way|over|n|difference|standard error", pairs)


def mean_with_error(differences: Sequence[float]) -> tuple[str, float]:
    """Return a mean with its sign, and its standard error."""
    return f"{fmean(differences):+.3f}", stdev(differences) / len(differences) ** 0.5
