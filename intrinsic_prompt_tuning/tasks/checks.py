"""One checker for everything that a person writes in YAML: the type hints of a dataclass say what may stand there."""

import string
import types
from collections import Counter
from dataclasses import MISSING, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from intrinsic_prompt_tuning.errors import IptError, nearest, short

T = TypeVar("T")
NAMES_OF_TYPES = {str: "text", dict: "a mapping", list: "a list", bool: "true or false", int: "a number", float: "a number"}


def build(kind: type[T], row: Any, where: str, /, **more: Any) -> T:
    """Make a dataclass of a mapping that a person wrote; `more` are fields that nobody writes.

    Raises:
        IptError: for the first field that is unknown, missing or of the wrong type, in the words of who wrote the file.
    """
    hints, own = get_type_hints(kind), [f for f in fields(kind) if f.name not in more]  # type: ignore[arg-type]
    needed = [f.name for f in own if f.default is MISSING and f.default_factory is MISSING]
    if not isinstance(row, dict):
        raise IptError(f"{where} is {described(row)}, not a mapping of fields such as {', '.join(needed)}")
    for name, value in row.items():
        if name not in (known := [f.name for f in own]):
            raise IptError(f"{where} has an unknown field '{short(name)}'{nearest(str(name), known)}")
        check(value, hints[name], f"{where}: field '{name}'")
    if lacking := [name for name in needed if name not in row]:
        raise IptError(f"{where} has no field '{lacking[0]}', which every row needs")
    return kind(**row, **more)


def check(value: Any, hint: Any, where: str) -> None:
    """Refuse a value that is not of a type: text, a choice (Literal), a list, a mapping, or one of several of these."""
    # Of several types the one that the value looks like explains what is wrong with it.
    hints = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    fitting = [one for one in hints if one is Any or isinstance(value, _plain(one))]
    if not fitting:
        names = " or ".join(dict.fromkeys(NAMES_OF_TYPES[_plain(one)] for one in hints if one is not types.NoneType))
        raise IptError(f"{where} must be {names}, not {described(value)}")
    kind, inner = get_origin(fitting[0]), get_args(fitting[0])
    if kind is Literal and value not in inner:
        raise IptError(f"{where} is '{short(value)}'{nearest(value, inner)}; it can be {', '.join(filter(None, inner))}")
    for entry, item in value.items() if kind is dict else enumerate(value, 1) if kind is list else ():
        if kind is dict:
            check(entry, inner[0], f"{where}, the name of an entry")
        check(item, inner[-1], f"{where}, entry '{short(entry)}'")


def _plain(hint: Any) -> Any:
    """Return the type to ask `isinstance` with; choices are text."""
    kind = get_origin(hint) or hint
    return str if kind is Literal else kind


def places(template: str, where: str = "") -> list[str]:
    """Return the names of a template's places, in order.

    Raises:
        IptError: it does more than put text into places: conversions, widths, which could fill the memory.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise IptError(f"{where} cannot be read ({error}); double a brace that is meant as text") from error
    if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
        raise IptError(f"{where}: a field of the template is a bare {{column}}, without '!' or ':' and not empty")
    return [name for _, name, _, _ in parts if name]


def described(value: Any) -> str:
    """Name a YAML value as its writer knows it, with the remedy if it is text without quotes."""
    if value is None or isinstance(value, list | dict):
        return "empty" if value is None else "a list" if isinstance(value, list) else "a mapping"
    if isinstance(value, bool):
        return f"{str(value).lower()} (in YAML yes, no, on and off are booleans: quote it)"
    return short(value) if isinstance(value, str) else f"{short(value)} (quote it)"


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, where YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            line = node.start_mark.line + 1
            raise IptError(f"{self.name}: '{short(twice[0])}' stands twice in the mapping at line {line}: remove one")
        return super().construct_mapping(node, deep)


@lru_cache(maxsize=4)
def _parse_yaml(file: Path, modified: int) -> Any:
    with file.open(encoding="utf-8") as stream:
        content = yaml.load(stream, Loader=_StrictLoader)
    if _size(content, {}) > 10**7:
        raise ValueError("its aliases make it larger than 10 million characters")
    return content


def _size(value: Any, known: dict[int, int]) -> int:
    """Return the characters of a value's texts, what aliases repeat counted each time; what has no text raises ValueError."""
    if id(value) not in known:
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        known[id(value)] = 1 + sum(_size(item, known) for item in inner) if inner else len(str(value).encode())
    return known[id(value)]


def read_mapping(file: Path, key: str = "") -> dict[str, Any]:
    """Return a YAML file's top-level mapping, in which `key` is a mapping if one is named; a file that stays is parsed once."""
    try:
        content = _parse_yaml(file, file.stat().st_mtime_ns)
    except FileNotFoundError as error:
        raise IptError(f"there is no file {file}") from error
    except (yaml.YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        raise IptError(f"{file} is not readable as YAML: {short(error, 400)}") from error
    if not isinstance(content, dict) or (key and not isinstance(content.get(key), dict)):
        what = f"a mapping with the key '{key}'" if key else "a mapping"
        raise IptError(f"{file}: expected {what}, got {described(content)}")
    return content
