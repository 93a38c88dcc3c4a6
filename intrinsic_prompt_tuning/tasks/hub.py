"""Tasks from the Hub and from local files: a row of tasks.yaml says how a record of a data set becomes text.

replace, clean, transform, keep -> template -> Example.
"""

import itertools
import operator
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from intrinsic_prompt_tuning.errors import IptError, UnreachableError, nearest
from intrinsic_prompt_tuning.lazy import datasets
from intrinsic_prompt_tuning.tasks.checks import build, places
from intrinsic_prompt_tuning.tasks.crossfit import crossfit_sample, drawn_test_rows, shuffled
from intrinsic_prompt_tuning.tasks.examples import Example, Metric, Role, Rows, Sample, Task
from intrinsic_prompt_tuning.tasks.records import CLEANERS, TRANSFORMS, Record, look_up, map_text, texts

CONVERTED = "refs/convert/parquet"
WAY_OUT = "; a folder of CrossFit or MetaICL files can stand in: --data DIR"
READERS = ("csv", "json", "parquet", "text")
"""Data sets that are files, local ones or URLs."""
LETTERS = [*string.ascii_uppercase, *map("".join, itertools.product(string.ascii_uppercase, repeat=2))]
"""Of options: A to Z, AA, AB ..."""
Cleaner = Literal["", "strip", "newlines", "breaks", "whitespace", "quotes", "letter", "compact"]


