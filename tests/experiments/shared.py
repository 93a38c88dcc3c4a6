"""What both scripts of experiments do: make and tell scores, draw splits, compare ways of tuning task by task."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import ipt
from intrinsic_prompt_tuning import Experiment
from intrinsic_prompt_tuning.evaluation import dimensions_needed, relative_performance, result_rows
from intrinsic_prompt_tuning.files import write_bytes
from intrinsic_prompt_tuning.report import make_report, needed_text, rows_text
from intrinsic_prompt_tuning.reporter import table_text
from intrinsic_prompt_tuning.results import Choice, Result
from intrinsic_prompt_tuning.spaces import SpaceKind

Spaces = tuple[tuple[SpaceKind, int], ...]
FLOORS = ("no prompt", "one answer for all")


def every(choices: Iterable[Choice]) -> list[Result]:
    """Return all results of choices."""
    return [result for choice in choices for result in choice]


def with_rates(x: Experiment, *rates: float) -> Experiment:
    """Return the experiment with other learning rates."""
    other = copy.copy(x)
    other.rates = replace(x.rates, learning_rate=[*rates], vector_learning_rate=[*rates])
    return other


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


def splits_drawn(cache: Path, tasks: Sequence[str], every_task: Sequence[str], seed: int = 0) -> list[Path]:
    """Write four splits, drawn by a seed, in each of which a fourth of some tasks is unseen, and every other task seen."""
    drawn = random.Random(seed).sample(tasks, len(tasks))
    folds = [drawn[n::4] for n in range(4)]
    return [
        write_split(cache, f"fold-{seed}-{n}", [task for task in every_task if task not in unseen], unseen)
        for n, unseen in enumerate(folds)
    ]


def pooled(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one report (see `spread`) of scores in several splits, whichever subspace of a kind and dim each task had."""
    scores = [s | {"subspace": None, "quantity": s["quantity"] + ", nearest" * (s["start"] == "nearest")} for s in told]
    floor, baseline = (
        {s["task"]: s["value"] for s in scores if s["quantity"] == stage} for stage in ("no prompt", "prompt tuning")
    )
    return {"scores": scores, "rows": result_rows([score for score in scores if score["space"]], baseline, floor)}


def averaged(runs: Iterable[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return scores with their means over runs."""
    found = defaultdict[tuple[Any, ...], list[dict[str, Any]]](list)
    for score in itertools.chain(*runs):
        found[tuple(score[name] for name in ("task", "quantity", "space", "dim", "start"))].append(score)
    return [own[0] | {"value": fmean(score["value"] for score in own)} for own in found.values()]


def pooled_text(told: Sequence[dict[str, Any]]) -> str:
    """Write what unseen tasks of several splits score together, and what is above what, task by task."""
    report, by_way = pooled(told), dict[str, dict[str, float]]()
    for score in report["scores"]:
        if score["space"] or score["quantity"] in ("prompt tuning", *FLOORS):
            way = " ".join(str(score[name]) for name in ("quantity", "space", "dim") if score[name] is not None)
            by_way.setdefault(way, {})[score["task"]] = score["value"]
    tuned, floor, rows = by_way["prompt tuning"], by_way["no prompt"], report["rows"]
    spread = f"standard deviation over tasks {pstdev(tuned.values()):.3f}, n={len(tuned)}"
    text = f"prompt tuning: mean score {fmean(tuned.values()):.3f}, {spread}\n"
    alone = [[way, relative_performance(by_way[way], tuned, floor)] for way in FLOORS]
    text += table_text("tuned nothing|n|E_rel|mean score", [[way, a["n_tasks"], a["e_rel"], a["mean_score"]] for way, a in alone])
    return text + rows_text(rows, wide=True) + needed_text(dimensions_needed(rows), rows) + pairs_text(by_way)


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
