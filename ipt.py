"""Intrinsic Prompt Tuning: ~100 tuned soft prompts -> one small non-linear subspace -> new tasks by tuning 250 numbers.

A language model (the backbone) stays frozen. Everything that learns is a table of per-task parameters `theta`:

    theta (tasks, size) -- back_project --> soft prompts (tasks, prompt_length, hidden) --> frozen backbone --> loss per task

    space      back_project                      size                     is
    prompt     identity                          prompt_length * hidden   prompt tuning
    subspace   W2 tanh(W1 v + b1) + b2, learned  dim                      intrinsic prompt tuning
    linear     the same without tanh: PCA        dim                      ablation
    random     the same network, untrained       dim                      baseline

    command            the paper's stage                  reads             writes
    ipt collect        prompt tuning                      tasks             soft prompts
    ipt fit-subspace   multi-task subspace finding, MSF   soft prompts      subspaces
    ipt tune           intrinsic subspace tuning, IST     subspaces, tasks  intrinsic vectors
    ipt eval           relative performance, E_rel        all of them       scores
    ipt run            all four

Paper: Qin et al., "Exploring Universal Intrinsic Task Subspace via Prompt Tuning", arXiv 2110.07867.
Dimensions in comments: batch, tasks (rows of theta), dim, prompt_length, input_length, target_length, hidden, vocabulary.
`grep '^# ---' ipt.py` prints the table of contents.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import inspect
import itertools
import json
import math
import operator
import os
import platform
import random
import re
import signal
import socket
import string
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from functools import cached_property, lru_cache, partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast, get_type_hints

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import torch
    import transformers
    from torch import Tensor
else:

    class _Lazy:
        """A package that is imported when first used, so that `ipt --help` answers at once."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            value = getattr(importlib.import_module(self._name), attribute)
            setattr(self, attribute, value)
            return value

    datasets, np, torch, transformers = map(_Lazy, ("datasets", "numpy", "torch", "transformers"))

# Two threads that wait by spinning are many times slower than one where another process wants a core, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
TASKS_FILE = Path(__file__).with_name("tasks.yaml")
TESTBED = "testbed"
"""The built-in world, the split of its tasks, and the folder of its backbone beside this file."""
FILE_VERSION = 1
IGNORE = -100
"""The label of a position that is padding, as in transformers."""


def shipped(name: str) -> Path:
    """Return where a file or folder that ships with the package is: installed beside this file, in a clone under tests/."""
    here = Path(__file__).parent
    places = [here / "ipt_data" / name, here / "tests" / "shipped" / name]
    return next((place for place in places if place.exists()), places[0])


# --- Errors --------------------------------------------------------------------------------------


class IptError(Exception):
    """A mistake that a person can mend; shown to the user as is, in one sentence."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a clause that names what an unknown name may have meant."""
    matches = difflib.get_close_matches(name, list(known))
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


# --- World ---------------------------------------------------------------------------------------
# The testbed's language, read from tasks.yaml: a lexicon, one sentence pattern, questions in words.

Scene = dict[str, SimpleNamespace]  # slot -> lexicon entry, one attribute per column


@dataclass(frozen=True)
class World:
    """A synthetic language in which every question has one computable answer."""

    name: str
    sentence: str
    """A `str.format` pattern over slots and their columns, such as `the {mood.word} {subject.word}`."""
    slots: dict[str, str]
    """Slot of the sentence -> the lexicon's table that fills it."""
    lexicon: dict[str, list[SimpleNamespace]]

    def draw(self, rng: random.Random) -> Scene:
        """Fill every slot with an entry drawn uniformly."""
        # A label that is rare takes many draws, and `rng.choice` would take most of their time.
        return {slot: entries[int(rng.random() * len(entries))] for slot, entries in self._entries.items()}

    def describe(self, scene: Scene) -> str:
        """Return the sentence that tells a scene."""
        return self.sentence.format(**scene)

    def columns(self, slot: str) -> list[str]:
        """Return the names of what is known about a slot's words."""
        return list(vars(self._entries[slot][0]))

    def values(self, slot: str, column: str) -> list[str]:
        """Return the distinct values of a column, in the lexicon's order."""
        return list(dict.fromkeys(getattr(entry, column) for entry in self._entries[slot]))

    @cached_property
    def _entries(self) -> dict[str, list[SimpleNamespace]]:
        """Return slot -> what fills it."""
        return {slot: self.lexicon[table] for slot, table in self.slots.items()}

    @cached_property
    def _known(self) -> dict[str, set[str]]:
        """Return slot -> every value of its columns."""
        return {slot: {value for column in self.columns(slot) for value in self.values(slot, column)} for slot in self.slots}

    def answer(self, question: str, scene: Scene) -> str:
        """Answer a question about a scene.

        A question is one part, or several joined by `then`, answered in turn. A part is `SLOT COLUMN` (the value, such as
        `day next`) or a test answered yes or no: `SLOT VALUE`, `same COLUMN SLOT SLOT`, `not TEST`, `TEST and TEST`,
        `TEST or TEST` (`or` binds loosest, `not` tightest).

        Raises:
            IptError: the question is not one of these.
        """
        return " ".join(self._answer_part(part.split(), scene) for part in question.split(" then "))

    def labels(self, question: str) -> list[str]:
        """Return all answers that a question can have, in the lexicon's order."""
        parts = []
        for part in question.split(" then "):
            slot, _, column = part.partition(" ")
            is_value = slot in self.slots and column in self.columns(slot)
            parts.append(self.values(slot, column) if is_value else ["no", "yes"])
        return [" ".join(answer) for answer in itertools.product(*parts)]

    def _answer_part(self, words: list[str], scene: Scene) -> str:
        match words:
            case [slot, column] if slot in self.slots and column in self.columns(slot):
                return str(getattr(scene[slot], column))
        return "yes" if self._holds(words, scene) else "no"

    def _holds(self, words: list[str], scene: Scene) -> bool:
        for connective, combine in (("or", any), ("and", all)):
            if connective in words:
                at = words.index(connective)
                # A list, so that both sides are checked even when one decides.
                return combine([self._holds(words[:at], scene), self._holds(words[at + 1 :], scene)])
        match words:
            case ["not", *rest]:
                return not self._holds(rest, scene)
            case ["same", column, a, b] if all(s in self.slots and column in self.columns(s) for s in (a, b)):
                return bool(getattr(scene[a], column) == getattr(scene[b], column))
            case [slot, value] if slot in self.slots and value in self._known[slot]:
                return value in vars(scene[slot]).values()
        raise IptError(
            f"world {self.name}: cannot read the question part {' '.join(words)!r}: expected 'SLOT COLUMN', 'SLOT VALUE' or "
            f"'same COLUMN SLOT SLOT' with the slots {', '.join(self.slots)}"
        )


# --- Metrics -------------------------------------------------------------------------------------
# CrossFit's: predictions and references as text, a score in [0, 1] ([-1, 1] for correlations). The best reference counts.

References = Sequence[str]


