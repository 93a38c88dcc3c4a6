"""How long the rest takes."""

from __future__ import annotations

import itertools

import pytest
from helpers import Listener

from intrinsic_prompt_tuning import reporter


def test_what_earlier_commands_did_makes_the_rest_no_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 25)
    monkeypatch.setattr(reporter.time, "monotonic", lambda: float(next(clock)))
    listener = Listener()
    with listener.progress("rolls", 4000) as advance:
        for done in (3000, 3025, 3050):  # one a second
            advance(done)
    assert listener.sentences[:2] == ["rolls: 76 %, 16 min 15 s left", "rolls: 76 %, 15 min 50 s left"]
