"""A name -> few-shot rows. Nothing here knows a tensor.

examples.py says what a task is; worlds.py, hub.py, folders.py and tables.py are four ways to draw its rows; splits.py says which
tasks are seen; checks.py reads what people write in YAML.
"""

from pathlib import Path
from typing import Any

from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.tasks.checks import build, check, read_mapping
from intrinsic_prompt_tuning.tasks.crossfit import CROSSFIT_SEEDS
from intrinsic_prompt_tuning.tasks.examples import Example, Rows, Sample, Task, check_names, rows_digest
from intrinsic_prompt_tuning.tasks.folders import few_shot_files, find_few_shot_tasks, kept
from intrinsic_prompt_tuning.tasks.hub import hub_task
from intrinsic_prompt_tuning.tasks.splits import split_tasks
from intrinsic_prompt_tuning.tasks.tables import Kind, find_table_tasks, table_files
from intrinsic_prompt_tuning.tasks.worlds import World, world_task

__all__ = [
    "CROSSFIT_SEEDS", "TASKS_FILE", "Example", "Rows", "Sample", "Task", "World", "few_shot_files", "find_few_shot_tasks",
    "find_table_tasks", "find_tasks", "kept", "load_tasks", "load_worlds", "rows_digest", "split_tasks",
]  # fmt: skip

_PACKAGE = Path(__file__).parents[1]
TASKS_FILE = next(file for file in (_PACKAGE / "tasks.yaml", _PACKAGE.parent / "tasks.yaml") if file.exists())
"""Installed inside the package; in a clone beside it."""


def load_tasks(file: Path) -> dict[str, Task]:
    """Return the tasks of a tasks file, in its order.

    Raises:
        IptError: for the first thing in the file that cannot be read or is wrong.
    """
    rows, worlds, tasks = read_mapping(file, "tasks")["tasks"], load_worlds(file), dict[str, Task]()
    check_names(rows, file)
    for name, row in rows.items():
        of_world = isinstance(row, dict) and "world" in row
        tasks[name] = world_task(name, row, worlds, file) if of_world else hub_task(name, row, file)
    return tasks


def load_worlds(file: Path) -> dict[str, World]:
    """Return the worlds of a tasks file."""
    check(rows := read_mapping(file, "tasks").get("worlds", {}), dict[str, Any], f"{file}: 'worlds'")
    return {name: build(World, row, where := f"{file}: world {name}", name=name, where=where) for name, row in rows.items()}


def find_tasks(file: Path, data: Path | None, columns: str, kind: Kind | None) -> tuple[dict[str, Task], dict[str, Task]]:
    """Return the tasks of a tasks file, or of few-shot files, of which it tells what their rows do not; and one's own tables'.

    Raises:
        IptError: for the first thing that cannot be read or is wrong, or that would be ignored.
    """
    known, few_shot = load_tasks(file), bool(data and few_shot_files(data))
    if (columns or kind) and (few_shot or not data):
        raise IptError("--columns and --kind are for your own tables, which --data names: leave them out")
    if data and few_shot:
        if tables := table_files(data):
            raise IptError(f"{data} holds few-shot files and tables, such as {tables[0].name}: give the tables another folder")
        return find_few_shot_tasks(data, known), {}
    return known, find_table_tasks(data, known, columns, kind) if data else {}