@dataclass(frozen=True, kw_only=True, eq=False)
class HubRow:
    """A row of tasks.yaml: one data set of the Hub, or local files, and the way its records become examples.

    A *path* in a field names a column, or what lies inside one: `sql.human_readable`, `candidates.0`. A name steps into a record,
    or into each record of a list; a number picks from a list.
    """

    where: str
    """The file and the task, for messages."""
    folder: Path
    """Local `data_files` are relative to it. Nobody writes these two."""
    template: str
    """The input: text with {path} fields, lists joined by `join`; {options} is every option in `option_style`."""
    answer: str
    """Path of the label, of the key that picks the right option, or of all references."""
    metric: Metric
    kind: Literal["", "classification", "multiple-choice", "free-form"] = ""
    """Without it, what `verbalizer` and `options` tell."""
    category: str = ""
    note: str = ""
    splits: dict[str, Role] = field(default_factory=dict)
    dataset: str = ""
    """Name on the Hub, or csv, json, parquet, text with `data_files`."""
    config: str = ""
    revision: str = ""
    """`refs/convert/parquet` reads the Hub's own conversion of a dataset that is still a script."""
    data_files: dict[str, str] = field(default_factory=dict)
    """Split name -> URL or local path."""
    reader: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the file reader, such as the separator of a csv file."""
    train: str = "train"
    """Split to draw from. Brackets shuffle it with seed 42 and take a slice: train[:80%], train[10000:11000]."""
    test: str = "validation"
    replace: dict[str, str] = field(default_factory=dict)
    """Text replaced in every string of a record; the new text is a template."""
    clean: Cleaner | dict[str, Cleaner] = ""
    """A name of CLEANERS for the whole input, or column -> cleaner."""
    transform: str | list[Any] = ""
    """A name of TRANSFORMS, then its arguments."""
    keep: dict[str, list[Any]] = field(default_factory=dict)
    """Path -> the values that a record must have there, other records are left out; an empty list: anything but empty."""
    join: str = " "
    truncate: str = ""
    """Field of the template whose end goes when an input is too long, and not what stands behind it; `start`: the beginning of
    the input goes. Without it, the field before the options."""
    options: str | list[str] = field(default_factory=list)
    """Path of the list of options, or one path per option."""
    option_labels: str = ""
    """Path of the letters before the options; A, B, C ... without it."""
    option_style: str = " ({letter}) {text}"
    pick: Literal["", "text", "label", "letter", "index", "number", "free"] = ""
    """What `answer` holds: the right option's `text`, its `label`, its `letter` (A, B ...), its `index` from 0 or its `number`
    from 1; `free` when it is no option but a text of its own."""
    verbalizer: dict[Any, str] = field(default_factory=dict)
    """Label -> the words that answer it; the words are the options."""
    references: Literal["", "unique", "sorted"] = ""
    """`unique` drops empty and repeated references, `sorted` also sorts them. CrossFit left the order of unique ones to chance,
    so where a row has several its MD5 cannot be met."""
    join_answers: str | None = None
    """Joins several answers to one; without it they are alternative references."""
    clean_answers: Cleaner = ""
    unavailable: str = ""
    """Why the dataset cannot be had any more."""

    def draw(self, data_seed: int, shots: int, test_rows: int | None) -> Sample:
        """Draw CrossFit's sample: `shots` per label, or 2 * `shots` in total."""
        per_label = self.kind == "classification"
        count = shots if per_label else 2 * shots
        rows = self.rows_of_split(self.train)
        train, validation = crossfit_sample(rows, seed=data_seed, k=count, per_label=per_label)
        if not validation:
            have = f"the {len(rows)} rows of '{self.train}'"
            raise IptError(f"{self.where}: {have} are too few for {count} shots and validation rows")
        return Sample(train, validation, () if test_rows == 0 else drawn_test_rows(self.rows_of_split(self.test), test_rows))

    def examples(self, records: Iterable[Record]) -> Iterator[Example]:
        """Turn records into examples, in order, without those that the transform or `keep` leave out."""
        records = map(self._edited, records)
        try:
            if self.transform:
                records = TRANSFORMS[self.transform[0]](records, *self.transform[1:])
            for record in records:
                found = [(texts(self._value(record, path, "keep")), values) for path, values in self.keep.items()]
                if all(any(text in values if values else text for text in own) for own, values in found):
                    yield self._example(record)
        except KeyError as error:  # only a transform can raise it
            raise IptError(f"{self.where}: transform needs column {error}, which the data lacks") from error
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise IptError(f"{self.where}: the data do not fit what the row says of them ({error!r})") from error

    def _edited(self, record: Record) -> Record:
        """Apply `replace`, and `clean` where it names columns."""
        for old, new in self.replace.items():
            text = self._render(string.Formatter().parse(new), record, ())
            record = map_text(record, operator.methodcaller("replace", old, text))
        columns = self.clean.items() if isinstance(self.clean, dict) else ()
        return record | {column: map_text(self._value(record, column, "clean"), CLEANERS[how]) for column, how in columns}

    def render(self, record: Record) -> Example:
        """Return a new input, which has no answer, of the columns that the template and the options name after a transform.

        Where neither names `options`, the record may bring what can be answered under that name.
        """
        clean = self.clean if isinstance(self.clean, str) else {c: how for c, how in self.clean.items() if c in record}
        example = self._example(replace(self, clean=clean)._edited(record), answered=False)
        is_column = self.options or "options" in places(self.template)
        return example if is_column else replace(example, options=texts(record.get("options") or []) or example.options)

    def _example(self, record: Record, *, answered: bool = True) -> Example:
        paths = [self.options] if isinstance(self.options, str) else self.options
        options = tuple(text for path in paths for text in texts(self._value(record, path, "options")))
        clean = CLEANERS[self.clean if isinstance(self.clean, str) else ""]
        parts = [*string.Formatter().parse(self.template)]
        end = next((number for number, (_, path, *_) in enumerate(parts, 1) if path == self.truncate), len(parts))
        head, tail = (self._render(some, record, options) for some in (parts[:end], parts[end:]))
        text, answers = clean(head + tail), self._answers(record, options) if answered else ("",)
        spared = len(text) if self.truncate == "start" else min(len(text), len(clean(tail)))
        words = tuple(dict.fromkeys(self.verbalizer.values()))
        return Example(text, answers, words or (() if self.pick == "free" else options), spared)

    def _render(self, parts: Iterable[tuple[Any, ...]], record: Record, options: Sequence[str]) -> str:
        def text_of(path: str) -> str:
            if path != "options" or not self.options:
                return self.join.join(texts(self._value(record, path, "template")))
            labels = self._value(record, self.option_labels, "option_labels") if self.option_labels else LETTERS
            return "".join(self.option_style.format(letter=a, text=b) for a, b in zip(labels, options, strict=False))

        return "".join(literal + (text_of(path) if path is not None else "") for literal, path, *_ in parts)

    def _answers(self, record: Record, options: Sequence[str]) -> tuple[str, ...]:
        answers = texts(self._value(record, self.answer, "answer"))
        if self.verbalizer:
            if unknown := [label for label in answers if label not in self.verbalizer]:
                has = f"verbalizer has no words for label '{unknown[0]}' of '{self.answer}'"
                raise IptError(f"{self.where}: {has}, only for {', '.join(self.verbalizer)}; add it")
            answers = tuple(self.verbalizer[label] for label in answers)
        elif self.pick != "free":
            answers = (self._picked(record, answers[0], options),)
        if self.references:
            answers = tuple(dict.fromkeys(filter(None, answers)))
        if self.references == "sorted":
            answers = tuple(sorted(answers))
        if self.join_answers is not None:
            answers = (self.join_answers.join(answers),)
        return tuple(map(CLEANERS[self.clean_answers], answers)) or ("",)

    def _picked(self, record: Record, key: str, options: Sequence[str]) -> str:
        """Return the right option."""
        numbers = [str(number) for number in range(len(options) + 1)]
        labels = texts(self._value(record, self.option_labels, "option_labels")) if self.pick == "label" else ()
        names = {"text": options, "label": labels, "letter": LETTERS, "index": numbers, "number": numbers[1:]}
        wanted = key.upper() if self.pick == "letter" else key
        for name, option in zip(names[self.pick], options, strict=False):
            if name == wanted:
                return option
        raise IptError(f"{self.where}: '{key}' of '{self.answer}' is no {self.pick} of the {len(options)} options {options}")

    def _value(self, record: Record, path: str, said: str) -> Any:
        try:
            return look_up(record, path)
        except (KeyError, IndexError, TypeError) as error:
            there = ", ".join(record)
            raise IptError(f"{self.where}: {said} names '{path}', which the data lacks; its columns are {there}") from error

    def rows_of_split(self, split: str) -> Rows:
        """Load one split as examples, in CrossFit's order."""
        name, bracket, bounds = split.partition("[")
        rows = tuple(self.examples(self._load_records(name)))
        if not bracket:
            return rows
        ends = bounds.removesuffix("]").split(":")
        start, stop = (int(int(end[:-1]) / 100 * len(rows)) if "%" in end else int(end) if end else None for end in ends)
        return tuple(shuffled(rows, 42)[start:stop])

    def _load_records(self, split: str) -> Iterator[Record]:
        """Read the records of one split through `datasets`; a failure names task, dataset and reason."""
        if self.unavailable:
            raise IptError(f"{self.where} cannot be loaded: {self.unavailable}{WAY_OUT}")
        config, files = self.config or None, self.data_files
        if self.revision == CONVERTED:  # one folder per config and split, which `datasets` would mix up
            config, files = None, {split: f"{config or 'default'}/{split}/*.parquet"}
        elif self.dataset in READERS:
            files = {name: file if "://" in file else str(self.folder / file) for name, file in files.items()}
        datasets.disable_progress_bars()
        try:
            table = datasets.load_dataset(
                self.dataset, config, revision=self.revision or None, data_files=files or None, split=split, **self.reader
            )
        except Exception as error:  # load_dataset lets through whatever its HTTP client, file system or reader raises
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            kind = UnreachableError if isinstance(error, ConnectionError) else IptError
            raise kind(f"{self.where}: split '{split}' of '{self.dataset}' could not be loaded: {reason}{WAY_OUT}") from error
        return iter(table)


