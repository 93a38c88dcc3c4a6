"""The testbed that ships: its tasks keep to the rules, and its backbone knows what it was taught."""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import ipt
from intrinsic_prompt_tuning.backbone import TESTBED_FOLDER, Backbone, load_backbone
from intrinsic_prompt_tuning.settings import TESTBED
from intrinsic_prompt_tuning.tasks import TASKS_FILE, Example, Task, World, load_tasks, load_worlds, rows_digest

# One place for all that depends on the final weights.
KINDS = ("value", "test", "values", "tests")
LEAST_BY_INSTRUCTION = {"trained": 0.95, "held-out": 0.85}
"""Share of exactly right answers to questions in words."""
MOST_BYTES = 8_000_000
"""Of everything that ships beside the module."""

ROOT = Path(ipt.__file__).resolve().parent
WEIGHTS = TESTBED_FOLDER / "model.safetensors"


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: task for name, task in load_tasks(TASKS_FILE).items() if TESTBED in task.splits}


@pytest.fixture(scope="module")
def world() -> World:
    return load_worlds(TASKS_FILE)[TESTBED]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """Return the script that made the testbed, as a module."""
    spec = importlib.util.spec_from_file_location("make_testbed", ROOT / "tests" / "make_testbed.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def question(task: Task) -> str:
    world, _, words = task.source.partition(": ")
    assert world == TESTBED
    return words


# --- Tasks ---------------------------------------------------------------------------------------


def test_there_are_100_seen_and_20_unseen_tasks_with_questions_of_their_own(tasks: dict[str, Task]) -> None:
    assert Counter(task.splits[TESTBED] for task in tasks.values()) == {"seen": 100, "unseen": 20}
    assert len({(task.kind, question(task)) for task in tasks.values()}) == 120


def test_all_kinds_occur_among_seen_and_unseen_tasks(tasks: dict[str, Task], world: World) -> None:
    for role in ("seen", "unseen"):
        kinds = {task.kind for task in tasks.values() if task.splits[TESTBED] == role}
        assert kinds == {"classification", "multiple-choice", "extraction", "transformation"}
        labels = {len(world.labels(question(task))) for task in tasks.values()
                  if task.splits[TESTBED] == role and task.kind == "classification"}  # fmt: skip
        assert 2 in labels and max(labels) > 2, "yes/no and several labels"


def test_no_unseen_and_at_most_half_of_the_seen_tasks_are_pretrained(tasks: dict[str, Task]) -> None:
    pretrained = Counter(task.splits[TESTBED] for task in tasks.values() if task.pretrained)
    assert pretrained["unseen"] == 0
    assert 0 < pretrained["seen"] <= 50


def test_every_task_has_rows_for_two_data_seeds_that_are_not_all_alike(tasks: dict[str, Task]) -> None:
    for name, task in tasks.items():
        samples = [task.sample(seed, 4, 30) for seed in (100, 21)]
        assert len({row.answers for row in samples[0].test}) > 1, name
        assert set(samples[0].train) != set(samples[1].train)
        sentences = [{row.input for row in part} for s in samples for part in (s.train, s.validation)]
        assert not any({row.input for row in samples[0].test} & part for part in sentences), name


def test_the_rows_that_a_clone_draws_are_those_that_the_figures_were_made_with(tasks: dict[str, Task]) -> None:
    """The draw uses no global state: neither the order of tasks nor another generator tells on it."""
    names = list(tasks)[::17]
    first = {name: tasks[name].sample(100, 4, 6) for name in names}
    random.seed(123)
    again = {name: tasks[name].sample(100, 4, 6) for name in reversed(names)}
    assert first == again
    drawn = [row for name in names for part in ("train", "validation", "test") for row in getattr(first[name], part)]
    assert rows_digest(drawn) == "58f2686191d02c0d"


def test_the_tasks_are_the_script_s_draw(maker: ModuleType, world: World) -> None:
    lines = TASKS_FILE.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "{world: testbed" in line] == list(maker.draw_task_rows(world))


# --- What the backbone is trained on -------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(maker: ModuleType) -> Any:
    return maker.held_out_compositions(load_tasks(TASKS_FILE))


def test_what_is_held_out_are_the_compositions_of_all_tasks_that_are_not_pretrained(
    maker: ModuleType, tasks: dict[str, Task], held_out: Any
) -> None:
    assert held_out == {maker.composition(question(task)) for task in tasks.values() if not task.pretrained}
    assert all(maker.composition(question(task)) in held_out for task in tasks.values() if task.splits[TESTBED] == "unseen")


