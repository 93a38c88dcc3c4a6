"""Damaged files of a cache: some hundreds of the cases that tests/corrupt.py tries by the thousand."""

from __future__ import annotations

import pytest
from corrupt import Cache, corrupt, kind_of

from intrinsic_prompt_tuning.files import read_file, write_file


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("corrupt"))


def test_a_damaged_file_costs_itself_alone_and_never_gives_another_figure(cache: Cache) -> None:
    counts, wrong = corrupt(cache, 150, seed=1)
    assert not wrong, wrong[0]
    assert {kind for kind, *_ in counts} == {kind_of(name) for name in cache.files}
    assert {result for *_, result in counts} == {"same", "refused"}


def test_another_figure_a_lost_one_and_another_state_would_be_found(cache: Cache) -> None:
    """What the cases are judged by can fail: files that are whole and tell something else."""
    score = next(name for name in cache.files if kind_of(name) == "scores")
    cache.restore()
    header, record, tensors = read_file(cache.copy / score)
    write_file(cache.copy / score, header, record | {"score": record["score"] + 0.125}, tensors)
    assert cache.outcome((score.name,)) == "WRONG: another figure"
    cache.restore()
    prompt = next(name for name in cache.files if kind_of(name) == "soft-prompts" and "not-subject" in name.name)
    (cache.copy / prompt).unlink()
    assert cache.outcome((prompt.name,)).startswith("WRONG: missing without a word")
    cache.restore()
    state = cache.copy / next(name for name in cache.files if kind_of(name) == "unfinished")
    header, record, tensors = read_file(state)
    write_file(state, header, record, tensors | {"theta": tensors["theta"] + 1})
    assert cache.outcome((state.name,)) == "WRONG: another state"


def test_a_damaged_score_is_made_anew_and_nothing_else(cache: Cache) -> None:
    cache.restore()
    scores = [cache.copy / name for name in cache.files if kind_of(name) == "scores"]
    times = {path: path.stat().st_mtime_ns for path in scores}
    whole = scores[3].read_bytes()
    scores[3].write_bytes(whole[:-9] + bytes(9))
    assert cache.evaluate(cache.experiment(cache.copy)) == cache.figures
    assert scores[3].read_bytes() == whole
    assert [path for path in scores if path.stat().st_mtime_ns != times[path]] == [scores[3]]
