"""Settings: a dataclass field is an option, its default the only default, and one table says what differs on the testbed."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
DATA, TUNING, MACHINE = "Rows", "Tuning", "Machine and manners"
"""Headings of the help."""
TESTBED = "testbed"
"""The built-in world, the split of its tasks, and its backbone."""
TESTBED_SETTINGS: dict[str, Any] = {
    "split": TESTBED, "prompt_length": 24, "initial_text": "_", "test_rows": 64, "steps": 400, "evaluations": 4, "batch_size": 1,
    "vector_learning_rate": [0.1], "subspace_steps": 120, "rows_per_task": 2,
}  # fmt: skip
"""What holds on the testbed's backbone where nothing is given."""
BEHIND_SETTINGS: dict[str, Any] = {"prompt_length": 10, "initial_text": "Answer:", "steps": 200}
"""What holds where nothing is given and the prompt stands behind the input: tests/experiments/README.md measured it."""


class Setting(NamedTuple):
    """What the command line says of a field, and what it allows."""

    help: str
    least: float | None = None
    most: float | None = None
    name: str = ""
    """Of the option, where the field's own name would say too little."""
    shown_default: str = ""
    """For defaults that are found out."""
    panel: str = ""
    """Under which heading of the help it stands; without one among the most common."""


def settled(kind: type[T], given: Mapping[str, Any], *, testbed: bool) -> T:
    """Make settings: what was given, else what holds on the testbed, else the field's default."""
    own = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    defaults = {name: value for name, value in TESTBED_SETTINGS.items() if testbed and name in own}
    return kind(**defaults | {name: value for name, value in given.items() if name in own and value is not None})


def versions() -> str:
    """Return the versions that a report of a mistake needs."""
    told = {"ipt": "intrinsic-prompt-tuning"} | {name: name for name in ("torch", "transformers", "datasets", "safetensors")}
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return ", ".join(f"{name} {importlib.metadata.version(package)}" for name, package in told.items()) + f", {python}"
