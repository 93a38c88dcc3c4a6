"""An experiment as one page of HTML that needs no other file: what was run, the table, pictures, every task's scores."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from intrinsic_prompt_tuning.evaluation import GROUP
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.report import BASELINES, report_text
from intrinsic_prompt_tuning.results import Result


def make_page(
    x: Experiment, scores: Iterable[Result], report: Mapping[str, Any], pictures: Mapping[str, bytes], versions: str
) -> str:
    """Return the page of `scores` that have been made, what they come to, and pictures as SVG, by the names of their files."""
    told = {name: value for name, value in report.items() if name != "scores"}
    drawn = "".join(
        f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'
        for name, svg in pictures.items()
    )
    absent = [task for task in x.roles if task not in x.left_out and task not in {score["task"] for score in report["scores"]}]
    failed = [
        *x.left_out.values(),
        *([f"{len(absent)} tasks have no soft prompt in the cache: {', '.join(absent)}"] * bool(absent)),
    ]
    poor = [f"prompt tuning is no better than no prompt: {task}" for task in report["no_better_than_no_prompt"]]
    options = [
        f"{name} {v.name if isinstance(v, Path) else v}"
        for name, v in vars(x.options).items()
        if v is not None and name != "cache"
    ]
    sections = {
        "Scores": f"<pre>{escape(report_text(told, wide=False))}</pre>",
        "Every column": f"<details><summary>show</summary><pre>{escape(report_text(told, wide=True))}</pre></details>",
        "Pictures": drawn or "<p>None: matplotlib is not installed, or the cache holds too little.</p>",
        "What was run": f"<p>{escape(versions)}; backbone {x.store.fingerprint}; {escape(', '.join(options))}</p>"
        + _table(_made(scores)),
        "Tasks that failed or were left out": "".join(f"<li>{escape(why)}</li>" for why in [*failed, *poor]) or "<p>None.</p>",
        "Every task": "<p>Scores on the test rows; a click on a head sorts.</p>" + _by_task(x, report),
    }
    body = "".join(f"<h2>{title}</h2>\n<div>{content}</div>\n" for title, content in sections.items())
    return PAGE.replace("TITLE", escape(f"{report['backbone']}, split {report['split']}")).replace("BODY", body)


def _made(scores: Iterable[Result]) -> list[dict[str, Any]]:
    """Return what stands behind the scores: a row for all results of one kind and configuration."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in {result.name: result for score in scores for choice in score.inputs for result in choice}.values():
        settings = result.header.get("tuning") or result.header["config"]
        groups.setdefault((result.kind, ", ".join(f"{name} {value}" for name, value in settings.items())), []).append(result)

    def values(own: Sequence[Result], *keys: str) -> str:
        found = {" ".join(str(result.header[key]) for key in keys): None for result in own if keys[0] in result.header}
        return ", ".join(found)

    return [
        {"what": kind, "files": len(own), "spaces": values(own, "space", "dim"), "data seeds": values(own, "data_seed"),
         "learning rates": values(own, "learning_rate"), "settings": settings}
        for (kind, settings), own in sorted(groups.items(), key=lambda group: "soft-prompt subspace".find(group[0][0]) % 99)
    ]  # fmt: skip


def _by_task(x: Experiment, report: Mapping[str, Any]) -> str:
    """Return a table for each role: a row for each task, its scores in the order of the paper's table."""
    scores = sorted(report["scores"], key=lambda score: (score["quantity"] not in BASELINES, score["quantity"]))
    groups = dict.fromkeys(tuple(own[name] for name in GROUP) for own in [s for s in scores if not s["space"]] + report["rows"])
    short = {group: " ".join(map(str, group[:4] if group[3] else group[:1])).replace(" random ", " ", 1) for group in groups}
    alike = Counter(short.values())
    heads = {group: name if alike[name] == 1 else f"{name} {group[4]} {(group[5] or '')[:8]}" for group, name in short.items()}
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for score in sorted(scores, key=lambda score: str(score["task"])):
        rows, task = tables.setdefault(x.roles[score["task"]], {}), score["task"]
        row = rows.setdefault(
            task, {"task": task, "kind": x.task(task).kind, "test rows": score["n"]} | dict.fromkeys(heads.values())
        )
        row[heads[tuple(score[name] for name in GROUP)]] = score["value"]
    return "".join(f"<h3>{role} tasks</h3>{_table(list(rows.values()))}" for role, rows in tables.items())


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table that can be sorted and scrolls in a box of its own, without columns that hold nothing."""
    heads = [name for name in rows[0] if any(row[name] not in (None, "") for row in rows)]
    top = "".join(f"<th><button>{escape(name)}</button></th>" for name in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{_cell(row[name])}</td>" for name in heads) + "</tr>" for row in rows)
    return f"<div><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: Any) -> str:
    return "-" if value in (None, "") else f"{value:.3f}" if isinstance(value, float) else escape(str(value))


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Intrinsic prompt tuning: TITLE</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70rem; margin: auto; padding: 1rem; }
h1, p, li { overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 1rem; border-bottom: 1px solid #ccc; }
h2 + div, div div, pre { overflow-x: auto; }
pre, table { font-size: .8rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; min-width: 4rem; }
td:last-child { min-width: 12rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
button { font: inherit; font-weight: bold; text-align: left; border: 0; background: none; color: #0055a0; padding: 0; }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0 2rem; }
</style>
</head>
<body>
<h1>Intrinsic prompt tuning: TITLE</h1>
<p>E_rel: mean over tasks of score / prompt tuning's score, with a 95 % interval over tasks. Gain: what is added to no prompt,
beside what prompt tuning adds. T_train: tasks that a subspace is made of, T_test: others. MSF: their prompts there and back through
it, IST: tuned in it.</p>
BODY
<script>
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, at = head.cellIndex, down = head.ariaSort !== "descending";
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = down ? "descending" : "ascending";
  const body = head.closest("table").tBodies[0], text = row => row.cells[at].textContent;
  const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  const last = row => text(row) === "-";
  body.append(...[...body.rows].sort((a, b) => last(a) - last(b) || (down ? -1 : 1) * order(text(a), text(b))));
};
</script>
</body>
</html>
"""
