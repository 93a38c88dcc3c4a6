"""How long the rest takes."""

from __future__ import annotations

import itertools

import pytest

from intrinsic_prompt_tuning import reporter
from intrinsic_prompt_tuning.reporter import Reporter


class Listener(Reporter):
    """Notes what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_what_earlier_commands_did_makes_the_rest_no_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 25)
    monkeypatch.setattr(reporter.time, "monotonic", lambda: float(next(clock)))
    listener = Listener()
    with listener.progress("rolls", 4000) as advance:
        for done in (3000, 3025, 3050):  # one a second
            advance(done)
    assert listener.said[:2] == ["rolls: 76 %, 16 min 15 s left", "rolls: 76 %, 15 min 50 s left"]
