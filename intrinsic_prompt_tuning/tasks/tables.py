"""One's own tables: .csv, .tsv and .jsonl files, a task each, named after the file, and what is read off their rows."""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from intrinsic_prompt_tuning.errors import IptError, short
from intrinsic_prompt_tuning.files import file_name
from intrinsic_prompt_tuning.tasks.crossfit import crossfit_sample, drawn_test_rows, shuffled
from intrinsic_prompt_tuning.tasks.examples import Example, Sample, Task, check_names
from intrinsic_prompt_tuning.tasks.records import Record, texts

Kind = Literal["classification", "free-form"]
PART = re.compile(r"(?is)^(.*?)(?:(?:^|[\W_]+)(train|validation|val|dev|test))?$")
COLUMNS = (("input", "text", "prompt"), ("output", "label", "completion"), ("options",))
MOST_LABELS, LONG_ANSWER = 20, 5  # distinct answers that can be labels, words of an answer that is short
LONGEST_LINE, LARGEST_FILE = 1_000_000, 100_000_000  # bytes


def table_files(data: Path) -> list[Path]:
    """Return the tables that a path is, or that a folder holds."""
    paths = sorted(data.glob("[!.]*")) if data.is_dir() else [data]
    return [path for path in paths if path.suffix.lower() in (".csv", ".tsv", ".jsonl") and path.is_file()]


def find_table_tasks(data: Path, known: Mapping[str, Task], columns: str = "", kind: Kind | None = None) -> dict[str, Task]:
    """Read a table, which is then all that its task has, or all tables of a folder: tasks that are seen in the split `own`.

    Raises:
        IptError: a file cannot be read as a table, or in more than one way, and neither --columns nor --kind says in which.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in table_files(data):
        ((task, part),) = PART.findall(path.stem)
        own = found.setdefault(file_name(task or path.resolve().parent.name).strip("-"), {})
        part = {"": "train", "train": "train", "test": "test"}.get(part.lower(), "validation")
        if own.setdefault(part, path) != path:
            raise IptError(f"{own[part]} and {path.name} are both {part} rows of one task: rename one")
    if not found:
        raise IptError(
            f"{data} {'holds no task' if data.exists() else 'is not there'}; expected files such as reviews.csv, .tsv or .jsonl, "
            "a folder of them, or one of few-shot files such as <task>/<task>_16_100_train.tsv, and the same with dev"
        )
    check_names([*known, *found], data)
    if taken := found.keys() & known.keys():
        raise IptError(f"{data}: there is a task '{min(taken)}' already: rename the file")
    return {name: _task_of(name, files, columns, kind) for name, files in found.items()}


def _task_of(name: str, files: Mapping[str, Path], columns: str, said: Kind | None) -> Task:
    """Read a task's files, decide what its rows tell, and say what was understood."""
    kept, total, names, told = dict[Any, tuple[str, Example]](), 0, list[str](), ""
    for part in filter(files.get, ("test", "validation", "train")):
        rows, names, told = _read(files[part], columns)
        total += len(rows)
        for row in rows:  # of rows alike the first stays, so that no test row is trained on
            kept.setdefault((row.input, row.options), (part, row))
    kind, words = _kind(name, [row for _, row in kept.values()], said)
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for part, row in kept.values():
        parts[part].append(replace(row, options=row.options or words))
    if "test" not in files:
        parts["train"] = sorted(shuffled(parts["train"], 42), key=lambda row: row.answers[0] if words else "")  # of every label
        parts["test"] = parts["train"][4::5]
        del parts["train"][4::5]
    sizes = ", ".join(f"{len(rows)} {part}" for part, rows in parts.items() if rows)
    told += f", {len(kept)} rows: {sizes}{'' if 'test' in files or not parts['test'] else ' (a fifth, put aside)'}"
    told += f"; {len(words)} labels: {short(', '.join(words))}" if words else ""
    told += f"; left out: {total - len(kept)} rows whose input came before" if total > len(kept) else ""
    length = fmean(len(re.findall("[a-z0-9]+", row.answers[0].lower())) for _, row in kept.values())  # as Rouge-L has words
    metric = "ACC" if kind != "free-form" else "Rouge-L" if length > LONG_ANSWER else "EM"
    draw = partial(_draw, name, parts, kind == "classification")
    return Task(name=name, kind=kind, metric=metric, draw=draw, source=told, splits={"own": "seen"}, words=words, column=names[0])


def _draw(name: str, parts: Mapping[str, list[Example]], per_label: bool, seed: int, shots: int, test_rows: int | None) -> Sample:
    """Draw CrossFit's sample: `shots` per label, or 2 * `shots` in total, and as many for validation."""
    count = shots if per_label else 2 * shots
    wanted = count if parts["validation"] else 2 * count
    counts = Counter(row.answers[0] if per_label else "" for row in parts["train"])
    label, there = min(counts.items(), key=lambda item: item[1], default=("", 0))
    if there < wanted:
        what = f"rows of the label '{short(label)}'" if label else "rows"
        way = f"name --shots {shots * there // wanted}, or " if shots * there >= wanted else ""
        raise IptError(
            f"task '{name}' has {there} {what} beside its test rows, and --shots {shots} wants {wanted}: {way}add rows"
        )
    draw = partial(crossfit_sample, seed=seed, k=count, per_label=per_label)
    train, validation = draw(parts["train"])
    return Sample(train, draw(parts["validation"])[0] or validation, drawn_test_rows(parts["test"], test_rows))


