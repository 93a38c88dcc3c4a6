"""Worlds: questions answered by hand, and the rows that are drawn from them."""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TASKS_FILE

from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.tasks import TASKS_FILE as SHIPPED
from intrinsic_prompt_tuning.tasks import Sample, Task, World, load_tasks
from intrinsic_prompt_tuning.tasks.worlds import OPTION_MARK, Scene, draw_rows

# --- Questions -----------------------------------------------------------------------------------


@pytest.fixture
def scene(world: World) -> Scene:
    """Return `the wild hen sees four leaves on sunday`."""
    wanted = {"mood": "wild", "animal": "hen", "count": "four", "thing": "leaf", "day": "sunday"}
    return {
        slot: next(entry for entry in world.tables[table] if entry.word == wanted[slot]) for slot, table in world.slots.items()
    }


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("mood opposite", "mild"),
        ("thing plural", "leaves"),
        ("day next", "monday"),
        ("animal bird", "yes"),
        ("animal fish", "no"),
        ("not animal bird", "no"),
        ("count even and animal bird", "yes"),
        ("count even and animal fish", "no"),
        ("count odd or animal fish", "no"),
        ("count odd or not animal fish", "yes"),
        ("mood good or count even and animal fish", "no"),  # `and` binds tighter than `or` ...
        ("count even or mood good and animal fish", "yes"),
        ("not count odd and not mood good", "yes"),  # ... and `not` tighter than both
        ("day next then count next", "monday five"),
        ("animal class then count even and mood bad then thing word", "bird yes leaf"),
        ("same next day day", "yes"),
        ("same next day count", "no"),
    ],
)
def test_a_question_gets_the_answer_worked_out_by_hand(world: World, scene: Scene, question: str, answer: str) -> None:
    assert world.describe(scene) == "the wild hen sees four leaves on sunday"
    assert world.answer(question, scene) == answer


@pytest.mark.parametrize("question", ["", "mood", "mood purple", "same tone mood", "count even and", "banana next", "then"])
def test_a_question_that_cannot_be_read_is_named(world: World, scene: Scene, question: str) -> None:
    with pytest.raises(IptError, match=r"world small: cannot read the question part .*SLOT COLUMN"):
        world.answer(question, scene)


def test_both_sides_of_a_connective_are_checked_even_when_one_decides(world: World, scene: Scene) -> None:
    with pytest.raises(IptError, match="'mood purple'"):
        world.answer("count even or mood purple", scene)


@pytest.mark.parametrize("question", ["mood good", "animal class", "day next then count parity", "mood tone then animal fish"])
def test_labels_are_all_answers_of_a_question_and_no_others(world: World, question: str) -> None:
    rng = random.Random(5)
    assert {world.answer(question, world.draw(rng)) for _ in range(600)} == set(world.labels(question))


def test_labels_stand_in_the_order_of_the_lexicon(world: World) -> None:
    assert world.labels("animal class") == ["beast", "bird", "fish"]
    assert world.labels("mood tone then day word")[:4] == ["good monday", "good tuesday", "good sunday", "bad monday"]


def test_white_space_in_a_question_does_not_count(world: World) -> None:
    assert world.labels("animal  class") == world.labels("animal class")


# --- Rows ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampler(tasks: dict[str, Task]) -> Callable[[str, int], Sample]:
    return lambda task, seed: tasks[task].sample(seed, 4, 15)


@pytest.mark.parametrize(("task", "labels"), [("mood-good", 2), ("animal-class", 3), ("even-or-good", 2)])
def test_classification_has_as_many_shots_of_every_label(sampler: Any, task: str, labels: int) -> None:
    sample = sampler(task, 100)
    for part in (sample.train, sample.validation):
        counts = collections.Counter(example.answers[0] for example in part)
        assert counts == dict.fromkeys(part[0].options, 4)
        assert len(counts) == labels


@pytest.mark.parametrize("task", ["count-next", "thing-plural", "mood-opposite-choice"])
def test_other_tasks_have_twice_the_shots_in_all(sampler: Any, task: str) -> None:
    sample = sampler(task, 100)
    assert [len(part) for part in (sample.train, sample.validation, sample.test)] == [8, 8, 15]


def test_train_validation_and_test_rows_never_coincide_over_seeds(tasks: dict[str, Task], sampler: Any) -> None:
    for task in tasks:
        samples = [sampler(task, seed) for seed in (100, 13, 21, 42, 87)]
        parts = {
            name: {e.input.partition(f" {OPTION_MARK}")[0] for s in samples for e in getattr(s, name)}
            for name in ("train", "validation", "test")
        }
        for a, b in itertools.combinations(parts.values(), 2):
            assert not a & b, task


