"""What a task is: a name, a metric, and a function that draws few-shot rows."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.files import digest

Role = Literal["seen", "unseen", "unseen-in", "unseen-out"]
"""What a task is in a split; `in` and `out` of the seen tasks' type."""
Metric = Literal["ACC", "Classification-F1", "EM", "QA-F1", "Rouge-L", "Matthew-Correlation", "Pearson-Correlation"]


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


class Sample(NamedTuple):
    """A task's rows for one data seed; the test rows are the same for all seeds."""

    train: Rows
    validation: Rows
    test: Rows


Draw = Callable[[int, int, int | None], Sample]
"""(data seed, shots, test rows) -> sample.

The data seed, 0 or more, chooses the training and validation rows, never the test rows. Shots are rows per label for
classification, half the rows in total otherwise; as many again for validation. Of the test rows at most so many are drawn with a
fixed seed, None for all. Raises IptError where there are too few rows.
"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row of tasks.yaml, few-shot files in a folder, or one's own table."""

    name: str
    kind: str
    """What its answers are: classification, multiple-choice, extraction, transformation or free-form."""
    metric: str
    draw: Draw
    source: str
    """Where the rows come from, for people."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """Name of a split -> this task's role in it."""
    category: str = ""
    pretrained: bool = False
    """The testbed's backbone was trained on this very question."""
    definition: Any = None
    """All that the rows follow from, so that a sample can be kept under a name; None: they are drawn anew by every command."""
    words: tuple[str, ...] = ()
    """The options of every row, where the task says them."""
    column: str = "input"
    """What a new input can also be called: its column in one's own table."""
    render: Callable[[dict[str, Any]], Example] | None = None
    """Makes an input of the template's columns, where the task has a template."""

    def sample(self, data_seed: int, shots: int, test_rows: int | None) -> Sample:
        """Draw a sample and refuse rows by which nothing can be told.

        Raises:
            IptError: a part is empty, the right answer is no option, or all test rows of a classification have one label.
        """
        sample = self.draw(data_seed, shots, test_rows)
        for part, rows in zip(Sample._fields, sample, strict=True):
            if not rows and not (part == "test" and test_rows == 0):
                raise IptError(f"task '{self.name}' has no {part} rows for data seed {data_seed}")
            for row in rows:
                if row.options and (right := row.answers[0]) not in row.options:
                    raise IptError(f"task '{self.name}': a {part} row has the answer '{right}', which is none of {row.options}")
        labels = {row.answers[0] for row in sample.test}
        if self.kind == "classification" and len(labels) == 1 and len(sample.test) > 9:
            count, label = len(sample.test), labels.pop()
            raise IptError(f"task '{self.name}': all {count} test rows have the label '{label}', so no score means anything")
        return sample


def rows_digest(examples: Iterable[Example]) -> str:
    """Return a name for rows, so that a result is never taken for one on other data."""
    return digest([[e.input, e.answers, e.options, e.tail] for e in examples])


NAME = re.compile(r"(?!(?i:|con|prn|aux|nul|com\d|lpt\d)(\.|\Z))[\w.-]+")
"""What a task can be called: no name that some file systems keep for themselves, and none that begins with a dot."""


def check_names(names: Iterable[object], where: Path) -> None:
    """Refuse what cannot be a task's name: it stands in file names, and many file systems take two cases for one.

    Raises:
        IptError: for the first such name.
    """
    folded: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name) or len(name.encode()) > 100:
            raise IptError(
                f"{where}: {str(name)[:120]!r} cannot be a task's name: expected at most 100 letters, digits, '.', '_' and '-' "
                "(100 bytes), and no name that a system keeps (quote yes and no)"
            )
        if (other := folded.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)) != name:
            both = f"the tasks '{other}' and '{name}'"
            raise IptError(f"{where}: {both} differ by case only, or by what file systems may fold: rename one")
