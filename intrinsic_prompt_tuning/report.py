"""The paper's table of what the cache holds: scores on test rows, compared with prompt tuning."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from intrinsic_prompt_tuning.context import COLLECTION_SEED
from intrinsic_prompt_tuning.evaluation import dimensions_needed, paper_name, result_rows
from intrinsic_prompt_tuning.experiment import Experiment, differences
from intrinsic_prompt_tuning.makers import answers_of
from intrinsic_prompt_tuning.metrics import METRICS
from intrinsic_prompt_tuning.reporter import table_text
from intrinsic_prompt_tuning.results import Result

BASELINES = {"prompt tuning": "mean_score", "no prompt": "no_prompt", "one answer for all": "one_answer"}
"""Stages of scores that others are compared with -> keys of the report."""


def wrong_answers(x: Experiment, scores: Sequence[Result], width: int | None) -> dict[str, Any]:
    """Return what scores of one task are of, numbered, and test rows: input, right answers, and by those numbers wrong ones."""
    scores = [score for score in scores if score.header["stage"] != "one answer for all"]
    task, metric, answers = scores[0].header["task"], scores[0].header["metric"], answers_of(x, scores)
    score_one, rows = METRICS[metric if metric in ("EM", "QA-F1", "Rouge-L") else "ACC"], list[dict[str, Any]]()
    # A metric of all rows together says nothing of one: there, what is a reference is right.
    for n, row in enumerate(x.sample(task, COLLECTION_SEED).test):
        wrong = {at: own[n] for at, own in enumerate(answers.values(), 1) if score_one([own[n]], [row.answers]) < 1}
        text = " ".join(row.input.split())[:width]
        rows += [{"row": n + 1, "input": text, "right": list(row.answers), "wrong": wrong}] if wrong else []
    told = {at: {k: v for k, v in told_score(x, score).items() if v is not None} for at, score in enumerate(scores, 1)}
    return {"task": task, "metric": metric, "prompts": told, "rows": rows}


def make_report(x: Experiment, scores: Sequence[Result]) -> dict[str, Any]:
    """Return the paper's table, and what stands beside it, of scores that have been made.

    Returns:
        `backbone`, `split`; `prompt_tuning` (per role: tasks and mean scores of the baselines), `no_better_than_no_prompt` (tasks
        on which prompt tuning is not), `imported` (tasks whose baseline is), `rows` (see `result_rows`), `dimensions_needed`,
        `rows_without_pretrained` (the seen tasks again, but for those whose very question the backbone was trained on),
        `subspaces` (what tells apart those of one space and dim) and `scores` (one a task).
    """
    told = [told_score(x, score) for score in scores]
    by_stage = {stage: {s["task"]: s["value"] for s in told if s["quantity"] == stage} for stage in BASELINES}
    tuned, floor = by_stage["prompt tuning"], by_stage["no prompt"]
    roles = {role: [task for task in tuned if x.roles[task] == role] for role in dict.fromkeys(x.roles[task] for task in tuned)}
    compared = [score for score in told if score["space"]]
    pretrained = {task for task in tuned if x.task(task).pretrained}
    others = [s for s in compared if s["task"] not in pretrained and x.roles[s["task"]] == "seen"] if pretrained else []
    rows = result_rows(compared, tuned, floor)
    best = [x.store.best(*score.inputs)[0] for score in scores if score.header["stage"] == "prompt tuning"]
    return {
        "backbone": x.options.backbone,
        "split": x.options.split,
        "prompt_tuning": {
            role: {"n_tasks": len(own)} | {key: fmean(by_stage[stage][task] for task in own) for stage, key in BASELINES.items()}
            for role, own in roles.items()
        },
        "no_better_than_no_prompt": [task for task in tuned if tuned[task] <= floor[task]],
        "imported": [result.header["task"] for result in best if "imported" in result.header],
        "rows": rows,
        "dimensions_needed": dimensions_needed(rows),
        "rows_without_pretrained": result_rows(others, tuned, floor),
        "subspaces": differences(choice[0] for score in scores for choice in score.inputs if choice[0].kind == "subspace"),
        "scores": sorted(told, key=lambda s: (s["task"], s["quantity"], s["space"] or "", s["dim"] or 0, s["start"] or "")),
    }


def told_score(x: Experiment, score: Result) -> dict[str, Any]:
    """Return a score as the table takes it."""
    header, (record, _) = score.header, x.store.read(score)
    stage, role = header["stage"], x.roles[header["task"]]
    name = stage if stage in BASELINES else paper_name(stage, role, same_data=header["data_seed"] == COLLECTION_SEED)
    about = {key: header.get(key) for key in ("task", "space", "start", "dim", "data_seed", "subspace")}
    candidates = len(header["of"][0]) if header["of"] else 1
    return {"quantity": name, "role": role, **about, "candidates": candidates, "value": record["score"], "n": record["n"]}


# --- For people


def report_text(report: Mapping[str, Any], *, wide: bool) -> str:
    """Write the paper's table and what stands beside it; every task's scores where the report has them."""
    text = f"backbone {report['backbone']}, split {report['split']}, test scores; baselines with data seed {COLLECTION_SEED}\n\n"
    baselines = [[f"{role} tasks", *row.values()] for role, row in report["prompt_tuning"].items()]
    text += table_text("prompt tuning|n|mean score|no prompt|one answer for all", baselines)
    text += rows_text(report["rows"], wide)
    text += needed_text(report["dimensions_needed"], report["rows"])
    for name, words in report["subspaces"].items():
        text += f"subspace {name[:8]}: {words or 'nothing differs but the soft prompts'}\n"
    for name, words in {"imported": "an imported prompt", "no_better_than_no_prompt": "no better than no prompt"}.items():
        if tasks := report.get(name):
            text += f"prompt tuning is {words} on {len(tasks)} task{'s' * (len(tasks) > 1)}: {', '.join(tasks)}\n"
    if wide and report["rows_without_pretrained"]:
        text += "seen tasks without those whose very question the backbone was trained on\n\n"
        text += rows_text(report["rows_without_pretrained"], wide)
    if "scores" in report:
        columns = ("task", "quantity", "dim", "space", "start", "data_seed", "value")
        text += table_text("|".join(columns), [[score[column] for column in columns] for score in report["scores"]])
    return text.removesuffix("\n")


def _figure_text(row: Mapping[str, Any], name: str) -> str | None:
    """Write a figure with the interval or the standard deviation that the row has of it, or nothing."""
    low, high, deviation = (row.get(f"{name}_{of}") for of in ("low", "high", "sd"))
    beside = "" if deviation is None else f" +- {deviation:.3f}"
    beside = beside if low is None or high is None else f" [{low:.3f} {high:.3f}]"
    return None if row[name] is None else f"{row[name]:.3f}{beside}"


def spread_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Write means and standard deviations over runs."""
    heads = "quantity|space|dim|runs|E_rel|gain|mean score|task's sd"
    about, figures = ("quantity", "space", "dim", "n_runs"), ("e_rel", "gain", "mean_score")
    cells = [[*map(row.get, about), *(_figure_text(row, name) for name in figures), row["task_sd"]] for row in rows]
    title = "over runs with other orders of rows, starts of vectors, subspaces and data: mean +- standard deviation"
    return f"{title}\n\n{table_text(heads, cells)}"


