"""An experiment as one page of HTML that needs no other file: what was run, the table, pictures, every task's scores."""

import contextlib
import os
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.report import report_text
from intrinsic_prompt_tuning.reporter import cell_text
from intrinsic_prompt_tuning.settings import versions
from intrinsic_prompt_tuning.tasks.checks import read_mapping

PAGE = Template((Path(__file__).parent / "cards" / "page.html").read_text(encoding="utf-8"))
LEARNING = ("collect", "fit-subspace", "tune", "run")
"""The commands whose options a page tells."""


def make_page(x: Experiment, report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the page of a report (see `make_report`) and pictures as SVG, by the names of their files."""
    told = {name: _short(value) for name, value in report.items() if name != "scores"}
    known = {*x.left_out, *(score["task"] for score in report["scores"])}
    failed = [*x.left_out.values(), *(f"{task}: no soft prompt in the cache" for task in x.roles if task not in known)]
    failed += [f"{task}: prompt tuning is no better than no prompt" for task in report["no_better_than_no_prompt"]]
    encoded = {escape(name): b64encode(svg).decode() for name, svg in pictures.items()}
    images = [f'<img alt="{name}" src="data:image/svg+xml;base64,{svg}">' for name, svg in encoded.items()]
    sections = {
        "Scores": f"<pre>{escape(report_text(told, wide=False))}</pre>",
        "Pictures": "".join(images) or "<p>None could be drawn.</p>",
        "What was run": f"<p>{escape(versions())}; backbone {x.store.fingerprint}</p><pre>{escape(_options(x))}</pre>",
        "Tasks that failed": f"<ul>{''.join(f'<li>{escape(why)}</li>' for why in failed or ['none'])}</ul>",
        "Scores of every task": "".join(f"<h3>{role} tasks</h3>{_table(rows)}" for role, rows in _by_task(x, report).items()),
        "Scores, every column": f"<pre>{escape(report_text(told, wide=True))}</pre>",
    }
    body = "".join(f"<h2>{title}</h2>\n<div>{content}</div>\n" for title, content in sections.items())
    return PAGE.substitute(title=escape(f"{told['backbone']}, split {told['split']}"), body=body)


def _options(x: Experiment) -> str:
    """Return as YAML the options of the commands that learned what the cache holds of this backbone."""
    about = []
    for file in sorted((x.cache / "commands").glob("*.yaml"), key=lambda file: file.stat().st_mtime_ns):
        with contextlib.suppress(IptError):  # a damaged file is one that tells nothing
            command = file.name.rpartition("-")[0]
            own = read_mapping(file, command)[command]
            if command in LEARNING and own.get("backbone") == x.options.backbone:
                about.append({command: {name: _short(value) for name, value in own.items()}})
    return "\n".join(yaml.safe_dump(one, default_flow_style=None, width=110) for one in about) or "no options are in the cache"


def _short(value: Any) -> Any:
    """Return the name of a file or folder, which says nothing about whose machine it is on; all else as it is."""
    is_path = isinstance(value, str) and os.path.exists(value)  # noqa: PTH110 (it takes any text)
    return Path(value).absolute().name if is_path else value


def _by_task(x: Experiment, report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the tasks in each role, each with its scores by what they are of."""

    def label(score: Mapping[str, Any]) -> str:
        start = score["start"] if score["start"] != "random" else None
        return " ".join(str(part) for part in (score["quantity"], score["space"], score["dim"], start) if part)

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
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell_text(row.get(name)))}</td>" for name in heads) + "</tr>" for row in rows)
    return f"<div><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
