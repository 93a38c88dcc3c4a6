"""What the scores come to: the paper's relative performance E_rel (section 4.1), beside what keeps it honest.

Gain, which what the model can do anyway cannot inflate; intervals over tasks; the absolute scores; the dimensions needed.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

LEAST_BASELINE = 0.02
"""A task on which prompt tuning scores no more has no ratio: one such task could rule the mean of a hundred."""
RECOVERED = 0.9
"""The gain at which dimensions suffice."""
Scores = Mapping[str, float]
"""Task -> test score."""


def paper_name(stage: str, role: str, *, same_data: bool) -> str:
    """Return the paper's name of a score; a split with in- and out-of-type test tasks has T_test_in and T_test_out."""
    if role == "seen":
        return "T_train(MSF)" if stage == "MSF" else f"T_train_{'same' if same_data else 'diff'}({stage})"
    return f"T_test{role.removeprefix('unseen').replace('-', '_')}({stage})"


def relative_performance(scores: Scores, baseline: Scores, floor: Scores) -> dict[str, float | int | None]:
    """Compare scores per task with prompt tuning's.

    Args:
        scores: of the method, on one task at least.
        baseline: of prompt tuning, on all of these tasks.
        floor: of the backbone without a prompt, likewise.

    Returns:
        `e_rel`, the mean over tasks of the ratios, and `median_ratio`; `n_tasks` in them, `n_excluded` whose prompt-tuning
        score is at most LEAST_BASELINE. Over all tasks: `mean_score`, `mean_prompt_tuning`, `ratio_of_means`, and `gain`, the
        ratio of the means after the floor's is taken off both. Bounds `_low` and `_high` are those of a 95 % bootstrap over
        tasks. None where there is nothing to divide by, or one task alone.
    """
    ratios = [scores[task] / baseline[task] for task in scores if baseline[task] > LEAST_BASELINE]
    both = [(scores[task] - floor[task], baseline[task] - floor[task]) for task in scores]
    mean_score, mean_baseline = fmean(scores.values()), fmean(baseline[task] for task in scores)
    return {
        "n_tasks": len(ratios),
        "n_excluded": len(scores) - len(ratios),
        **_with_interval("e_rel", ratios, fmean),
        "median_ratio": median(ratios) if ratios else None,
        **_with_interval("gain", both, _gain),
        "mean_score": mean_score,
        "mean_prompt_tuning": mean_baseline,
        "ratio_of_means": mean_score / mean_baseline if mean_baseline else None,
    }


def _gain(pairs: Sequence[tuple[float, float]]) -> float:
    """Return what a method gains over no prompt beside what prompt tuning gains; endless where that is nothing."""
    method, baseline = (fmean(side) for side in zip(*pairs, strict=True))
    return method / baseline if baseline > 1e-9 else math.copysign(math.inf, method)


def _with_interval(name: str, values: Sequence[Any], figure: Callable[[Sequence[Any]], float]) -> dict[str, float | None]:
    """Return a figure of values, one a task, and its 95 % bootstrap interval; None for what has no end."""
    rng, found = random.Random(0), [figure(values) if values else math.inf, math.inf, math.inf]
    if math.isfinite(found[0]) and len(values) > 1:
        drawn = sorted(figure(rng.choices(values, k=len(values))) for _ in range(2000))
        found[1:] = drawn[50], drawn[-51]
    names = (name, f"{name}_low", f"{name}_high")
    return {name: one if math.isfinite(one) else None for name, one in zip(names, found, strict=True)}


GROUP = ("quantity", "space", "start", "dim", "data_seed", "subspace")
"""What a row of the paper's table is of."""