def _kind(name: str, rows: Sequence[Example], said: Kind | None) -> tuple[str, tuple[str, ...]]:
    """Return what a table is, by its options or else by how many answers are distinct; and the words of a classification."""
    options, labels = {row.options for row in rows}, tuple(sorted({row.answers[0] for row in rows}))
    if () in options and len(options) > 1:
        raise IptError(f"task '{name}' has rows with options and rows without: give all of them some, or none")
    if options != {()}:
        return ("classification", options.pop()) if len(options) == 1 else ("multiple-choice", ())
    few = len(labels) <= MOST_LABELS and 4 * len(labels) <= len(rows)
    if not said and not few and 2 * len(labels) <= len(rows):
        raise IptError(
            f"task '{name}' has {len(labels)} distinct answers in {len(rows)} rows, which can be labels or free text: say which "
            "with --kind classification or --kind free-form"
        )
    kind = said or ("classification" if few else "free-form")
    return kind, labels if kind == "classification" else ()


def _read(path: Path, said: str) -> tuple[list[Example], list[str], str]:
    """Return a table's rows, which columns they were read from, and that for people."""
    rows, names, record = list[Example](), list[str](), Record()
    for where, record in _records(path):
        names = _columns(where, record, said)  # of every line: one of JSON may have others than the first
        rows.append(_example(where, record, names))
    if not rows:
        raise IptError(f"{path} holds no rows")
    unused = ", ".join(name for name in record if name not in names)
    return rows, names, f"{' -> '.join(names)} of {path.name}" + (f" (not {short(unused)})" if unused else "")


def _columns(where: str, record: Record, said: str) -> list[str]:
    """Return the columns of input, answer and, where there are any, options; or of messages alone."""
    inputs, answers, options = ([name for name in record if name.strip().lower() in names] for names in COLUMNS)
    readings = [[*pair, *options] for pair in itertools.product(inputs, answers)] + [["messages"]] * ("messages" in record)
    if said:
        readings = [[name.strip() for name in said.split(",")]]
        if not record.keys() >= set(readings[0]) or len(readings[0]) > len(COLUMNS):
            known = short(", ".join(record), 200)
            raise IptError(f"--columns is '{said}', expected at most {len(COLUMNS)} of the columns of {where}: {known}")
    if len(readings) != 1:
        raise IptError(
            f"{where} has the columns {short(', '.join(record), 200)}; expected one of {', '.join(COLUMNS[0])} and one of "
            f"{', '.join(COLUMNS[1])}, or messages: say which to read with --columns, such as --columns question,reply"
        )
    return readings[0]


def _example(where: str, record: Record, names: Sequence[str]) -> Example:
    """Make a row of a record: numbers become text, white space at the ends goes, a list of answers is several references."""
    values = [record.get(name) for name in names[:3]] if names[1:] else _turns(where, record.get(names[0]))
    values[2:] = [value.split("|") if isinstance(value, str) and value else value or [] for value in values[2:]]
    text, answers, *options = (tuple(map(str.strip, texts(value))) for value in values)
    nested = any(isinstance(item, dict | list) for value in values for item in (value if isinstance(value, list) else [value]))
    if len(text) != 1 or not answers or not all(text + answers + sum(options, ())) or nested:
        raise IptError(f"{where}: expected text in {', '.join(names)}, got {short(values)}")
    return Example(text[0], answers, tuple(dict.fromkeys(*options)) if options else ())


def _turns(where: str, messages: Any) -> list[Any]:
    """Return what stands before the assistant's last message, a single one as it is, several as lines; and that message."""
    try:
        turns = [(turn["role"] + "", turn["content"] + "") for turn in messages]
        last = max(at for at, (role, _) in enumerate(turns) if role == "assistant")
    except (TypeError, KeyError, ValueError) as error:
        raise IptError(f"{where}: expected messages with text in role and content, and one of the assistant's") from error
    return [turns[0][1] if last == 1 else "\n".join(f"{role}: {content}" for role, content in turns[:last]), turns[last][1]]


def _records(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield the records of a file, and where they stand; no more than one is held."""
    number, kind = 0, path.suffix.lower()

    def lines() -> Iterator[str]:
        nonlocal number
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE or file.tell() > LARGEST_FILE:
                raise ValueError(f"a line can have {LONGEST_LINE:,} bytes, a file {LARGEST_FILE:,}")
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    try:
        with path.open("rb") as file:
            head = next(lines(), "")
            source = itertools.chain([head], lines())
            separator = "\t" if kind == ".tsv" else max(",;\t", key=head.count)
            table = csv.DictReader(source, delimiter=separator, strict=True)
            if kind != ".jsonl":
                table.fieldnames = heads = [name.strip() for name in table.fieldnames or ()]
                if any(heads.count(name) > 1 for name in heads if name):
                    raise ValueError("two columns have one name")
            for record in map(json.loads, filter(str.strip, source)) if kind == ".jsonl" else table:
                json.dumps(record, ensure_ascii=False).encode()  # half a character cannot be written
                if not isinstance(record, dict) or None in record:  # DictReader puts what is too much there
                    raise ValueError("no JSON object, or more cells than columns")
                yield f"{path}, line {number}", record
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise IptError(
            f"{path}, line {number} cannot be read ({short(error, 200)}); expected UTF-8, and in it a JSON object a line, or "
            "cells under the names of the first line, in double quotes where text holds a separator"
        ) from error
