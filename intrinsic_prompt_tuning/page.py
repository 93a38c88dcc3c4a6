"""An experiment as one page of HTML that needs no other file: what was run, the table, pictures, every task's scores."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.report import report_text
from intrinsic_prompt_tuning.settings import versions


def make_page(x: Experiment, report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the page of a report (see `make_report`) and pictures as SVG, by the names of their files."""
    told = {name: _short(value) for name, value in report.items() if name != "scores"}
    tuned = {score["task"] for score in report["scores"]}
    failed = [
        *x.left_out.values(),
        *(f"{task}: no soft prompt in the cache" for task in x.roles if task not in {*x.left_out, *tuned}),
    ]
    failed += [f"{task}: prompt tuning is no better than no prompt" for task in report["no_better_than_no_prompt"]]
    sections = {
        "Scores": f"<pre>{escape(report_text(told, wide=False))}</pre>",
        "Pictures": "".join(_image(name, svg) for name, svg in pictures.items()) or "<p>None could be drawn.</p>",
        "What was run": f"<p>{escape(versions())}; backbone {x.store.fingerprint}</p><pre>{escape(_options(x))}</pre>",
        "Tasks that failed": f"<ul>{''.join(f'<li>{escape(why)}</li>' for why in failed or ['none'])}</ul>",
        "Scores of every task": "".join(f"<h3>{role} tasks</h3>{_table(rows)}" for role, rows in _by_task(x, report).items()),
        "Scores, every column": f"<pre>{escape(report_text(told, wide=True))}</pre>",
    }
    body = "".join(f"<h2>{title}</h2>\n<div>{content}</div>\n" for title, content in sections.items())
    return PAGE.substitute(title=escape(f"{told['backbone']}, split {told['split']}"), body=body)


def _options(x: Experiment) -> str:
    """Return as YAML the options of the commands that learned what the cache holds of this backbone."""
    files = sorted((x.cache / "commands").glob("*.yaml"), key=lambda file: file.stat().st_mtime_ns)
    told = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    about = [{command: {name: _short(value) for name, value in own.items()} for command, own in one.items()} for one in told
             if any(own.get("backbone") == x.options.backbone and "steps" in own for own in one.values())]  # fmt: skip
    return "\n".join(yaml.safe_dump(one, default_flow_style=None, width=110) for one in about) or "no options are in the cache"


def _short(value: Any) -> Any:
    """Return the name of a file or folder, which says nothing about whose machine it is on; all else as it is."""
    return Path(value).name if isinstance(value, str | Path) and Path(value).exists() else value


def _by_task(x: Experiment, report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the tasks in each role, each with its scores by what they are of."""

    def label(score: Mapping[str, Any]) -> str:
        return " ".join(str(score[key]) for key in ("quantity", "space", "dim", "start") if score[key] not in (None, 0, "random"))

    alike = {own for (_, own), n in Counter((score["task"], label(score)) for score in report["scores"]).items() if n > 1}
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for score in sorted(report["scores"], key=lambda score: bool(score["space"])):  # baselines first
        task, name = score["task"], label(score)
        row = {"task": task, "kind": x.task(task).kind, "test rows": score["n"]}
        name += f" {score['data_seed']} {(score['subspace'] or '')[:8]}" if name in alike else ""
        tables.setdefault(x.roles[task], {}).setdefault(task, row)[name] = score["value"]
    return {role: list(rows.values()) for role, rows in tables.items()}


def _table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table that is sorted by a click on a head, and scrolls in a box of its own."""
    heads = dict.fromkeys(name for row in rows for name in row)
    top = "".join(f"<th><button>{escape(name)}</button></th>" for name in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{_cell(row.get(name))}</td>" for name in heads) + "</tr>" for row in rows)
    return f"<div><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else escape(str(value))


def _image(name: str, svg: bytes) -> str:
    return f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Intrinsic prompt tuning: $title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70rem; margin: auto; padding: 1rem; }
h1, p, li { overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
pre, div div { overflow-x: auto; font-size: .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; }
td { white-space: nowrap; }
td:first-child { white-space: normal; min-width: 8rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
button { font: inherit; font-weight: bold; text-align: left; border: 0; background: none; padding: 0; color: #0055a0; }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0 2rem; }
</style>
</head>
<body>
<h1>Intrinsic prompt tuning: $title</h1>
<p>E_rel: mean over tasks of score / prompt tuning's score, with a 95 % interval over tasks. Gain: what is added to no prompt,
beside what prompt tuning adds. T_train: tasks that a subspace is made of, T_test: others. MSF: their prompts there and back
through it, IST: tuned in it. A click on a table's head sorts.</p>
$body
<script>
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, at = head.cellIndex, down = head.ariaSort !== "descending";
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = down ? "descending" : "ascending";
  const body = head.closest("table").tBodies[0], text = row => row.cells[at].textContent, lacks = row => text(row) === "-";
  const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  body.append(...[...body.rows].sort((a, b) => lacks(a) - lacks(b) || (down ? -1 : 1) * order(text(a), text(b))));
};
</script>
</body>
</html>
""")
