"""Which tasks the subspace is found with, and which it never sees."""

from collections.abc import Mapping
from pathlib import Path

from intrinsic_prompt_tuning.errors import IptError, nearest
from intrinsic_prompt_tuning.tasks.checks import check, read_mapping
from intrinsic_prompt_tuning.tasks.examples import Role, Task


def split_tasks(tasks: Mapping[str, Task], name: str) -> dict[str, str]:
    """Resolve the name of a split to task -> role: seen, unseen, unseen-in or unseen-out.

    Args:
        tasks: All known tasks; their `splits` say what they are in random, cls and the like.
        name: Such a split; without-<type>, such as without-nli: the seen tasks of random but for those of one type, and all
            tasks of that type as unseen; or a YAML file of the user's with a list of tasks for each role.

    Raises:
        IptError: there is no such split.
    """
    if name.endswith((".yaml", ".yml")):
        return read_split(Path(name), tasks)
    base = {task.name: task.splits["random"] for task in tasks.values() if "random" in task.splits}
    types = {task: f"without-{kind}" for task in base if (kind := tasks[task].category.partition("/")[2])}
    if left_out := {task for task, split in types.items() if split == name}:
        return {
            task: "unseen" if task in left_out else "seen" for task, role in base.items() if task in left_out or role == "seen"
        }
    known = sorted({*types.values(), *(split for task in tasks.values() for split in task.splits)})
    if name not in known:
        near = nearest(name, known)
        raise IptError(f"there is no task split '{name}'{near}; there are {', '.join(known)}, or a file: --split mine.yaml")
    return {task.name: task.splits[name] for task in tasks.values() if name in task.splits}


def read_split(file: Path, tasks: Mapping[str, Task]) -> dict[str, str]:
    """Read a split from a file such as `{seen: [glue-sst2, squad-no_context], unseen: [anli]}`.

    Raises:
        IptError: it is no such file, a task is unknown, or a task stands under two roles.
    """
    check(content := read_mapping(file), dict[Role, list[str]], f"{file}")
    split: dict[str, str] = {}
    for role, name in ((role, name) for role, names in content.items() for name in names):
        if name not in tasks:
            raise IptError(f"{file}: there is no task '{name}'{nearest(name, tasks)}; 'ipt tasks' lists them")
        if name in split:
            raise IptError(f"{file}: task '{name}' stands twice, under {split[name]} and {role}: remove one")
        split[name] = role
    if not split:
        raise IptError(f"{file} names no task: expected lists such as {{seen: [glue-sst2, anli], unseen: [piqa]}}")
    return split
