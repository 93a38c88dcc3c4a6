"""The rooms: imports point one way, no room is too large, and each knows only what it may."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ipt

ROOT = Path(ipt.__file__).resolve().parent
PACKAGE = "intrinsic_prompt_tuning"
ORDER = [
    "ipt", "__init__", "page", "pictures", "using", "adapters", "shelf", "report", "experiment", "makers", "context", "results",
    "finding", "tuning", "spaces", "backbone", "seq2seq", "causal", "layout", "passes", "evaluation", "metrics", "tasks",
    "reporter", "ranks", "files", "settings", "lazy", "errors",
]  # fmt: skip
"""From the top of the house to its ground: a room imports only from those behind it in this list."""
TASKS_ORDER = ["__init__", "tables", "folders", "hub", "worlds", "splits", "crossfit", "records", "examples", "checks"]
COMMAND_LINE = ("ipt",)
ROWS = {"evaluation", "metrics", "tasks"}
TENSORS = {"finding", "tuning", "spaces", "backbone", "seq2seq", "causal", "layout", "passes"}
MOST_LINES = {"ipt": 515}


def rooms() -> dict[str, list[Path]]:
    """Return room -> its files."""
    found = {"ipt": [ROOT / "ipt.py"]}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        room = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(room, []).append(path)
    return found


def imports(path: Path) -> set[str]:
    """Return the full names of all that a file imports, wherever in it, but for what only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        inner for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in node.body for inner in ast.walk(part)
    }  # fmt: skip
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in unseen:
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node not in unseen:
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> str | None:
    """Return which room an imported name is from."""
    head, *rest = name.split(".")
    return None if head not in (PACKAGE, "ipt") else "ipt" if head == "ipt" else rest[0] if rest[0] in ORDER else "__init__"


def test_every_room_has_its_place_in_the_order() -> None:
    assert sorted(rooms()) == sorted(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_arrows_point_down(room: str) -> None:
    below = ORDER[ORDER.index(room) + 1 :]
    for path in rooms()[room]:
        used = {found for name in imports(path) if (found := room_of(name))} - {room}
        assert used <= set(below), f"{path.name} of {room} imports from above: {used - set(below)}"


@pytest.mark.parametrize("part", TASKS_ORDER)
def test_arrows_point_down_among_the_tasks(part: str) -> None:
    used = {
        name.split(".")[2] for name in imports(ROOT / PACKAGE / "tasks" / f"{part}.py") if name.startswith(f"{PACKAGE}.tasks.")
    }
    below = TASKS_ORDER[TASKS_ORDER.index(part) + 1 :]
    assert used <= set(below)


def test_an_arrow_that_turns_would_be_found(tmp_path: Path) -> None:
    path = tmp_path / "room.py"
    path.write_text(f"def late():\n    from {PACKAGE}.experiment import Experiment\n    import ipt\n", encoding="utf-8")
    assert {room_of(name) for name in imports(path)} == {"experiment", "ipt"}


@pytest.mark.parametrize("room", sorted(ROWS))
def test_rooms_about_rows_know_no_tensor(room: str) -> None:
    for path in rooms()[room]:
        assert not {name for name in imports(path) if name.partition(".")[0] in ("torch", "transformers", "safetensors")}
        assert not {name for name in imports(path) if name in (f"{PACKAGE}.lazy.torch", f"{PACKAGE}.lazy.transformers")}


@pytest.mark.parametrize("room", sorted(TENSORS))
def test_rooms_about_tensors_know_no_file(room: str) -> None:
    for path in rooms()[room]:
        assert not {name for name in imports(path) if room_of(name) in ("files", "results", "context", "experiment")}


@pytest.mark.parametrize("room", [room for room in ORDER if room not in COMMAND_LINE])
def test_nobody_but_the_command_line_knows_a_terminal_prints_or_exits(room: str) -> None:
    for path in rooms()[room]:
        assert not {name for name in imports(path) if name.partition(".")[0] in ("typer", "rich", "argparse")}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
            ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
        }
        assert not used & {"print", "exit", "quit", "SystemExit", "sys.exit", "sys.stdout", "sys.stderr"}, path


def test_rooms_are_small_enough_to_be_read() -> None:
    for room, paths in rooms().items():
        for path in paths:
            assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES.get(room, 450), path


def test_nothing_that_ships_lies_under_the_tests() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wheel = text[text.index("[tool.hatch.build.targets.wheel]") : text.index("[tool.ruff]")]
    assert "tests" not in wheel


def test_the_readme_lists_the_rooms_in_this_order() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| room |")[2]
    told = [room for row in re.findall(r"^\| (`[^|]*) \|", table, re.M) for room in re.findall(r"`(\w+)/?`", row)]
    assert told == [room for room in ORDER if room not in ("ipt", "__init__")]