def needed_text(needed: Mapping[str, Mapping[str, float | None]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the dimensions needed by the rows of a report, or nothing where no vector was tuned."""
    cells = []
    for space, of, dim in ((space, of, dim) for space, own in needed.items() for of, dim in own.items()):
        run = [row["dim"] for row in rows if (row["space"], row["quantity"], row["start"]) == (space, of, "random")]
        cells.append([space, of, f"{'at most ' * (dim == min(run, default=None))}{dim:.1f}" if dim else "more"])
    return table_text("space|quantity|dimensions needed for 90 % of gain", cells) if cells else ""


def rows_text(rows: Sequence[Mapping[str, Any]], wide: bool) -> str:
    """Write rows of the paper's table: in 100 columns what every reader needs, and what tells two rows apart; or every column."""
    alike = len({(row["quantity"], row["space"], row["dim"]) for row in rows}) < len(rows)
    alike |= any(row["start"] not in (None, "random") for row in rows)
    shown = ["quantity", "space", "dim", "numbers"] + (["start", "data_seed", "subspace"] if wide or alike else [])
    shown += ["n_tasks", "e_rel"] + (["n_excluded", "median_ratio", "ratio_of_means", "candidates"] if wide else [])
    heads = {"n_tasks": "n", "e_rel": "E_rel", "n_excluded": "excluded", "median_ratio": "median"}
    cells = []
    for row in rows:
        told = {**row, "subspace": row["subspace"] and row["subspace"][:8], "e_rel": _figure_text(row, "e_rel")}
        gain = _figure_text(row, "gain") if wide else row["gain"]
        means = f"{row['mean_score']:.3f} / {row['mean_prompt_tuning']:.3f}"
        cells.append([*(told[name] for name in shown), gain, means])
    names = [*(heads.get(name, name.replace("_", " ")) for name in shown), "gain", "mean / prompt tuning"]
    return table_text("|".join(names), cells) if rows else ""


def sample_text(x: Experiment, name: str, data_seed: int) -> str:
    """Write a task's first rows as the backbone gets them, with their lengths in tokens."""
    lines = []
    for part, rows in zip(("train", "validation", "test"), x.encoded(name, data_seed), strict=True):
        lines.append(f"{name}, {part}: {len(rows)} rows, {sum(e.truncated for e in rows)} truncated")
        for e in rows[:8]:
            options = f"   options: {' | '.join(e.example.options)}" if e.example.options else ""
            text, answers = x.backbone.tokenizer.decode(e.input_ids), " / ".join(e.example.answers)
            lines.append(f"  {len(e.input_ids)} tokens: {text} -> {len(e.target_ids)} tokens: {answers}{options}")
    return "\n".join(lines)