def test_pre_training_never_draws_a_held_out_composition(
    maker: ModuleType, world: World, tasks: dict[str, Task], held_out: Any
) -> None:
    batches = maker.Batches(world, maker.make_tokenizer(world), held_out, seed=5)
    banned = [parts_of(question(task)) for task in tasks.values() if not task.pretrained]
    drawn = {kind: {batches.draw_question(kind) for _ in range(4000)} for kind in (*KINDS, "parts")}
    for kind, questions in drawn.items():
        for one in questions:
            parts = parts_of(one)
            assert parts not in banned, (kind, one)
            assert not any(frozenset(pair) in banned for pair in itertools.combinations(parts, 2)), (kind, one)
    assert sum(map(len, drawn.values())) > 1000  # breadth: else nothing banned might ever have come up


def test_without_the_ban_held_out_compositions_would_be_drawn(maker: ModuleType, world: World, held_out: Any) -> None:
    batches = maker.Batches(world, maker.make_tokenizer(world), set(), seed=5)
    drawn = {maker.composition(batches.draw_question(kind)) for kind in KINDS for _ in range(4000)}
    assert len(drawn & held_out) > len(held_out) / 4


def parts_of(text: str) -> frozenset[str]:
    """Return the single questions that a question is made of, read here by itself and not by the script under test."""
    words = text.replace(" then ", "|").replace(" and ", "|").replace(" or ", "|").split("|")
    bare = {word.removeprefix("not ") for word in words}
    return frozenset(bare | ({"not"} if len(words) == 1 and text.startswith("not ") else set()))


def test_partial_answers_stand_at_the_words_that_complete_or_combine(maker: ModuleType, world: World) -> None:
    entries = {
        "subject": {"word": "swan", "category": "bird", "size": "large"}, "object": {"size": "small"},
        "day": {"word": "tuesday", "next": "wednesday"}, "city": {"tone": "cool"}, "colour": {"tone": "warm"},
    }  # fmt: skip
    scene = {slot: SimpleNamespace(**known) for slot, known in entries.items()}
    for question, expected in [
        ("subject category then not object small then day next", "- bird - no - yes - - wednesday"),
        ("not subject bird or not city warm", "no - yes yes yes - no"),
        ("same tone colour city and subject large", "- - - no no - yes"),
    ]:
        assert " ".join(answer or "-" for answer in maker.partial_answers(world, question, scene)) == expected


# --- The backbone --------------------------------------------------------------------------------


def test_what_ships_is_a_few_megabytes_of_plain_files() -> None:
    files = [path for path in WEIGHTS.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in WEIGHTS.parent.iterdir()}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(TESTBED, device="cpu")


def test_the_backbone_is_a_t5_of_about_a_million_parameters(backbone: Backbone) -> None:
    assert backbone.model.config.model_type == "t5"
    assert 5e5 < sum(weight.numel() for weight in backbone.model.parameters()) < 2e6


def test_the_tokenizer_knows_every_word_of_the_world(backbone: Backbone, tasks: dict[str, Task]) -> None:
    unknown = backbone.tokenizer.unk_token_id
    for name, task in tasks.items():
        sample = task.sample(100, 4, 20)
        for row in [*sample.train, *sample.test]:
            encoded = backbone.encode([row], prompt_length=8)[0]
            assert unknown not in encoded.input_ids + encoded.target_ids, name
            assert backbone.tokenizer.decode(encoded.target_ids, skip_special_tokens=True) == row.answers[0]
        for word in question(task).split():
            assert backbone.tokenizer.convert_tokens_to_ids(word) != unknown


@pytest.mark.parametrize("part", LEAST_BY_INSTRUCTION)
def test_the_backbone_answers_questions_in_words(
    backbone: Backbone, maker: ModuleType, world: World, held_out: Any, part: str
) -> None:
    batches, rows = maker.Batches(world, maker.make_tokenizer(world), set(), seed=31), []
    while len(rows) < 320:
        words = batches.draw_question(
            KINDS[len(rows) % len(KINDS)] if part == "trained" else "tests" if len(rows) % 2 else "values"
        )
        if (maker.composition(words) in held_out) == (part == "held-out"):
            scene, answer = batches.draw_scene(words)
            text = " ".join([*(words.split() + [maker.FILLER] * 8)[:8], world.describe(scene)])
            rows.append((0, backbone.encode([Example(text, (answer,))], prompt_length=0)[0]))
    answers = backbone.answer(backbone.initial_prompt(0, seed=0)[None], rows, decoding="generate")
    right = sum(a.text == row.example.answers[0] for a, (_, row) in zip(answers, rows, strict=True))
    assert right / len(rows) >= LEAST_BY_INSTRUCTION[part]
