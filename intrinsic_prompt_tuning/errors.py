"""The one kind of error that a person is meant to see."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class IptError(Exception):
    """A mistake that a person can mend; shown to the user as is, in one sentence."""


class UnwritableError(IptError):
    """A file cannot be written: it is the disk or the folder, and nothing that the file is about."""


class UnreachableError(IptError):
    """The Hub does not answer."""


def damaged(path: Path, why: str) -> IptError:
    """Return an error about a file of the cache that is not as it was written."""
    return IptError(f"{path} {why}: remove it, and the command makes it anew")


def short(value: object, most: int = 80) -> str:
    """Return what a person or another program wrote, in one line and cut to what a sentence can hold."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a clause that names what an unknown name may have meant."""
    matches = difflib.get_close_matches(name, list(known))
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