def accuracy(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Return the share of predictions that are a reference to the letter, white space at the ends aside."""
    return _mean(p.strip() in {r.strip() for r in refs} for p, refs in zip(predictions, references, strict=True))


def macro_f1(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Return the mean F1 over the labels that occur among predictions or first references."""
    truths = [refs[0].strip() for refs in references]
    guesses = [p.strip() for p in predictions]
    scores = []
    for label in set(truths) | set(guesses):
        hits = sum(t == g == label for t, g in zip(truths, guesses, strict=True))
        scores.append(2 * hits / (truths.count(label) + guesses.count(label)))
    return _mean(scores)


def normalise_answer(text: str) -> str:
    """Lower the case, drop punctuation and articles, and fold white space (SQuAD's rule)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Return the share of predictions that are a reference after normalisation."""
    return _best_reference(predictions, references, lambda p, r: float(normalise_answer(p) == normalise_answer(r)))


def token_f1(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Return the mean F1 of normalised words in common (SQuAD's rule)."""

    def f1(prediction: str, reference: str) -> float:
        p, r = normalise_answer(prediction).split(), normalise_answer(reference).split()
        common = sum((Counter(p) & Counter(r)).values())
        return 2 * common / (len(p) + len(r)) if p and r else float(p == r)

    return _best_reference(predictions, references, f1)


def rouge_l(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Return the mean F1 of the longest common subsequence of words (letters and digits, lower case, no stemming)."""

    def f1(prediction: str, reference: str) -> float:
        p, r = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))
        lengths = [0] * (len(r) + 1)
        for word in p:
            diagonal = 0
            for j, other in enumerate(r, start=1):
                diagonal, lengths[j] = lengths[j], diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
        return 2 * lengths[-1] / (len(p) + len(r)) if p and r else 0.0

    return _best_reference(predictions, references, f1)


def matthews(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Return Matthews' correlation of two classes; a prediction that is not the positive one counts as the other.

    The positive class is `acceptable` (CoLA, the only task that CrossFit scores so), else the last label in order.
    """
    truths = [refs[0].strip() for refs in references]
    positive = "acceptable" if "acceptable" in truths else max(truths)
    return pearson([str(int(p.strip() == positive)) for p in predictions], [[str(int(t == positive))] for t in truths])


def pearson(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Return the correlation of numbers; 0 when either side is constant, and a prediction that is no number counts as 0."""
    x, y = ([_number(text) for text in texts] for texts in (predictions, [refs[0] for refs in references]))
    mean_x, mean_y = _mean(x), _mean(y)
    dx, dy = [a - mean_x for a in x], [b - mean_y for b in y]
    scale = math.sqrt(sum(a * a for a in dx) * sum(b * b for b in dy))
    return sum(a * b for a, b in zip(dx, dy, strict=True)) / scale if scale else 0.0


METRICS: dict[str, Callable[[Sequence[str], Sequence[References]], float]] = {
    "ACC": accuracy,
    "Classification-F1": macro_f1,
    "EM": exact_match,
    "QA-F1": token_f1,
    "Rouge-L": rouge_l,
    "Matthew-Correlation": matthews,
    "Pearson-Correlation": pearson,
}


def _best_reference(predictions: Sequence[str], references: Sequence[References], score: Callable[[str, str], float]) -> float:
    return _mean(max(score(p, r) for r in refs) for p, refs in zip(predictions, references, strict=True))


def _mean(values: Iterable[float]) -> float:
    numbers = [float(v) for v in values]
    return sum(numbers) / len(numbers)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


# --- Tasks ---------------------------------------------------------------------------------------
# A task is a source of few-shot samples and a metric. Sources: a world (the testbed), the Hub or local files, a gym folder.


@dataclass(frozen=True)
class Example:
    """One row of a task as text."""

    input: str
    answers: tuple[str, ...]
    """The references; the first is what is trained on."""
    options: tuple[str, ...] = ()
    """What can be answered; empty when the answer is free."""
    tail: int = 0
    """The last so many characters of `input` that truncation spares: it cuts the end of what stands before them."""


Rows = tuple[Example, ...]


@dataclass(frozen=True)
class FewShotSample:
    """A task's rows for one data seed; the test rows are the same for all seeds."""

    train: Rows
    validation: Rows
    test: Rows


class Source(Protocol):
    """Where a task's rows come from."""

    def sample(self, data_seed: int, *, shots: int, test_rows: int | None) -> FewShotSample:
        """Draw a few-shot sample.

        Args:
            data_seed: chooses the training and validation rows, never the test rows.
            shots: rows per label for classification, half the rows in total otherwise; as many again for validation.
            test_rows: at most so many test rows, the first of a fixed order; None for all.

        Raises:
            IptError: there are too few rows.
        """


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row of tasks.yaml, or a task of a gym folder."""

    name: str
    kind: str
    """What its answers are: classification, multiple-choice, extraction, transformation or free-form."""
    metric: str
    splits: Mapping[str, str]
    """Name of a split -> this task's place in it: seen or unseen (unseen-in, unseen-out)."""
    source: Source
    category: str = ""
    note: str = ""
    pretrained: bool = False
    """The testbed's backbone was trained on this very question."""


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, where YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise IptError(
                f"{self.name}: {twice[0]!r} stands twice in the mapping at line {node.start_mark.line + 1}: remove one"
            )
        return super().construct_mapping(node, deep)


def read_tasks_file(file: Path) -> dict[str, Any]:
    """Return a tasks file's top-level mappings `worlds`, `subsets` and `tasks`."""
    content = read_yaml(file)
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise IptError(f"{file}: expected a mapping with the key 'tasks', got {type(content).__name__}")
    return content


def read_yaml(file: Path) -> Any:
    """Parse a YAML file, once as long as it stays as it is."""
    try:
        return _parse_yaml(file, file.stat().st_mtime_ns)
    except FileNotFoundError as error:
        raise IptError(f"there is no file {file}: name another with --tasks-file or --split") from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError, TypeError) as error:
        raise IptError(f"{file} is not readable as YAML: {' '.join(str(error).split())}") from error


@lru_cache(maxsize=2)
def _parse_yaml(file: Path, modified: int) -> Any:
    with file.open(encoding="utf-8") as stream:
        return yaml.load(stream, Loader=_StrictLoader)


def subsets(file: Path) -> dict[str, list[str]]:
    """Return the splits of a tasks file that are lists of seen tasks."""
    return dict(read_tasks_file(file).get("subsets", {}))


def load_worlds(file: Path) -> dict[str, World]:
    """Return the worlds of a tasks file."""
    worlds = {}
    rows = read_tasks_file(file).get("worlds", {})
    if not isinstance(rows, dict):
        raise IptError(f"{file}: 'worlds' is {rows!r}, expected a mapping of a world's name to its rows")
    for name, row in rows.items():
        try:
            lexicon = {
                table: [SimpleNamespace(**dict(zip(columns["columns"], entry.split(), strict=True))) for entry in columns["rows"]]
                for table, columns in row["lexicon"].items()
            }
            worlds[name] = World(name, row["sentence"], row["slots"], lexicon)
            worlds[name].describe(worlds[name].draw(random.Random(0)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IptError(
                f"{file}: world {name}: {error!r}: expected 'sentence' (with {{slot.column}}), 'slots' (slot: table), 'lexicon' "
                "(table: columns and rows, as many words in each row as there are columns)"
            ) from error
    return worlds


WORLD_FIELDS = {"world", "kind", "question", "metric", "splits", "pretrained"}
PLACES = ("seen", "unseen", "unseen-in", "unseen-out")
WORLD_METRICS = {"classification": "ACC", "multiple-choice": "ACC", "extraction": "QA-F1", "transformation": "EM"}


def parse_world_task(name: str, row: dict[str, Any], worlds: Mapping[str, World], file: Path) -> Task:
    """Return a task whose rows are drawn from a world."""
    where = f"{file}: task {name}"
    for key in row.keys() - WORLD_FIELDS:
        raise IptError(f"{where}: unknown field {key!r}{nearest(key, WORLD_FIELDS)}; expected {', '.join(sorted(WORLD_FIELDS))}")
    if row["world"] not in worlds:
        raise IptError(f"{where}: there is no world {row['world']!r} in this file{nearest(str(row['world']), worlds)}")
    if row.get("kind") not in WORLD_METRICS:
        raise IptError(f"{where}: kind is {row.get('kind')!r}, expected one of {', '.join(WORLD_METRICS)}")
    world, question = worlds[row["world"]], row.get("question")
    if not isinstance(question, str):
        raise IptError(f"{where}: 'question' is {question!r}, expected text such as 'day next'")
    try:
        world.answer(question, world.draw(random.Random(0)))
    except IptError as error:
        raise IptError(f"{where}: {error}") from error
    metric = row.get("metric", WORLD_METRICS[row["kind"]])
    if metric not in METRICS:
        raise IptError(f"{where}: unknown metric {metric!r}{nearest(str(metric), METRICS)}; expected {', '.join(METRICS)}")
    splits, pretrained = row.get("splits", {}), row.get("pretrained", False)
    if not isinstance(splits, dict) or not all(place in PLACES for place in splits.values()):
        raise IptError(f"{where}: splits is {splits!r}, expected a split's name: one of {', '.join(PLACES)}")
    if not isinstance(pretrained, bool):
        raise IptError(f"{where}: pretrained is {pretrained!r}, expected true or false")
    source = WorldRows(world, question, row["kind"])
    return Task(
        name=name,
        kind=row["kind"],
        metric=metric,
        splits=row.get("splits", {}),
        source=source,
        pretrained=row.get("pretrained", False),
    )


def load_tasks(file: Path) -> dict[str, Task]:
    """Return the tasks of a tasks file, in its order."""
    content, worlds = read_tasks_file(file), load_worlds(file)
    tasks = {}
    for name, row in content["tasks"].items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            raise IptError(
                f"{file}: {name!r} cannot be a task's name: expected letters, digits, '.', '_' and '-' (quote yes and no)"
            )
        if not isinstance(row, dict):
            raise IptError(f"{file}: task {name}: expected a mapping of fields, got {row!r}")
        tasks[name] = parse_world_task(name, row, worlds, file) if "world" in row else parse_hub_task(name, row, file)
    return tasks


@dataclass(frozen=True, eq=False)
class WorldRows:
    """Rows of a world without end; a sentence's checksum decides its part, so that train, validation and test never meet."""

    world: World
    question: str
    kind: str

    def __str__(self) -> str:
        """Return what the question is."""
        return f"{self.world.name}: {self.question}"

    def sample(self, data_seed: int, *, shots: int, test_rows: int | None) -> FewShotSample:
        """Draw rows, as many of every label for classification."""
        count = shots * len(self._answers) if self.kind == "classification" else 2 * shots
        return FewShotSample(
            train=self.draw(count, f"train {data_seed}", (2, 3)),
            validation=self.draw(count, f"validation {data_seed}", (1,)),
            test=_test_rows(self, 1000 if test_rows is None else test_rows),
        )

    def draw(self, count: int, stream: str, parts: Collection[int]) -> Rows:
        """Return so many rows of some of the four parts of all sentences; the stream's name is the seed."""
        return tuple(itertools.islice(self._draw(random.Random(f"{self.question} {stream}"), parts), count))

    @cached_property
    def _answers(self) -> list[str]:
        return self.world.labels(self.question)

    def _draw(self, rng: random.Random, parts: Collection[int]) -> Iterator[Example]:
        """Yield examples, the wanted label going round for classification; no sentence comes twice."""
        seen = set[str]()
        for label in itertools.cycle(self._answers if self.kind == "classification" else [None]):
            for _ in range(100_000):
                scene = self.world.draw(rng)
                sentence = self.world.describe(scene)
                if sentence in seen or zlib.crc32(sentence.encode()) % 4 not in parts:
                    continue
                answer = self.world.answer(self.question, scene)
                if label in (None, answer):
                    break
            else:
                raise IptError(
                    f"world {self.world.name}: the question {self.question!r} has too few rows for the answer {label!r}"
                )
            seen.add(sentence)
            if self.kind == "multiple-choice":
                options = self._draw_options(answer, rng)
                yield Example(sentence + "".join(f" {OPTION_MARK} {option}" for option in options), (answer,), options)
            else:
                yield Example(sentence, (answer,), tuple(self._answers) if label else ())

    def _draw_options(self, answer: str, rng: random.Random) -> tuple[str, ...]:
        """Return the answer among up to two other answers that the question can have, in random order."""
        options = {answer}
        while len(options) < min(3, len(self._answers)):
            options.add(self.world.answer(self.question, self.world.draw(rng)))
        return tuple(rng.sample(sorted(options), len(options)))


@lru_cache(maxsize=1000)
def _test_rows(source: WorldRows, count: int) -> Rows:
    """Draw the test rows, which all data seeds share."""
    return source.draw(count, "test", (0,))


OPTION_MARK = "|"
"""Stands before each option in a multiple-choice input of a world."""


# --- CrossFit's few-shot samples -----------------------------------------------------------------
# Rows in, rows out, in CrossFit's order and, as a TSV file, in CrossFit's bytes, so that its published MD5s can be compared.

CROSSFIT_SEEDS = (100, 13, 21, 42, 87)


def crossfit_sample(rows: Sequence[Example], *, seed: int, shots: int, per_label: bool) -> tuple[Rows, Rows]:
    """Draw train and validation rows exactly as CrossFit does.

    Args:
        rows: The whole training set, in the order of its files.
        seed: Of numpy's legacy generator, which shuffles a copy of `rows`.
        shots: Rows per label where `per_label`, else in total: train takes the first so many, validation the next.
        per_label: A label is the answer's text; labels follow each other in the order of their first row after the shuffle.

    Returns:
        Train and validation rows. A label with too few rows gives fewer, as in CrossFit.
    """
    groups: dict[str, list[Example]] = {}
    for row in _shuffle(rows, seed):
        groups.setdefault("\t".join(row.answers) if per_label else "", []).append(row)
    train = tuple(row for group in groups.values() for row in group[:shots])
    validation = tuple(row for group in groups.values() for row in group[shots : 2 * shots])
    return train, validation


def _shuffle(rows: Sequence[Example], seed: int) -> list[Example]:
    shuffled = list(rows)
    np.random.RandomState(seed).shuffle(shuffled)  # type: ignore[arg-type]  # the draws of np.random.seed and shuffle
    return shuffled


def crossfit_tsv(examples: Iterable[Example]) -> bytes:
    """Return the bytes of CrossFit's TSV file: per line the input and all references, tab-separated, nothing escaped."""
    return "".join("\t".join((row.input, *row.answers)) + "\n" for row in examples).encode()


def verify_task(task: Task) -> list[tuple[str, int, str]]:
    """Rebuild a task's samples and compare them with the MD5s that CrossFit published.

    Returns:
        (part, seed, "equal" or "different"): train and dev of five seeds, then test once, as all seeds share it.
    """
    lines = (line.split() for line in shipped("crossfit_md5.txt").read_text(encoding="utf-8").splitlines())
    published = next((digits for name, *digits in lines if name == task.name), None)
    if published is None:
        raise IptError(f"CrossFit published no MD5s for task '{task.name}'; only its own tasks can be verified")
    samples = {seed: task.source.sample(seed, shots=16, test_rows=None) for seed in CROSSFIT_SEEDS}
    parts = [(part, seed, rows) for seed, it in samples.items() for part, rows in (("train", it.train), ("dev", it.validation))]
    parts.append(("test", CROSSFIT_SEEDS[0], samples[CROSSFIT_SEEDS[0]].test))
    verdicts = []
    for (part, seed, rows), digits in zip(parts, published, strict=True):
        equal = hashlib.md5(crossfit_tsv(rows)).hexdigest().startswith(digits)
        verdicts.append((part, seed, "equal" if equal else "different"))
    return verdicts


# --- Tasks from the Hub and from local files -----------------------------------------------------
# A row of tasks.yaml says how a record of a dataset becomes text: replace, clean, transform, keep -> template -> Example.

Record = dict[str, Any]
CONVERTED = "refs/convert/parquet"
WAY_OUT = "; a folder of CrossFit or MetaICL files can stand in: --data DIR"


@dataclass(frozen=True, kw_only=True, eq=False)
class HubDataset:
    """A source: one dataset of the Hub, or local files, and the way its records become examples.

    A *path* in a field names a column, or what lies inside one: `sql.human_readable`, `candidates.0`. A name steps into a record,
    or into each record of a list; a number picks from a list.
    """

    where: str
    """The file and the task, for messages."""
    folder: Path
    """Local `data_files` are relative to it."""
    template: str
    """The input: text with {path} fields, lists joined by `join`; {options} is every option in `option_style`."""
    answer: str
    """Path of the label, of the key that picks the right option, or of all references."""
    dataset: str = ""
    """Name on the Hub, or csv, json, parquet, text with `data_files`."""
    config: str | None = None
    revision: str | None = None
    """`refs/convert/parquet` reads the Hub's own conversion of a dataset that is still a script."""
    data_files: Mapping[str, str] | None = None
    """Split name -> URL or local path."""
    reader: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the file reader, such as the separator of a csv file."""
    train: str = "train"
    """Split to draw from. Brackets shuffle it with seed 42 and take a slice: train[:80%], train[10000:11000]."""
    test: str = "validation"
    replace: Mapping[str, str] = field(default_factory=dict)
    """Text replaced in every string of a record; the new text is a template."""
    clean: str | Mapping[str, str] = ""
    """A name of CLEANERS for the whole input, or column -> cleaner."""
    transform: Sequence[Any] = ()
    """A name of TRANSFORMS, then its arguments."""
    keep: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Path -> the values that a record must have there, other records are left out; an empty list: anything but empty."""
    join: str = " "
    truncate: str = ""
    """Field of the template whose end goes when an input is too long; `start`: the beginning of the input goes."""
    options: str | Sequence[str] = ()
    """Path of the list of options, or one path per option."""
    option_labels: str = ""
    """Path of the letters before the options; A, B, C ... without it."""
    option_style: str = " ({letter}) {text}"
    pick: str = "text"
    """What `answer` holds: the right option's `text`, its `label`, its `letter` (A, B ...), its `index` from 0 or its `number`
    from 1; `free` when it is no option but a text of its own."""
    verbalizer: Mapping[str, str] = field(default_factory=dict)
    """Label -> the words that answer it; the words are the options."""
    per_label: bool = False
    """Whether shots count per label or in total."""
    references: str = ""
    """`unique` drops empty and repeated references, `sorted` also sorts them. CrossFit left the order of unique ones to chance,
    so where a row has several its MD5 cannot be met."""
    join_answers: str | None = None
    """Joins several answers to one; without it they are alternative references."""
    clean_answers: str = ""
    unavailable: str = ""
    """Why the dataset cannot be had any more."""

    def __str__(self) -> str:
        """Return where the rows come from."""
        return " ".join(filter(None, [self.dataset, self.config, self.revision, self.unavailable and "unavailable"]))

    def sample(self, data_seed: int, *, shots: int, test_rows: int | None) -> FewShotSample:
        """Draw CrossFit's sample: `shots` per label, or 2 * `shots` in total; the test rows are the same for all seeds."""
        count = shots if self.per_label else 2 * shots
        rows = _rows_of_split(self, self.train)
        train, validation = crossfit_sample(rows, seed=data_seed, shots=count, per_label=self.per_label)
        if not validation:
            raise IptError(
                f"{self.where}: the {len(rows)} rows of '{self.train}' are too few for {count} shots and validation rows"
            )
        test = () if test_rows == 0 else _rows_of_split(self, self.test)[:test_rows]
        return FewShotSample(train, validation, test)

    def examples(self, records: Iterable[Record]) -> Iterator[Example]:
        """Turn records into examples, in order, without those that the transform or `keep` leave out."""
        records = map(self._edited, records)
        try:
            if self.transform:
                records = TRANSFORMS[self.transform[0]](records, *self.transform[1:])
            for record in records:
                if all(_is_kept(self._value(record, path, "keep"), values) for path, values in self.keep.items()):
                    yield self._example(record)
        except KeyError as error:  # only a transform can raise it
            raise IptError(f"{self.where}: transform needs column {error}, which the data lacks") from error

    def _edited(self, record: Record) -> Record:
        """Apply `replace`, and `clean` where it names columns."""
        for old, new in self.replace.items():
            record = _map_text(record, operator.methodcaller("replace", old, self._render(new, record, ())))
        columns = self.clean.items() if isinstance(self.clean, Mapping) else ()
        return record | {column: _map_text(self._value(record, column, "clean"), CLEANERS[how]) for column, how in columns}

    def _example(self, record: Record) -> Example:
        paths = [self.options] if isinstance(self.options, str) else self.options
        options = tuple(text for path in paths for text in _texts(self._value(record, path, "options")))
        clean = CLEANERS[self.clean if isinstance(self.clean, str) else ""]
        head, tail = (self._render(part, record, options) for part in self._parts)
        text, answers = clean(head + tail), self._answers(record, options)
        spared = len(text) if self.truncate == "start" else min(len(text), len(clean(tail)))
        choices = tuple(dict.fromkeys(self.verbalizer.values())) or (() if self.pick == "free" else options)
        return Example(text, answers, choices, spared)

    @cached_property
    def _parts(self) -> tuple[str, str]:
        """The template up to the field that truncation shortens, and the rest, which it spares."""
        *others, last = template_fields(self.template) or [""]
        gives_way = self.truncate or (others[-1] if others and last == "options" else "start")
        head, mark, tail = self.template.partition("{" + gives_way + "}")
        return head + mark, tail

    def _render(self, template: str, record: Record, options: Sequence[str]) -> str:
        def text_of(path: str) -> str:
            if path != "options" or not self.options:
                return self.join.join(_texts(self._value(record, path, "template")))
            labels = self._value(record, self.option_labels, "option_labels") if self.option_labels else string.ascii_uppercase
            return "".join(self.option_style.format(letter=a, text=b) for a, b in zip(labels, options, strict=False))

        parts = string.Formatter().parse(template)
        return "".join(literal + (text_of(path) if path is not None else "") for literal, path, *_ in parts)

    def _answers(self, record: Record, options: Sequence[str]) -> tuple[str, ...]:
        answers = _texts(self._value(record, self.answer, "answer"))
        if self.verbalizer:
            answers = tuple(map(self._word, answers))
        elif self.pick != "free":
            answers = (self._picked(record, answers[0], options),)
        if self.references:
            answers = tuple(dict.fromkeys(filter(None, answers)))
        if self.references == "sorted":
            answers = tuple(sorted(answers))
        if self.join_answers is not None:
            answers = (self.join_answers.join(answers),)
        return tuple(map(CLEANERS[self.clean_answers], answers)) or ("",)

    def _word(self, label: str) -> str:
        if label not in self.verbalizer:
            known = ", ".join(self.verbalizer)
            raise IptError(
                f"{self.where}: verbalizer has no words for label '{label}' of '{self.answer}', only for {known}; add it"
            )
        return self.verbalizer[label]

    def _picked(self, record: Record, key: str, options: Sequence[str]) -> str:
        """Return the right option."""
        if self.pick in ("index", "number"):
            position = int(key) - (self.pick == "number") if key.isdigit() else -1
        else:
            labels = _texts(self._value(record, self.option_labels, "option_labels")) if self.pick == "label" else ()
            among = {"text": options, "label": labels, "letter": string.ascii_uppercase}[self.pick]
            wanted = key.upper() if self.pick == "letter" else key
            position = list(among).index(wanted) if wanted in list(among) else -1
        if not 0 <= position < len(options):
            raise IptError(f"{self.where}: '{key}' of '{self.answer}' is no {self.pick} of the {len(options)} options {options}")
        return options[position]

    def _value(self, record: Record, path: str, field_name: str) -> Any:
        try:
            return _look_up(record, path)
        except (KeyError, IndexError, TypeError) as error:
            columns = ", ".join(record)
            raise IptError(
                f"{self.where}: {field_name} names '{path}', which the data lacks; its columns are {columns}"
            ) from error


@lru_cache(maxsize=2)  # train and test of the task at hand, for all its seeds
def _rows_of_split(source: HubDataset, split: str) -> Rows:
    """Load one split as examples, in CrossFit's order."""
    name, bracket, bounds = split.partition("[")
    rows = tuple(source.examples(_load_records(source, name)))
    if not bracket:
        return rows
    start, stop = (
        int(int(bound[:-1]) / 100 * len(rows)) if bound.endswith("%") else int(bound) if bound else None
        for bound in bounds.removesuffix("]").split(":")
    )
    return tuple(_shuffle(rows, 42)[start:stop])


def _load_records(source: HubDataset, split: str) -> Iterator[Record]:
    """Read the records of one split through `datasets`; a failure names task, dataset and reason."""
    if source.unavailable:
        raise IptError(f"{source.where} cannot be loaded: {source.unavailable}{WAY_OUT}")
    files = source.data_files
    if source.revision == CONVERTED:  # one folder per config and split, which `datasets` would mix up
        files = {split: f"{source.config or 'default'}/{split}/*.parquet"}
    elif files and source.dataset in ("csv", "json", "parquet", "text"):
        files = {name: file if "://" in file else str(source.folder / file) for name, file in files.items()}
    config = None if source.revision == CONVERTED else source.config
    try:
        table = datasets.load_dataset(
            source.dataset, config, revision=source.revision, data_files=files, split=split, **source.reader
        )
    except Exception as error:  # load_dataset lets through whatever its HTTP client, file system or reader raises
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise IptError(f"{source.where}: split '{split}' of '{source.dataset}' could not be loaded: {reason}{WAY_OUT}") from error
    return iter(table)


def template_fields(template: str) -> list[str]:
    """List the paths that a template names, in order."""
    return [path for _, path, *_ in string.Formatter().parse(template) if path is not None]


def _look_up(value: Any, path: str) -> Any:
    """Follow a path; a name goes through lists to every record in them."""
    for step in path.split("."):
        if isinstance(value, list):
            value = value[int(step)] if step.isdigit() else [_look_up(item, step) for item in value]
        else:
            value = value[step]
    return value


def _texts(value: Any) -> tuple[str, ...]:
    """Flatten a value to strings: lists in order, a missing value as the empty string, booleans as YAML writes them."""
    if isinstance(value, list):
        return tuple(text for item in value for text in _texts(item))
    if value is None:
        return ("",)
    return (str(value).lower() if isinstance(value, bool) else str(value),)


def _is_kept(value: Any, values: Sequence[str]) -> bool:
    return any(text in values if values else text for text in _texts(value))


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Change every string inside a value."""
    if isinstance(value, dict):
        return {key: _map_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


CLEANERS: dict[str, Callable[[str], str]] = {
    "": str,
    "strip": str.strip,
    "newlines": lambda text: text.replace("\n", " "),
    "breaks": lambda text: re.sub(r"[\n\r\t]", " ", text),
    "whitespace": lambda text: " ".join(text.replace(r"\n", " ").split()),  # also a newline that the data spells out
    "quotes": lambda text: text.strip("'"),
    "letter": lambda text: text[2:],  # A)text
    "compact": lambda text: text.replace(" ", "").lower(),
}

# What no field of a row can say. Each takes all records of a split in order, and the arguments that the row gives.


def _merge(records: Iterable[Record], column: str, *keys: str) -> Iterator[Record]:
    """Make one record of those equal in `keys`, its `column` the list of theirs: several references of one input."""
    merged: dict[tuple[Any, ...], Record] = {}
    for record in records:
        merged.setdefault(tuple(record[key] for key in keys), record | {column: []})[column].append(record[column])
    return iter(merged.values())


def _dialogues(records: Iterable[Record]) -> Iterator[Record]:
    """Leave out the broken utterances of empathetic_dialogues, then merge the answers to one prompt."""
    return _merge((record for record in records if "hit:" not in record["utterance"]), "utterance", "prompt", "context")


def _pair(records: Iterable[Record], right: str, wrong: str) -> Iterator[Record]:
    """Put two sentences in an order drawn row by row (seed 42); `label` is the position of the right one."""
    coin = np.random.RandomState(42)
    for record in records:
        if coin.random_sample() > 0.5:
            yield {"first": record[right], "second": record[wrong], "label": 0}
        else:
            yield {"first": record[wrong], "second": record[right], "label": 1}


def _acronym(records: Iterable[Record]) -> Iterator[Record]:
    """Read acronym and long form off the token tags, of sentences with exactly one of each."""
    for record in records:
        tags = record["labels"]
        if tags.count(0) == tags.count(1) == 1:
            spans = {}
            for name, begin, inside in (("long", 0, 2), ("short", 1, 3)):
                start = tags.index(begin)
                length = next((n for n, tag in enumerate(tags[start + 1 :], 1) if tag != inside), len(tags) - start)
                spans[name] = record["tokens"][start : start + length]
            yield record | spans


def _majority(records: Iterable[Record], path: str) -> Iterator[Record]:
    """Take the label that most annotators gave; ties are left out."""
    for record in records:
        (label, count), *others = Counter(_look_up(record, path)).most_common(2)
        if not others or count > others[0][1]:
            yield record | {"majority": label}


def _band(records: Iterable[Record], column: str, low: float, high: float) -> Iterator[Record]:
    """Make a label of a score: 0 below `low`, 1 above `high`; what lies between is left out."""
    return (row | {"label": int(row[column] > high)} for row in records if not low <= row[column] <= high)


def _math_options(records: Iterable[Record]) -> Iterator[Record]:
    """Cut math_qa's options out of their one string as CrossFit does: at every comma, even one inside a number."""
    for record in records:
        parts = enumerate(record["options"].split(",")[:5])
        options = [part[4 if index == 0 else 5 : None if index == 4 else -1] for index, part in parts]
        if options["abcde".index(record["correct"])]:
            yield record | {"options": options}


def _inline_options(records: Iterable[Record]) -> Iterator[Record]:
    """Find the two options inside quarel's question."""
    for record in records:
        _, *options = re.split(r"\([AB]\) ?", record["question"], maxsplit=2)
        yield record | {"options": [option.removesuffix("or ").strip() for option in options]}


def _multirc(records: Iterable[Record]) -> Iterator[Record]:
    """Gather multirc's options of one question; the answer is every right one."""
    records = ({**row, "question_id": row["idx"]["question"], "answer": (row["answer"], row["label"])} for row in records)
    for row in _merge(records, "answer", "question_id"):
        right = [text for text, label in row["answer"] if label == 1]
        yield row | {"options": [text for text, _ in row["answer"]], "right": right or ["NO ANSWER!"]}


def _infobox(records: Iterable[Record]) -> Iterator[Record]:
    """Write wiki_bio's table as text; tables whose headers and cells do not match are left out."""
    for record in records:
        title, (headers, cells) = (
            record["input_text"]["context"],
            map(record["input_text"]["table"].get, ("column_header", "content")),
        )
        if len(headers) == len(cells):
            lines = [f"{header}: {cell.strip()} [n] ".replace("\n", " ") for header, cell in zip(headers, cells, strict=True)]
            yield record | {"title": title.strip(), "infobox": "".join(lines)}


def _proto_qa(records: Iterable[Record]) -> Iterator[Record]:
    """Parse proto_qa line by line: its answers are the keys of a mapping, whose order a table would lose."""
    for row in (json.loads(record["text"]) for record in records):
        yield {"question": row["question"]["normalized"], "answers": list(row["answers"]["raw"])}


def _gold_paragraphs(records: Iterable[Record]) -> Iterator[Record]:
    """Keep the paragraphs of hotpot_qa that support the answer."""
    for record in records:
        paragraphs = zip(record["context"]["title"], record["context"]["sentences"], strict=True)
        gold = ["".join(sentences) for title, sentences in paragraphs if title in record["supporting_facts"]["title"]]
        yield record | {"gold": " ".join(gold).strip()}


TRANSFORMS: dict[str, Callable[..., Iterator[Record]]] = {
    "merge": _merge,
    "dialogues": _dialogues,
    "pair": _pair,
    "acronym": _acronym,
    "majority": _majority,
    "band": _band,
    "math_options": _math_options,
    "inline_options": _inline_options,
    "multirc": _multirc,
    "infobox": _infobox,
    "proto_qa": _proto_qa,
    "gold_paragraphs": _gold_paragraphs,
}


# --- Rows of tasks.yaml --------------------------------------------------------------------------
# Checked field by field before anything is loaded.

TASK_FIELDS = ("metric", "kind", "category", "note", "splits")
MAPPING_FIELDS = ("data_files", "reader", "verbalizer", "keep", "replace", "splits")
ROW_FIELDS: dict[str, tuple[type, ...]] = {
    **{setting.name: (str,) for setting in fields(HubDataset) if setting.name not in ("where", "folder", "per_label")},
    **dict.fromkeys(TASK_FIELDS, (str,)),
    **dict.fromkeys(MAPPING_FIELDS, (dict,)),
    **{"options": (str, list), "clean": (str, dict), "transform": (str, list)},
}
_NAMES_OF_TYPES: dict[type, str] = {str: "text", dict: "a mapping", list: "a list"}
CHOICES: dict[str, Collection[str]] = {
    "kind": ("classification", "multiple-choice", "free-form"),
    "metric": METRICS,
    "pick": ("text", "label", "letter", "index", "number", "free"),
    "references": ("unique", "sorted"),
    "splits": PLACES,
    "clean": CLEANERS,
    "clean_answers": CLEANERS,
}


def parse_hub_task(name: str, row: Any, file: Path) -> Task:
    """Make a task of one row of a tasks file.

    Raises:
        IptError: For the first field that is unknown, missing, of the wrong type or names something that does not exist.
    """
    where = f"{file.name}: task '{name}'"
    if not isinstance(row, dict):
        raise IptError(f"{where} is {_described(row)}, not a mapping of fields such as dataset, template, answer")
    for key, value in row.items():
        _check_field(where, str(key), value)
    for key in ("template", "answer", "metric", *(() if "unavailable" in row else ("dataset",))):
        if key not in row:
            raise IptError(f"{where} has no field '{key}', which every row needs")
    kind = row.get("kind") or (
        "classification" if "verbalizer" in row else "multiple-choice" if "options" in row else "free-form"
    )
    needed = {"classification": "verbalizer", "multiple-choice": "options"}.get(kind)
    if needed and not row.get(needed):
        raise IptError(f"{where} is of kind {kind}, so it needs field '{needed}'")
    settings = {key: value for key, value in row.items() if key not in TASK_FIELDS}
    settings["verbalizer"] = {_texts(label)[0]: word for label, word in row.get("verbalizer", {}).items()}
    settings["keep"] = {path: _texts(values) for path, values in row.get("keep", {}).items()}
    settings["transform"] = [row["transform"]] if isinstance(row.get("transform"), str) else row.get("transform", ())
    settings.setdefault("pick", "free" if kind != "multiple-choice" else "text")
    source = HubDataset(where=where, folder=file.parent, per_label=kind == "classification", **settings)
    _check_row(source)
    about = {key: row[key] for key in ("metric", "category", "note") if key in row}
    return Task(name=name, kind=kind, splits=row.get("splits", {}), source=source, **about)


def _check_field(where: str, key: str, value: Any) -> None:
    """Refuse an unknown field, a value of the wrong type, and text that YAML read as something else."""
    if key not in ROW_FIELDS:
        raise IptError(f"{where} has an unknown field '{key}'{nearest(key, ROW_FIELDS)}")
    if not isinstance(value, ROW_FIELDS[key]):
        expected = " or ".join(_NAMES_OF_TYPES[kind] for kind in ROW_FIELDS[key])
        raise IptError(f"{where}: field '{key}' must be {expected}, not {_described(value)}")
    for entry, text in value.items() if isinstance(value, dict) and key != "reader" else ():
        if not isinstance(text, list if key == "keep" else str):
            expected = "a list of values" if key == "keep" else "text"
            raise IptError(f"{where}: field '{key}', entry '{_texts(entry)[0]}' must be {expected}, not {_described(text)}")
    for text in value.values() if isinstance(value, dict) else [value]:
        if isinstance(text, str) and text not in CHOICES.get(key, [text]):
            raise IptError(
                f"{where}: field '{key}' is '{text}'{nearest(text, CHOICES[key])}; it can be {', '.join(CHOICES[key])}"
            )


def _check_row(source: HubDataset) -> None:
    """Refuse what contradicts itself or cannot be read."""
    try:
        parts = list(string.Formatter().parse(source.template))
    except ValueError as error:
        raise IptError(
            f"{source.where}: field 'template' cannot be read ({error}); double a brace that is meant as text"
        ) from error
    named = template_fields(source.template)
    if not all(named) or any(spec or conversion for *_, spec, conversion in parts):
        raise IptError(f"{source.where}: a field of the template is a bare {{column}}, without '!' or ':' and not empty")
    if source.truncate not in ("", "start", *named):
        raise IptError(f"{source.where}: truncate names '{source.truncate}', but the template has only {', '.join(named)}")
    if source.transform and source.transform[0] not in TRANSFORMS:
        name = str(source.transform[0])
        raise IptError(
            f"{source.where}: there is no transform '{name}'{nearest(name, TRANSFORMS)}; there are {', '.join(TRANSFORMS)}"
        )
    if source.pick == "label" and not source.option_labels:
        raise IptError(f"{source.where}: pick is 'label', so option_labels must name the column of the labels")
    for split in (source.train, source.test):
        if not re.fullmatch(r"[^\[\]]+(\[(\d+%?)?:(\d+%?)?\])?", split):
            raise IptError(f"{source.where}: split '{split}' cannot be read; write a name or a slice such as train[:80%]")


def _described(value: Any) -> str:
    """Name a YAML value as its writer knows it, with the remedy if it is text without quotes."""
    if value is None or isinstance(value, list | dict):
        return "empty" if value is None else "a list" if isinstance(value, list) else "a mapping"
    if isinstance(value, bool):
        return f"{str(value).lower()} (in YAML yes, no, on and off are booleans: quote it)"
    return f"{value} (quote it)"


# --- Splits of the tasks -------------------------------------------------------------------------
# Which tasks the subspace is found with, and which it never sees.


def split_tasks(tasks: Mapping[str, Task], name: str, subsets: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Resolve the name of a split to task -> seen, unseen, unseen-in or unseen-out.

    Args:
        tasks: All known tasks; their `splits` say what they are in random, cls and non-cls.
        name: Such a split; a name in `subsets`; without-<type>, such as without-nli: the seen tasks of random but for those of
            one type, and all tasks of that type as unseen; or a YAML file of the user's with a list of tasks for each place.
        subsets: Name -> the seen tasks, for random-20 and the like, whose unseen tasks are those of random.
    """
    if name.endswith((".yaml", ".yml")):
        return read_split(Path(name), tasks)
    base = {task.name: task.splits["random"] for task in tasks.values() if "random" in task.splits}
    types = {task: "without-" + tasks[task].category.partition("/")[2] for task in base}
    if name in types.values():
        return {
            task: "unseen" if types[task] == name else role
            for task, role in base.items()
            if name == types[task] or role == "seen"
        }
    if name in subsets:
        return dict.fromkeys(subsets[name], "seen") | {task: role for task, role in base.items() if role != "seen"}
    known = sorted({*subsets, *types.values(), *(split for task in tasks.values() for split in task.splits)})
    if name not in known:
        raise IptError(
            f"there is no task split '{name}'{nearest(name, known)}; there are {', '.join(known)}, or a file: --split mine.yaml"
        )
    return {task.name: task.splits[name] for task in tasks.values() if name in task.splits}


def read_split(file: Path, tasks: Mapping[str, Task]) -> dict[str, str]:
    """Read a split from a file such as `{seen: [glue-sst2, squad-no_context], unseen: [anli]}`.

    Raises:
        IptError: it is no such file, a task is unknown, or a task stands in two places.
    """
    content = read_yaml(file)
    if not isinstance(content, dict) or not content or not all(isinstance(names, list) for names in content.values()):
        raise IptError(f"{file}: expected lists of tasks under {', '.join(PLACES)}")
    split: dict[str, str] = {}
    for place, name in ((place, name) for place, names in content.items() for name in names):
        if place not in PLACES:
            raise IptError(f"{file}: {place!r} is no place of a split{nearest(str(place), PLACES)}; expected {', '.join(PLACES)}")
        if name not in tasks:
            raise IptError(f"{file}: there is no task {name!r}{nearest(str(name), tasks)}; 'ipt tasks' lists them")
        if name in split:
            raise IptError(f"{file}: task {name!r} stands twice, under {split[name]} and {place}: remove one")
        split[name] = place
    return split


# --- Gym folders ---------------------------------------------------------------------------------
# Few-shot files that CrossFit (TSV) or MetaICL (JSONL) built, K and seeds as found. <task>_test.jsonl serves all seeds.

GYM_FILE = re.compile(r"(?P<task>.+?)(_(?P<k>\d+)_(?P<seed>\d+))?_(?P<part>train|dev|test)\.(tsv|jsonl)")


@dataclass(frozen=True, kw_only=True, eq=False)
class GymFolder:
    """A source: the few-shot files of one task."""

    task: str
    files: Mapping[tuple[int, int, str], Path]
    """(K, data seed, train, dev or test) -> file; K and seed are 0 for a test file that serves all seeds."""
    per_label: bool = False
    options: tuple[str, ...] = ()
    """Options of every row, for TSV files, which name none."""

    def __str__(self) -> str:
        """Return what the folder holds."""
        test = "" if self.has_test else ", no test rows"
        sizes = "/".join(map(str, sorted({k for k, _, part in self.files if part == "train"})))
        return f"gym folder, K {sizes}, data seeds {' '.join(map(str, self.seeds))}{test}"

    @property
    def seeds(self) -> tuple[int, ...]:
        """The data seeds with both train and dev rows."""
        return tuple(sorted({seed for k, seed, part in self.files if part == "train" and (k, seed, "dev") in self.files}))

    @property
    def has_test(self) -> bool:
        """Whether there are test rows."""
        return any(part == "test" for *_, part in self.files)

    def sample(self, data_seed: int, *, shots: int, test_rows: int | None) -> FewShotSample:
        """Read the sample of one seed; K is `shots` (2 * `shots` in total without labels) if it is there, else the smallest."""
        if data_seed not in self.seeds:
            there = ", ".join(map(str, self.seeds))
            raise IptError(f"task '{self.task}' has no train and dev files for data seed {data_seed}; the folder has {there}")
        sizes = sorted(k for k, seed, part in self.files if (seed, part) == (data_seed, "train"))
        wanted = shots if self.per_label else 2 * shots
        k = wanted if wanted in sizes else sizes[0]
        test = self.files.get((k, data_seed, "test"), self.files.get((0, 0, "test")))
        if test is None and test_rows != 0:
            raise IptError(f"task '{self.task}' has no test file; add {self.task}_{k}_{data_seed}_test.tsv to its folder")
        train, dev = (self._read(self.files[k, data_seed, part]) for part in ("train", "dev"))
        if not (train and dev):
            raise IptError(f"task '{self.task}': its train or dev file for data seed {data_seed} is empty")
        return FewShotSample(train, dev, self._read(test)[:test_rows] if test and test_rows != 0 else ())

    def _read(self, path: Path) -> Rows:
        lines = path.read_bytes().decode("utf-8").split("\n")  # a row may hold any other line separator
        return tuple(self._row(f"{path}, line {number}", path.suffix, line) for number, line in enumerate(lines, 1) if line)

    def _row(self, where: str, suffix: str, line: str) -> Example:
        if suffix == ".tsv":
            text, *answers = line.split("\t")
            if not answers:
                raise IptError(f"{where}: expected an input, a tab and the references, but there is no tab")
            return Example(text, tuple(answers), self.options)
        try:
            row = json.loads(line)
            return Example(row["input"], (row["output"],), tuple(row.get("options") or ()))
        except (ValueError, KeyError, TypeError) as error:
            raise IptError(f"{where}: expected a JSON object with input, output and options ({error!r})") from error


def find_gym_tasks(folder: Path, known: Mapping[str, Task]) -> dict[str, Task]:
    """Find the tasks of a gym folder.

    A known name gives kind, metric, splits and category. Of an unknown task the rows tell: the same options in every row are a
    classification, changing ones multiple choice, none free-form answers.
    """
    found: dict[str, dict[tuple[int, int, str], Path]] = {}
    for path in sorted(folder.glob("*/*")):
        match = GYM_FILE.fullmatch(path.name)
        if match and match["task"] == path.parent.name and (match["k"] or match["part"] == "test"):
            found.setdefault(match["task"], {})[int(match["k"] or 0), int(match["seed"] or 0), match["part"]] = path
    sources = [GymFolder(task=name, files=files) for name, files in found.items()]
    tasks = {source.task: _gym_task(source, known.get(source.task)) for source in sources if source.seeds}
    if not tasks:
        raise IptError(f"{folder} holds no task; expected files such as <task>/<task>_16_100_train.tsv, and the same with dev")
    return tasks


def _gym_task(source: GymFolder, known: Task | None) -> Task:
    if known is None:
        options = {row.options for row in source.sample(source.seeds[0], shots=16, test_rows=0).train}
        kind = "free-form" if options == {()} else "classification" if len(options) == 1 else "multiple-choice"
        known = Task(name=source.task, kind=kind, metric="EM" if kind == "free-form" else "ACC", splits={}, source=source)
    words = known.source.verbalizer.values() if isinstance(known.source, HubDataset) else ()
    per_label = known.kind == "classification"
    return replace(known, source=replace(source, per_label=per_label, options=tuple(dict.fromkeys(words))))


def missing_from_gym(tasks: Mapping[str, Task], wanted: Iterable[str], seeds: Iterable[int]) -> list[str]:
    """Say, one sentence each, which wanted tasks a gym folder lacks, and which seeds or test rows the others lack."""
    sentences = []
    for name in wanted:
        source = tasks[name].source if name in tasks else None
        if not isinstance(source, GymFolder):
            sentences.append(f"task '{name}' is not in the folder")
            continue
        absent = [str(seed) for seed in seeds if seed not in source.seeds]
        sentences += [f"task '{name}' lacks data seeds {', '.join(absent)}"] if absent else []
        sentences += [] if source.has_test else [f"task '{name}' has no test file"]
    return sentences


# --- Ranks ---------------------------------------------------------------------------------------
# Under torchrun every process is a rank with a device of its own, and all share one cache. Alone, a process is rank 0 of 1.


LEFT_ALONE = 75
"""Exit code of a rank that waits for one that has gone."""


def rank() -> int:
    """Return this process's number."""
    return int(os.environ.get("RANK", "0"))


def n_ranks() -> int:
    """Return how many processes share the work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined_ranks() -> Iterator[None]:
    """Meet the other ranks, and leave them at the end."""
    if n_ranks() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # A rank waits for the slowest, whose share may take days; one that dies is torchrun's to notice.
    torch.distributed.init_process_group(backend, timeout=timedelta(days=30))
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """Leave without a word when a rank to meet has gone: it has told why."""
    try:
        yield
    except RuntimeError as error:
        raise SystemExit(LEFT_ALONE) from error


def from_first_rank(value: Any) -> Any:
    """Return rank 0's value on every rank: what is decided by a look into the cache, in which others write meanwhile."""
    if n_ranks() == 1:
        return value
    box = [value]
    with _meeting():
        torch.distributed.broadcast_object_list(box)
    return box[0]


def wait_for_ranks() -> None:
    """Return when all ranks have come here, so that the files of all are there."""
    if n_ranks() > 1:
        with _meeting():
            torch.distributed.barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up a tensor over the ranks, in place."""
    if n_ranks() > 1:
        with _meeting():
            torch.distributed.all_reduce(tensor)
    return tensor


def own_share(costs: Sequence[float]) -> list[int]:
    """Return which pieces of work are this rank's, when the costliest go first, each to the rank with the least so far."""
    shares: list[list[int]] = [[] for _ in range(n_ranks())]
    load = [0.0] * n_ranks()
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        to = load.index(min(load))
        shares[to].append(piece)
        load[to] += costs[piece]
    return sorted(shares[rank()])


# --- Backbone ------------------------------------------------------------------------------------
# The frozen encoder-decoder and its tokenizer. Soft prompts go in front of the input's embeddings, as in PEFT.


@dataclass(frozen=True)
class Encoded:
    """An example as token ids, made once."""

    input_ids: list[int]
    target_ids: list[int]
    option_ids: list[list[int]]
    example: Example
    answer_limit: int
    """Tokens to generate at most: those of the task's longest reference."""
    truncated: bool

    def __len__(self) -> int:
        """Return the tokens that a pass over this row holds."""
        return len(self.input_ids) + len(self.target_ids)


@dataclass
class Budget:
    """How many tokens go through the backbone at once: as many as memory holds, found by trying. It changes no result."""

    tokens: int
    most: float = math.inf
    """What has not fitted before, if anything."""

    def run(self, lengths: Sequence[int], work: Callable[[list[int]], None]) -> None:
        """Call `work` on lists of row numbers, the longest rows first and rows of like length together."""
        order, done = sorted(range(len(lengths)), key=lambda row: -lengths[row]), 0
        in_one = max(lengths, default=0) * len(lengths)
        while done < len(order):
            tokens = self.tokens
            for size in pass_sizes([lengths[row] for row in order[done:]], tokens):
                rows = order[done : done + size]
                if self._try(rows, lengths, work):
                    done += size
                    self._grow(in_one, used=lengths[rows[0]] * size)
                if self.tokens != tokens:
                    break

    def _try(self, rows: list[int], lengths: Sequence[int], work: Callable[[list[int]], None]) -> bool:
        """Tell whether a pass fitted into memory; if it did not, the next are half as large."""
        longest = lengths[rows[0]]
        try:
            work(rows)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            if len(rows) == 1:
                raise IptError(
                    f"one row of {longest} tokens does not fit into memory: "
                    "shorten it with --max-length or use a smaller backbone"
                ) from error
            self.most, self.tokens = min(self.most, longest * len(rows)), longest * (len(rows) // 2)
            return False
        return True

    def _grow(self, in_one: int, used: int) -> None:
        """Double if all rows do not fit into one pass, and if by what the last has used there is memory for that."""
        if in_one > self.tokens and 2 * self.tokens < self.most and memory_share() * max(1, self.tokens / used) < 0.4:
            self.tokens *= 2


def pass_sizes(lengths: Sequence[int], tokens: int) -> list[int]:
    """Cut rows, the longest first, into passes of at most so many tokens with the padding, so that they cost the least.

    A pass costs its tokens and a fixed amount: an eighth of a full pass (the testbed on a CPU), or 4,096 tokens if that is less.
    """
    overhead = min(tokens, 1 << 15) / 8
    # From the last row on: the first pass of the cheapest way to do a row and all behind it, and the cost of that way.
    first, costs = [0] * len(lengths), np.zeros(len(lengths) + 1)
    counts = np.arange(1, len(lengths) + 1)
    for row in reversed(range(len(lengths))):
        most = min(max(1, tokens // lengths[row]), len(lengths) - row)
        totals = lengths[row] * counts[:most] + costs[row + 1 : row + most + 1]
        first[row] = most - int(totals[::-1].argmin())  # of equals the largest
        costs[row] = overhead + totals[first[row] - 1]
    sizes = list[int]()
    while (row := sum(sizes)) < len(lengths):
        sizes.append(first[row])
    return sizes


def memory_share() -> float:
    """Return the share of the GPU's memory that has been in use at most since last asked; 1 on a CPU.

    On a CPU the passes that fit its caches are the fastest (`tests/benchmark.py --budgets`), so its memory is not to be filled.
    """
    if not torch.cuda.is_initialized():
        return 1.0
    share = torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.reset_peak_memory_stats()
    return share


@dataclass(frozen=True)
class Backbone:
    """A frozen sequence-to-sequence language model."""

    name: str
    model: Any
    """A transformers model with an encoder, a decoder and a language-model head."""
    tokenizer: Any
    fingerprint: str
    """Changes with the architecture, the weights or the tokenizer."""
    max_length: int
    """Tokens of prompt and input together."""
    budget: Budget
    """Of passes forward and backward."""
    answer_budget: Budget
    """Of passes forward only, which keep no activations."""

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return torch.device(self.model.device)

    @property
    def hidden(self) -> int:
        """Return the size of an input embedding."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @cached_property
    def embedding_rms(self) -> float:
        """Return the root mean square of the embeddings as the encoder gets them: about 10 for T5, 0.02 for BART."""
        with torch.no_grad():
            ids = torch.arange(self.model.get_input_embeddings().weight.shape[0], device=self.device)
            return float(self.model.get_input_embeddings()(ids).float().pow(2).mean().sqrt())

    def initial_prompt(self, prompt_length: int, seed: int) -> Tensor:
        """Return embeddings of random words of the vocabulary, the start that all tasks share: (prompt_length, hidden)."""
        special = set(self.tokenizer.all_special_ids)
        words = [token for token in range(len(self.tokenizer)) if token not in special]
        ids = torch.tensor(random.Random(seed).choices(words, k=prompt_length), device=self.device, dtype=torch.long)
        with torch.no_grad():
            embeddings: Tensor = self.model.get_input_embeddings()(ids).float()
        return embeddings

    def encode(self, examples: Sequence[Example], *, prompt_length: int) -> list[Encoded]:
        """Tokenise the rows of one task, cutting inputs so that prompt, input and end-of-sequence fit.

        Raises:
            IptError: the prompt leaves no room for any input.
        """
        room = self.max_length - prompt_length
        if room < 4:
            raise IptError(
                f"a prompt of {prompt_length} tokens leaves no room for the input: {self.name} takes {self.max_length} tokens in "
                "all; use a smaller --prompt-length"
            )
        texts = sorted({text for e in examples for text in (*e.answers, *e.options)})
        ids = dict(zip(texts, self.tokenizer(text_target=texts).input_ids, strict=True)) if texts else {}
        longest = getattr(self.model.config, "max_position_embeddings", None) or max(map(len, ids.values()), default=1)
        ids = {text: own if len(own) <= longest else own[: longest - 1] + own[-1:] for text, own in ids.items()}
        limit = max((len(ids[text]) for e in examples for text in e.answers), default=1)
        inputs = self.tokenizer([e.input for e in examples]).input_ids if examples else []
        return [
            Encoded(self._cut(own, e, room), ids[e.answers[0]], [ids[o] for o in e.options], e, limit, len(own) > room)
            for own, e in zip(inputs, examples, strict=True)
        ]

    def _cut(self, ids: list[int], example: Example, room: int) -> list[int]:
        """Cut input ids to a length: the end of what stands before the example's tail, then the start of the tail."""
        if len(ids) <= room:
            return ids
        tail = example.input[len(example.input) - example.tail :]
        spared = 1 + len(self.tokenizer(tail, add_special_tokens=False).input_ids)  # the end of the sequence too
        head = max(1, room - spared)
        return ids[:head] + ids[len(ids) - (room - head) :]

    def encoder_states(self, soft_prompts: Tensor, input_ids: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Run the encoder on `soft prompt + input`.

        Args:
            soft_prompts: (batch, prompt_length, hidden), float32.
            input_ids: one list a row; padded here on the right, which neither T5 nor BART sees.

        Returns:
            States (batch, prompt_length + input_length, hidden) and their mask (batch, prompt_length + input_length).
        """
        ids, real = self._pad(input_ids, self.tokenizer.pad_token_id, before=soft_prompts.shape[1])
        inputs = self.model.get_input_embeddings()(ids)  # (batch, input_length, hidden)
        inputs = torch.cat([soft_prompts.to(inputs.dtype), inputs], dim=1)  # (batch, prompt_length + input_length, hidden)
        mask = to_device(np.pad(real, ((0, 0), (soft_prompts.shape[1], 0)), constant_values=True), self.device)
        return self.model.get_encoder()(inputs_embeds=inputs, attention_mask=mask).last_hidden_state, mask

    def answer_losses(self, states: Tensor, mask: Tensor, target_ids: Sequence[list[int]]) -> Tensor:
        """Return minus the log-likelihood of each row's target, summed over its tokens: (batch,), float32."""
        targets, real = self._pad(target_ids, IGNORE)  # (batch, target_length)
        decoder_ids = self.model.prepare_decoder_input_ids_from_labels(labels=targets)
        places = Places.of(real, self.device)
        with self._head_on(places):
            logits = self._decode(states, mask, decoder_ids)  # (target tokens, vocabulary)
        return places.sum_losses(logits, targets)

    def _decode(self, states: Tensor, mask: Tensor, ids: Tensor, cache: Any = None) -> Tensor:
        """Run the decoder on ids (batch, length) behind those that the cache holds, which it then holds too; return logits."""
        options = {} if cache is None else {self._cache_name: cache}
        out = self.model(
            encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=ids, use_cache=cache is not None, **options
        )
        return cast("Tensor", out.logits)

    @cached_property
    def _cache_name(self) -> str:
        """Return what this version of transformers calls the decoder's cache."""
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    @contextlib.contextmanager
    def _head_on(self, places: Places) -> Iterator[None]:
        """Let only these positions reach the vocabulary, the widest layer by far."""
        head = self.model.lm_head.register_forward_pre_hook(lambda _, states: (places.pick(states[0]),))
        try:
            yield
        finally:
            head.remove()

    def _pad(self, rows: Sequence[Sequence[int]], value: int, before: int = 0) -> tuple[Tensor, np.ndarray]:
        """Pad on the right; return ids on the device, and on the host which of them are real.

        On a GPU, the width is such that it is a multiple of 8 together with what comes before: kernels want that, and there
        are few widths to compile for.
        """
        width = max(map(len, rows))
        if self.device.type == "cuda":
            width = -(-(before + width) // 8) * 8 - before
        ids = np.full((len(rows), width), value)
        for row, values in zip(ids, rows, strict=True):
            row[: len(values)] = values
        return to_device(ids, self.device), np.arange(width) < np.array([[len(row)] for row in rows])

    def answer(
        self, soft_prompts: Tensor, rows: Sequence[tuple[int, Encoded]], *, decoding: str = "options", losses: bool = True
    ) -> list[Answer]:
        """Answer rows, each behind the soft prompt that it names.

        Args:
            soft_prompts: (tasks, prompt_length, hidden).
            rows: (index of the soft prompt, example).
            decoding: `options` answers by the most likely option where there are options; `generate` always generates greedily.
            losses: whether to compute the loss of the right answer, too.
        """
        answers: dict[int, Answer] = {}

        def work(numbers: list[int]) -> None:
            chunk = [rows[n][1] for n in numbers]
            prompts = soft_prompts[to_device([rows[n][0] for n in numbers], self.device)]
            begun = self._begin(*self.encoder_states(prompts, [e.input_ids for e in chunk]))
            choosing = {i for i, e in enumerate(chunk) if e.option_ids and decoding == "options"}
            wanted = [(i, e.target_ids) for i, e in enumerate(chunk) if losses]
            wanted += [(i, option) for i in sorted(choosing) for option in chunk[i].option_ids]
            # An option that is the right answer, as one is, need not be scored twice.
            places = {(i, tuple(text)): None for i, text in wanted}
            loss_of = dict(zip(places, self._text_losses(begun, list(places)), strict=True))
            texts = self._generate(begun, chunk, [i for i in range(len(chunk)) if i not in choosing])
            for i in choosing:
                options = [loss_of[i, tuple(option)] for option in chunk[i].option_ids]
                texts[i] = chunk[i].example.options[options.index(min(options))]
            for i, n in enumerate(numbers):
                target = tuple(chunk[i].target_ids)
                answers[n] = Answer(texts[i], loss_of[i, target] / len(target) if losses else math.nan)

        with torch.inference_mode():
            self.answer_budget.run([soft_prompts.shape[1] + len(e) for _, e in rows], work)
        return [answers[n] for n in range(len(rows))]

    def _begin(self, states: Tensor, mask: Tensor) -> Begun:
        """Run the decoder on its start token: all texts behind a row go on from there."""
        start = torch.full((len(states), 1), self.model.config.decoder_start_token_id, device=states.device)
        cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        return Begun(states, mask, self._decode(states, mask, start, cache)[:, -1].float(), cache)

    def _text_losses(self, begun: Begun, texts: Sequence[tuple[int, Sequence[int]]]) -> list[float]:
        """Return minus the log-likelihood of texts, each given as its row and its tokens, summed over these."""
        losses: list[float] = []
        # Each text brings a copy of its row's keys and values, but no pass through the encoder.
        size = max(1, 4 * self.answer_budget.tokens // begun.states.shape[1])
        for start in range(0, len(texts), size):
            piece = texts[start : start + size]
            at = to_device([i for i, _ in piece], self.device)
            tokens, real = self._pad([text for _, text in piece], 0)
            sums = torch.nn.functional.cross_entropy(begun.logits[at], tokens[:, 0], reduction="none")
            if tokens.shape[1] > 1:
                sums = sums + self._following_losses(begun, at, tokens, Places.of(real[:, 1:], self.device))
            losses += sums.tolist()
        return losses

    def _following_losses(self, begun: Begun, at: Tensor, tokens: Tensor, places: Places) -> Tensor:
        """Return the losses of all tokens (texts, length) but the first, the real ones among them being at these places."""
        with self._head_on(places):
            logits = self._decode(
                begun.states[at], begun.mask[at], tokens[:, :-1], begun.cache_of(at)
            )  # (real tokens, vocabulary)
        return places.sum_losses(logits, tokens[:, 1:])

    def _generate(self, begun: Begun, chunk: Sequence[Encoded], which: Sequence[int]) -> dict[int, str]:
        """Return greedily generated text of some rows."""
        if not which:
            return {}
        at = to_device(which, self.device)
        stop, logits, past = self.model.config.eos_token_id, begun.logits[at], begun.cache_of(at)
        ended = torch.zeros(len(which), dtype=torch.bool, device=at.device)
        tokens: list[Tensor] = []
        # Not `generate`, which would follow whatever the backbone was saved with: beams, forced tokens, penalties.
        for left in reversed(range(max(chunk[i].answer_limit for i in which))):
            following = logits.argmax(-1)
            tokens.append(following.masked_fill(ended, self.tokenizer.pad_token_id))
            ended |= following == stop
            if not left or ended.all():
                break
            logits = self._decode(begun.states[at], begun.mask[at], following[:, None], past)[:, -1]
        # A row's own limit holds, so that no answer depends on the rows beside it.
        written = torch.stack(tokens, dim=1).tolist()
        own = [row[: chunk[i].answer_limit] for i, row in zip(which, written, strict=True)]
        return dict(zip(which, self.tokenizer.batch_decode(own, skip_special_tokens=True), strict=True))


@dataclass(frozen=True)
class Places:
    """Where the real tokens of padded rows are, found on the host: a device that is asked makes the host wait for it."""

    flat: Tensor
    """(real tokens,), in the flattened rows."""
    row: Tensor
    """(real tokens,)."""
    n_rows: int

    @classmethod
    def of(cls, real: np.ndarray, device: torch.device) -> Places:
        """Return the places of what is true in (rows, length)."""
        return cls(to_device(np.flatnonzero(real), device), to_device(np.nonzero(real)[0], device), len(real))

    def pick(self, values: Tensor) -> Tensor:
        """Return what values (rows, length, ...) hold at the places: (real tokens, ...)."""
        return values.flatten(0, 1).index_select(0, self.flat)

    def sum_losses(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Return each row's loss over tokens (rows, length), logits being (real tokens, vocabulary): (rows,), float32."""
        losses = torch.nn.functional.cross_entropy(logits.float(), self.pick(tokens), reduction="none")
        return losses.new_zeros(self.n_rows).index_add(0, self.row, losses)


def to_device(values: Any, device: torch.device) -> Tensor:
    """Return numbers of the host as a tensor of the device, without waiting for what the device is at."""
    tensor = torch.as_tensor(np.asarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class Begun:
    """Rows whose encoder and first decoder step are done."""

    states: Tensor
    """(rows, prompt_length + input_length, hidden)."""
    mask: Tensor
    """(rows, prompt_length + input_length)."""
    logits: Tensor
    """(rows, vocabulary), of the first token."""
    cache: Any
    """Keys and values of the encoder's states, the costly part, and of the start token."""

    def cache_of(self, at: Tensor) -> Any:
        """Return a cache of rows, some perhaps several times; this one stays as it is."""
        parts = []
        for part in (self.cache.self_attention_cache, self.cache.cross_attention_cache):
            chosen = transformers.DynamicCache()
            for number, layer in enumerate(part.layers):
                chosen.update(layer.keys[at], layer.values[at], number)
            parts.append(chosen)
        return transformers.EncoderDecoderCache(*parts)


@dataclass(frozen=True)
class Answer:
    """What the backbone answered to a row."""

    text: str
    loss: float
    """Mean loss per token of the right answer; nan when it was not asked for."""


def load_backbone(
    name: str, *, device: str = "auto", precision: str = "auto", max_length: int = 512, compiled: bool = False
) -> Backbone:
    """Load and freeze a sequence-to-sequence backbone.

    Args:
        name: a Hub id, a local folder, or `testbed`.
        device: `auto` takes a GPU when there is one, each rank its own.
        precision: `bf16`, `fp32`, or `auto`: bf16 on a GPU that has it. What learns is always float32.
        max_length: tokens of prompt and input together, at most what the backbone has positions for.
        compiled: let torch.compile make kernels of its own for encoder and decoder.

    Raises:
        IptError: there is no such model, or it is not sequence to sequence.
    """
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        if device == "auto":
            count = torch.cuda.device_count()
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else "cpu"
        place = torch.device(device)
        torch.empty(0, device=place)
        if place.type == "cuda":
            torch.cuda.set_device(place)
    except (RuntimeError, AssertionError) as error:
        raise IptError(
            f"there is no device {device!r} here ({str(error).splitlines()[0]}): use --device auto, cpu or cuda"
        ) from error
    half = precision == "bf16" or (precision == "auto" and place.type == "cuda" and torch.cuda.is_bf16_supported())
    path = str(shipped("testbed")) if name == TESTBED else name
    try:
        model, loading = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            path, dtype=torch.bfloat16 if half else torch.float32, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise IptError(
            f"cannot load the backbone {name!r} as a sequence-to-sequence model: {str(error).splitlines()[0]} "
            "Expected a Hub id (google/t5-base-lm-adapt) or a folder with config, safetensors and tokenizer"
        ) from error
    if loading["missing_keys"]:
        raise IptError(f"the backbone {name!r} lacks the tensors {', '.join(sorted(loading['missing_keys']))}: it is not whole")
    model = model.to(place).eval().requires_grad_(False)
    if compiled:
        model.get_encoder().compile(dynamic=True)
        model.get_decoder().compile(dynamic=True)
    elif model._supports_sdpa:
        share_position_bias(model)
    positions = getattr(model.config, "max_position_embeddings", None) or max_length
    return Backbone(
        name, model, tokenizer, fingerprint(model, tokenizer), min(max_length, positions), *first_budgets(place)
    )  # fmt: skip


def first_budgets(device: torch.device) -> tuple[Budget, Budget]:
    """Return what is tried first, forward and backward, and forward only."""
    return (Budget(1 << 10), Budget(1 << 11)) if device.type == "cpu" else (Budget(1 << 15), Budget(1 << 17))


def share_position_bias(model: Any) -> None:
    """Let a backbone's attention join position bias (T5) and padding mask once a pass; transformers does it at every layer.

    The joined mask (batch, heads, length, length) is the largest tensor of a pass, and each layer would keep its own for the
    backward pass. Whether there is padding at all is not looked at either: that look makes the host wait for the device.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        bias = options.pop("position_bias", None)
        if bias is not None and mask is not None:
            if getattr(bias, "joined_with", None) is not mask:  # kept on the bias, so that it goes when the pass is over
                # T5 computes its bias heads last; the fused kernels of a GPU want keys last.
                bias.joined_with, bias.joined = mask, torch.where(mask, bias.contiguous(), torch.finfo(query.dtype).min)
            mask, bias = bias.joined, None
        return sdpa_attention_forward(module, query, key, value, mask, position_bias=bias, **options)

    def full_mask(*arguments: Any, **options: Any) -> Any:
        return sdpa_mask(*arguments, **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    transformers.AttentionInterface.register("ipt", attend)
    transformers.AttentionMaskInterface.register("ipt", full_mask)
    model.set_attn_implementation("ipt")


def fingerprint(model: Any, tokenizer: Any) -> str:
    """Digest a backbone: its settings, vocabulary, and up to 4,096 evenly spaced values of each tensor."""
    about = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in about}
    digest = hashlib.sha256(json.dumps([tokenizer.get_vocab(), config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.flatten()
        sampled = flat[:: max(1, len(flat) // 4096)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sampled.numpy().tobytes())
    return digest.hexdigest()


# --- Spaces --------------------------------------------------------------------------------------
# theta (tasks, size) -> soft prompts (tasks, prompt_length, hidden), as a difference to the shared initial prompt in units
# of the embeddings (prompt) or of the collected prompts (the others), so that one learning rate suits every backbone.


class Space(Protocol):
    """A frozen map from what learns to soft prompts."""

    @property
    def initial_prompt(self) -> Tensor:
        """Return the prompt that the others are differences to: (prompt_length, hidden)."""

    @property
    def size(self) -> int:
        """Return how many numbers one task tunes."""

    def back_project(self, theta: Tensor) -> Tensor:
        """Map theta (tasks, size) to soft prompts (tasks, prompt_length, hidden)."""


@dataclass(frozen=True)
class PromptSpace:
    """Every number of the soft prompt itself: prompt tuning."""

    initial_prompt: Tensor
    """(prompt_length, hidden): where theta is zero."""
    unit: float

    @property
    def size(self) -> int:
        """Return prompt_length * hidden."""
        return self.initial_prompt.numel()

    def back_project(self, theta: Tensor) -> Tensor:
        """Return the initial prompt plus theta, in units of the embeddings."""
        return self.initial_prompt + self.unit * theta.view(-1, *self.initial_prompt.shape)


@dataclass(frozen=True)
class Subspace:
    """The paper's auto-encoder of soft prompts (section 3.2): one linear layer in, `W2 tanh(W1 v + b1) + b2` out."""

    initial_prompt: Tensor
    """(prompt_length, hidden): the prompts are taken as differences to it."""
    unit: float
    """Root mean square of those differences over the collected prompts."""
    weights: dict[str, Tensor]
    """in.weight (dim, n), in.bias (dim), hidden.weight (inner, dim), hidden.bias, out.weight (n, inner), out.bias, where n is
    prompt_length * hidden; without the hidden layer (linear), out.weight is (n, dim)."""
    space: str = "subspace"
    """Which of the spaces this is: subspace, linear or random."""
    digest: str = ""
    """Names what it was made of."""

    @property
    def size(self) -> int:
        """Return the intrinsic dimension."""
        return self.weights["in.weight"].shape[0]

    def standardise(self, soft_prompts: Tensor) -> Tensor:
        """Return (tasks, prompt_length, hidden) prompts as differences of unit size: (tasks, prompt_length * hidden)."""
        return ((soft_prompts - self.initial_prompt) / self.unit).flatten(1)

    def project(self, soft_prompts: Tensor) -> Tensor:
        """Map soft prompts to intrinsic vectors (tasks, dim): the paper's Proj."""
        return _linear(self.standardise(soft_prompts), self.weights, "in")

    def decode(self, vectors: Tensor) -> Tensor:
        """Map intrinsic vectors to standardised prompts (tasks, prompt_length * hidden): the paper's Proj_b."""
        inner = torch.tanh(_linear(vectors, self.weights, "hidden")) if "hidden.weight" in self.weights else vectors
        return _linear(inner, self.weights, "out")

    def back_project(self, theta: Tensor) -> Tensor:
        """Map intrinsic vectors to soft prompts."""
        return self.initial_prompt + self.unit * self.decode(theta).view(-1, *self.initial_prompt.shape)

    def unexplained(self, soft_prompts: Tensor, reconstructed: Tensor) -> Tensor:
        """Return the reconstruction error: the share of the prompts' variance around the initial prompt left unexplained."""
        return (reconstructed - soft_prompts).pow(2).mean() / (soft_prompts - self.initial_prompt).pow(2).mean()


def _linear(x: Tensor, weights: Mapping[str, Tensor], layer: str) -> Tensor:
    return torch.nn.functional.linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"])


def random_subspace(initial_prompt: Tensor, *, unit: float, dim: int, inner: int, seed: int) -> Subspace:
    """Return an untrained auto-encoder with torch's default initialisation of linear layers."""
    n, generator = initial_prompt.numel(), torch.Generator().manual_seed(seed)
    weights = {}
    for layer, rows, columns in (("in", dim, n), ("hidden", inner, dim), ("out", n, inner)):
        bound = 1 / math.sqrt(columns)
        # In place: the last layer is the largest tensor of all.
        weights[f"{layer}.weight"] = torch.rand(rows, columns, generator=generator).mul_(2).sub_(1).mul_(bound)
        weights[f"{layer}.bias"] = torch.rand(rows, generator=generator).mul_(2).sub_(1).mul_(bound)
    return Subspace(initial_prompt, unit, {k: w.to(initial_prompt.device) for k, w in weights.items()})


def linear_subspace(soft_prompts: Tensor, initial_prompt: Tensor, *, dim: int) -> Subspace:
    """Return the principal components of soft prompts (tasks, prompt_length, hidden), intrinsic vectors of unit variance.

    Raises:
        IptError: there are not more prompts than dimensions.
    """
    if dim >= len(soft_prompts):
        raise IptError(
            f"{len(soft_prompts)} prompts have {len(soft_prompts) - 1} principal components, not {dim}: use a smaller --dim"
        )
    differences = (soft_prompts - initial_prompt).flatten(1)
    unit = float(differences.pow(2).mean().sqrt())
    mean = differences.mean(0) / unit
    _, s, v = torch.linalg.svd(differences / unit - mean, full_matrices=False)
    rank = int((s > 1e-4 * s[0]).sum())
    if dim > rank:
        raise IptError(f"the {len(soft_prompts)} prompts span {rank} dimensions, not {dim}: use a smaller --dim")
    scale = s[:dim, None] / math.sqrt(len(soft_prompts))
    inward = v[:dim] / scale
    weights = {"in.weight": inward, "in.bias": -inward @ mean, "out.weight": (v[:dim] * scale).T, "out.bias": mean}
    return Subspace(initial_prompt, unit, {k: w.contiguous() for k, w in weights.items()})


# --- Tuning --------------------------------------------------------------------------------------
# The one engine: prompt tuning and intrinsic tuning of many jobs at once. A job is one task, one few-shot sample, one start,
# one learning rate. Jobs share passes through the backbone and nothing else.


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How a job is tuned."""

    steps: int = 1000
    """Updates."""
    batch_size: int = 8
    """Rows of a job in one update."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; it then falls linearly to zero."""
    clip: float = 0.1
    """Largest norm of a job's gradient (the paper's)."""
    evaluations: int = 5
    """How often in a run the validation rows are scored; the best checkpoint is kept."""
    patience: int = 3
    """Evaluations without a better one after which a job ends; 0: every job takes all its steps."""
    solved: float = 0.03
    """Loss per token of the validation rows under which a job ends that answers all of them right: nothing is left to learn."""

    @property
    def evaluate_every(self) -> int:
        """Return the steps between two evaluations."""
        return max(1, self.steps // self.evaluations)


@dataclass(frozen=True)
class Job:
    """One row of theta: what is tuned, from where, on what."""

    header: dict[str, Any]
    """What the result is a function of, task, metric, data_seed and learning_rate among it; goes into its file."""
    start: Tensor
    """(size,), float32."""
    rows: Callable[[], tuple[list[Encoded], list[Encoded]]]
    """Returns training and validation rows; called when the job begins, so that waiting jobs cost nothing."""
    cost: float = 1.0
    """How much work it is beside other jobs: by it ranks share the jobs."""

    @property
    def name(self) -> str:
        """Return what to call the job in messages."""
        return f"{self.header['task']} (data seed {self.header['data_seed']}, learning rate {self.header['learning_rate']:g})"


@dataclass(frozen=True)
class Tuned:
    """A finished job."""

    job: Job
    theta: Tensor
    """(size,), the best checkpoint by validation score, then by validation loss."""
    soft_prompt: Tensor
    """(prompt_length, hidden), what theta stands for."""
    record: dict[str, float]
    """validation (score), validation_loss, best_step, steps, first_loss, last_loss (training, means over 10 steps)."""


class JobTable:
    """The jobs in the slots: theta, Adam's moments, step counts and best checkpoints, one row a job."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Begin with no job; `size` is the length of a row of theta."""
        self.jobs: list[Job] = []
        self.rows: list[tuple[list[Encoded], list[Encoded]]] = []
        self.state = {name: torch.zeros(0, size, device=device) for name in ("theta", "mean", "square", "best_theta")}
        # Losses stay on the device: reading them would make it wait for the host at every step.
        self.state |= {name: torch.zeros(0, device=device) for name in ("first_loss", "last_loss")}
        # What the host decides by is float64: a step count is exact, and a score compares as it was computed.
        names = ("step", "best_score", "best_loss", "best_step")
        self.state |= {name: torch.zeros(0, dtype=torch.float64) for name in names}

    def add(self, job: Job, state: Mapping[str, Tensor] | None = None) -> None:
        """Give a job a slot, at its start or, resumed, at a saved state."""
        start = {"theta": job.start, "best_theta": job.start, "best_score": torch.tensor(-math.inf)} | dict(state or {})
        for name, table in self.state.items():
            row = start.get(name, torch.zeros(table.shape[1:])).to(table)
            self.state[name] = torch.cat([table, row[None]])
        self.jobs.append(job)
        self.rows.append(job.rows())

    @property
    def row_lengths(self) -> float:
        """Return the mean tokens of a training row without the prompt, summed over the jobs."""
        return sum(sum(map(len, train)) / len(train) for train, _ in self.rows)

    def keep(self, which: Sequence[int]) -> None:
        """Drop all jobs but these."""
        self.state = {name: table[list(which)] for name, table in self.state.items()}
        self.jobs, self.rows = [self.jobs[i] for i in which], [self.rows[i] for i in which]

    def result(self, i: int, space: Space) -> Tuned:
        """Return a job's outcome, copied out of the table."""
        theta = self.state["best_theta"][i].clone()
        record = {name: float(self.state[name][i]) for name in ("best_step", "first_loss", "last_loss")}
        record |= {"validation": float(self.state["best_score"][i]), "validation_loss": float(self.state["best_loss"][i])}
        return Tuned(self.jobs[i], theta, space.back_project(theta[None])[0], record | {"steps": float(self.state["step"][i])})


def tune(
    backbone: Backbone,
    space: Space,
    jobs: Iterable[Job],
    config: TuneConfig,
    *,
    slots: int | None = None,
    decoding: str = "options",
    resume: Mapping[str, Mapping[str, Tensor]] | None = None,
    on_step: Callable[[JobTable], None] = lambda table: None,
) -> Iterator[Tuned]:
    """Tune jobs and yield each as it finishes, its slot going to the next.

    Args:
        backbone: frozen; only theta gets gradients.
        space: maps theta to soft prompts, once per job and step.
        jobs: in the order in which they get slots.
        config: the same for all jobs.
        slots: jobs that are tuned at once; without it as many as fill four passes, so that rows of like length meet, and at
            least 16.
        decoding: how validation rows are answered.
        resume: states of unfinished jobs by job digest, as in a checkpoint.
        on_step: called after each step of all slots, with the table.

    Raises:
        IptError: a loss is not finite.
    """
    table, queue = JobTable(space.size, backbone.device), iter(jobs)
    while True:
        while _has_slot(table, slots, backbone.budget, config, len(space.initial_prompt)) and (job := next(queue, None)):
            table.add(job, (resume or {}).get(digest(job.header)))
        if not table.jobs:
            return
        _step(backbone, space, table, config)
        steps = table.state["step"]
        due = [i for i, step in enumerate(steps.tolist()) if step % config.evaluate_every == 0 or step == config.steps]
        if due:
            _validate(backbone, space, table, due, decoding)
        done = _over(table.state, config, due) if due else []
        yield from (table.result(i, space) for i in done)
        if done:
            table.keep([i for i in range(len(table.jobs)) if i not in done])
        on_step(table)


def _over(state: Mapping[str, Tensor], config: TuneConfig, due: Sequence[int]) -> list[int]:
    """Return which of the jobs just validated end here: their steps are done, they get no better, or they cannot."""
    over = state["step"] == config.steps
    if config.patience:
        over |= state["step"] - state["best_step"] >= config.patience * config.evaluate_every
        over |= (state["best_score"] == 1) & (state["best_loss"] < config.solved)
    return [i for i in due if over[i]]


def _has_slot(table: JobTable, slots: int | None, budget: Budget, config: TuneConfig, prompt_length: int) -> bool:
    """Tell whether one more job can be tuned beside those in the table."""
    if slots:
        return len(table.jobs) < slots
    tokens = config.batch_size * (table.row_lengths + prompt_length * len(table.jobs))
    return len(table.jobs) < 16 or tokens < 4 * budget.tokens


def _step(backbone: Backbone, space: Space, table: JobTable, config: TuneConfig) -> None:
    """Update every job in the table once, each on its own next minibatch."""
    state, steps = table.state, table.state["step"].long().tolist()
    theta = state["theta"].requires_grad_()
    prompts = space.back_project(theta)  # (tasks, prompt_length, hidden)
    batch = [
        (i, train[row])
        for i, (train, _) in enumerate(table.rows)
        for row in minibatch(len(train), config.batch_size, table.jobs[i].header["data_seed"], steps[i])
    ]
    losses, prompt_gradient = prompt_losses(backbone, prompts.detach(), batch)
    (gradient,) = torch.autograd.grad(prompts, theta, prompt_gradient)
    state["theta"] = theta.detach()
    _record_losses(losses, state, config)
    adam(state, gradient, torch.tensor([job.header["learning_rate"] for job in table.jobs], dtype=torch.float64), config)


def prompt_losses(backbone: Backbone, soft_prompts: Tensor, batch: Sequence[tuple[int, Encoded]]) -> tuple[Tensor, Tensor]:
    """Return each prompt's loss on its own rows of a batch, and the gradient of it.

    Args:
        backbone: frozen.
        soft_prompts: (tasks, prompt_length, hidden).
        batch: (index of the soft prompt, row).

    Returns:
        Losses (tasks,), each the mean over the target tokens of the prompt's rows; gradients (tasks, prompt_length, hidden).
    """
    leaf = soft_prompts.requires_grad_()
    losses = torch.zeros(len(leaf), device=leaf.device)
    tokens = Counter[int]()
    for i, example in batch:
        tokens[i] += len(example.target_ids)

    def work(numbers: list[int]) -> None:
        slots = to_device([batch[n][0] for n in numbers], leaf.device)
        states, mask = backbone.encoder_states(leaf[slots], [batch[n][1].input_ids for n in numbers])
        sums = backbone.answer_losses(states, mask, [batch[n][1].target_ids for n in numbers])
        means = sums / to_device([tokens[batch[n][0]] for n in numbers], leaf.device)
        means.sum().backward()
        losses.index_add_(0, slots, means.detach())

    backbone.budget.run([leaf.shape[1] + len(example) for _, example in batch], work)
    return losses, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def minibatch(rows: int, size: int, seed: int, step: int) -> list[int]:
    """Return the row numbers of a step: without end through the rows, freshly shuffled each time; no state to save."""
    wanted = range(step * size, (step + 1) * size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(rows) for epoch in {n // rows for n in wanted}}
    return [int(orders[n // rows][n % rows]) for n in wanted]


def adam(state: dict[str, Tensor], gradient: Tensor, learning_rates: Tensor, config: TuneConfig) -> None:
    """Take each job's own step of Adam (betas 0.9 and 0.999), its gradient clipped, its rate warmed up and decayed."""
    norms = gradient.norm(dim=1, keepdim=True)
    gradient = gradient * (config.clip / norms.clamp_min(config.clip))
    state["step"] = state["step"] + 1
    state["mean"] = state["mean"].lerp(gradient, 0.1)
    state["square"] = state["square"].lerp(gradient.square(), 0.001)
    step = state["step"]
    warm = (step / max(1.0, config.warmup * config.steps)).clamp_max(1)
    left = (1 - (step - 1) / config.steps).clamp_min(0)
    rates = torch.stack([learning_rates * torch.minimum(warm, left) / (1 - 0.9**step), 1 - 0.999**step]).float()
    rate, share = to_device(rates, gradient.device)[..., None]  # (tasks, 1) each
    state["theta"] = state["theta"] - rate * state["mean"] / ((state["square"] / share).sqrt() + 1e-8)


def _record_losses(losses: Tensor, state: dict[str, Tensor], config: TuneConfig) -> None:
    """Add each job's loss to its mean over its first ten and over its last ten steps; one that is not finite stays in both."""
    step, window = to_device(state["step"], losses.device), min(10, config.steps)
    state["first_loss"] = state["first_loss"] + torch.where(step < window, losses / window, 0)
    state["last_loss"] = torch.where(step == 0, losses, state["last_loss"].lerp(losses, 0.1))


def _validate(backbone: Backbone, space: Space, table: JobTable, due: Sequence[int], decoding: str) -> None:
    """Score the validation rows of some jobs, and keep their theta where it is the best so far."""
    with torch.no_grad():
        prompts = space.back_project(table.state["theta"][list(due)])
    rows = [(at, example) for at, i in enumerate(due) for example in table.rows[i][1]]
    answers = iter(backbone.answer(prompts, rows, decoding=decoding))
    state = table.state
    for name in ("best_theta", "best_score", "best_loss", "best_step"):
        state[name] = state[name].clone()  # whoever holds the state of the last step keeps it whole
    for i in due:
        examples = table.rows[i][1]
        own = list(itertools.islice(answers, len(examples)))
        score = METRICS[table.jobs[i].header["metric"]]([a.text for a in own], [e.example.answers for e in examples])
        loss = sum(a.loss for a in own) / len(own)
        for which, value in (("training", float(state["last_loss"][i])), ("validation", loss)):
            if not math.isfinite(value):
                raise IptError(
                    f"the {which} loss of task {table.jobs[i].name} is {value} by step {int(state['step'][i])}: "
                    "use a smaller --learning-rate, or --precision fp32"
                )
        if (score, -loss) > (float(state["best_score"][i]), -float(state["best_loss"][i])):
            state["best_theta"][i] = state["theta"][i]
            for name, value in (("best_score", score), ("best_loss", loss), ("best_step", float(state["step"][i]))):
                state[name][i] = value


# --- Subspace finding ----------------------------------------------------------------------------
# The paper's MSF (section 3.2): an auto-encoder of the collected prompts, learned on reconstruction and on the tasks' loss.


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig:
    """How a subspace is found."""

    dim: int = 250
    """Intrinsic dimension."""
    inner: int = 768
    """Width of the layer behind the intrinsic vector (the paper's d')."""
    steps: int = 1000
    """Updates on both losses."""
    warmup_steps: int = 200
    """Updates before those, on the reconstruction error alone; they do not touch the backbone."""
    learning_rate: float = 0.03
    """Of Adafactor, relative to a weight's root mean square; warmed up and decayed linearly, at most 1 / sqrt(step)."""
    tasks_per_step: int = 16
    """Tasks drawn uniformly for a step of the LM loss: all tasks weigh the same."""
    rows_per_task: int = 4
    """Training rows of each drawn task."""
    alpha: float = 10.0
    """Weight of the reconstruction error (share of variance unexplained) beside the LM loss (mean per token)."""
    noise: float = 0.2
    """Standard deviation of noise on intrinsic vectors, whose own is about one: makes the subspace smooth between the tasks."""
    lm_loss: bool = True
    reconstruction_loss: bool = True
    seed: int = 0

    @property
    def steps_before(self) -> int:
        """Return the updates on the reconstruction error alone."""
        return self.warmup_steps if self.reconstruction_loss else 0

    def __post_init__(self) -> None:
        """Refuse what cannot learn anything."""
        if not (self.lm_loss or self.reconstruction_loss):
            raise IptError(
                "both losses are switched off: nothing would be learned; leave --no-lm-loss or --no-reconstruction-loss out"
            )


class SubspaceFits:
    """Subspaces of several dimensions that are learned side by side, on the same draws of tasks and rows.

    Adafactor keeps next to nothing beside the weights, where Adam keeps two more copies; it learned better, too.
    """

    def __init__(self, initial_prompt: Tensor, unit: float, configs: Sequence[SubspaceConfig]) -> None:
        """Begin with untrained subspaces, one per configuration."""
        self.step = 0
        self.configs = configs
        self.subspaces = [random_subspace(initial_prompt, unit=unit, dim=c.dim, inner=c.inner, seed=c.seed) for c in configs]
        self.optimizers = []
        for subspace, config in zip(self.subspaces, configs, strict=True):
            for weight in subspace.weights.values():
                weight.requires_grad_()
            self.optimizers.append(torch.optim.Adafactor(subspace.weights.values(), lr=config.learning_rate))
        self.lm_losses = torch.full((len(configs),), math.nan)
        """Mean LM loss per target token at the last step, on the backbone's device; nan where it is off."""
        self.unexplained = self.lm_losses
        """Reconstruction error at the last step, likewise."""

    def state(self) -> dict[str, Tensor]:
        """Return weights and optimiser states by `dim layer name`: with the step, all that a checkpoint needs."""
        return {
            f"{subspace.size} {layer} {name}": tensor
            for subspace, optimizer in zip(self.subspaces, self.optimizers, strict=True)
            for layer, weight in subspace.weights.items()
            for name, tensor in ({"weight": weight.detach()} | optimizer.state[weight]).items()
            if name != "step"
        }

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self.step = step
        for subspace, optimizer in zip(self.subspaces, self.optimizers, strict=True):
            for layer, weight in subspace.weights.items():
                prefix = f"{subspace.size} {layer} "
                own = {name.removeprefix(prefix): tensor.to(weight) for name, tensor in state.items() if name.startswith(prefix)}
                weight.data.copy_(own.pop("weight"))
                optimizer.state[weight] = own | {"step": torch.tensor(float(step))}

    def update(self, losses: Sequence[Tensor], total: int) -> None:
        """Take a step for each subspace, its rate warmed up, then falling linearly over the second half.

        Raises:
            IptError: a loss is not finite.
        """
        for optimizer, config, loss in zip(self.optimizers, self.configs, losses, strict=True):
            if not loss.isfinite():
                raise IptError(
                    f"subspace of dim {config.dim}: the loss is not finite at step {self.step + 1}: use a smaller --alpha, or "
                    "--precision fp32"
                )
            optimizer.param_groups[0]["lr"] = config.learning_rate * min(1, (self.step + 1) / 50, 2 * (total - self.step) / total)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()  # at once, so that gradients of one subspace at a time are in memory
        self.step += 1


def fit_subspaces(
    backbone: Backbone,
    soft_prompts: Tensor,
    initial_prompt: Tensor,
    rows: Sequence[Sequence[Encoded]],
    configs: Sequence[SubspaceConfig],
    *,
    resume: tuple[int, Mapping[str, Tensor]] | None = None,
    on_step: Callable[[SubspaceFits], None] = lambda fits: None,
) -> list[Subspace]:
    """Find subspaces of collected prompts; what each comes to does not depend on those beside it.

    A decoder maps each drawn task's vector once a step, whatever the number of its rows: the rows only see prompts, and what
    comes back is the loss's gradient with respect to those. Ranks share the prompts and add up these gradients.

    Args:
        backbone: frozen.
        soft_prompts: (tasks, prompt_length, hidden).
        initial_prompt: (prompt_length, hidden), the start that they share.
        rows: each task's training rows.
        configs: the losses and the optimiser; alike in everything but the dimension.
        resume: step and state of a checkpoint.
        on_step: called before the first step and after each.

    Raises:
        IptError: an intrinsic dimension exceeds the prompt's, or a loss is not finite.
    """
    for config in configs:
        if config.dim > initial_prompt.numel():
            raise IptError(
                f"--dim {config.dim} is larger than the prompt itself, {initial_prompt.numel()} numbers: use a smaller --dim"
            )
    fits = SubspaceFits(initial_prompt, float((soft_prompts - initial_prompt).pow(2).mean().sqrt()), configs)
    if resume:
        fits.restore(*resume)
    config, tasks = configs[0], range(len(soft_prompts))
    warmup, total = config.steps_before, config.steps_before + config.steps
    on_step(fits)
    while fits.step < total:
        # All randomness follows from seed and step, so that a checkpoint need not hold it.
        rng = random.Random(f"{config.seed} {fits.step}")
        generator = torch.Generator().manual_seed(config.seed + 7919 * fits.step)
        drawn = list(tasks) if fits.step < warmup else rng.sample(tasks, min(config.tasks_per_step, len(tasks)))
        wanted, noise = soft_prompts[drawn], generator.get_state()
        reconstructed = [_reconstruct(s, wanted, config.noise, generator.set_state(noise)) for s in fits.subspaces]
        unexplained = [s.unexplained(wanted, r) for s, r in zip(fits.subspaces, reconstructed, strict=True)]
        losses = [config.alpha * share * config.reconstruction_loss for share in unexplained]
        if config.lm_loss and fits.step >= warmup:
            batch = [
                (i, e) for i, task in enumerate(drawn) for e in rng.sample(rows[task], min(config.rows_per_task, len(rows[task])))
            ]
            batches = [(i + n * len(drawn), e) for n in range(len(configs)) for i, e in batch]
            lm_losses, gradients = _shared_prompt_losses(backbone, torch.cat(reconstructed).detach(), batches)
            fits.lm_losses = lm_losses.view(len(configs), -1).mean(1)
            for n, (prompts, gradient) in enumerate(zip(reconstructed, gradients.chunk(len(configs)), strict=True)):
                losses[n] = losses[n] + (prompts * gradient).sum() / len(drawn)  # its gradient is the mean LM loss's
        fits.unexplained = torch.stack(unexplained).detach()
        fits.update(losses, total)
        on_step(fits)
    return [_unit_vectors(subspace, soft_prompts) for subspace in fits.subspaces]


def _reconstruct(subspace: Subspace, soft_prompts: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Map prompts through the subspace, with noise on their intrinsic vectors."""
    vectors = subspace.project(soft_prompts)
    return subspace.back_project(vectors + noise * to_device(torch.randn(vectors.shape, generator=generator), vectors.device))


def _shared_prompt_losses(
    backbone: Backbone, soft_prompts: Tensor, batch: Sequence[tuple[int, Encoded]]
) -> tuple[Tensor, Tensor]:
    """Return what `prompt_losses` does, every rank having done its share of the prompts."""
    own = [(i, example) for i, example in batch if i % n_ranks() == rank()]
    losses, gradients = prompt_losses(backbone, soft_prompts, own)
    return sum_over_ranks(losses), sum_over_ranks(gradients)


def _unit_vectors(subspace: Subspace, soft_prompts: Tensor) -> Subspace:
    """Rescale the code so that the collected prompts' intrinsic vectors have a root mean square of one."""
    subspace = replace(subspace, weights={name: weight.detach() for name, weight in subspace.weights.items()})
    scale = subspace.project(soft_prompts).pow(2).mean().sqrt()
    weights = subspace.weights | {
        "in.weight": subspace.weights["in.weight"] / scale,
        "in.bias": subspace.weights["in.bias"] / scale,
        "hidden.weight": subspace.weights["hidden.weight"] * scale,
    }
    return replace(subspace, weights=weights)


# --- Evaluation ----------------------------------------------------------------------------------
# The paper's relative performance E_rel (section 4.1), beside what keeps it honest: n, an interval, the absolute scores.


@dataclass(frozen=True)
class Score:
    """The test score of one soft prompt."""

    quantity: str
    """The paper's name, such as T_test(IST); or prompt tuning, no prompt, majority answer."""
    task: str
    space: str = "subspace"
    start: str | None = None
    dim: int | None = None
    data_seed: int | None = None
    subspace: str | None = None
    """Digest of the subspace's header."""
    value: float = math.nan


def quantity(stage: str, place: str, *, same_data: bool) -> str:
    """Return the paper's name of a score; a split with in- and out-of-type test tasks has T_test_in and T_test_out."""
    if place == "seen":
        return "T_train(MSF)" if stage == "MSF" else f"T_train_{'same' if same_data else 'diff'}(IST)"
    return f"T_test{place.removeprefix('unseen').replace('-', '_')}({stage})"


def relative_performance(scores: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float | int | None]:
    """Compare scores per task with prompt tuning's.

    Args:
        scores: task -> score of the method.
        baseline: task -> score of prompt tuning; tasks without one are left out.

    Returns:
        `e_rel`, the mean over tasks of the ratios, with `e_rel_low` and `e_rel_high` (95 % bootstrap over tasks); `n_tasks`
        in it, `n_excluded` whose prompt-tuning score is not above 0; `mean_score`, `mean_prompt_tuning` and
        `ratio_of_means` over all tasks. None where there is nothing to divide by.
    """
    tasks = [task for task in scores if task in baseline]
    ratios = [scores[task] / baseline[task] for task in tasks if baseline[task] > 0]
    rng = random.Random(0)
    means = sorted(_mean(rng.choices(ratios, k=len(ratios))) for _ in range(2000)) if ratios else []
    mean_score = _mean(scores[task] for task in tasks) if tasks else None
    mean_baseline = _mean(baseline[task] for task in tasks) if tasks else None
    return {
        "n_tasks": len(ratios),
        "n_excluded": len(scores) - len(ratios),
        "e_rel": _mean(ratios) if ratios else None,
        "e_rel_low": means[50] if means else None,
        "e_rel_high": means[-51] if means else None,
        "mean_score": mean_score,
        "mean_prompt_tuning": mean_baseline,
        "ratio_of_means": mean_score / mean_baseline if mean_score is not None and mean_baseline else None,
    }


def result_rows(scores: Iterable[Score], baseline: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the paper's table: one row per quantity, space, start, dim, data seed and subspace, in the paper's order."""
    names = ("quantity", "space", "start", "dim", "data_seed", "subspace")
    groups: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for score in scores:
        groups[tuple(getattr(score, name) for name in names)][score.task] = score.value
    rows = [dict(zip(names, group, strict=True)) | relative_performance(own, baseline) for group, own in groups.items()]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        stage = ("MSF" not in row["quantity"], "same" not in row["quantity"], row["quantity"], row["start"] or "")
        return (
            ("subspace", "linear", "random").index(row["space"]),
            -row["dim"],
            "train" not in row["quantity"],
            stage,
            row["data_seed"],
        )

    rows.sort(key=place)
    return [{name: value for name, value in row.items() if name != "subspace"} for row in rows]


# --- Files ---------------------------------------------------------------------------------------
# safetensors files that describe themselves: one metadata entry, "ipt", with the header (what the tensors are a function of)
# and the record (what came out). The same inputs give the same bytes. A file is found by the digest of its header.


def digest(header: Mapping[str, Any]) -> str:
    """Return a name for a header: 16 hexadecimal digits of the SHA-256 of its JSON."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]


def rows_digest(examples: Iterable[Example]) -> str:
    """Return a name for rows, so that a result is never taken for one on other data."""
    return digest({"rows": [[e.input, e.answers, e.options] for e in examples]})


def file_name(text: str) -> str:
    """Return text with what a file's name should not hold replaced."""
    return re.sub(r"[^\w.-]+", "-", text)


def user_cache() -> Path:
    """Return $IPT_CACHE, or the folder `ipt` in the platform's place for caches."""
    if "IPT_CACHE" in os.environ:
        return Path(os.environ["IPT_CACHE"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ipt"
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "ipt"


def write_file(path: Path, header: Mapping[str, Any], record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file as a whole or not at all."""
    from safetensors.torch import save

    metadata = {"ipt": json.dumps({"header": header, "record": record}, sort_keys=True)}
    write_bytes(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush, rename.

    Raises:
        IptError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise IptError(f"cannot write {path}: {error.strerror or error}; name another folder with --cache") from error


def missing_files(paths: Sequence[Path]) -> list[int]:
    """Return which of these files are not there yet, the same on all ranks."""
    return cast("list[int]", from_first_rank([n for n, path in enumerate(paths) if not path.exists()]))


def read_metadata(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header and the record of a file, without its tensors.

    Raises:
        IptError: it is not a safetensors file of ipt, or of another version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["ipt"])
            header, record = content["header"] | {}, content["record"] | {}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise IptError(
            f"{path} is not a file of ipt, or is damaged ({error}): remove it, and the command makes it anew"
        ) from error
    if header.get("version") != FILE_VERSION:
        raise IptError(
            f"{path} has file version {header.get('version')}, expected {FILE_VERSION}: remove it, or use the ipt that made it"
        )
    return header, record


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
    """Return a file's tensors, which must be these and no others.

    Raises:
        IptError: a name, a shape or a type is not as expected.
    """
    from safetensors.torch import load_file

    tensors = load_file(path, device=str(device))
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != dict(shapes) or not all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values()):
        raise IptError(
            f"{path} holds the tensors {found}, expected {dict(shapes)}, finite float32: remove it, and the command makes it anew"
        )
    return tensors


@dataclass(frozen=True)
class Artifact:
    """A file of the cache, its tensors still on disk."""

    path: Path
    header: dict[str, Any]
    record: dict[str, Any]

    @property
    def digest(self) -> str:
        """Return the digest of its header."""
        return digest(self.header)


@dataclass(frozen=True)
class Cache:
    """The files of one backbone."""

    folder: Path
    fingerprint: str

    def path(self, header: Mapping[str, Any]) -> Path:
        """Return where the file with this header is or would be."""
        return self.folder / f"{header['kind']}s" / f"{header.get('task', header.get('dim'))}-{digest(header)}.safetensors"

    def lacking(self, headers: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return which of these files are not there yet, the same on all ranks."""
        return missing_files([self.path(header) for header in headers])

    def save(self, header: Mapping[str, Any], record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a file."""
        write_file(self.path(header), header, record, tensors)

    def find(self, wanted: Mapping[str, Any], tasks: Iterable[str] | None = None) -> list[Artifact]:
        """Return the files whose header has these values, `kind` among them; of these tasks, if given; ordered by name.

        Raises:
            IptError: a file was made for another backbone.
        """
        found, names = [], None if tasks is None else set(tasks)
        for path in sorted((self.folder / f"{wanted['kind']}s").glob("*.safetensors")):
            if names is not None and path.stem.rpartition("-")[0] not in names:
                continue
            header, record = read_metadata(path)
            if header["backbone"] != self.fingerprint:
                raise IptError(
                    f"{path} was made with another backbone ({header['backbone'][:8]}, expected {self.fingerprint[:8]}): "
                    "remove it, or name another folder with --cache"
                )
            if all(header.get(name) == value for name, value in wanted.items()):
                found.append(Artifact(path, header, record))
        return found


def best_of_grid(artifacts: Iterable[Artifact], by: Sequence[str]) -> list[Artifact]:
    """Return, of the artifacts alike in these header fields, the best by validation score, then by validation loss."""
    best: dict[tuple[Any, ...], Artifact] = {}
    for artifact in artifacts:
        key = tuple(artifact.header[name] for name in by)
        if key not in best or _rank(artifact) > _rank(best[key]):
            best[key] = artifact
    return list(best.values())


def _rank(artifact: Artifact) -> tuple[float, float]:
    return artifact.record["validation"], -artifact.record["validation_loss"]


# --- Experiment ----------------------------------------------------------------------------------
# What the commands share: the settings, the chosen tasks, the loaded backbone, the cache; and the stages over them.

COLLECTION_SEED = 100
"""The data seed of the prompts that the subspace is made of, and of every baseline."""
PRESETS: dict[str, tuple[Any, Any]] = {
    "split": (TESTBED, "random"), "prompt_length": (8, 100), "test_rows": (64, 1000), "steps": (280, 1000),
    "evaluations": (2, 5), "batch_size": (1, 8), "learning_rate": (0.3, 0.1), "vector_learning_rate": (0.1, 0.1),
    "subspace_steps": (120, 2000), "rows_per_task": (2, 4),
}  # fmt: skip
"""Defaults on the testbed's backbone, and on any other."""


def preset_help(name: str, text: str, min: int | None = None) -> Any:
    """Return an option whose help ends in its two defaults."""
    return typer.Option(min=min, help=text, show_default=_presets(name))


def _presets(name: str) -> str:
    return f"{PRESETS[name][0]} on the testbed, else {PRESETS[name][1]}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A backbone, tasks and a cache: the options that all commands share."""

    backbone: Annotated[str, typer.Option(help="Hub id or folder of a sequence-to-sequence model.")] = TESTBED
    split: Annotated[str | None, preset_help("split", "Which tasks are seen and unseen: a name, or a YAML file.")] = None
    data: Annotated[Path | None, typer.Option(help="Gym folder (CrossFit TSV, MetaICL JSONL) to take the tasks from.")] = None
    tasks_file: Annotated[Path, typer.Option(help="Another tasks.yaml.", show_default=False)] = TASKS_FILE
    cache: Annotated[Path | None, typer.Option(help="Folder of all results.", show_default="$IPT_CACHE or the user's")] = None
    prompt_length: Annotated[int | None, preset_help("prompt_length", "Tokens of a soft prompt.", min=1)] = None
    shots: Annotated[int, typer.Option(min=1, help="Rows per label, or half the rows of a task without labels.")] = 16
    test_rows: Annotated[int | None, preset_help("test_rows", "Test rows of a task, at most.", min=1)] = None
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of prompt and input together.")] = 512
    decoding: Annotated[str, typer.Option(help="options: the most likely option; generate: as CrossFit.")] = "options"
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto"
    processes: Annotated[
        int | None, typer.Option(min=1, help="Share the work.", show_default="one per core, at most 4, on the testbed, else 1")
    ] = None
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the backbone, which takes minutes.")] = False
    seed: Annotated[int, typer.Option(help="Of the initial prompt that all tasks share.")] = 0
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Do without seen tasks that have no soft prompt.")] = False

    def __post_init__(self) -> None:
        """Check what Typer cannot."""
        check_choice("decoding", self.decoding, "options", "generate")
        check_choice("precision", self.precision, "auto", "fp32", "bf16")

    def preset(self, name: str) -> Any:
        """Return a setting, or its default for the backbone."""
        value = getattr(self, name, None)
        return PRESETS[name][self.backbone != TESTBED or bool(self.data)] if value is None else value

    @property
    def n_processes(self) -> int:
        """Return how many processes share the work.

        On the testbed's small matrices two threads are hardly faster than one, but two processes are nearly twice as fast.
        """
        small = self.backbone == TESTBED and self.device in ("auto", "cpu")
        return self.processes or (min(4, os.cpu_count() or 1) if small else 1)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """Return all tasks that there are, of the gym folder or of the tasks file."""
        known = load_tasks(self.tasks_file)
        return find_gym_tasks(self.data, known) if self.data else known

    @cached_property
    def places(self) -> dict[str, str]:
        """Return the split's tasks and where in it they are: seen or unseen."""
        return split_tasks(self.tasks, self.preset("split"), subsets(self.tasks_file))

    def named(self, *places: str) -> list[str]:
        """Return the split's tasks in these places, but for those whose rows could not be had."""
        return [task for task, place in self.places.items() if place.split("-")[0] in places and task not in self.failures]

    def keep(self, tasks: Iterable[str]) -> None:
        """Reduce the split to some of its tasks."""
        kept = set(tasks)
        for task in [task for task in self.places if task not in kept]:
            del self.places[task]

    def task(self, name: str) -> Task:
        """Return a task by name."""
        if name not in self.tasks:
            raise IptError(f"there is no task {name!r}{nearest(name, self.tasks)}; 'ipt tasks' lists them")
        return self.tasks[name]

    @cached_property
    def model(self) -> Backbone:
        """Return the loaded backbone."""
        loaded = load_backbone(
            self.backbone, device=self.device, precision=self.precision, max_length=self.max_length, compiled=self.compiled
        )
        if (file := self._budget_file(loaded)).exists():
            budget, answer_budget = (Budget(*numbers) for numbers in json.loads(file.read_bytes()))
            loaded = replace(loaded, budget=budget, answer_budget=answer_budget)
        return loaded

    def _folder(self, loaded: Backbone) -> Path:
        name = Path(self.backbone).name if Path(self.backbone).exists() else self.backbone
        return (self.cache or user_cache()) / f"{file_name(name)}-{loaded.fingerprint[:8]}"

    def _budget_file(self, loaded: Backbone) -> Path:
        kind = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else loaded.device.type
        return self._folder(loaded) / "budgets" / f"{file_name(f'{platform.node()}-{kind}')}.json"

    def remember_budgets(self) -> None:
        """Keep what was found out about how much fits into memory, for the next command on this machine."""
        file, first = self._budget_file(self.model), first_budgets(self.model.device)
        known = json.loads(file.read_bytes()) if file.exists() else [list(astuple(budget)) for budget in first]
        found = [list(astuple(budget)) for budget in (self.model.budget, self.model.answer_budget)]
        if rank() == 0 and found != known:
            write_bytes(file, json.dumps(found).encode())

    @cached_property
    def store(self) -> Cache:
        """Return the cache's part for this backbone."""
        return Cache(self._folder(self.model), self.model.fingerprint)

    @cached_property
    def prompt_space(self) -> PromptSpace:
        """Return the space of whole soft prompts, around the initial prompt that all tasks share."""
        return PromptSpace(self.model.initial_prompt(self.preset("prompt_length"), self.seed), self.model.embedding_rms)

    @cached_property
    def _samples(self) -> dict[tuple[str, int], FewShotSample]:
        return {}

    @cached_property
    def _encoded(self) -> dict[Rows, list[Encoded]]:
        return {}

    @cached_property
    def failures(self) -> dict[str, str]:
        """Return task -> why its rows could not be had, of those asked for so far."""
        return {}

    def sample(self, task: str, data_seed: int) -> FewShotSample:
        """Return a task's rows as text, drawn once."""
        if (task, data_seed) not in self._samples:
            source = self.task(task).source
            self._samples[task, data_seed] = source.sample(data_seed, shots=self.shots, test_rows=self.preset("test_rows"))
        return self._samples[task, data_seed]

    def row_cost(self, examples: Sequence[Example]) -> float:
        """Return roughly how many tokens a row of these is, its prompt among them: English has some four letters a token."""
        return float(self.preset("prompt_length") + _mean(len(e.input) for e in examples) / 4)

    def with_rows(self, tasks: Iterable[str], data_seed: int) -> list[str]:
        """Return the tasks whose rows can be had; the others are told at once, and again at the end."""
        good = []
        for task in tasks:
            try:
                self.sample(task, data_seed)
                good.append(task)
            except IptError as error:
                self.failures[task] = str(error)
                say(f"left out: {error}")
        return good

    def data_digest(self, task: str, data_seed: int) -> str:
        """Return a name for a task's few-shot rows."""
        sample = self.sample(task, data_seed)
        return digest({"rows": [rows_digest(sample.train), rows_digest(sample.validation)]})

    def encoded(self, examples: Rows) -> list[Encoded]:
        """Return rows of a task as tokens, made once."""
        if examples not in self._encoded:
            self._encoded[examples] = self.model.encode(examples, prompt_length=self.preset("prompt_length"))
        return self._encoded[examples]

    def header(self, kind: str, **more: Any) -> dict[str, Any]:
        """Return the part that all headers share, and more."""
        precision = str(self.model.model.dtype).removeprefix("torch.")
        shared = {"version": FILE_VERSION, "backbone": self.model.fingerprint, "precision": precision, "seed": self.seed}
        return shared | {"kind": kind, "prompt_length": self.preset("prompt_length"), "max_length": self.model.max_length} | more

    def prompts(self, tasks: Iterable[str]) -> dict[str, Artifact]:
        """Return the best soft prompt of each task that has one in the cache."""
        wanted = self.header("soft-prompt", data_seed=COLLECTION_SEED, decoding=self.decoding)
        found = self.store.find(wanted, set(tasks) - self.failures.keys())
        found = [a for a in found if self.is_current(a)]
        best = {a.header["task"]: a for a in best_of_grid(found, ["task"])}
        return {task: best[task] for task in tasks if task in best}

    @cached_property
    def only(self) -> set[str]:
        """Return the digests of the files to use, where others may lie beside them; empty for all."""
        return set()

    def is_current(self, artifact: Artifact) -> bool:
        """Tell whether a result is of the rows and the metric that its task has now, and is wanted."""
        task, header = artifact.header["task"], artifact.header
        same = header["data"] == self.data_digest(task, header["data_seed"]) and header["metric"] == self.task(task).metric
        return same and (not self.only or artifact.digest in self.only)

    def read_prompts(self, artifacts: Iterable[Artifact]) -> Tensor:
        """Return soft prompts (tasks, prompt_length, hidden)."""
        shape = {"soft_prompt": tuple(self.prompt_space.initial_prompt.shape)}
        return torch.stack([read_tensors(a.path, shape, self.model.device)["soft_prompt"] for a in artifacts])

    def collected(self) -> list[Artifact]:
        """Return the soft prompts of the seen tasks.

        Raises:
            IptError: one is missing; nothing is ever put in its place.
        """
        found = self.prompts(self.named("seen"))
        missing = [task for task in self.named("seen") if task not in found]
        if not found or (missing and not self.skip_missing):
            raise IptError(
                f"{len(missing)} seen tasks of the split {self.preset('split')} have no soft prompt in {self.store.folder} "
                f"({', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}): run 'ipt collect' with the same options first"
                + (", or leave them out with --skip-missing" if found else "")
            )
        return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How jobs are tuned: options of collect, tune and run."""

    steps: Annotated[int | None, preset_help("steps", "Updates of a job.", min=1)] = None
    batch_size: Annotated[int | None, preset_help("batch_size", "Rows of a job in one update.", min=1)] = None
    learning_rate: Annotated[
        list[float] | None,
        typer.Option(help="In units of the embeddings, or of intrinsic vectors; repeat it: validation chooses.",
                     show_default=f"{_presets('learning_rate')}; of intrinsic vectors {_presets('vector_learning_rate')}"),
    ] = None  # fmt: skip
    evaluations: Annotated[int | None, preset_help("evaluations", "Validations of a job.", min=1)] = None
    patience: Annotated[
        int, typer.Option(min=0, help="Validations without gain that end a job; 0: none ends early, not even a solved one.")
    ] = TuneConfig.patience
    slots: Annotated[
        int | None, typer.Option(min=1, help="Jobs tuned at once.", show_default="four passes full, at least 16")
    ] = None

    def __post_init__(self) -> None:
        """Check what Typer cannot."""
        for rate in self.learning_rate or []:
            if not (0 < rate < math.inf):
                raise IptError(f"--learning-rate is {rate}, expected a number above 0")

    def config(self, experiment: Experiment) -> TuneConfig:
        """Return the engine's configuration."""
        return TuneConfig(
            steps=self.steps or experiment.preset("steps"), batch_size=self.batch_size or experiment.preset("batch_size"),
            evaluations=self.evaluations or experiment.preset("evaluations"), patience=self.patience,
        )  # fmt: skip


def make_jobs(
    experiment: Experiment, kind: str, tasks: Iterable[str], *, data_seed: int, tuning: Tuning,
    draw: Callable[[str], Tensor], **more: Any,
) -> list[Job]:  # fmt: skip
    """Return a job per task and learning rate; `draw` gives a task's start, `more` goes into the headers."""

    def rows(task: str) -> tuple[list[Encoded], list[Encoded]]:
        sample = experiment.sample(task, data_seed)
        return experiment.encoded(sample.train), experiment.encoded(sample.validation)

    def job(task: str, rate: float) -> Job:
        header = experiment.header(
            kind, task=task, metric=experiment.task(task).metric, data_seed=data_seed,
            data=experiment.data_digest(task, data_seed), decoding=experiment.decoding,
            tuning=asdict(tuning.config(experiment)), learning_rate=rate, **more,
        )  # fmt: skip
        config, sample = tuning.config(experiment), experiment.sample(task, data_seed)
        passes = 2 * config.steps * config.batch_size + config.evaluations * len(sample.validation)  # backward is one more
        return Job(header, draw(task), partial(rows, task), cost=passes * experiment.row_cost(sample.train))

    rates = tuning.learning_rate or [experiment.preset("learning_rate" if kind == "soft-prompt" else "vector_learning_rate")]
    return [job(task, rate) for task in experiment.with_rows(tasks, data_seed) for rate in rates]


def collect_jobs(experiment: Experiment, tuning: Tuning, tasks: Iterable[str], data_seed: int = COLLECTION_SEED) -> list[Job]:
    """Return the jobs of prompt tuning: theta is zero, at the initial prompt."""
    zero = torch.zeros(experiment.prompt_space.size)
    return make_jobs(experiment, "soft-prompt", tasks, data_seed=data_seed, tuning=tuning, draw=lambda task: zero)


def tune_jobs(
    experiment: Experiment, tuning: Tuning, tasks: Iterable[str], *, data_seed: int, subspace: Subspace, start: str
) -> list[Job]:
    """Return the jobs of intrinsic tuning, each from its own intrinsic vector."""
    seen = subspace.project(experiment.read_prompts(experiment.collected()))
    center = seen.mean(0)

    def draw(task: str) -> Tensor:
        seed = digest({"task": task, "data_seed": data_seed, "seed": experiment.seed})
        generator = torch.Generator().manual_seed(int(seed, 16) % 2**63)
        if start == "random":  # the paper's rule: N(0, 0.02)
            return 0.02 * torch.randn(subspace.size, generator=generator)
        mix = torch.randn(len(seen), generator=generator).to(seen) / math.sqrt(len(seen))
        return center + mix @ (seen - center)  # normal, with the seen vectors' mean and covariance

    more = {"space": subspace.space, "dim": subspace.size, "start": start, "subspace": subspace.digest}
    return make_jobs(experiment, "intrinsic-vector", tasks, data_seed=data_seed, tuning=tuning, draw=draw, **more)


Variant = tuple[str, int, str]
"""Space, dim and start of intrinsic vectors."""


def variant_jobs(experiment: Experiment, tuning: Tuning, variant: Variant, data_seed: int) -> tuple[Subspace, list[Job]]:
    """Return a subspace and its jobs of both challenges: seen tasks with other data, unseen tasks."""
    space, dim, start = variant
    subspace = find_space(experiment, space, dim)
    challenges = (experiment.named("seen"), data_seed), (experiment.named("unseen"), COLLECTION_SEED)
    jobs = [tune_jobs(experiment, tuning, tasks, data_seed=seed, subspace=subspace, start=start) for tasks, seed in challenges]
    return subspace, list(itertools.chain(*jobs))


def waiting_jobs(experiment: Experiment, jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs that the cache has no results of."""
    return [jobs[n] for n in experiment.store.lacking([job.header for job in jobs])]


def run_jobs(experiment: Experiment, space: Space, jobs: Sequence[Job], tuning: Tuning, label: str) -> None:
    """Tune the jobs whose files are not there yet; write each file as its job ends, and a checkpoint every half minute."""
    store, config = experiment.store, tuning.config(experiment)
    waiting = waiting_jobs(experiment, jobs)
    own = [waiting[n] for n in own_share([job.cost for job in waiting])]
    # One checkpoint per set of jobs and rank: another command in between leaves it alone.
    unfinished = store.folder / "unfinished"
    checkpoint = unfinished / f"{digest({'jobs': [digest(job.header) for job in jobs]})}-{rank()}.safetensors"
    saved, done = time.monotonic(), 0
    name = "soft_prompt" if isinstance(space, PromptSpace) else "intrinsic_vector"
    latest: tuple[list[Job], dict[str, Tensor]] = [], {}

    def save_unfinished() -> None:
        running, state = latest
        tensors = {f"{digest(job.header)}.{name}": rows[i] for i, job in enumerate(running) for name, rows in state.items()}
        write_file(checkpoint, experiment.header("checkpoint"), {}, tensors)

    def on_step(table: JobTable) -> None:
        nonlocal saved, latest
        latest = list(table.jobs), dict(table.state)
        advance(int(table.state["step"].sum()) + done * config.steps)
        if time.monotonic() - saved > 30:
            save_unfinished()
            saved = time.monotonic()

    with progress(label, len(own) * config.steps) as advance:
        try:
            for result in tune(
                experiment.model, space, own, config, slots=tuning.slots, decoding=experiment.decoding,
                resume=read_unfinished(unfinished) if own else None, on_step=on_step,
            ):  # fmt: skip
                tensor = result.soft_prompt if name == "soft_prompt" else result.theta
                store.save(result.job.header, result.record, {name: tensor})
                done += 1
        except KeyboardInterrupt:
            if latest[0]:
                save_unfinished()
            raise
    wait_for_ranks()
    experiment.remember_budgets()
    if waiting and rank() == 0:
        remove_finished(unfinished, {digest(job.header) for job in jobs})


def read_unfinished(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the states of unfinished jobs by job digest, whichever rank had them."""
    from safetensors.torch import load_file

    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for checkpoint in sorted(folder.glob("*.safetensors")):
        read_metadata(checkpoint)
        for key, tensor in load_file(checkpoint).items():
            job, _, name = key.partition(".")
            states[job][name] = tensor
    return states


def remove_finished(folder: Path, jobs: Collection[str]) -> None:
    """Remove the checkpoints in which all jobs are among these."""
    from safetensors import safe_open

    for checkpoint in folder.glob("*.safetensors"):
        with safe_open(checkpoint, framework="pt") as file:
            finished = {key.partition(".")[0] for key in file.keys()} <= set(jobs)  # noqa: SIM118 (it is no mapping)
        if finished:
            checkpoint.unlink()


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How a subspace is found: options of fit-subspace and run."""

    subspace_steps: Annotated[int | None, preset_help("subspace_steps", "Updates of the subspace on both losses.", min=1)] = None
    alpha: Annotated[float, typer.Option(min=0, help="Weight of the reconstruction error.")] = SubspaceConfig.alpha
    lm_loss: Annotated[bool, typer.Option(help="Learn from the tasks' loss.")] = True
    reconstruction_loss: Annotated[bool, typer.Option(help="Learn to reconstruct the prompts.")] = True

    def config(self, experiment: Experiment, dim: int) -> SubspaceConfig:
        """Return the configuration for one dimension."""
        options = {name: value for name, value in asdict(self).items() if name != "subspace_steps"}
        steps, rows = self.subspace_steps or experiment.preset("subspace_steps"), experiment.preset("rows_per_task")
        return SubspaceConfig(dim=dim, steps=steps, rows_per_task=rows, **options)


def fit(experiment: Experiment, configs: Sequence[SubspaceConfig]) -> list[dict[str, Any]]:
    """Find the subspaces of the seen tasks' prompts that the cache does not hold yet; return the headers of all."""
    collection, store = experiment.collected(), experiment.store
    headers = subspace_headers(experiment, collection, configs)
    waiting = store.lacking(headers)
    if not waiting:
        return headers
    checkpoint = store.folder / "unfinished-subspaces" / f"{digest({'subspaces': [headers[n] for n in waiting]})}.safetensors"
    fits, saved = SubspaceFits(experiment.prompt_space.initial_prompt, 1.0, []), time.monotonic()

    def save_unfinished() -> None:
        nonlocal saved
        saved = time.monotonic()
        if rank() == 0 and fits.step:
            write_file(checkpoint, experiment.header("checkpoint"), {"step": fits.step}, fits.state())

    def on_step(now: SubspaceFits) -> None:
        nonlocal fits
        fits = now
        advance(fits.step)
        if time.monotonic() - saved > 60:
            save_unfinished()

    dims = " and ".join(str(configs[n].dim) for n in waiting)
    with progress(f"subspace, dim {dims}", configs[0].steps_before + configs[0].steps) as advance:
        try:
            subspaces = fit_subspaces(
                experiment.model, experiment.read_prompts(collection), experiment.prompt_space.initial_prompt,
                collection_rows(experiment, collection), [configs[n] for n in waiting],
                resume=read_unfinished_subspaces(checkpoint), on_step=on_step,
            )  # fmt: skip
        except KeyboardInterrupt:
            save_unfinished()
            raise
    if rank() == 0:
        for n, subspace, *losses in zip(waiting, subspaces, fits.lm_losses.tolist(), fits.unexplained.tolist(), strict=True):
            figures = {"unit": subspace.unit} | dict(zip(("lm_loss", "unexplained"), losses, strict=True))
            store.save(headers[n], {k: v for k, v in figures.items() if math.isfinite(v)}, subspace.weights)
        checkpoint.unlink(missing_ok=True)
    experiment.remember_budgets()
    wait_for_ranks()
    return headers


def subspace_headers(
    experiment: Experiment, collection: Iterable[Artifact], configs: Iterable[SubspaceConfig]
) -> list[dict[str, Any]]:
    """Return the headers of subspaces of a collection."""
    prompts = [a.digest for a in collection]
    return [experiment.header("subspace", dim=c.dim, prompts=prompts, config=asdict(c)) for c in configs]


def collection_rows(experiment: Experiment, collection: Iterable[Artifact]) -> list[list[Encoded]]:
    """Return the training rows of collected prompts."""
    return [experiment.encoded(experiment.sample(a.header["task"], COLLECTION_SEED).train) for a in collection]


def read_unfinished_subspaces(checkpoint: Path) -> tuple[int, dict[str, Tensor]] | None:
    """Return step and state of subspaces that were being learned, if there are any."""
    from safetensors.torch import load_file

    return (read_metadata(checkpoint)[1]["step"], load_file(checkpoint)) if checkpoint.exists() else None


def read_subspace(experiment: Experiment, artifact: Artifact) -> Subspace:
    """Return a subspace from its file."""
    n, dim, inner = experiment.prompt_space.size, artifact.header["dim"], artifact.header["config"]["inner"]
    shapes = {"in.weight": (dim, n), "in.bias": (dim,), "hidden.weight": (inner, dim), "hidden.bias": (inner,)}
    weights = read_tensors(artifact.path, shapes | {"out.weight": (n, inner), "out.bias": (n,)}, experiment.model.device)
    return Subspace(experiment.prompt_space.initial_prompt, artifact.record["unit"], weights, digest=artifact.digest)


def find_space(experiment: Experiment, space: str, dim: int) -> Subspace:
    """Return a subspace of the cache, or make one that needs no learning (linear, random).

    Raises:
        IptError: the cache holds no such subspace, or several.
    """
    collection = experiment.collected()
    prompts = [a.digest for a in collection]
    if space == "subspace":
        found = experiment.store.find(experiment.header("subspace", dim=dim, prompts=prompts))
        found = [a for a in found if not experiment.only or a.digest in experiment.only]
        if len(found) != 1:
            raise IptError(
                f"the cache holds {len(found)} subspaces of dim {dim} for these {len(collection)} prompts, expected one: "
                + (
                    f"remove all but one of {', '.join(str(a.path) for a in found)}"
                    if found
                    else f"run 'ipt fit-subspace --dim {dim}'"
                )
            )
        return read_subspace(experiment, found[0])
    soft_prompts, initial = experiment.read_prompts(collection), experiment.prompt_space.initial_prompt
    name = digest({"space": space, "dim": dim, "prompts": prompts})
    if space == "linear":
        return replace(linear_subspace(soft_prompts, initial, dim=dim), space=space, digest=name)
    unit = float((soft_prompts - initial).pow(2).mean().sqrt())
    return replace(random_subspace(initial, unit=unit, dim=dim, inner=SubspaceConfig.inner, seed=0), space=space, digest=name)


# --- Scores --------------------------------------------------------------------------------------
# Everything in the cache behind the test rows. A score is computed once; its file is named by what it is a score of.


@dataclass(frozen=True)
class Candidate:
    """A soft prompt whose test score is wanted."""

    score: Score
    """With nan for the value."""
    digest: str
    """Of what the prompt is made of."""
    soft_prompt: Callable[[], Tensor]


def candidates(experiment: Experiment) -> list[Candidate]:
    """Return every soft prompt, reconstruction and intrinsic vector of the split's tasks that the cache holds."""
    found, store = experiment.prompts(experiment.named("seen", "unseen")), experiment.store
    wanted = [
        Candidate(Score("prompt tuning", task, "prompt"), a.digest, partial(lambda a: experiment.read_prompts([a])[0], a))
        for task, a in found.items()
    ]
    if not found or not (experiment.skip_missing or set(experiment.named("seen")) <= found.keys()):
        return wanted  # without the whole collection there is no subspace
    prompts = [a.digest for a in experiment.collected()]
    files = store.find(experiment.header("subspace", prompts=prompts))
    fitted = [read_subspace(experiment, a) for a in files if not experiment.only or a.digest in experiment.only]
    subspaces = {subspace.digest: subspace for subspace in fitted}
    wanted += [_reconstruction(experiment, subspace, task, a) for subspace in fitted for task, a in found.items()]
    vectors = store.find(experiment.header("intrinsic-vector", decoding=experiment.decoding), experiment.named("seen", "unseen"))
    vectors = [a for a in vectors if experiment.is_current(a)]
    for artifact in best_of_grid(vectors, ["task", "data_seed", "space", "start", "dim", "subspace"]):
        space, dim, name = (artifact.header[field] for field in ("space", "dim", "subspace"))
        if space != "subspace" and name not in subspaces:
            made = find_space(experiment, space, dim)
            subspaces[made.digest] = made
        if name in subspaces:  # else it belongs to another collection of prompts
            wanted.append(_tuned(experiment, subspaces[name], artifact))
    return wanted


def _reconstruction(experiment: Experiment, subspace: Subspace, task: str, artifact: Artifact) -> Candidate:
    def soft_prompt() -> Tensor:
        return subspace.back_project(subspace.project(experiment.read_prompts([artifact])))[0]

    name = quantity("MSF", experiment.places[task], same_data=True)
    score = Score(name, task, dim=subspace.size, data_seed=COLLECTION_SEED, subspace=subspace.digest)
    return Candidate(score, digest({"prompt": artifact.digest, "subspace": subspace.digest}), soft_prompt)


def _tuned(experiment: Experiment, subspace: Subspace, artifact: Artifact) -> Candidate:
    def soft_prompt() -> Tensor:
        vector = read_tensors(artifact.path, {"intrinsic_vector": (subspace.size,)}, experiment.model.device)
        return subspace.back_project(vector["intrinsic_vector"][None])[0]

    h = artifact.header
    name = quantity("IST", experiment.places[h["task"]], same_data=h["data_seed"] == COLLECTION_SEED)
    return Candidate(
        Score(name, h["task"], h["space"], h["start"], h["dim"], h["data_seed"], subspace.digest), artifact.digest, soft_prompt
    )


def score_files(experiment: Experiment, wanted: Sequence[Candidate]) -> list[Path]:
    """Return where the scores of candidates are or would be."""
    rows = {task: rows_digest(experiment.sample(task, COLLECTION_SEED).test) for task in {c.score.task for c in wanted}}
    names = [
        {"of": c.digest, "rows": rows[c.score.task], "decoding": experiment.decoding,
         "metric": experiment.task(c.score.task).metric}
        for c in wanted
    ]  # fmt: skip
    return [experiment.store.folder / "scores" / f"{digest(name)}.json" for name in names]


def test_scores(experiment: Experiment, wanted: Sequence[Candidate]) -> list[Score]:
    """Return test scores; those that are not in the cache are computed, many prompts at a time."""
    tests = {c.score.task: experiment.sample(c.score.task, COLLECTION_SEED).test for c in wanted}
    files = score_files(experiment, wanted)
    missing = missing_files(files)
    costs = {task: len(rows) * experiment.row_cost(rows) for task, rows in tests.items()}
    own = [missing[n] for n in own_share([costs[wanted[i].score.task] for i in missing])]
    with progress("test scores", len(own)) as advance:
        for start in range(0, len(own), 32):
            some = own[start : start + 32]
            encoded = [experiment.encoded(tests[wanted[i].score.task]) for i in some]
            prompts = torch.stack([wanted[i].soft_prompt() for i in some])
            pairs = [(at, example) for at, examples in enumerate(encoded) for example in examples]
            answers = iter(experiment.model.answer(prompts, pairs, decoding=experiment.decoding, losses=False))
            for i, examples in zip(some, encoded, strict=True):
                texts = [answer.text for answer in itertools.islice(answers, len(examples))]
                value = METRICS[experiment.task(wanted[i].score.task).metric](texts, [e.example.answers for e in examples])
                write_bytes(files[i], json.dumps({"score": value, "n": len(examples), "task": wanted[i].score.task}).encode())
            advance(start + len(some))
    experiment.remember_budgets()
    wait_for_ranks()
    return [replace(c.score, value=json.loads(file.read_bytes())["score"]) for c, file in zip(wanted, files, strict=True)]


def without_prompt(experiment: Experiment, tasks: Iterable[str]) -> list[Candidate]:
    """Return the backbone without any prompt, for each task."""
    empty = torch.zeros(0, experiment.model.hidden, device=experiment.model.device)
    return [Candidate(Score("no prompt", task, "prompt"), digest({"prompt": None}), lambda: empty) for task in tasks]


def floor_scores(experiment: Experiment, tasks: Sequence[str]) -> list[Score]:
    """Return what costs nothing: the backbone without any prompt, and the commonest training answer to every test row."""
    majority = []
    for task in tasks:
        sample = experiment.sample(task, COLLECTION_SEED)
        commonest = Counter(e.answers[0] for e in sample.train).most_common(1)[0][0]
        value = METRICS[experiment.task(task).metric]([commonest] * len(sample.test), [e.answers for e in sample.test])
        majority.append(Score("majority answer", task, "prompt", value=value))
    return test_scores(experiment, without_prompt(experiment, tasks)) + majority


def evaluate(experiment: Experiment) -> tuple[dict[str, Any], list[Score]]:
    """Score all that the cache holds; return the report (the paper's table) and the scores behind it.

    Raises:
        IptError: there is no soft prompt to compare with.
    """
    experiment.with_rows(experiment.named("seen", "unseen"), COLLECTION_SEED)
    wanted = candidates(experiment)
    if not wanted:
        raise IptError(
            f"{experiment.store.folder} holds no soft prompt of the split {experiment.preset('split')}: run 'ipt collect' first"
        )
    scores = test_scores(experiment, wanted)
    tuned = {s.task: s.value for s in scores if s.quantity == "prompt tuning"}
    scores += floor_scores(experiment, list(tuned))
    report: dict[str, Any] = {"backbone": experiment.backbone, "split": experiment.preset("split"), "prompt_tuning": {}}
    for place in dict.fromkeys(experiment.places[task] for task in tuned):
        own = {task for task in tuned if experiment.places[task] == place}
        columns = (("mean_score", "prompt tuning"), ("no_prompt", "no prompt"), ("majority_answer", "majority answer"))
        means = {name: _mean(s.value for s in scores if s.quantity == label and s.task in own) for name, label in columns}
        report["prompt_tuning"][place] = {"n_tasks": len(own)} | means
    report["rows"] = result_rows([s for s in scores if s.subspace], tuned)
    return report, scores


# --- Plans ---------------------------------------------------------------------------------------
# What a command is about to do, and how long that will take: by a few steps of it, measured by all ranks at once.


@dataclass(frozen=True)
class Plan:
    """A stage of work that is still to do."""

    work: str
    rows: float = 0
    """That go through the backbone."""
    tokens: float = 0
    """Of the rows' prompts, inputs and targets."""
    seconds: float = 0
    """Of wall time, all ranks working."""
    size: float = 0
    """Bytes of files."""
    pace: Pace | None = None
    """What the seconds of tuning come from."""

    def __str__(self) -> str:
        """Return it as a sentence."""
        text = f"plan: {self.work}"
        text += f"; {self.rows:,.0f} rows, {self.tokens / 1e6:,.1f} million tokens" if self.rows else ""
        text += f"; {self.seconds / 60:.1f} minutes by steps just measured" if self.seconds else ""
        return text + (f"; {self.size / 1e6:,.1f} MB of files" if self.size else "")


@dataclass(frozen=True)
class Pace:
    """How fast this machine is on some tasks."""

    step: float
    """Seconds of one job's share of an update."""
    answer: float
    """Seconds to answer one row."""
    length: float
    """Mean tokens of a row without the prompt."""
    validation_rows: float
    """Mean of a job."""


def measure_pace(experiment: Experiment, jobs: Sequence[Job], config: TuneConfig) -> Pace:
    """Tune some jobs for a few steps, the fastest of three counting, and validate them once; nothing of it is kept."""
    table = JobTable(experiment.prompt_space.size, experiment.model.device)
    for job in jobs:
        table.add(replace(job, start=torch.zeros(experiment.prompt_space.size)))
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        _step(experiment.model, experiment.prompt_space, table, config)
        float(table.state["last_loss"].sum())  # waits for the device
        seconds.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    _validate(experiment.model, experiment.prompt_space, table, range(len(jobs)), experiment.decoding)
    answering, validation = time.perf_counter() - begin, sum(len(rows) for _, rows in table.rows)
    return Pace(
        step=min(seconds[1:]) / len(jobs), answer=answering / validation,
        length=table.row_lengths / len(jobs), validation_rows=validation / len(jobs),
    )  # fmt: skip


def plan_tuning(experiment: Experiment, config: TuneConfig, pace: Pace, count: int, work: str, size: int) -> Plan:
    """Return the plan of tuning so many jobs of so many numbers."""
    trained, answered = config.steps * config.batch_size, config.evaluations * pace.validation_rows
    rows = count * (trained + answered)
    seconds = count * (config.steps * pace.step + answered * pace.answer) / n_ranks()
    return Plan(work, rows, rows * (experiment.preset("prompt_length") + pace.length), seconds, 4 * count * size, pace)


def plan_jobs(experiment: Experiment, tuning: Tuning, jobs: Sequence[Job]) -> Plan:
    """Return the plan of those jobs that the cache has no results of."""
    waiting, config = waiting_jobs(experiment, jobs), tuning.config(experiment)
    if not waiting:
        return Plan(f"0 jobs to tune, {len(jobs)} done before")
    work = f"{len(waiting)} jobs to tune, {config.steps} steps each at most, {len(jobs) - len(waiting)} done before"
    rows = [e for job in waiting for part in job.rows() for e in part]
    if truncated := sum(e.truncated for e in rows):
        work += f", {truncated} of {len(rows)} rows truncated"
    pace = measure_pace(experiment, some_of(waiting), config)
    return plan_tuning(experiment, config, pace, len(waiting), work, waiting[0].start.numel())


def some_of(jobs: Sequence[Job]) -> Sequence[Job]:
    """Return at most 16 jobs to measure by, from all over the list."""
    return jobs[:: -(-len(jobs) // 16)]


def plan_fit(experiment: Experiment, configs: Sequence[SubspaceConfig]) -> Plan:
    """Return the plan of those subspaces that the cache does not hold."""
    collection = experiment.collected()
    waiting = experiment.store.lacking(subspace_headers(experiment, collection, configs))
    if not waiting:
        return Plan(f"0 subspaces to find, {len(configs)} found before")
    rows = collection_rows(experiment, collection)
    return plan_subspaces(experiment, [configs[n] for n in waiting], experiment.read_prompts(collection), rows)


def plan_subspaces(
    experiment: Experiment, configs: Sequence[SubspaceConfig], soft_prompts: Tensor, rows: Sequence[Sequence[Encoded]]
) -> Plan:
    """Return the plan of subspaces of prompts, by two steps of each kind (every rank takes part in them)."""
    config, times = configs[0], list[float]()
    few = [replace(c, warmup_steps=2, steps=2) for c in configs]
    fit_subspaces(
        experiment.model, soft_prompts, experiment.prompt_space.initial_prompt, rows, few,
        on_step=lambda fits: times.append(time.perf_counter()),
    )  # fmt: skip
    n, per_step = experiment.prompt_space.size, min(config.tasks_per_step, len(rows)) * config.rows_per_task * config.lm_loss
    count = config.steps * per_step * len(configs)
    size = sum(c.dim * (n + 1 + c.inner) + c.inner + n * (c.inner + 1) for c in configs)
    return Plan(
        f"subspaces of dim {' and '.join(str(c.dim) for c in configs)} from {len(soft_prompts)} prompts, "
        f"{config.steps_before} steps on the reconstruction, {config.steps} with {per_step * len(configs)} rows each",
        count, count * (experiment.preset("prompt_length") + _mean(len(e) for own in rows for e in own)),
        (times[2] - times[1]) * config.steps_before + (times[-1] - times[-2]) * config.steps, 4 * size,
    )  # fmt: skip


def plan_scores(experiment: Experiment) -> Plan:
    """Return the plan of the scores that the cache does not hold, by the rows of the first."""
    experiment.with_rows(experiment.named("seen", "unseen"), COLLECTION_SEED)
    wanted = candidates(experiment)
    wanted += without_prompt(experiment, [c.score.task for c in wanted if c.score.quantity == "prompt tuning"])
    missing = [wanted[n] for n in missing_files(score_files(experiment, wanted))]
    work = f"{len(missing)} prompts to score, {len(wanted) - len(missing)} scored before"
    if not missing:
        return Plan(work)
    rows = [experiment.encoded(experiment.sample(c.score.task, COLLECTION_SEED).test) for c in missing]
    begin = time.perf_counter()
    first = [(0, e) for e in rows[0]]
    experiment.model.answer(missing[0].soft_prompt()[None], first, decoding=experiment.decoding, losses=False)
    seconds, count = time.perf_counter() - begin, sum(map(len, rows))
    tokens = count * experiment.preset("prompt_length") + sum(len(e) for own in rows for e in own)
    return Plan(work, count, tokens, seconds / len(rows[0]) * count / n_ranks())


def plan_run(
    experiment: Experiment, tuning: Tuning, vector_tuning: Tuning, jobs: Sequence[Job], configs: Sequence[SubspaceConfig],
    variants: Sequence[Variant], data_seed: int,
) -> Iterator[Plan]:  # fmt: skip
    """Yield the plans of the stages of `ipt run`, and of all of it while a soft prompt is missing."""
    yield (prompts := plan_jobs(experiment, tuning, jobs))
    config, seen, pace = tuning.config(experiment), experiment.named("seen"), prompts.pace
    if pace is None:
        yield from plan_rest(experiment, vector_tuning, configs, variants, data_seed)
        return
    if not seen:
        return
    initial, generator = experiment.prompt_space.initial_prompt, torch.Generator().manual_seed(0)
    stand_in = initial + torch.randn((len(seen), *initial.shape), generator=generator).to(initial)
    rows = [experiment.encoded(experiment.sample(task, COLLECTION_SEED).train) for task in seen]
    yield (subspaces := plan_subspaces(experiment, configs, stand_in, rows))
    tasks = experiment.named("seen", "unseen")
    count = len(variants) * len(tasks) * len(vector_tuning.learning_rate or [0])
    work = f"{count} intrinsic vectors to tune, {config.steps} steps each at most"
    yield (vectors := plan_tuning(experiment, config, pace, count, work, configs[0].dim))
    n_scores = len(tasks) * (2 + len(configs) + len(variants))
    answered = n_scores * _mean(len(experiment.sample(task, COLLECTION_SEED).test) for task in tasks)
    tokens, seconds = answered * (experiment.preset("prompt_length") + pace.length), answered * pace.answer / n_ranks()
    yield (scores := Plan(f"{n_scores} prompts to score", answered, tokens, seconds))
    yield Plan("all of it, if no job ends early", seconds=sum(stage.seconds for stage in (prompts, subspaces, vectors, scores)))


def plan_rest(
    experiment: Experiment, tuning: Tuning, configs: Sequence[SubspaceConfig], variants: Sequence[Variant], data_seed: int
) -> Iterator[Plan]:
    """Yield the plans of what `ipt run` has left behind its soft prompts, as far as that depends on nothing still missing."""
    experiment.only.update(map(digest, subspace_headers(experiment, experiment.collected(), configs)))
    plans = [plan_fit(experiment, configs)]
    if not plans[0].seconds:
        for variant in variants:
            jobs = variant_jobs(experiment, tuning, variant, data_seed)[1]
            experiment.only.update(digest(job.header) for job in jobs)
            plans.append(plan_jobs(experiment, tuning, jobs))
    if not any(stage.seconds for stage in plans):
        plans.append(plan_scores(experiment))
    yield from (stage for stage in plans if stage.seconds)


# --- Command line --------------------------------------------------------------------------------
# Results on stdout, progress and messages on stderr. A command is a signature, a line of help and a call of a stage.

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Intrinsic Prompt Tuning: many soft prompts, one small subspace, new tasks by tuning 250 numbers.",
)  # fmt: skip
stderr = Console(stderr=True, highlight=False)


SHARED: set[Callable[..., None]] = set()
"""Commands whose work several processes can share."""


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """Let several processes share a command's work."""
    SHARED.add(command)
    return command


def run_in_processes(count: int) -> int:
    """Run this very command in several processes on this machine; return 0, or the exit code of the first that failed.

    A person's mistake is met by all of them; the first process alone tells it, unless only another one failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:]], stderr=subprocess.PIPE if number else None,
            env=os.environ | meeting | threads | {"RANK": str(number), "LOCAL_RANK": str(number)},
        )
        for number in range(count)
    ]  # fmt: skip
    try:
        while any(process.poll() is None for process in ranks) and not any(process.poll() for process in ranks):
            time.sleep(0.05)
        if any(process.poll() for process in ranks):
            with contextlib.suppress(subprocess.TimeoutExpired):
                ranks[0].wait(5)  # it meets the same mistake a moment later, if it is a person's
        failed = [process for process in ranks if process.poll() not in (None, 0, LEFT_ALONE)]
        if failed and failed[0] is not ranks[0]:
            sys.stderr.write((failed[0].communicate()[1] or b"").decode())
        return failed[0].returncode if failed else 0
    finally:
        for process in ranks:
            if process.poll() is None:
                process.terminate()  # which saves unfinished work
        for process in ranks:
            process.communicate()


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for every field of its dataclass parameters."""
    hints, parameters = get_type_hints(command, include_extras=True), []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(hints[name]):
            types, own = get_type_hints(hints[name], include_extras=True), fields(hints[name])
            groups[name] = hints[name], [f.name for f in own]
            parameters += [parameter.replace(name=f.name, default=f.default, annotation=types[f.name]) for f in own]
        else:
            parameters.append(parameter.replace(annotation=hints[name]))

    @wraps(command)
    def expanded(**values: Any) -> None:
        for name, (kind, own) in groups.items():
            values[name] = kind(**{field: values.pop(field) for field in own})
        if command in SHARED and n_ranks() == 1 and values["experiment"].n_processes > 1:
            raise SystemExit(run_in_processes(values["experiment"].n_processes))
        with joined_ranks():
            command(**values)

    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    expanded.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def dim_help(default: str) -> Any:
    """Return the option of intrinsic dimensions."""
    return typer.Option(min=1, help="Intrinsic dimension; repeat it for more.", show_default=default)


TaskOption = Annotated[list[str] | None, typer.Option(help="A task; repeat it for more.", show_default="all of the split")]
SeenOption = Annotated[bool, typer.Option("--seen", help="All seen tasks of the split.")]
UnseenOption = Annotated[bool, typer.Option("--unseen", help="All unseen tasks of the split.")]
DimOption = Annotated[list[int] | None, dim_help("250")]
DataSeedOption = Annotated[int, typer.Option(help="Of the few-shot rows; on seen tasks, another than 100 is unseen data.")]
SpaceOption = Annotated[str, typer.Option(help="Where to tune: prompt, subspace, linear or random.")]
StartOption = Annotated[str, typer.Option(help="random: N(0, 0.02); seen: from the distribution of the seen tasks' vectors.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and how long it would take.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def chosen(experiment: Experiment, task: list[str] | None, seen: bool, unseen: bool) -> list[str]:
    """Return the tasks that the options name; all of the split when they name none."""
    named = [experiment.task(name).name for name in task or []]
    places = [place for place, wanted in (("seen", seen), ("unseen", unseen)) if wanted]
    found = list(dict.fromkeys(named + experiment.named(*places)))
    if places and not found:
        raise IptError(
            f"the split {experiment.preset('split')} has no {' and no '.join(places)} tasks; 'ipt tasks' lists what it has"
        )
    return found or list(experiment.places)


@app.command()
@options
@shared
def collect(
    experiment: Experiment, tuning: Tuning, task: TaskOption = None, seen: SeenOption = False, unseen: UnseenOption = False,
    data_seed: DataSeedOption = COLLECTION_SEED, dry_run: DryRunOption = False,
) -> None:  # fmt: skip
    """Tune a soft prompt for each task.

    Example: ipt collect --seen --learning-rate 0.1 --learning-rate 0.3
    """
    jobs = collect_jobs(experiment, tuning, chosen(experiment, task, seen, unseen), data_seed)
    do_jobs(experiment, tuning, [("collect", experiment.prompt_space, jobs)], dry_run)


@app.command("fit-subspace")
@options
@shared
def fit_subspace_(experiment: Experiment, fitting: Fitting, dim: DimOption = None, dry_run: DryRunOption = False) -> None:
    """Find the subspace of the seen tasks' soft prompts.

    Example: ipt fit-subspace --dim 250 --dim 10
    """
    check_dims(experiment, dim or [250])
    experiment.with_rows(experiment.places, COLLECTION_SEED)
    configs = [fitting.config(experiment, size) for size in dim or [250]]
    say(plan_fit(experiment, configs))
    for header in () if dry_run else fit(experiment, configs):
        say(f"subspace: {experiment.store.path(header)}")


@app.command("tune")
@options
@shared
def tune_(
    experiment: Experiment, tuning: Tuning, task: TaskOption = None, seen: SeenOption = False, unseen: UnseenOption = False,
    dim: DimOption = None, data_seed: DataSeedOption = COLLECTION_SEED, space: SpaceOption = "subspace",
    start: StartOption = "random", dry_run: DryRunOption = False,
) -> None:  # fmt: skip
    """Tune an intrinsic vector for each task.

    Example: ipt tune --task day-next --dim 250 --data-seed 21
    """
    check_choice("space", space, "prompt", "subspace", "linear", "random")
    check_choice("start", start, "random", "seen")
    tasks = chosen(experiment, task, seen, unseen)
    if space == "prompt":
        jobs = collect_jobs(experiment, tuning, tasks, data_seed)
        do_jobs(experiment, tuning, [("collect", experiment.prompt_space, jobs)], dry_run)
        return
    check_dims(experiment, dim or [250])
    spaces = [find_space(experiment, space, size) for size in dim or [250]]
    batches: list[tuple[str, Space, list[Job]]] = [
        (f"tune {space} {found.size}", found,
         tune_jobs(experiment, tuning, tasks, data_seed=data_seed, subspace=found, start=start))
        for found in spaces
    ]  # fmt: skip
    do_jobs(experiment, tuning, batches, dry_run)


@app.command("eval")
@options
@shared
def eval_(
    experiment: Experiment,
    per_task: Annotated[bool, typer.Option("--per-task", help="Also every task's scores.")] = False,
    as_json: JsonOption = False, dry_run: DryRunOption = False,
) -> None:  # fmt: skip
    """Score everything in the cache on the test rows, and print the paper's table.

    Example: ipt eval --per-task
    """
    if dry_run:
        say(plan_scores(experiment))
        return
    show_scores(experiment, as_json, per_task=per_task)


@app.command()
@options
@shared
def run(
    experiment: Experiment, tuning: Tuning, fitting: Fitting,
    dim: Annotated[list[int] | None, dim_help("250 and 10")] = None, as_json: JsonOption = False,
    data_seed: Annotated[int, typer.Option(help="Of the seen tasks' other data.")] = 21,
    vector_learning_rate: Annotated[
        list[float] | None, preset_help("vector_learning_rate", "Of intrinsic vectors; --learning-rate is of soft prompts.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tasks and steps: the same code in about a minute.")] = False,
    dry_run: DryRunOption = False,
) -> None:  # fmt: skip
    """Do all of it: collect, fit-subspace, tune, eval. What has been done is not done again.

    Example: ipt run --quick
    """
    if quick:
        tuning, fitting = replace(tuning, steps=tuning.steps or 80), replace(fitting, subspace_steps=fitting.subspace_steps or 50)
        experiment.keep(experiment.named("seen")[::8] + experiment.named("unseen")[::5])
    dims, vector_tuning = dim or [250, 10], replace(tuning, learning_rate=vector_learning_rate)
    prompts = collect_jobs(experiment, tuning, experiment.named("seen", "unseen"))
    check_dims(experiment, dims)
    configs = [fitting.config(experiment, size) for size in dims]
    variants = [("subspace", size, "random") for size in dims] + [("subspace", dims[0], "seen"), ("random", dims[0], "random")]
    experiment.only.update(digest(job.header) for job in prompts)  # what other settings left in the cache changes nothing
    for stage in plan_run(experiment, tuning, vector_tuning, prompts, configs, variants, data_seed):
        say(stage)
    if dry_run:
        return
    run_jobs(experiment, experiment.prompt_space, prompts, tuning, "collect")
    experiment.only.update(map(digest, fit(experiment, configs)))
    for variant in variants:
        subspace, jobs = variant_jobs(experiment, vector_tuning, variant, data_seed)
        experiment.only.update(digest(job.header) for job in jobs)
        run_jobs(experiment, subspace, jobs, vector_tuning, "tune {} {}, {} start".format(*variant))
    show_scores(experiment, as_json)


@app.command("tasks")
@options
def tasks_(
    experiment: Experiment,
    task: Annotated[list[str] | None, typer.Argument(help="Tasks.", show_default="all of the split")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the few-shot sample as the backbone gets it.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the samples with CrossFit's published MD5s.")] = False,
    data_seed: DataSeedOption = COLLECTION_SEED,
) -> None:
    """List tasks with kind, metric, place in the split and source; look at one; verify them.

    Example: ipt tasks day-next --show
    """
    names = [experiment.task(name).name for name in task or experiment.places]
    if verify:
        verify_tasks(experiment, names)
    elif show:
        for name in names:
            show_task(experiment, name, data_seed)
    else:
        row = "{:<52} {:<16} {:<20} {:<10} {}"
        echo(row.format("task", "kind", "metric", "place", "source"))
        for name in names:
            it = experiment.task(name)
            echo(row.format(name, it.kind, it.metric, experiment.places.get(name, "-"), str(it.source)).rstrip())
        if experiment.data and not task:
            wanted = split_tasks(load_tasks(experiment.tasks_file), experiment.preset("split"), subsets(experiment.tasks_file))
            for sentence in missing_from_gym(experiment.tasks, wanted, CROSSFIT_SEEDS):
                say(sentence)


def show_task(experiment: Experiment, name: str, data_seed: int) -> None:
    """Print a task's rows as the backbone gets them, with their lengths in tokens."""
    sample = experiment.sample(name, data_seed)
    for part in ("train", "validation", "test"):
        rows = experiment.encoded(getattr(sample, part))
        echo(f"{name}, {part}: {len(rows)} rows, {sum(e.truncated for e in rows)} truncated")
        for e in rows[:8]:
            options = f"   options: {' | '.join(e.example.options)}" if e.example.options else ""
            kept = experiment.model.tokenizer.decode(e.input_ids)
            echo(f"  {len(e.input_ids)} tokens: {kept} -> {len(e.target_ids)} tokens: {' / '.join(e.example.answers)}{options}")


def verify_tasks(experiment: Experiment, names: Iterable[str]) -> None:
    """Rebuild samples, compare them with CrossFit's MD5s, a line each, and count."""
    counts = Counter[str]()
    for name in names:
        try:
            verdicts = verify_task(experiment.task(name))
        except IptError as error:
            verdicts = []
            echo(f"{name}: could not be loaded: {error}")
            counts["could not be loaded"] += 1
        if verdicts:
            different = [f"{part} {seed}" for part, seed, verdict in verdicts if verdict != "equal"]
            echo(f"{name}: {'different: ' + ', '.join(different) if different else 'equal'}")
            counts["different" if different else "equal"] += 1
    echo(", ".join(f"{counts[verdict]} {verdict}" for verdict in ("equal", "different", "could not be loaded")))


def do_jobs(experiment: Experiment, tuning: Tuning, batches: Sequence[tuple[str, Space, list[Job]]], dry_run: bool) -> None:
    """Tune batches of jobs, or only tell the plan; say where the results are."""
    for label, space, jobs in batches:
        say(plan_jobs(experiment, tuning, jobs))
        if not dry_run:
            run_jobs(experiment, space, jobs, tuning, label)
    say(f"results: {experiment.store.folder}")
    refuse_failures(experiment)


def show_scores(experiment: Experiment, as_json: bool, *, per_task: bool = False) -> None:
    """Score all that the cache holds and print it."""
    report, scores = evaluate(experiment)
    print_report(report, scores if per_task else [], as_json)
    if not as_json:
        print_without_pretrained(experiment, scores)
    refuse_failures(experiment)


def refuse_failures(experiment: Experiment) -> None:
    """End with an error that lists the tasks that were left out, if there are any."""
    if experiment.failures:
        raise IptError(f"{len(experiment.failures)} tasks were left out: " + "; ".join(experiment.failures.values()))


def check_dims(experiment: Experiment, dims: Iterable[int]) -> None:
    """Refuse an intrinsic dimension that exceeds the prompt's, before any work."""
    for dim in dims:
        if experiment.places and dim > experiment.prompt_space.size:
            raise IptError(
                f"--dim {dim} is larger than the prompt itself, {experiment.prompt_space.size} numbers: use a smaller --dim"
            )


def check_choice(name: str, value: str, *known: str) -> None:
    """Refuse an option's value that is not one of those known."""
    if value not in known:
        raise IptError(f"--{name} is {value!r}, expected {', '.join(known)}")


def say(text: object) -> None:
    """Print a message on stderr, once for all ranks."""
    if rank() == 0:
        stderr.print(str(text), markup=False, soft_wrap=True)


def echo(text: str = "") -> None:
    """Print a line of results on stdout, once for all ranks."""
    if rank() == 0:
        sys.stdout.write(f"{text}\n")


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with what is left, or plain lines when stderr is no terminal; nothing when there is nothing to do."""
    if not total or rank():
        yield lambda done: None
        return
    if stderr.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=stderr) as bar:
            line = bar.add_task(label, total=total)
            yield lambda done: bar.update(line, completed=done)
            bar.update(line, completed=total)
        return
    begin = told = time.monotonic()

    def advance(done: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > 20:
            told = now
            say(f"{label}: {100 * done / total:.0f} %, {(now - begin) * (total - done) / max(1, done) / 60:.1f} minutes left")

    yield advance
    say(f"{label}: done in {time.monotonic() - begin:.0f} s")


def print_report(report: dict[str, Any], scores: Sequence[Score], as_json: bool) -> None:
    """Print the paper's table for people, or all of it as one JSON object."""
    if as_json:
        echo(json.dumps(report | ({"scores": [asdict(score) for score in scores]} if scores else {})))
        return
    echo(f"backbone {report['backbone']}, split {report['split']}, test scores; baselines with data seed {COLLECTION_SEED}\n")
    print_table("prompt tuning|n|mean score|no prompt|majority answer", [
        [f"{place} tasks", row["n_tasks"], row["mean_score"], row["no_prompt"], row["majority_answer"]]
        for place, row in report["prompt_tuning"].items()
    ])  # fmt: skip
    print_rows(report["rows"])
    if scores:
        ordered = sorted(scores, key=lambda s: (s.task, s.quantity, s.space, s.dim or 0, s.start or ""))
        rows = [[s.task, s.quantity, s.dim, s.space, s.start, s.data_seed, s.value] for s in ordered]
        print_table("task|quantity|dim|space|start|data seed|score", rows)


def print_without_pretrained(experiment: Experiment, scores: Sequence[Score]) -> None:
    """Print the rows of the seen tasks once more, without those whose very question the backbone was trained on."""
    pretrained = {task for task in experiment.places if experiment.task(task).pretrained}
    tuned = {s.task: s.value for s in scores if s.quantity == "prompt tuning"}
    own = [s for s in scores if s.subspace and s.task not in pretrained and experiment.places[s.task] == "seen"]
    if own and pretrained & tuned.keys():
        echo(f"seen tasks without the {len(pretrained & tuned.keys())} whose very question the backbone was trained on\n")
        print_rows(result_rows(own, tuned))


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of the paper's table."""
    columns = ("quantity", "dim", "space", "start", "data_seed", "n_tasks", "n_excluded", "e_rel", "e_rel_low", "e_rel_high",
               "mean_score", "mean_prompt_tuning", "ratio_of_means")  # fmt: skip
    heads = "quantity|dim|space|start|data seed|n|excluded|E_rel|95 % low|high|mean score|prompt tuning|ratio of means"
    if rows:
        print_table(heads, [[row[column] for column in columns] for row in rows])


def print_table(heads: str, rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under heads, columns as wide as they need to be, whatever the terminal."""
    shown = [heads.split("|")] + [
        ["-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    echo()


def main() -> None:
    """Run the command line; a mistake that a person can mend is one line and exit code 1."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # as Ctrl-C: unfinished work is saved
    try:
        app()
    except IptError as error:
        stderr.print(f"error: {error}", markup=False, soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
