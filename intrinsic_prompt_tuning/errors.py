"""The one kind of error that a person is meant to see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IptError(Exception):
    """A mistake that a person can mend; shown to the user as is, in one sentence."""


class UnwritableError(IptError):
    """A file cannot be written: it is the disk or the folder, and nothing that the file is about."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a clause that names what an unknown name may have meant."""
    matches = difflib.get_close_matches(name, list(known))
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
