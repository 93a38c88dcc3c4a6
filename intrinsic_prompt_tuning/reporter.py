"""Whom the stages tell what they do, and how durations, sizes and tables are written for people."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from intrinsic_prompt_tuning.errors import IptError


def duration(seconds: float) -> str:
    """Write a time as people say it: 45 s, 4 min 12 s, 2 h 05 min."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"


def size(n_bytes: float) -> str:
    """Write a size as people say it: 512 B, 4.1 kB, 310 MB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while n_bytes >= 999.5 and len(units) > 1:
        n_bytes, units = n_bytes / 1000, units[1:]
    return f"{n_bytes:.3g} {units[0]}"


def cell_text(value: Any) -> str:
    """Write what stands in a table."""
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def table_text(heads: str, rows: Sequence[Sequence[Any]]) -> str:
    """Write rows under heads, columns as wide as they need to be, and an empty line."""
    shown = [heads.split("|"), *([cell_text(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    return "\n".join(lines) + "\n\n"


class Reporter:
    """Whom the stages tell what they do; this one keeps it to itself, but for a log."""

    def __init__(self, *, verbose: bool = False, log: Path | None = None) -> None:
        """Say every event, too; add events to a file."""
        self.verbose, self.log_file = verbose, log

    def say(self, text: str) -> None:
        """Take a sentence."""

    def log(self, event: str, **about: Any) -> None:
        """Take what happened in figures, whatever the rank: a validation, a result that is made."""
        if self.verbose:
            figures = ", ".join(f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in about.items())
            self.say(f"{event}: {figures}")
        if self.log_file:
            line = json.dumps({"time": round(time.time(), 3), "event": event} | about) + "\n"
            try:
                with self.log_file.open("a", encoding="utf-8") as file:
                    file.write(line)  # one write, so that lines of several processes do not mix
            except OSError as error:
                why = error.strerror or error
                raise IptError(f"cannot write {self.log_file}: {why}; name another file with --log") from error

    @contextlib.contextmanager
    def progress(self, label: str, total: float) -> Iterator[Callable[[float], None]]:
        """Yield what takes how much of the total is done; say now and then how long the rest takes."""
        begin = told = time.monotonic()
        first: tuple[float, float] | None = None  # what was done by earlier commands says nothing of this one's pace

        def advance(done: float) -> None:
            nonlocal told, first
            now = time.monotonic()
            first = first or (now, done)
            if now - told > 20 and done > first[1]:
                told = now
                left = (now - first[0]) * (total - done) / (done - first[1])
                self.say(f"{label}: {100 * done / total:.0f} %, {duration(left)} left")

        yield advance
        if total:
            self.say(f"{label}: done in {duration(time.monotonic() - begin)}")
