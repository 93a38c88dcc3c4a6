"""Few-shot files: what CrossFit (TSV) and MetaICL (JSONL) build, and what the cache keeps of every sample that was drawn.

<folder>/<task>/<task>_<k>_<data seed>_{train,dev,test}.{tsv,jsonl}, and <task>_test.{tsv,jsonl} for all seeds
"""

import contextlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from intrinsic_prompt_tuning.errors import IptError, short
from intrinsic_prompt_tuning.files import digest, write_bytes
from intrinsic_prompt_tuning.tasks.crossfit import drawn_test_rows
from intrinsic_prompt_tuning.tasks.examples import Example, Rows, Sample, Task, check_names, rows_digest

FEW_SHOT_FILE = re.compile(r"(?P<task>.+?)(_(?P<k>\d+)_(?P<seed>\d+))?_(?P<part>train|dev|test)\.(tsv|jsonl)")
KEPT = ("_train.jsonl", "_dev.jsonl", "_test.jsonl", ".checksum")
Files = Mapping[tuple[int, int, str], Path]
"""(K, data seed, train, dev or test) -> file of one task; K and seed are 0 for a test file that serves all seeds."""


def few_shot_files(folder: Path) -> dict[str, Files]:
    """Return the few-shot files of each task in a folder, where there are train and dev rows; none of a table, or of tables."""
    found: dict[str, dict[tuple[int, int, str], Path]] = {}
    for path in sorted(folder.glob("*/*")):
        match = FEW_SHOT_FILE.fullmatch(path.name)
        if match and match["task"] == path.parent.name and (match["k"] or match["part"] == "test"):
            found.setdefault(match["task"], {})[int(match["k"] or 0), int(match["seed"] or 0), match["part"]] = path
    return {task: files for task, files in found.items() if _sizes(files)}


def _sizes(files: Files) -> dict[int, list[int]]:
    """Return the data seeds with both train and dev rows, and the K of each."""
    both = sorted((seed, k) for k, seed, part in files if part == "train" and (k, seed, "dev") in files)
    return {seed: [k for other, k in both if other == seed] for seed, _ in both}


def find_few_shot_tasks(folder: Path, known: Mapping[str, Task]) -> dict[str, Task]:
    """Find the tasks of a folder of few-shot files.

    A known name gives kind, metric, splits and category. Of an unknown task the rows tell: the same options in every row are a
    classification, changing ones multiple choice, none free-form answers.
    """
    found = few_shot_files(folder)
    check_names(found, folder)
    return {name: _task_of(name, files, known.get(name)) for name, files in found.items()}


def _task_of(name: str, files: Files, known: Task | None) -> Task:
    sizes, draw = _sizes(files), partial(_draw, name, files)
    if known is None:
        (seed, (k, *_)), *_ = sizes.items()
        options = {row.options for row in read_rows(files[k, seed, "train"])}
        kind = "free-form" if options == {()} else "classification" if len(options) == 1 else "multiple-choice"
        known = Task(name=name, kind=kind, metric="EM" if kind == "free-form" else "ACC", draw=draw, source="")
    holds = f"K {'/'.join(map(str, sorted({*itertools.chain(*sizes.values())})))}, data seeds {' '.join(map(str, sizes))}"
    source = f"few-shot files, {holds}{'' if any(part == 'test' for *_, part in files) else ', no test rows'}"
    draw = partial(draw, labels=known.kind == "classification", words=known.words)
    return replace(known, draw=draw, source=source, definition=None)


def _draw(name: str, files: Files, seed: int, shots: int, test_rows: int | None, labels: bool, words: tuple[str, ...]) -> Sample:
    """Read the sample of one seed; K is `shots`, or 2 * `shots` in total without labels.

    MetaICL's K counts a classification's rows in total, too, so a folder with one K only has it in either sense. The words are
    the options of every row, for TSV files, which name none.
    """
    sizes = _sizes(files)
    had = f"for data seed {seed}; the folder has {', '.join(map(str, sizes.get(seed, sizes)))}"
    if seed not in sizes:
        raise IptError(f"task '{name}' has no train and dev files {had}")
    k = next((k for k in (shots if labels else 2 * shots, shots) if k in sizes[seed]), None)
    if k is None:
        raise IptError(f"task '{name}' has no files of K {shots} {had}: name one with --shots")
    test = files.get((k, seed, "test"), files.get((0, 0, "test")))
    if test is None and test_rows != 0:
        raise IptError(f"task '{name}' has no test file; add {name}_{k}_{seed}_test.tsv to its folder")
    train, dev = (read_rows(files[k, seed, part], words) for part in ("train", "dev"))
    return Sample(train, dev, drawn_test_rows(read_rows(test, words), test_rows) if test and test_rows != 0 else ())