def read_hub_row(name: str, row: Any, file: Path) -> HubRow:
    """Read one row of a tasks file.

    Raises:
        IptError: for the first field that is unknown, missing, of the wrong type, names something that does not exist, or
            contradicts another.
    """
    where = f"{file.name}: task '{name}'"
    read = build(HubRow, row, where, where=where, folder=file.parent)
    if not (read.dataset or read.unavailable):
        raise IptError(f"{where} has no field 'dataset', which every row needs")
    kind = read.kind or ("classification" if read.verbalizer else "multiple-choice" if read.options else "free-form")
    needed = {"classification": "verbalizer", "multiple-choice": "options"}.get(kind)
    if needed and not getattr(read, needed):
        raise IptError(f"{where} is of kind {kind}, so it needs field '{needed}'")
    named = places(read.template, f"{where}: field 'template'")
    read = replace(
        read, kind=kind, pick=read.pick or ("text" if kind == "multiple-choice" else "free"),
        truncate=read.truncate or (named[-2] if named[1:] and named[-1] == "options" else ""),
        transform=[read.transform] if read.transform and isinstance(read.transform, str) else read.transform,
        verbalizer={texts(label)[0]: word for label, word in read.verbalizer.items()},
        keep={path: list(texts(values)) for path, values in read.keep.items()},
    )  # fmt: skip
    _check_row(read)
    return read