def test_no_row_comes_twice_in_a_part(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        sample = task.sample(13, 16, 60)
        for part in (sample.train, sample.validation, sample.test):
            assert len({e.input for e in part}) == len(part)


def test_the_seed_draws_the_shots_and_never_the_test_rows(tasks: dict[str, Task], sampler: Any) -> None:
    for task in tasks:
        first = sampler(task, 100)
        again = sampler(task, 100)
        other = sampler(task, 21)
        assert first == again
        assert first.test == other.test
        assert set(first.train) != set(other.train)
        assert set(first.validation) != set(other.validation)


def test_fewer_test_rows_are_the_first_of_more(tasks: dict[str, Task]) -> None:
    few, many = (tasks["animal-class"].sample(100, 1, n).test for n in (5, 12))
    assert few == many[:5]


def test_every_row_answers_its_question(world: World, tasks: dict[str, Task], sampler: Any) -> None:
    told = {}
    for entries in itertools.product(*(world.tables[table] for table in world.slots.values())):
        scene = dict(zip(world.slots, entries, strict=True))
        told[world.describe(scene)] = scene
    for name, task in tasks.items():
        for example in sampler(name, 21).train:
            sentence = example.input.partition(f" {OPTION_MARK}")[0]
            assert example.answers == (world.answer(task.source.removeprefix("small: "), told[sentence]),)


def test_a_multiple_choice_row_shows_its_options_and_the_answer_among_them_at_no_fixed_place(sampler: Any) -> None:
    sample = sampler("mood-opposite-choice", 100)
    places = set()
    for example in [*sample.train, *sample.validation, *sample.test]:
        assert len(set(example.options)) == 3
        assert example.input.endswith("".join(f" {OPTION_MARK} {option}" for option in example.options))
        places.add(example.options.index(example.answers[0]))
    assert places == {0, 1, 2}


def test_a_world_too_small_for_the_shots_says_so(tasks: dict[str, Task]) -> None:
    with pytest.raises(IptError, match=r"world small: the question 'mood good' has too few rows for the answer '(yes|no)'"):
        tasks["mood-good"].sample(100, 700, 10)


def test_without_a_number_there_are_a_thousand_test_rows() -> None:
    task = load_tasks(SHIPPED)["day-next"]
    every = task.sample(100, 1, None).test
    assert (len(every), every[:5]) == (1000, task.sample(100, 1, 5).test)


def test_a_stream_s_name_is_its_seed_and_the_parts_share_no_sentence(world: World) -> None:
    one, again, other = (draw_rows(world, "day next", "transformation", 30, name, (0, 1)) for name in ("a", "a", "b"))
    assert one == again != other
    apart = draw_rows(world, "day next", "transformation", 30, "a", (2, 3))
    assert not {row.input for row in one} & {row.input for row in apart}


# --- What a person writes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        ("{mood.word:>999999999}", "world small: 'sentence': a field of the template is a bare {column}"),
        ("{mood.word:{count.word}}", "world small: 'sentence': a field of the template is a bare {column}"),
        ("{mood.word!r}", "world small: 'sentence': a field of the template is a bare {column}"),
        ("{}", "world small: 'sentence': a field of the template is a bare {column}"),
        ("{mood.word", "world small: 'sentence' cannot be read"),
        ("{0}", "world small: .*expected 'sentence'"),
        ("{mood}", "world small: expected 'sentence' with {slot.column}, not with {mood}"),
        ("{mood.__class__}", "world small: expected 'sentence' with {slot.column}, not with"),
        ("{mood.word[0]}", "world small: expected 'sentence' with {slot.column}, not with"),
        ("{mood.word.__len__}", "world small: expected 'sentence' with {slot.column}, not with"),
        ("{mood.nothing}", "world small: .*expected 'sentence'"),
    ],
)
def test_a_sentence_can_only_put_words_into_places(tmp_path: Path, slot: str, message: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(TASKS_FILE.replace("{mood.word}", slot), encoding="utf-8")
    with pytest.raises(IptError, match=message) as caught:
        load_tasks(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_a_world_s_task_says_its_question_and_holds_all_that_its_rows_follow_from(tasks: dict[str, Task], world: World) -> None:
    task = tasks["count-next"]
    assert task.source == "small: count next"
    text, row, _ = task.definition
    assert text == {"sentence": world.sentence, "slots": world.slots, "lexicon": world.lexicon}
    assert row == {"world": "small", "kind": "transformation", "question": "count next", "splits": {"tiny": "seen"}}
