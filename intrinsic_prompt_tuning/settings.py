"""Settings: a dataclass field is an option, its default the only default, and one table says what differs on the testbed."""

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_type_hints

T = TypeVar("T")
TESTBED = "testbed"
"""The built-in world, the split of its tasks, and its backbone."""
TESTBED_SETTINGS: dict[str, Any] = {
    "split": TESTBED, "prompt_length": 24, "initial_text": "_", "test_rows": 64, "steps": 400, "evaluations": 4, "batch_size": 1,
    "vector_learning_rate": [0.1], "subspace_steps": 120, "rows_per_task": 2,
}  # fmt: skip
"""What holds on the testbed's backbone where nothing is given."""
BEHIND: dict[str, Any] = {"prompt_length": 10, "initial_text": "Answer:", "steps": 200}
"""What holds where nothing is given and the prompt stands behind the input: tests/experiments/README.md measured it."""


class Setting(NamedTuple):
    """What the command line says of a field, and what it allows."""

    help: str
    least: float | None = None
    most: float | None = None
    shown_default: str = ""
    """For defaults that are found out."""
    panel: str = ""
    """Under which heading of the help it stands; without one among the most common."""


DATA, TUNING, MACHINE = (partial(Setting, panel=panel) for panel in ("Rows", "Tuning", "Machine and manners"))
"""Settings under a heading of the help."""


@dataclass(frozen=True, kw_only=True)
class Manners:
    """What every command has beside its settings; `processes`: those whose work several processes can share."""

    processes: Annotated[
        int | None, MACHINE("Share the work.", least=1, most=64, shown_default="one per core, at most 4, on the testbed, else 1")
    ] = None
    config: Annotated[Path | None, MACHINE("YAML file of options.")] = None
    log: Annotated[Path | None, MACHINE("Add what happens to a file, a JSON object a line.")] = None
    quiet: Annotated[bool, MACHINE("Say nothing but results and errors.")] = False
    verbose: Annotated[bool, MACHINE("Say every validation, too.")] = False


def described(kind: type, name: str) -> tuple[Any, str, Setting] | None:
    """Return a field's type, the option's flag, and its setting with all that holds by default; None: it has none."""
    value, *notes = get_args(get_type_hints(kind, include_extras=True)[name]) or (None,)
    if not notes or not isinstance(setting := notes[0], Setting):
        return None
    default, flag = getattr(kind(), name), f"--{name.replace('_', '-')}"
    flag = f"{flag}/--no-{flag[2:]}" if (value is bool and default) or value == (bool | None) else flag
    return value, flag, setting._replace(shown_default=_shown(name, setting.shown_default or default))


def _shown(name: str, default: Any) -> str:
    """Return a default as help shows it, and what holds elsewhere; empty where there is nothing to show."""

    def text(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else "on" if value is True else str(value)

    told = text(default) if default not in (None, False) else ""
    told = f"{text(BEHIND[name])} behind the input, {told} in front" if name in BEHIND else told
    return f"{text(TESTBED_SETTINGS[name])} on the testbed, else {told}" if name in TESTBED_SETTINGS else told


def settled(kind: type[T], given: Mapping[str, Any]) -> T:
    """Make settings: what was given by name, else the field's default."""
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})  # type: ignore[arg-type]


def versions() -> str:
    """Return the versions that a report of a mistake needs."""
    told = {"ipt": "intrinsic-prompt-tuning"} | {name: name for name in ("torch", "transformers", "datasets", "safetensors")}
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return ", ".join(f"{name} {importlib.metadata.version(package)}" for name, package in told.items()) + f", {python}"