def _check_row(row: HubRow) -> None:
    """Refuse what contradicts itself or cannot be read."""
    for name, template in [("option_style", row.option_style), *(("replace", new) for new in row.replace.values())]:
        places(template, f"{row.where}: field '{name}'")
    # The first reads pickles, which can hold code; the others write elsewhere, or in many processes.
    if row.dataset == "pandas" or row.reader.keys() & {"cache_dir", "download_config", "num_proc", "storage_options"}:
        raise IptError(f"{row.where}: dataset 'pandas', and a 'reader' with cache_dir, num_proc and the like, are not allowed")
    if nested := [column for column in row.clean if "." in column] if isinstance(row.clean, dict) else []:
        raise IptError(f"{row.where}: clean names '{nested[0]}', but only whole columns can be cleaned")
    named = places(row.template)
    if row.truncate not in ("", "start", *named):
        raise IptError(f"{row.where}: truncate names '{row.truncate}', but the template has only {', '.join(named)}")
    if unknown := set(places(row.option_style)) - {"letter", "text"}:
        raise IptError(f"{row.where}: option_style names '{unknown.pop()}', but there are only letter and text")
    if row.transform and (not isinstance(row.transform[0], str) or row.transform[0] not in TRANSFORMS):
        wrong = f"there is no transform '{row.transform[0]}'{nearest(str(row.transform[0]), TRANSFORMS)}"
        raise IptError(f"{row.where}: {wrong}; there are {', '.join(TRANSFORMS)}")
    if row.pick == "label" and not row.option_labels:
        raise IptError(f"{row.where}: pick is 'label', so option_labels must name the column of the labels")
    for split in (row.train, row.test):
        if not re.fullmatch(r"[^\[\]]+(\[(\d+%?)?:(\d+%?)?\])?", split):
            raise IptError(f"{row.where}: split '{split}' cannot be read; write a name or a slice such as train[:80%]")


def hub_task(name: str, row: Any, file: Path) -> Task:
    """Return a task whose rows are CrossFit's sample of a data set."""
    read = read_hub_row(name, row, file)
    source = " ".join(filter(None, [read.dataset, read.config, read.revision, read.unavailable and "unavailable"]))
    is_path = read.dataset.startswith((".", "/", "~")) or (read.dataset != "" and Path(read.dataset).exists())
    files = read.data_files.values()  # without any, a reader finds its own
    remote = bool(files) and all("://" in data_file and not data_file.startswith("file:") for data_file in files)
    is_local = is_path or (read.dataset in READERS and not remote)  # a person may change such files at any time
    return Task(
        name=name, kind=read.kind, metric=read.metric, draw=read.draw, source=source, splits=read.splits, category=read.category,
        definition=None if is_local else row, words=tuple(dict.fromkeys(read.verbalizer.values())), render=read.render,
    )  # fmt: skip
