"""The testbed's language, read from tasks.yaml: a lexicon, one sentence pattern, questions in words, and rows without end."""

import itertools
import random
import re
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from intrinsic_prompt_tuning.errors import IptError, nearest
from intrinsic_prompt_tuning.tasks.checks import build, places
from intrinsic_prompt_tuning.tasks.examples import Example, Metric, Role, Rows, Sample, Task

Scene = dict[str, SimpleNamespace]  # slot -> lexicon entry, one attribute per column
OPTION_MARK = "|"
"""Stands before each option in a multiple-choice input."""
WORLD_METRICS = {"classification": "ACC", "multiple-choice": "ACC", "extraction": "QA-F1", "transformation": "EM"}
TEST_STREAM = "test, the second"
"""The first one was looked at while settings were chosen."""


@dataclass(kw_only=True, eq=False)
class World:
    """A synthetic language in which every question has one computable answer."""

    name: str
    where: str
    """For messages. Nobody writes these two."""
    sentence: str
    """A `str.format` pattern over slots and their columns, such as `the {mood.word} {subject.word}`."""
    slots: dict[str, str]
    """Slot of the sentence -> the lexicon's table that fills it."""
    lexicon: dict[str, dict[str, list[str]]]
    """Words and what is known about them: table -> its `columns`, and its `rows` of as many words."""

    def __post_init__(self) -> None:
        """Read the lexicon, and try one sentence.

        Raises:
            IptError: a table, a slot or a column is not there, or a row has not as many words as there are columns.
        """
        where = self.where
        self.definition = {"sentence": self.sentence, "slots": self.slots, "lexicon": self.lexicon}
        for place in places(self.sentence, f"{where}: 'sentence'"):
            if not re.fullmatch(r"\w+\.[^\W_]\w*", place):
                raise IptError(f"{where}: expected 'sentence' with {{slot.column}}, not with {{{place}}}")
        try:
            self.tables = {
                name: [SimpleNamespace(**dict(zip(table["columns"], row.split(), strict=True))) for row in table["rows"]]
                for name, table in self.lexicon.items()
            }
            self._entries = {slot: self.tables[table] for slot, table in self.slots.items()}
            self._columns = {(slot, column) for slot in self.slots for column in self.columns(slot)}
            self._known = {(slot, value) for slot, column in self._columns for value in self.values(slot, column)}
            self.describe(self.draw(random.Random(0)))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise IptError(
                f"{where}: {error!r}: expected 'sentence' (with {{slot.column}}), 'slots' (slot: table), 'lexicon' "
                "(table: columns and rows, as many words in each row as there are columns)"
            ) from error

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
        parts = map(str.split, question.split(" then "))
        answers = [self.values(*words) if tuple(words) in self._columns else ["no", "yes"] for words in parts]
        return [" ".join(answer) for answer in itertools.product(*answers)]

    def _answer_part(self, words: list[str], scene: Scene) -> str:
        if tuple(words) in self._columns:
            return str(getattr(scene[words[0]], words[1]))
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
            case ["same", column, a, b] if {(a, column), (b, column)} <= self._columns:
                return bool(getattr(scene[a], column) == getattr(scene[b], column))
            case [slot, value] if (slot, value) in self._known:
                return value in vars(scene[slot]).values()
        raise IptError(
            f"world {self.name}: cannot read the question part {' '.join(words)!r}: expected 'SLOT COLUMN', 'SLOT VALUE' or "
            f"'same COLUMN SLOT SLOT' with the slots {', '.join(self.slots)}"
        )


@dataclass(frozen=True, kw_only=True)
class WorldRow:
    """A row of tasks.yaml that asks a question about a world's sentences."""

    world: str
    question: str
    kind: Literal["classification", "multiple-choice", "extraction", "transformation"]
    metric: Metric | None = None
    splits: dict[str, Role] = field(default_factory=dict)
    pretrained: bool = False


def world_task(name: str, row: Any, worlds: Mapping[str, World], file: Path) -> Task:
    """Return a task whose rows are drawn from a world.

    Raises:
        IptError: a field is wrong, or the world cannot answer the question.
    """
    where = f"{file}: task {name}"
    fields = build(WorldRow, row, where)
    if fields.world not in worlds:
        raise IptError(f"{where}: there is no world '{fields.world}' in this file{nearest(fields.world, worlds)}")
    world = worlds[fields.world]
    try:
        world.answer(fields.question, world.draw(random.Random(0)))
    except IptError as error:
        raise IptError(f"{where}: {error}") from error
    return Task(
        name=name, kind=fields.kind, metric=fields.metric or WORLD_METRICS[fields.kind], splits=fields.splits,
        pretrained=fields.pretrained, source=f"{world.name}: {fields.question}", definition=[world.definition, row, TEST_STREAM],
        draw=partial(draw_world, world, fields.question, fields.kind),
    )  # fmt: skip


def draw_world(world: World, question: str, kind: str, data_seed: int, shots: int, test_rows: int | None) -> Sample:
    """Draw a task's rows, as many of every label for classification.

    A sentence's checksum decides its part, so that train, validation and test rows never meet.
    """
    count = shots * len(world.labels(question)) if kind == "classification" else 2 * shots
    rows = partial(draw_rows, world, question, kind)
    return Sample(
        train=rows(count, f"train {data_seed}", (2, 3)),
        validation=rows(count, f"validation {data_seed}", (1,)),
        test=rows(1000 if test_rows is None else test_rows, TEST_STREAM, (0,)),
    )


def draw_rows(world: World, question: str, kind: str, count: int, stream: str, parts: Collection[int]) -> Rows:
    """Return so many rows of some of the four parts of all sentences, every label in turn for classification.

    The stream's name is the seed. No sentence comes twice.
    """
    rng, labels, rows = random.Random(f"{question} {stream}"), tuple(world.labels(question)), dict[str, Example]()
    for label in itertools.islice(itertools.cycle(labels if kind == "classification" else [None]), count):
        for _ in range(100_000):
            scene = world.draw(rng)
            sentence, answer = world.describe(scene), world.answer(question, scene)
            if label in (None, answer) and sentence not in rows and zlib.crc32(sentence.encode()) % 4 in parts:
                break
        else:
            raise IptError(f"world {world.name}: the question '{question}' has too few rows for the answer '{label}'")
        choices = _draw_options(world, question, answer, rng) if kind == "multiple-choice" else ()
        shown = "".join(f" {OPTION_MARK} {choice}" for choice in choices)
        rows[sentence] = Example(sentence + shown, (answer,), labels if label else choices)
    return tuple(rows.values())


def _draw_options(world: World, question: str, answer: str, rng: random.Random) -> tuple[str, ...]:
    """Return the answer among up to two other answers that the question can have, in random order."""
    options, most = {answer}, min(3, len(world.labels(question)))
    for _ in range(1000):  # two parts may exclude each other, so that fewer answers occur than there are labels
        if len(options) == most:
            break
        options.add(world.answer(question, world.draw(rng)))
    return tuple(rng.sample(sorted(options), len(options)))