def read_rows(path: Path, options: tuple[str, ...] = ()) -> Rows:
    """Return the rows of a few-shot file; those of TSV have these options."""
    try:
        if not path.is_file():  # such as a device, which never ends
            raise OSError("it is no file")
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # a row may hold any other line separator
    except (OSError, UnicodeDecodeError) as error:
        raise IptError(f"{path} cannot be read: {error}") from error
    parse = _json_row if path.suffix == ".jsonl" else partial(_tsv_row, options)
    return tuple(parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip())


def _tsv_row(options: tuple[str, ...], line: str, where: str) -> Example:
    text, *answers = line.removesuffix("\r").split("\t")
    if not answers:
        raise IptError(f"{where}: expected an input, a tab and the references, but there is no tab")
    return Example(text, tuple(answers), options)


def _json_row(line: str, where: str) -> Example:
    """Read one JSON object: input, output, and if it has them options, answers (all references) and tail."""
    try:
        row = json.loads(line)
        text, answers, options = row["input"], row.get("answers") or [row["output"]], row.get("options") or []
        tail = row.get("tail", 0)
        "".join([text, *answers, *options]).encode()  # half a character is none
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IptError(f"{where}: expected a JSON object with input, output and options ({error!r})") from error
    if not (isinstance(answers, list) and isinstance(options, list) and isinstance(tail, int) and 0 <= tail <= len(text)):
        raise IptError(f"{where}: expected text in input and output, and a list of texts in options; a tail is within the input")
    return Example(text, tuple(answers), tuple(options), tail)


def parse_input(tasks: Mapping[str, Task], default: str, line: str) -> tuple[str, Example]:
    """Return the task of a new input, and it as a row without answer.

    A line is text, or a JSON object with `input` or else the columns of its task's template, and perhaps `task`, `options`.

    Raises:
        IptError: it is no text, or begins as an object and is not such a one, or is of none of these tasks.
    """
    try:
        row: dict[str, Any] = json.loads(line) if line.lstrip().startswith("{") else {"input": line}
        task, options = row.get("task", default), row.get("options") or []
        if not isinstance(task, str) or task not in tasks:
            raise IptError(f"task {task!r} was not named with --task")
        if "input" not in row and (render := tasks[task].render):
            example = render(row)
        else:
            text: Any = row.get("input", row.get(tasks[task].column))
            if not isinstance(options, list) or not all(isinstance(part, str) for part in (text, *options)):
                raise IptError("expected text in input, and a list of texts in options")
            if not (isinstance(tail := row.get("tail", 0), int) and 0 <= tail <= len(text)):
                raise IptError("expected a tail within the input")
            example = Example(text, ("",), tuple(dict.fromkeys(options)), tail)
        "".join([example.input, *example.options]).encode()  # what is no text does not survive this
    except (ValueError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise IptError(f"expected text, or a JSON object with input or the template's columns ({short(error, 200)})") from error
    return task, example


def kept(task: Task, folder: Path) -> Task:
    """Return the task with a draw that converts and draws once on this machine, and then reads the few-shot files of that.

    The files lie in `folder`, under a name that changes with all that the rows follow from, with a checksum of the rows beside.
    """

    def draw(data_seed: int, shots: int, test_rows: int | None) -> Sample:
        # As it is written: the order of labels, slots and replacements tells on the rows.
        name = digest({"definition": repr(task.definition), "metric": task.metric, "shots": shots, "test rows": test_rows})
        k = shots if task.kind == "classification" else 2 * shots
        own = folder / f"{task.name}-{name}" / task.name
        *files, checksum = (own / f"{task.name}_{k}_{data_seed}{end}" for end in KEPT)
        with contextlib.suppress(IptError, OSError):  # what is not there, or damaged, is drawn anew
            sample = Sample(*map(read_rows, files))
            if checksum.read_bytes() == digest([rows_digest(rows) for rows in sample]).encode():
                return sample
        sample = task.draw(data_seed, shots, test_rows)
        for path, rows in zip(files, sample, strict=True):
            write_bytes(path, b"".join(_json_line(row) for row in rows))
        write_bytes(checksum, digest([rows_digest(rows) for rows in sample]).encode())
        return sample

    return task if task.definition is None else replace(task, draw=draw)


def _json_line(row: Example) -> bytes:
    fields = {"input": row.input, "output": row.answers[0], "options": row.options, "answers": row.answers, "tail": row.tail}
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