def result_rows(scores: Iterable[Mapping[str, Any]], baseline: Scores, floor: Scores) -> list[dict[str, Any]]:
    """Return the paper's table, in the paper's order.

    Args:
        scores: `task`, `value`, `candidates`, `quantity`, `space`, `dim`, and the other fields of GROUP if they have them.
        baseline: scores of prompt tuning.
        floor: scores without a prompt.
    """
    rows = [
        dict(zip(GROUP, group, strict=True))
        | {"numbers": own[0]["dim"], "candidates": max(score["candidates"] for score in own)}
        | relative_performance({score["task"]: score["value"] for score in own}, baseline, floor)
        for group, own in _alike(scores, GROUP).items()
    ]
    spaces = ("subspace", "linear", "random", "random-unscaled", "low-rank", "nearest", "mean", "prompt")

    def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
        quantity, space = row["quantity"], (spaces.index(row["space"]), -row["dim"], row["subspace"] or "")
        stage = ("train" not in quantity, "MSF" not in quantity, "same" not in quantity, quantity, row["start"] or "")
        return *space, *stage, row["data_seed"]

    return sorted(rows, key=order)


def _alike(items: Iterable[Mapping[str, Any]], names: Sequence[str]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Return the values that items have under some names -> the items that have them, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for item in items:
        groups.setdefault(tuple(map(item.get, names)), []).append(item)
    return groups


def dimensions_needed(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return, by space and quantity, the smallest dim at which a space recovers 90 % of prompt tuning's gain.

    Several rows of one dim (data seeds, subspaces) count with their mean.

    Between the dims that were run, gain is taken to be linear in the logarithm of dim. A space that recovers as much at the
    smallest dim that was run needs at most that; one that never does has None.
    """
    tuned = (row for row in rows if "IST" in row["quantity"] and row["start"] == "random" and row["gain"] is not None)
    needed: dict[str, dict[str, float | None]] = {}
    for (space, quantity), own in _alike(tuned, ("space", "quantity")).items():
        by_dim = sorted(_alike(own, ("dim",)).items())
        needed.setdefault(space, {})[quantity] = _crossing([(d, fmean(row["gain"] for row in alike)) for (d,), alike in by_dim])
    return needed


def _crossing(points: Sequence[tuple[int, float]]) -> float | None:
    """Return the dim at which the gain first reaches RECOVERED."""
    for (low, less), (dim, gain) in itertools.pairwise([points[0], *points]):
        if gain >= RECOVERED:
            return low * (dim / low) ** ((RECOVERED - less) / (gain - less)) if gain > less else float(dim)
    return None


def spread(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return how the rows of the paper's table, and prompt tuning, differ between runs with other seeds.

    Args:
        reports: of the runs, each with `rows` (see `result_rows`) and `scores` (`quantity`, `role`, `space`, `dim`, `task`,
            `value`).

    Returns:
        Of each quantity, space and dim, and of each baseline of seen and of unseen tasks: `n_runs`; `e_rel`, `gain` and
        `mean_score` as means over runs, their standard deviations as `_sd`; and `task_sd`, the standard deviation of one task's
        score over runs, a mean over tasks (the paper's Table 2). A figure that a run lacks has no mean.
    """
    about, told = ("quantity", "space", "dim"), list[dict[str, Any]]()
    named = [[s if s["space"] else s | {"quantity": f"{s['quantity']}, {s['role']}"} for s in r["scores"]] for r in reports]
    runs = [(_alike(scores, about), _alike(report["rows"], about)) for scores, report in zip(named, reports, strict=True)]
    for key in dict.fromkeys(key for scores, _ in runs for key in scores):
        own = [(scores[key], rows.get(key, [{}])[-1]) for scores, rows in runs if key in scores]
        by_task = _alike((score for scores, _ in own for score in scores), ("task",)).values()
        deviations = [stdev(score["value"] for score in alike) for alike in by_task if len(alike) > 1]
        row = dict(zip(about, key, strict=True)) | {"n_runs": len(own), "task_sd": fmean(deviations) if deviations else None}
        figures = {name: [run.get(name) for _, run in own] for name in ("e_rel", "gain")}
        figures["mean_score"] = [fmean(score["value"] for score in scores) for scores, _ in own]
        for name, values in figures.items():
            known = [value for value in values if value is not None]
            known = known if len(known) == len(values) else []  # a mean of fewer runs is not what the row says
            row |= {name: fmean(known) if known else None, f"{name}_sd": stdev(known) if len(known) > 1 else None}
        told.append(row)
    return told
