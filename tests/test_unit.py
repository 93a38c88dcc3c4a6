"""Each section of ipt.py by itself, in its order and under its banners."""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import scipy.stats
import sklearn.decomposition
import sklearn.metrics
import torch
import transformers
from conftest import TASKS_FILE
from rouge_score import rouge_scorer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ipt
from ipt import Backbone, Encoded, Example, IptError, Job, Task, TuneConfig, Tuned, World

# --- Errors --------------------------------------------------------------------------------------


def test_the_nearest_names_are_offered_and_nothing_when_none_is_near() -> None:
    assert ipt.nearest("mood-god", ["mood-good", "count-next"]) == "; did you mean 'mood-good'?"
    assert ipt.nearest("xyzzy", ["mood-good", "count-next"]) == ""


# --- World ---------------------------------------------------------------------------------------


@pytest.fixture
def scene(world: World) -> ipt.Scene:
    """Return `the wild hen sees four leaves on sunday`."""
    wanted = {"mood": "wild", "animal": "hen", "count": "four", "thing": "leaf", "day": "sunday"}
    return {
        slot: next(entry for entry in world.lexicon[table] if entry.word == wanted[slot]) for slot, table in world.slots.items()
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
def test_a_question_gets_the_answer_worked_out_by_hand(world: World, scene: ipt.Scene, question: str, answer: str) -> None:
    assert world.describe(scene) == "the wild hen sees four leaves on sunday"
    assert world.answer(question, scene) == answer


@pytest.mark.parametrize("question", ["", "mood", "mood purple", "same tone mood", "count even and", "banana next", "then"])
def test_a_question_that_cannot_be_read_is_named(world: World, scene: ipt.Scene, question: str) -> None:
    with pytest.raises(IptError, match=r"world small: cannot read the question part .*SLOT COLUMN"):
        world.answer(question, scene)


def test_both_sides_of_a_connective_are_checked_even_when_one_decides(world: World, scene: ipt.Scene) -> None:
    with pytest.raises(IptError, match="'mood purple'"):
        world.answer("count even or mood purple", scene)


@pytest.mark.parametrize("question", ["mood good", "animal class", "day next then count parity", "mood tone then animal fish"])
def test_labels_are_all_answers_of_a_question_and_no_others(world: World, question: str) -> None:
    rng = random.Random(5)
    assert {world.answer(question, world.draw(rng)) for _ in range(600)} == set(world.labels(question))


def test_labels_stand_in_the_order_of_the_lexicon(world: World) -> None:
    assert world.labels("animal class") == ["beast", "bird", "fish"]
    assert world.labels("mood tone then day word")[:4] == ["good monday", "good tuesday", "good sunday", "bad monday"]


# --- Metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_classification_metrics_equal_scikit_learn(seed: int) -> None:
    rng = random.Random(seed)
    truths = rng.choices(["red", "green", "blue"], k=37)
    guesses = [t if rng.random() < 0.5 else rng.choice(["red", "green", "blue", "never right"]) for t in truths]
    references = [(t,) for t in truths]
    assert ipt.accuracy(guesses, references) == pytest.approx(sklearn.metrics.accuracy_score(truths, guesses))
    expected = sklearn.metrics.f1_score(truths, guesses, average="macro", zero_division=0)
    assert ipt.macro_f1(guesses, references) == pytest.approx(expected)


@pytest.mark.parametrize("labels", [("acceptable", "unacceptable"), ("no", "yes")])
@pytest.mark.parametrize("seed", range(5))
def test_matthews_equals_scikit_learn(seed: int, labels: tuple[str, str]) -> None:
    rng = random.Random(seed)
    truths = [labels[0], labels[1], *rng.choices(labels, k=29)]
    guesses = [t if rng.random() < 0.7 else rng.choice(labels) for t in truths]
    expected = sklearn.metrics.matthews_corrcoef(truths, guesses)
    assert ipt.matthews(guesses, [(t,) for t in truths]) == pytest.approx(expected)
    assert -1 <= expected < 1


def test_matthews_of_one_answer_for_all_is_zero_and_of_all_wrong_minus_one() -> None:
    references = [("acceptable",), ("unacceptable",), ("acceptable",)]
    assert ipt.matthews(["acceptable"] * 3, references) == 0
    assert ipt.matthews(["unacceptable", "acceptable", "unacceptable"], references) == pytest.approx(-1)


def test_pearson_equals_scipy_and_a_prediction_that_is_no_number_counts_as_zero() -> None:
    rng = random.Random(3)
    y = [rng.uniform(0, 5) for _ in range(23)]
    x = [v + rng.gauss(0, 1) for v in y]
    expected = scipy.stats.pearsonr([*x, 0.0], [*y, 2.5])[0]
    assert ipt.pearson([*map(str, x), "four"], [*((str(v),) for v in y), ("2.5",)]) == pytest.approx(expected)
    assert ipt.pearson(["1", "1"], [("1",), ("2",)]) == 0


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity"])
def test_pearson_stays_a_number_whatever_is_predicted(text: str) -> None:
    assert math.isfinite(ipt.pearson([text, "1", "3"], [("1",), ("2",), ("4",)]))


def test_rouge_l_equals_rouge_score() -> None:
    rng, scorer = random.Random(7), rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    words = ["The", "cat", "sat", "on", "a", "mat", "it's", "2,000", "re-run", "end.", "Ünder", ""]
    texts = [" ".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(80)]
    for prediction, reference in itertools.pairwise(texts):
        expected = scorer.score(reference, prediction)["rougeL"].fmeasure
        assert ipt.rouge_l([prediction], [(reference,)]) == pytest.approx(expected), (prediction, reference)


@pytest.mark.parametrize(
    ("prediction", "reference", "match", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0, 1.0),
        ("a tower", "the tower, of an iron", 0.0, 0.5),  # tower | tower of iron
        ("big big cat", "big cat cat", 0.0, 2 / 3),  # words count as often as they stand in both
        ("", "", 1.0, 1.0),
        ("the", "a", 1.0, 1.0),
        ("", "cat", 0.0, 0.0),
        ("dog", "cat", 0.0, 0.0),
        ("theatre", "atre", 0.0, 0.0),  # only whole words are articles
    ],
)
def test_squad_metrics_equal_cases_worked_by_hand(prediction: str, reference: str, match: float, f1: float) -> None:
    assert ipt.exact_match([prediction], [(reference,)]) == match
    assert ipt.token_f1([prediction], [(reference,)]) == pytest.approx(f1)


@pytest.mark.parametrize("metric", ["ACC", "EM", "QA-F1", "Rouge-L"])
def test_with_several_references_the_best_counts_and_rows_are_averaged(metric: str) -> None:
    assert ipt.METRICS[metric](["two words", "x", "y"], [("no", "two words"), ("x",), ("z",)]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", ipt.METRICS)
def test_a_metric_refuses_as_many_predictions_as_there_are_no_rows_for(metric: str) -> None:
    with pytest.raises(ValueError, match="zip"):
        ipt.METRICS[metric](["1", "2", "3"], [("1",), ("2",)])


# --- Tasks ---------------------------------------------------------------------------------------


def load(tmp_path: Path, text: str) -> dict[str, Task]:
    file = tmp_path / "own.yaml"
    file.write_text(text, encoding="utf-8")
    return ipt.load_tasks(file)


def test_tasks_come_in_the_order_of_the_file_with_all_that_it_says(tasks: dict[str, Task]) -> None:
    assert list(tasks)[:2] == ["mood-good", "animal-class"]
    assert [task.metric for task in tasks.values()] == ["ACC", "Classification-F1", "EM", "QA-F1", "ACC", "ACC", "EM"]
    assert collections.Counter(task.splits["tiny"] for task in tasks.values()) == {"seen": 5, "unseen": 2}
    assert [name for name, task in tasks.items() if task.pretrained] == ["mood-good"]


ROW = "{world: small, kind: classification, question: mood good"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tasks:", "things:", "expected a mapping with the key 'tasks'"),
        ("tasks:", "tasks: [", "not readable as YAML"),
        ("  mood-good: " + ROW, "  mood-good: " + ROW + ", kind: extraction", "'kind' stands twice"),
        ("  animal-class:", "  mood-good:", "'mood-good' stands twice"),
        ("  animal-class:", "  no:", "False cannot be a task's name.*quote yes and no"),
        ("  animal-class:", "  a/b:", "'a/b' cannot be a task's name"),
        (ROW, ROW + ", qestion: x", "task mood-good: unknown field 'qestion'; did you mean 'question'"),
        ("{world: small, kind: class", "{world: smal, kind: class", "no world 'smal' in this file; did you mean 'small'"),
        ("kind: transformation, question: count", "kind: no, question: count", "task count-next: kind is False, expected one of"),
        ("question: mood good", "question: no", "task mood-good: 'question' is False, expected text"),
        ("question: thing plural", "question: thing plurals", "task thing-plural: .*'thing plurals'"),
        ("metric: Classification-F1", "metric: Classification-F2", "task animal-class: .*did you mean 'Classification-F1'"),
        ("sees {count.word}", "sees {counts.word}", "world small: .*expected 'sentence'"),
        ("cup cups,", "cup,", "world small: .*as many words in each row"),
        ("cup cups,", "no,", "world small: .*as many words in each row"),
        ("columns: [word, plural]", "columns: [word, no]", "world small: "),
        ("day: day}", "day: days}", "world small: .*days"),
        ("sentence:", "sentense:", "world small: .*'sentence'"),
        ("worlds:", "worlds: []\nother:", "worlds"),
        ("splits: {tiny: seen}, pretrained: true", "splits: seen, pretrained: true", "task mood-good: .*splits"),
        ("splits: {tiny: seen}, pretrained: true", "splits: {tiny: sean}, pretrained: true", "task mood-good: .*sean"),
        ("pretrained: true", "pretrained: perhaps", "task mood-good: .*pretrained"),
        (ROW, "{[a, b]: c, world: small, kind: classification, question: mood good", "own.yaml"),
    ],
)
def test_a_broken_tasks_file_is_refused_with_what_is_wrong_and_where(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert TASKS_FILE.count(old) >= 1
    with pytest.raises(IptError, match=message) as caught:
        load(tmp_path, TASKS_FILE.replace(old, new, 1))
    assert "own.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_tasks_file_and_one_that_is_a_folder_or_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\xff")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "folder.yaml").mkdir()
    for place in ("empty.yaml", "bytes.yaml", "absent.yaml", "folder.yaml"):
        with pytest.raises(IptError, match=place):
            ipt.load_tasks(tmp_path / place)


@pytest.fixture(scope="module")
def sampler(tasks: dict[str, Task]) -> Callable[[str, int], ipt.FewShotSample]:
    return lambda task, seed: tasks[task].source.sample(seed, shots=4, test_rows=15)


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
            name: {e.input.partition(f" {ipt.OPTION_MARK}")[0] for s in samples for e in getattr(s, name)}
            for name in ("train", "validation", "test")
        }
        for a, b in itertools.combinations(parts.values(), 2):
            assert not a & b, task


def test_no_row_comes_twice_in_a_part(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        sample = task.source.sample(13, shots=16, test_rows=60)
        for part in (sample.train, sample.validation, sample.test):
            assert len({e.input for e in part}) == len(part)


def test_the_seed_draws_the_shots_and_never_the_test_rows(tasks: dict[str, Task], sampler: Any) -> None:
    for task in tasks:
        first = sampler(task, 100)
        ipt._test_rows.cache_clear()
        again = sampler(task, 100)
        ipt._test_rows.cache_clear()
        other = sampler(task, 21)
        assert first == again
        assert first.test == other.test
        assert set(first.train) != set(other.train)
        assert set(first.validation) != set(other.validation)


def test_fewer_test_rows_are_the_first_of_more(tasks: dict[str, Task]) -> None:
    source = tasks["animal-class"].source
    few, many = (source.sample(100, shots=1, test_rows=n).test for n in (5, 12))
    assert few == many[:5]


def test_every_row_answers_its_question(world: World, tasks: dict[str, Task], sampler: Any) -> None:
    told = {}
    for entries in itertools.product(*(world.lexicon[table] for table in world.slots.values())):
        scene = dict(zip(world.slots, entries, strict=True))
        told[world.describe(scene)] = scene
    for name, task in tasks.items():
        for example in sampler(name, 21).train:
            sentence = example.input.partition(f" {ipt.OPTION_MARK}")[0]
            assert example.answers == (world.answer(task.source.question, told[sentence]),)


def test_a_multiple_choice_row_shows_its_options_and_the_answer_among_them_at_no_fixed_place(sampler: Any) -> None:
    sample = sampler("mood-opposite-choice", 100)
    places = set()
    for example in [*sample.train, *sample.validation, *sample.test]:
        assert len(set(example.options)) == 3
        assert example.input.endswith("".join(f" {ipt.OPTION_MARK} {option}" for option in example.options))
        places.add(example.options.index(example.answers[0]))
    assert places == {0, 1, 2}


def test_a_world_too_small_for_the_shots_says_so(tasks: dict[str, Task]) -> None:
    with pytest.raises(IptError, match=r"world small: the question 'mood good' has too few rows for the answer '(yes|no)'"):
        tasks["mood-good"].source.sample(100, shots=700, test_rows=10)


# --- Backbone ------------------------------------------------------------------------------------


def rows_of(
    backbone: Backbone, task: Task, *, seed: int = 100, part: str = "train", length: int = 3, shots: int = 4
) -> list[Encoded]:
    sample = task.source.sample(seed, shots=shots, test_rows=11)
    return backbone.encode(getattr(sample, part), prompt_length=length)


def random_prompts(backbone: Backbone, tasks: int, length: int = 3, seed: int = 0) -> Tensor:
    noise = torch.randn(tasks, length, backbone.hidden, generator=torch.Generator().manual_seed(seed))
    return noise * backbone.embedding_rms


def mixed_rows(backbone: Backbone, tasks: dict[str, Task], prompts: int) -> list[tuple[int, Encoded]]:
    """Return rows of all tasks, of many lengths, with short inputs among them, each behind one of several prompts."""
    rows = [row for name in tasks for row in rows_of(backbone, tasks[name], part="test")[:4]]
    short = [
        Example("the owl", ("bird",)),
        Example("on", ("one two three four five",)),
        Example("cod sees keys", ("fish", "eel")),
    ]
    rows += [backbone.encode([example], prompt_length=3)[0] for example in short]
    random.Random(0).shuffle(rows)
    return [(n % prompts, row) for n, row in enumerate(rows)]


def test_embeddings_are_measured_as_the_encoder_gets_them(bart: Backbone, t5: Backbone) -> None:
    assert bart.embedding_rms == pytest.approx(0.9, rel=0.1)  # 0.9 / sqrt(20), times sqrt(20) by scale_embedding
    assert t5.embedding_rms == pytest.approx(float(t5.model.get_input_embeddings().weight.pow(2).mean().sqrt()))


def test_the_initial_prompt_is_made_of_words_and_depends_on_the_seed_only(backbone: Backbone) -> None:
    prompt = backbone.initial_prompt(7, seed=3)
    table = backbone.model.get_input_embeddings()(torch.arange(len(backbone.tokenizer)))
    found = [int((table == row).all(1).nonzero()[0]) for row in prompt]
    assert not set(found) & set(backbone.tokenizer.all_special_ids)
    assert torch.equal(prompt, backbone.initial_prompt(7, seed=3))
    assert not torch.equal(prompt, backbone.initial_prompt(7, seed=4))


def peft_model(backbone: Backbone, prompt: Tensor) -> Any:
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=len(prompt), num_transformer_submodules=1)
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(prompt)
    return model.eval()


def pad(backbone: Backbone, rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def test_a_soft_prompt_gives_the_loss_of_peft(backbone: Backbone, tasks: dict[str, Task]) -> None:
    (prompt,), rows = random_prompts(backbone, 1), mixed_rows(backbone, tasks, 1)
    ids = pad(backbone, [row.input_ids for _, row in rows], backbone.tokenizer.pad_token_id)
    labels = pad(backbone, [row.target_ids for _, row in rows], -100)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (ids.shape[1] - len(row.input_ids)) for _, row in rows])
    expected = peft_model(backbone, prompt)(input_ids=ids, attention_mask=mask, labels=labels).loss
    with torch.no_grad():
        states, states_mask = backbone.encoder_states(prompt.expand(len(rows), -1, -1), [row.input_ids for _, row in rows])
        losses = backbone.answer_losses(states, states_mask, [row.target_ids for _, row in rows])
    assert float(losses.sum() / (labels != -100).sum()) == pytest.approx(float(expected), rel=1e-5)
    answers = backbone.answer(prompt[None], rows)
    means = [loss / len(row.target_ids) for loss, (_, row) in zip(losses.tolist(), rows, strict=True)]
    assert [answer.loss for answer in answers] == pytest.approx(means, rel=1e-4)


def test_a_soft_prompt_gives_the_gradient_of_peft(backbone: Backbone, tasks: dict[str, Task]) -> None:
    (prompt,), rows = random_prompts(backbone, 1), mixed_rows(backbone, tasks, 1)
    ids = pad(backbone, [row.input_ids for _, row in rows], backbone.tokenizer.pad_token_id)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (ids.shape[1] - len(row.input_ids)) for _, row in rows])
    other = peft_model(backbone, prompt)
    other(input_ids=ids, attention_mask=mask, labels=pad(backbone, [row.target_ids for _, row in rows], -100)).loss.backward()
    losses, gradient = ipt.prompt_losses(backbone, prompt[None].clone(), rows)
    torch.testing.assert_close(gradient[0], other.prompt_encoder["default"].embedding.weight.grad, rtol=1e-4, atol=1e-7)
    assert losses.shape == (1,)


def test_a_soft_prompt_gives_the_greedy_generations_of_peft(backbone: Backbone, tasks: dict[str, Task]) -> None:
    prompts = random_prompts(backbone, 5, seed=2)
    limit, pad_id = 7, backbone.tokenizer.pad_token_id
    rows = [(0, dataclasses.replace(row, answer_limit=limit)) for _, row in mixed_rows(backbone, tasks, 1)]
    ids = pad(backbone, [row.input_ids for _, row in rows], pad_id)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (ids.shape[1] - len(row.input_ids)) for _, row in rows])
    texts = set()
    for prompt in prompts:
        greedy = {"max_new_tokens": limit, "do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 0, "early_stopping": False}
        tokens = peft_model(backbone, prompt).generate(input_ids=ids, attention_mask=mask, **greedy)
        expected = backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        got = [answer.text for answer in backbone.answer(prompt[None], rows, decoding="generate")]
        assert got == expected
        texts |= set(got)
    assert len(texts) > 1  # else equality would say nothing


def test_generation_is_greedy_whatever_the_backbone_was_saved_with(backbone: Backbone, tasks: dict[str, Task]) -> None:
    rows = mixed_rows(backbone, tasks, 4)
    prompts, start = random_prompts(backbone, 4, seed=3), backbone.model.config.decoder_start_token_id
    answers = backbone.answer(prompts, rows, decoding="generate")
    for (slot, row), answer in zip(rows, answers, strict=True):
        states, mask = backbone.encoder_states(prompts[slot][None], [row.input_ids])
        ids = [start]
        while len(ids) <= row.answer_limit and (len(ids) == 1 or ids[-1] != backbone.model.config.eos_token_id):
            logits = backbone.model(
                encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=torch.tensor([ids]), use_cache=False
            ).logits
            ids.append(int(logits[0, -1].argmax()))
        expected = backbone.tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.text == expected


def test_answers_are_the_same_without_the_losses(backbone: Backbone, tasks: dict[str, Task]) -> None:
    prompts, rows = random_prompts(backbone, 4), mixed_rows(backbone, tasks, 4)
    for decoding in ("options", "generate"):
        with_losses, without = (backbone.answer(prompts, rows, decoding=decoding, losses=losses) for losses in (True, False))
        assert [a.text for a in without] == [a.text for a in with_losses]
        assert all(math.isnan(a.loss) for a in without) and all(math.isfinite(a.loss) for a in with_losses)


def test_answers_are_the_same_however_little_goes_through_at_once(backbone: Backbone, tasks: dict[str, Task]) -> None:
    prompts, rows = random_prompts(backbone, 4), mixed_rows(backbone, tasks, 4)
    tight = dataclasses.replace(backbone, answer_budget=ipt.Budget(1))  # a row a pass, a text a piece
    for decoding in ("options", "generate"):
        one, other = (side.answer(prompts, rows, decoding=decoding) for side in (backbone, tight))
        assert [a.text for a in one] == [a.text for a in other]
        assert [a.loss for a in one] == pytest.approx([a.loss for a in other], abs=1e-5)


def test_padding_changes_neither_loss_nor_answer(backbone: Backbone, tasks: dict[str, Task]) -> None:
    prompts, rows = random_prompts(backbone, 4), mixed_rows(backbone, tasks, 4)
    together = backbone.answer(prompts, rows)
    alone = [backbone.answer(prompts, [row])[0] for row in rows]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.loss for a in together] == pytest.approx([a.loss for a in alone], abs=1e-5)
    assert len({len(row) for _, row in rows}) > 5


def test_options_are_answered_as_a_plain_loop_over_them_does(backbone: Backbone, tasks: dict[str, Task]) -> None:
    rows = [(slot, row) for slot, row in mixed_rows(backbone, tasks, 4) if row.option_ids]
    prompts = random_prompts(backbone, 4, seed=1)
    answers = backbone.answer(prompts, rows)
    for (slot, row), answer in zip(rows, answers, strict=True):
        inputs = torch.cat([prompts[slot], backbone.model.get_input_embeddings()(torch.tensor(row.input_ids))])[None]
        losses = {}
        for option in row.example.options:
            labels = torch.tensor([backbone.tokenizer(option).input_ids])
            with torch.no_grad():
                losses[option] = float(backbone.model(inputs_embeds=inputs, labels=labels).loss) * labels.shape[1]
        assert answer.text == min(losses, key=losses.__getitem__)
    assert len({answer.text for answer in answers}) > 2


def test_an_input_that_is_too_long_loses_its_middle_keeps_its_tail_and_ends_as_before(t5_folder: Path, bart_folder: Path) -> None:
    for folder in (t5_folder, bart_folder):
        backbone = ipt.load_backbone(str(folder), max_length=16)
        words = " ".join(["the", "fox", "sees", "one", "cups", "on"] * 5)
        tail = " | mild | wild"
        row = backbone.encode([Example(words + tail, ("mild",), tail=len(tail))], prompt_length=5)[0]
        ids = backbone.tokenizer(words + tail).input_ids
        assert row.truncated
        assert len(row.input_ids) == 16 - 5
        assert row.input_ids[-5:] == ids[-5:]  # | mild | wild </s>
        assert row.input_ids[:6] == ids[:6]
        fitting = backbone.encode([Example("the fox", ("mild",))], prompt_length=5)[0]
        assert not fitting.truncated
        assert fitting.input_ids == backbone.tokenizer("the fox").input_ids


def test_without_a_tail_the_end_of_the_input_goes_but_not_the_end_of_sequence(t5_folder: Path) -> None:
    backbone = ipt.load_backbone(str(t5_folder), max_length=16)
    words = ["the", "fox", "sees", "one", "cups", "on", "monday", "glad", "owl", "two", "keys", "eel"]
    row = backbone.encode([Example(" ".join(words), ("mild",))], prompt_length=6)[0]
    assert row.input_ids == backbone.tokenizer(" ".join(words[:9])).input_ids


def test_prompt_and_input_fit_the_positions_that_bart_has(bart: Backbone) -> None:
    assert bart.max_length == 30
    row = bart.encode([Example("the fox " * 40, ("bird",), ("bird", "fish"))], prompt_length=9)[0]
    assert len(row.input_ids) == 21
    (answer,) = bart.answer(random_prompts(bart, 1, length=9), [(0, row)])
    assert math.isfinite(answer.loss)


def test_an_answer_longer_than_the_positions_that_bart_has_is_cut_to_them(bart: Backbone) -> None:
    row = bart.encode([Example("the fox", ("one two " * 30,))], prompt_length=3)[0]
    assert row.target_ids[-1] == bart.tokenizer.eos_token_id
    for decoding in ("options", "generate"):
        (answer,) = bart.answer(random_prompts(bart, 1), [(0, row)], decoding=decoding)
        assert math.isfinite(answer.loss)


def test_a_prompt_that_leaves_no_room_for_the_input_is_refused(bart: Backbone) -> None:
    with pytest.raises(IptError, match=r"a prompt of 28 tokens leaves no room for the input: .* takes 30 tokens"):
        bart.encode([Example("the fox", ("bird",))], prompt_length=28)[0]


def test_the_answer_limit_is_the_longest_reference_of_the_task(t5: Backbone) -> None:
    rows = t5.encode([Example("a", ("one",)), Example("b", ("two", "three four five"))], prompt_length=3)
    assert [row.answer_limit for row in rows] == [4, 4]


def test_the_fingerprint_changes_with_weights_vocabulary_and_settings(t5_folder: Path, t5: Backbone, tmp_path: Path) -> None:
    def changed(file: str, edit: Callable[[Any], None]) -> str:
        folder = tmp_path / file
        folder.mkdir()
        for path in t5_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        if file.endswith("json"):
            content = json.loads((folder / file).read_text())
            edit(content)
            (folder / file).write_text(json.dumps(content))
        else:
            weights = safetensors.torch.load_file(folder / file)
            edit(weights)
            safetensors.torch.save_file(weights, folder / file, {"format": "pt"})
        return ipt.load_backbone(str(folder)).fingerprint

    def swap_words(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["fox"], vocabulary["owl"] = vocabulary["owl"], vocabulary["fox"]

    assert ipt.load_backbone(str(t5_folder), max_length=20).fingerprint == t5.fingerprint
    found = {
        t5.fingerprint,
        changed("model.safetensors", lambda weights: weights["shared.weight"][5].mul_(1.1)),
        changed("tokenizer.json", swap_words),
        changed("config.json", lambda content: content.update(feed_forward_proj="gelu")),  # the same shapes, another function
    }
    assert len(found) == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot load the backbone"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "sequence-to-sequence"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load the backbone"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load the backbone"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nonsense"), "cannot load the backbone"),
    ],
)
def test_a_folder_that_is_no_whole_backbone_is_refused(t5_folder: Path, tmp_path: Path, damage: Any, message: str) -> None:
    for path in t5_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(IptError, match=message):
        ipt.load_backbone(str(tmp_path))


def test_a_backbone_that_lacks_a_tensor_is_refused_and_never_filled_in(t5_folder: Path, tmp_path: Path) -> None:
    for path in t5_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["encoder.block.1.layer.1.DenseReluDense.wi.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IptError, match=r"wi.weight"):
        ipt.load_backbone(str(tmp_path))


def test_a_device_that_is_not_there_is_refused(t5_folder: Path) -> None:
    for device in ("cuda:99", "toaster"):
        with pytest.raises(IptError, match=device):
            ipt.load_backbone(str(t5_folder), device=device)


def test_the_budget_halves_when_memory_runs_out_and_still_does_every_row_once() -> None:
    budget, done, sizes = ipt.Budget(100), [], []

    def work(numbers: list[int]) -> None:
        sizes.append(len(numbers))
        if len(numbers) > 3:
            raise torch.OutOfMemoryError
        done.extend(numbers)

    budget.run([10, 9, 11, 10, 8, 10, 7, 10, 10, 10, 10], work)
    assert sorted(done) == list(range(11))
    assert done[0] == 2  # the longest first
    assert sizes[:3] == [1, 10, 5]  # none is padded to the longest


def test_the_budget_grows_while_memory_is_left_but_never_again_to_what_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipt, "memory_share", lambda: 0.1)
    budget, sizes = ipt.Budget(20), []

    def work(numbers: list[int]) -> None:
        sizes.append(len(numbers))
        if len(numbers) > 10:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    budget.run([10] * 100, work)
    assert sizes[:5] == [2, 4, 8, 16, 8]
    assert set(sizes[5:-1]) == {8}
    assert (budget.tokens, budget.most) == (80, 160)


def test_a_pass_that_is_small_because_rows_differ_tells_less_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipt, "memory_share", lambda: 0.3)
    cases = [
        ([10] * 30, 200, 400),  # a full pass, 0.3 of the memory: twice as much fits
        ([100] + [10] * 20, 400, 400),  # two passes, neither of them near full: perhaps all of it
        ([90] + [10] * 20, 2000, 2000),  # all would fit into one pass, two of them hold less padding
        ([900, 900], 100, 400),  # rows longer than a pass, twice
        ([10], 100, 100),
    ]
    for lengths, tokens, then in cases:
        budget = ipt.Budget(tokens)
        budget.run(lengths, lambda numbers: None)
        assert (budget.tokens, budget.most) == (then, math.inf), lengths


def test_another_error_than_lack_of_memory_is_not_hidden() -> None:
    def work(numbers: list[int]) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        ipt.Budget(100).run([10] * 10, work)


def test_a_row_that_does_not_fit_alone_is_an_error_that_says_what_to_do() -> None:
    def work(numbers: list[int]) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(IptError, match=r"one row of 40 tokens does not fit into memory: shorten it with --max-length"):
        ipt.Budget(1000).run([30, 40], work)


# --- Spaces --------------------------------------------------------------------------------------


@pytest.fixture
def initial(t5: Backbone) -> Tensor:
    return t5.initial_prompt(3, seed=0)


def collection(initial: Tensor, tasks: int = 11, rank: int = 5, seed: int = 0) -> Tensor:
    """Return soft prompts whose differences to the initial one lie near a space of few dimensions."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tasks, rank, generator=g) @ torch.randn(rank, initial.numel(), generator=g)
    noise = 0.1 * torch.randn(tasks, initial.numel(), generator=g)
    return initial + 3 * (mixed + noise).unflatten(1, initial.shape)


def random_space(initial: Tensor, dim: int = 6) -> ipt.Subspace:
    return ipt.random_subspace(initial, unit=2.5, dim=dim, inner=13, seed=1)


def test_theta_zero_is_the_initial_prompt_and_theta_counts_in_units_of_the_embeddings(initial: Tensor) -> None:
    space = ipt.PromptSpace(initial, 2.5)
    assert space.size == 3 * 16
    theta = torch.zeros(4, 48)
    assert torch.equal(space.back_project(theta), initial.expand(4, -1, -1))
    theta[2, 17] = 2
    changed = space.back_project(theta)[2] - initial
    assert float(changed[1, 1]) == pytest.approx(5)
    assert changed.count_nonzero() == 1


def test_a_subspace_is_the_paper_s_auto_encoder_of_the_standardised_differences(initial: Tensor) -> None:
    space, prompts = random_space(initial), collection(initial)
    w = {name: tensor.double().numpy() for name, tensor in space.weights.items()}
    x = ((prompts - initial) / 2.5).reshape(11, 48).double().numpy()
    v = x @ w["in.weight"].T + w["in.bias"]
    y = np.tanh(v @ w["hidden.weight"].T + w["hidden.bias"]) @ w["out.weight"].T + w["out.bias"]
    vectors = space.project(prompts)
    assert vectors.shape == (11, 6)
    np.testing.assert_allclose(vectors.numpy(), v, atol=1e-5)
    expected = initial.numpy() + 2.5 * y.reshape(11, 3, 16)
    np.testing.assert_allclose(space.back_project(vectors).numpy(), expected, atol=1e-4)
    unexplained = ((y - x) ** 2).sum() / (x**2).sum()
    assert float(space.unexplained(prompts, space.back_project(vectors))) == pytest.approx(unexplained, rel=1e-5)


def test_the_random_space_depends_on_its_seed_and_has_the_scale_of_an_untrained_layer(initial: Tensor) -> None:
    one, same, other = (ipt.random_subspace(initial, unit=1.0, dim=6, inner=13, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(one.weights[name], same.weights[name]) for name in one.weights)
    assert not torch.equal(one.weights["out.weight"], other.weights["out.weight"])
    for name, columns in (("in", 48), ("hidden", 6), ("out", 13)):
        for part in ("weight", "bias"):
            largest = float(one.weights[f"{name}.{part}"].abs().max())
            assert 0.5 < largest * columns**0.5 <= 1


def test_the_linear_space_reconstructs_as_scikit_learn_s_pca(initial: Tensor) -> None:
    prompts = collection(initial)
    space = ipt.linear_subspace(prompts, initial, dim=4)
    flat = prompts.flatten(1).double().numpy()
    pca = sklearn.decomposition.PCA(n_components=4).fit(flat)
    expected = pca.inverse_transform(pca.transform(flat))
    got = space.back_project(space.project(prompts)).flatten(1).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert np.abs(got - flat).max() > 0.1
    torch.testing.assert_close(space.project(prompts).pow(2).mean(0), torch.ones(4), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("tasks", "dim"), [(5, 5), (80, 49)])
def test_the_linear_space_has_no_more_dimensions_than_its_prompts_have(initial: Tensor, tasks: int, dim: int) -> None:
    with pytest.raises(IptError, match="smaller --dim"):
        ipt.linear_subspace(collection(initial, tasks, rank=40), initial, dim=dim)


# --- Tuning --------------------------------------------------------------------------------------

CONFIG = TuneConfig(steps=12, batch_size=3, evaluations=4, patience=1, clip=1.0)


def make_job(
    backbone: Backbone, task: Task, start: Tensor, *, rate: float = 0.1, seed: int = 100, metric: str | None = None
) -> Job:
    header = {"task": task.name, "metric": metric or task.metric, "data_seed": seed, "learning_rate": rate}

    def rows() -> tuple[list[Encoded], list[Encoded]]:
        return rows_of(backbone, task, seed=seed), rows_of(backbone, task, seed=seed, part="validation")

    return Job(header, start, rows)


def make_space(backbone: Backbone, kind: str) -> ipt.Space:
    initial = backbone.initial_prompt(3, seed=0)
    if kind == "prompt":
        return ipt.PromptSpace(initial, backbone.embedding_rms)
    return ipt.random_subspace(initial, unit=2 * backbone.embedding_rms, dim=6, inner=13, seed=1)


def make_jobs(backbone: Backbone, space: ipt.Space, tasks: dict[str, Task]) -> list[Job]:
    """Return seven jobs of all kinds, with learning rates of their own, that end at different steps."""
    starts = 0.3 * torch.randn(len(tasks), space.size, generator=torch.Generator().manual_seed(4))
    rates = (0.1, 0.01, 0.3, 0.03, 0.2, 0.05, 0.15)
    return [make_job(backbone, task, start, rate=r) for task, start, r in zip(tasks.values(), starts, rates, strict=True)]


@pytest.mark.parametrize("at_once", [16, 31])
def test_without_a_number_of_slots_jobs_fill_a_pass_and_at_least_16_are_tuned(
    t5: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    space, config, counts = make_space(t5, "subspace"), TuneConfig(steps=1, batch_size=2), list[int]()
    lengths = [len(row) for row in rows_of(t5, tasks["mood-good"])]
    tokens = 2 * (3 + sum(lengths) / len(lengths)) * (at_once - 0.5 if at_once > 16 else 5) / 4
    jobs = (make_job(t5, tasks["mood-good"], torch.zeros(space.size), rate=n) for n in range(1, 40))
    monkeypatch.setattr(ipt, "_validate", lambda backbone, space, table, *others: counts.append(len(table.jobs)))
    list(ipt.tune(dataclasses.replace(t5, budget=ipt.Budget(round(tokens))), space, jobs, config))
    assert counts[0] == at_once


def test_a_queue_of_10_000_jobs_loads_no_rows_before_their_turn(t5: Backbone, tasks: dict[str, Task]) -> None:
    space, config, loaded = make_space(t5, "subspace"), TuneConfig(steps=1, batch_size=2), list[int]()
    rows = rows_of(t5, tasks["mood-good"])

    def job(n: int) -> Job:
        template = make_job(t5, tasks["mood-good"], torch.zeros(space.size))
        return dataclasses.replace(template, rows=lambda: (loaded.append(n), (rows, rows))[1])

    first = next(ipt.tune(t5, space, map(job, range(10_000)), config, slots=16))
    assert first.record["steps"] == 1
    assert loaded == list(range(16))


def tuned(results: Iterable[Tuned]) -> dict[str, Tuned]:
    listed = list(results)
    by_name = {result.job.name: result for result in listed}
    assert len(by_name) == len(listed)
    return by_name


def assert_same(a: dict[str, Tuned], b: dict[str, Tuned], *, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name].theta, b[name].theta, rtol=tolerance, atol=tolerance, msg=name)
        torch.testing.assert_close(a[name].soft_prompt, b[name].soft_prompt, rtol=tolerance, atol=10 * tolerance)
        assert a[name].record == pytest.approx(b[name].record, rel=max(tolerance, 1e-9))


@pytest.mark.parametrize("kind", ["prompt", "subspace"])
def test_a_job_alone_gives_what_it_gives_among_others(backbone: Backbone, tasks: dict[str, Task], kind: str) -> None:
    space = make_space(backbone, kind)
    jobs = make_jobs(backbone, space, tasks)
    together = tuned(ipt.tune(backbone, space, jobs, CONFIG, slots=7))
    alone = tuned(result for job in jobs for result in ipt.tune(backbone, space, [job], CONFIG, slots=1))
    assert_same(together, alone, tolerance=2e-4)
    moved = [float((result.theta - result.job.start).abs().max()) for result in alone.values()]
    assert max(moved) > 0.1


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_slots_refill_so_that_every_job_is_done_once_with_the_same_result(
    t5: Backbone, tasks: dict[str, Task], slots: int
) -> None:
    space = make_space(t5, "prompt")
    jobs, full = make_jobs(t5, space, tasks), []
    results = tuned(
        ipt.tune(t5, space, jobs, CONFIG, slots=slots, on_step=lambda table: full.append([job.name for job in table.jobs]))
    )
    assert set(results) == {job.name for job in jobs}
    assert max(map(len, full)) <= slots
    assert_same(results, tuned(ipt.tune(t5, space, jobs, CONFIG, slots=7)), tolerance=2e-4)
    assert len({result.record["steps"] for result in results.values()}) > 1  # jobs end at different steps, so slots mix


def test_jobs_begin_in_their_order_and_as_soon_as_a_slot_is_free(t5: Backbone, tasks: dict[str, Task]) -> None:
    space, config = make_space(t5, "prompt"), dataclasses.replace(CONFIG, steps=4, patience=0)
    begun: list[str] = []

    def spied(job: Job) -> Job:
        def rows() -> tuple[list[Encoded], list[Encoded]]:
            begun.append(job.header["task"])
            return job.rows()

        return dataclasses.replace(job, rows=rows)

    jobs = [spied(job) for job in make_jobs(t5, space, tasks)]
    results = ipt.tune(t5, space, jobs, config, slots=3)
    next(results)
    assert begun == list(tasks)[:3]
    list(results)
    assert begun == list(tasks)


def test_the_backbone_stays_bitwise_the_same_and_gets_no_gradient(backbone: Backbone, tasks: dict[str, Task]) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    for kind in ("prompt", "subspace"):
        space = make_space(backbone, kind)
        frozen = [space.initial_prompt.clone(), *(w.clone() for w in getattr(space, "weights", {}).values())]
        list(ipt.tune(backbone, space, make_jobs(backbone, space, tasks)[:2], CONFIG, slots=2))
        after = [space.initial_prompt, *getattr(space, "weights", {}).values()]
        assert all(map(torch.equal, frozen, after))
        assert all(tensor.grad is None and not tensor.requires_grad for tensor in after)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.model.state_dict().items())
    assert all(weight.grad is None and not weight.requires_grad for weight in backbone.model.parameters())
    assert not backbone.model.training


def test_a_job_s_own_rows_alone_give_it_a_gradient(t5: Backbone, tasks: dict[str, Task]) -> None:
    prompts, rows = random_prompts(t5, 3), rows_of(t5, tasks["count-next"])
    losses, gradient = ipt.prompt_losses(t5, prompts.clone(), [(0, rows[0]), (2, rows[1]), (2, rows[2])])
    assert losses[1] == 0
    assert not gradient[1].any()
    assert gradient[0].any()
    _, alone = ipt.prompt_losses(t5, prompts[2:].clone(), [(0, rows[1]), (0, rows[2])])
    torch.testing.assert_close(alone[0], gradient[2])


def test_the_loss_of_a_prompt_is_the_mean_over_the_tokens_of_all_its_rows(t5: Backbone) -> None:
    (prompt,) = random_prompts(t5, 1)
    examples = [Example("the fox sees", ("one",)), Example("the owl", ("two three four five six",))]
    rows = t5.encode(examples, prompt_length=3)
    losses, _ = ipt.prompt_losses(t5, prompt[None].clone(), [(0, row) for row in rows])
    alone = [answer.loss * len(row.target_ids) for row in rows for answer in t5.answer(prompt[None], [(0, row)])]
    assert float(losses) == pytest.approx(sum(alone) / (2 + 6), rel=1e-5)


def test_every_row_of_adam_equals_torch_s_adam_with_its_own_clipping_schedule_and_step_count() -> None:
    config = TuneConfig(steps=20, warmup=0.25, clip=1.5)
    rates, begins = torch.tensor([0.1, 0.3, 0.02]), (0, 4, 7)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 9, generator=generator)
    names = {"theta": start.clone(), "mean": torch.zeros(3, 9), "square": torch.zeros(3, 9)}
    state: dict[str, Tensor] = names | {"step": torch.zeros(3, dtype=torch.float64)}
    parameters = [torch.nn.Parameter(row.clone()) for row in start]
    optimizers = [torch.optim.Adam([p], lr=1.0) for p in parameters]
    clipped = 0
    for step in range(20):
        gradient = torch.randn(3, 9, generator=generator) * (0.2 if step % 2 else 2.0)
        active = [i for i in range(3) if step >= begins[i]]
        part = {name: table[active] for name, table in state.items()}
        ipt.adam(part, gradient[active], rates[active], config)
        for name, table in part.items():
            state[name][active] = table
        for i in active:
            own = step - begins[i] + 1
            parameters[i].grad = gradient[i].clone()
            clipped += int(torch.nn.utils.clip_grad_norm_([parameters[i]], 1.5) > 1.5)
            optimizers[i].param_groups[0]["lr"] = float(rates[i]) * min(own / 5, 1 - (own - 1) / 20)
            optimizers[i].step()
    expected = torch.stack([p.detach() for p in parameters])
    torch.testing.assert_close(state["theta"], expected, rtol=1e-4, atol=1e-5)
    assert state["step"].tolist() == [20, 16, 13]
    assert 0 < clipped < 49
    assert (state["theta"] - start).abs().min() > 1e-4


class Questions(TorchDispatchMode):
    """Count what would make the host wait for a device: reading a number, and finding out where a mask is true."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.joined: list[int] = []
        """Strides between keys of the masks that were joined with a position bias."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        indices = arguments[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        masks = [at for at in indices if at is not None and at.dtype == torch.bool]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique") or masks:
            self.asked.append(name)
        result = operation(*arguments, **(options or {}))
        if name == "where" and result.dim() == 4:
            self.joined.append(result.stride(-1))
        return result


def test_a_step_looks_at_no_number_and_at_no_mask_of_the_device(backbone: Backbone, tasks: dict[str, Task]) -> None:
    space, config = make_space(backbone, "subspace"), TuneConfig(steps=3, batch_size=3)
    table = ipt.JobTable(space.size, backbone.device)
    for task in tasks.values():
        table.add(make_job(backbone, task, torch.zeros(space.size)))
    with Questions() as questions:
        ipt._step(backbone, space, table, config)
        assert not questions.asked
        float(table.state["last_loss"].sum())
    assert questions.asked == ["_local_scalar_dense"]


def test_position_bias_and_mask_are_joined_once_a_pass_with_the_result_of_transformers(
    t5: Backbone, tasks: dict[str, Task]
) -> None:
    config = transformers.T5Config(
        vocab_size=len(t5.tokenizer), d_model=16, d_kv=4, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval().requires_grad_(False)
    backbone = dataclasses.replace(t5, model=model)
    rows = [rows_of(t5, tasks[name])[0] for name in ("mood-good", "mood-opposite-choice", "day-then-count")]
    assert len({len(row.input_ids) for row in rows}) > 1, "without padding there would be no mask"
    prompt = backbone.initial_prompt(3, seed=0).expand(len(rows), -1, -1).clone().requires_grad_()

    def pass_over() -> tuple[Tensor, Tensor, list[int]]:
        with Questions() as questions:
            states, mask = backbone.encoder_states(prompt, [row.input_ids for row in rows])
            losses = backbone.answer_losses(states, mask, [row.target_ids for row in rows])
        return losses.detach(), torch.autograd.grad(losses.sum(), prompt)[0], questions.joined

    *expected, at_every_layer = pass_over()
    ipt.share_position_bias(model)
    *own, once = pass_over()
    for a, b in zip(own, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len(at_every_layer) == 9, "three layers, each of the encoder, of the decoder, and between them"
    assert once == [1, 1, 1], "the fused kernels of a GPU take no other layout"


def test_running_out_of_memory_halves_the_rows_at_once_and_changes_no_result(t5_folder: Path, tasks: dict[str, Task]) -> None:
    plain, tight = (ipt.load_backbone(str(t5_folder)) for _ in range(2))
    refused = 0

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal refused
        if len(kwargs["inputs_embeds"]) > 4:
            refused += 1
            raise torch.OutOfMemoryError

    tight.model.get_encoder().register_forward_pre_hook(refuse, with_kwargs=True)
    space = make_space(plain, "prompt")
    results = [tuned(ipt.tune(b, space, make_jobs(b, space, tasks), CONFIG, slots=4)) for b in (plain, tight)]
    assert_same(*results, tolerance=2e-4)
    assert refused
    assert tight.budget.tokens < plain.budget.tokens


def test_the_best_checkpoint_is_kept_and_is_a_copy(t5: Backbone, tasks: dict[str, Task]) -> None:
    """The jobs train on rows of a task and are validated on another's, so they get worse at some point."""
    space, config = make_space(t5, "prompt"), TuneConfig(steps=12, batch_size=3, evaluations=12, patience=0)
    jobs = [
        make_job(t5, tasks[name], torch.zeros(space.size), rate=3.0, metric="ACC")
        for name in ("animal-class", "mood-opposite-choice")
    ]
    wrong = rows_of(t5, tasks["even-or-good"])
    jobs = [dataclasses.replace(job, rows=lambda rows=job.rows: (wrong, rows()[1])) for job in jobs]
    seen: dict[int, dict[str, Tensor]] = {}

    def on_step(table: ipt.JobTable) -> None:
        if table.jobs:
            seen[int(table.state["step"][0])] = {name: t.clone() for name, t in table.state.items()}

    results = list(ipt.tune(t5, space, jobs, config, slots=2, on_step=on_step))
    for i, result in enumerate(results):
        best = int(result.record["best_step"])
        assert best < 12, "the case shows nothing when the last step is the best"
        assert torch.equal(result.theta, seen[best]["theta"][i])
        assert torch.equal(result.soft_prompt, space.back_project(result.theta[None])[0])
        rows = rows_of(t5, tasks[result.job.header["task"]], part="validation")
        answers = t5.answer(result.soft_prompt[None], [(0, row) for row in rows])
        score = ipt.accuracy([a.text for a in answers], [row.example.answers for row in rows])
        assert result.record["validation"] == pytest.approx(score)
        assert result.record["validation_loss"] == pytest.approx(sum(a.loss for a in answers) / len(rows), rel=1e-4)
        scores = [(float(s["best_score"][i]), -float(s["best_loss"][i])) for _, s in sorted(seen.items())]
        assert scores == sorted(scores)


def test_a_job_ends_when_patience_is_over_and_never_without_patience(t5: Backbone, tasks: dict[str, Task]) -> None:
    space = make_space(t5, "prompt")
    job = make_job(t5, tasks["count-next"], torch.zeros(space.size), rate=1e-9)  # moves too little for another score
    for patience, steps in ((2, 9), (3, 12), (0, 30)):
        config = TuneConfig(steps=30, batch_size=3, evaluations=10, patience=patience)
        job_ = dataclasses.replace(job, start=torch.zeros(space.size))
        (result,) = ipt.tune(t5, space, [job_], config, slots=1)
        best = result.record["best_step"]
        assert result.record["steps"] == min(30, best + 3 * patience if patience else steps)


def test_a_job_ends_when_all_validation_rows_are_right_and_cost_next_to_nothing(t5: Backbone, tasks: dict[str, Task]) -> None:
    space, task = make_space(t5, "prompt"), tasks["count-next"]
    rows = rows_of(t5, task, part="validation")[:3]
    answers = t5.answer(space.initial_prompt[None], [(0, row) for row in rows])
    examples = [dataclasses.replace(row.example, answers=(a.text,)) for row, a in zip(rows, answers, strict=True)]
    right = [dataclasses.replace(row, example=example) for row, example in zip(rows, examples, strict=True)]
    cases = ((right, 99.0, 3, 4), (right, 1e-9, 3, 12), (rows, 99.0, 3, 12), (right, 99.0, 0, 12))
    for validation, solved, patience, steps in cases:
        config = TuneConfig(steps=12, batch_size=3, evaluations=3, patience=patience, solved=solved)
        job = make_job(t5, task, torch.zeros(space.size), rate=1e-9)  # the answers stay as they are
        job = dataclasses.replace(job, rows=lambda own=job.rows, validation=validation: (own()[0], validation))
        (result,) = ipt.tune(t5, space, [job], config)
        assert (result.record["steps"], result.record["validation"] == 1) == (steps, validation is right)


def test_steps_that_do_not_divide_still_end_with_an_evaluation(t5: Backbone, tasks: dict[str, Task]) -> None:
    space = make_space(t5, "prompt")
    config = TuneConfig(steps=7, batch_size=2, evaluations=3, patience=0)
    (result,) = ipt.tune(t5, space, [make_job(t5, tasks["animal-class"], torch.zeros(space.size))], config, slots=1)
    assert result.record["steps"] == 7
    assert result.record["best_step"] in (2, 4, 6, 7)


@pytest.mark.parametrize("kind", ["prompt", "subspace"])
def test_going_on_after_an_interruption_gives_the_theta_of_an_uninterrupted_run(
    backbone: Backbone, tasks: dict[str, Task], kind: str
) -> None:
    space = make_space(backbone, kind)
    jobs, states = make_jobs(backbone, space, tasks), {}
    whole = tuned(ipt.tune(backbone, space, jobs, CONFIG, slots=2))

    def interrupt(table: ipt.JobTable) -> None:
        states.clear()
        for i, job in enumerate(table.jobs):
            states[ipt.digest(job.header)] = {name: values[i].clone() for name, values in table.state.items()}
        interrupt.steps += 1  # type: ignore[attr-defined]
        if interrupt.steps == 14:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    interrupt.steps = 0  # type: ignore[attr-defined]
    results = ipt.tune(backbone, space, jobs, CONFIG, slots=2, on_step=interrupt)
    finished = []
    with pytest.raises(KeyboardInterrupt):
        finished.extend(iter(lambda: next(results), None))
    rest = [job for job in jobs if job.name not in {result.job.name for result in finished}]
    assert finished
    assert len(rest) > len(states) > 0
    later = list(ipt.tune(backbone, space, rest, CONFIG, slots=2, resume=states))
    both = tuned([*finished, *later])
    assert all(torch.equal(both[name].theta, whole[name].theta) for name in whole)
    assert {name: result.record for name, result in both.items()} == {name: result.record for name, result in whole.items()}


def test_a_loss_that_is_not_finite_names_task_step_and_learning_rate(t5: Backbone, tasks: dict[str, Task]) -> None:
    space = make_space(t5, "prompt")
    good = make_job(t5, tasks["mood-good"], torch.zeros(space.size), rate=0.125)
    bad = make_job(t5, tasks["count-next"], torch.full((space.size,), math.nan), rate=0.25)
    with pytest.raises(
        IptError, match=r"task count-next \(data seed 100, learning rate 0.25\) is nan by step 3: .*--learning-rate"
    ):
        list(ipt.tune(t5, space, [good, bad], CONFIG, slots=2))


def test_a_prompt_that_only_the_last_step_broke_is_an_error_too(bart: Backbone, tasks: dict[str, Task]) -> None:
    """The loss of a step is that before its update; what the last update makes is first seen by the validation."""
    space, config = make_space(bart, "prompt"), TuneConfig(steps=1, batch_size=3, warmup=0)
    job = make_job(bart, tasks["mood-good"], torch.zeros(space.size), rate=1e39)
    with pytest.raises(IptError, match=r"mood-good .*1e\+39"):
        list(ipt.tune(bart, space, [job], config, slots=1))


def test_tuning_lowers_the_loss_of_every_job(backbone: Backbone, tasks: dict[str, Task]) -> None:
    space, config = make_space(backbone, "prompt"), TuneConfig(steps=60, batch_size=8, patience=0)
    jobs = [make_job(backbone, task, torch.zeros(space.size), rate=0.1) for task in tasks.values()]
    for result in ipt.tune(backbone, space, jobs, config, slots=7):
        assert result.record["last_loss"] < result.record["first_loss"], result.job.name


def test_a_job_answers_its_validation_rows_as_it_is_told_to(t5: Backbone, tasks: dict[str, Task]) -> None:
    """Free generations of an untrained backbone are never one of two words, the most likely of the two options always is."""
    space, config = make_space(t5, "prompt"), TuneConfig(steps=1, batch_size=2)
    job = make_job(t5, tasks["mood-good"], torch.zeros(space.size), rate=1e-6)
    scores = {d: next(iter(ipt.tune(t5, space, [job], config, slots=1, decoding=d))).record for d in ("options", "generate")}
    assert scores["options"]["validation"] > scores["generate"]["validation"] == 0


# --- Subspace finding ----------------------------------------------------------------------------

FIT = ipt.SubspaceConfig(dim=6, inner=13, steps=40, warmup_steps=60, tasks_per_step=5, rows_per_task=2, learning_rate=0.1)


def fit_inputs(backbone: Backbone, tasks: dict[str, Task]) -> tuple[Tensor, Tensor, list[list[Encoded]]]:
    """Return prompts of all tasks, the initial prompt that they share, and the tasks' rows."""
    initial = backbone.initial_prompt(3, seed=0)
    prompts = initial + 0.3 * (collection(initial, tasks=7) - initial) * backbone.embedding_rms
    return prompts, initial, [rows_of(backbone, task) for task in tasks.values()]


def fit(backbone: Backbone, tasks: dict[str, Task], **changes: Any) -> tuple[ipt.Subspace, list[tuple[float, float]], Tensor]:
    """Fit a subspace to prompts of all tasks; return it, (LM loss, unexplained variance) of every step, and the prompts."""
    (prompts, initial, rows), told = fit_inputs(backbone, tasks), []
    config = dataclasses.replace(FIT, **changes)
    (space,) = ipt.fit_subspaces(
        backbone,
        prompts,
        initial,
        rows,
        [config],
        on_step=lambda fits: told.append((float(fits.lm_losses[0]), float(fits.unexplained[0]))),
    )
    return space, told[1:], prompts


def unexplained(space: ipt.Subspace, prompts: Tensor) -> Tensor:
    return space.unexplained(prompts, space.back_project(space.project(prompts)))


def test_fitting_lowers_the_unexplained_variance_and_tells_both_losses(backbone: Backbone, tasks: dict[str, Task]) -> None:
    space, told, prompts = fit(backbone, tasks)
    assert len(told) == 100
    assert told[0][1] > 0.9
    assert float(unexplained(space, prompts)) < 0.6
    assert [math.isnan(lm) for lm, _ in told] == [True] * 60 + [False] * 40
    assert all(not weight.requires_grad for weight in space.weights.values())
    assert all(weight.grad is None for weight in backbone.model.parameters())


def test_subspaces_fitted_side_by_side_are_those_fitted_alone(t5: Backbone, tasks: dict[str, Task]) -> None:
    prompts, initial, rows = fit_inputs(t5, tasks)
    configs = [dataclasses.replace(FIT, dim=dim, steps=20) for dim in (6, 4)]
    for config, together in zip(configs, ipt.fit_subspaces(t5, prompts, initial, rows, configs), strict=True):
        (alone,) = ipt.fit_subspaces(t5, prompts, initial, rows, [config])
        for name, weight in alone.weights.items():
            torch.testing.assert_close(together.weights[name], weight, rtol=1e-3, atol=1e-4)


def test_a_fit_that_was_stopped_goes_on_from_its_state_to_the_same_subspace(t5: Backbone, tasks: dict[str, Task]) -> None:
    (prompts, initial, rows), stopped = fit_inputs(t5, tasks), []
    config = dataclasses.replace(FIT, steps=20)

    def stop(fits: ipt.SubspaceFits) -> None:
        if fits.step == 70:
            stopped.append({name: tensor.clone() for name, tensor in fits.state().items()})
            raise KeyboardInterrupt

    (whole,) = ipt.fit_subspaces(t5, prompts, initial, rows, [config])
    with pytest.raises(KeyboardInterrupt):
        ipt.fit_subspaces(t5, prompts, initial, rows, [config], on_step=stop)
    (resumed,) = ipt.fit_subspaces(t5, prompts, initial, rows, [config], resume=(70, stopped[0]))
    for name, weight in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], weight, rtol=0, atol=0)


def test_the_lm_loss_can_be_switched_off(t5: Backbone, tasks: dict[str, Task]) -> None:
    space, told, prompts = fit(t5, tasks, lm_loss=False)
    assert all(math.isnan(lm) for lm, _ in told)
    assert float(unexplained(space, prompts)) < 0.6


def test_the_reconstruction_loss_can_be_switched_off(t5: Backbone, tasks: dict[str, Task]) -> None:
    """Then there are no steps on it alone, alpha means nothing, and the LM loss still falls."""
    space, told, _ = fit(t5, tasks, reconstruction_loss=False, steps=60, alpha=1.0)
    other, _, _ = fit(t5, tasks, reconstruction_loss=False, steps=60, alpha=1000.0)
    assert all(torch.equal(space.weights[name], other.weights[name]) for name in space.weights)
    losses = [lm for lm, _ in told]
    assert len(losses) == 60
    assert sum(losses[-10:]) < sum(losses[:10])


def test_without_both_losses_nothing_would_be_learned_so_it_is_refused() -> None:
    with pytest.raises(IptError, match="both losses are switched off"):
        ipt.SubspaceConfig(lm_loss=False, reconstruction_loss=False)


def test_alpha_weighs_the_reconstruction_error(t5: Backbone, tasks: dict[str, Task]) -> None:
    errors = []
    for alpha in (0.01, 100.0):
        space, _, prompts = fit(t5, tasks, alpha=alpha, warmup_steps=0, steps=100)
        errors.append(float(unexplained(space, prompts)))
    assert errors[1] < errors[0]


def test_a_step_s_gradient_is_that_of_mean_task_loss_plus_alpha_times_reconstruction_error(
    t5: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step over all tasks and rows, without noise, against autograd through the whole thing at once."""
    got: list[Tensor] = []

    def record(optimizer: torch.optim.Optimizer) -> None:
        got.extend(weight.grad.clone() for weight in optimizer.param_groups[0]["params"])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adafactor, "step", record)
    with pytest.raises(KeyboardInterrupt):
        fit(t5, tasks, alpha=4.0, noise=0.0, warmup_steps=0, tasks_per_step=7, rows_per_task=99)
    monkeypatch.undo()
    prompts, initial, _ = fit_inputs(t5, tasks)
    unit = float((prompts - initial).pow(2).mean().sqrt())
    space = ipt.random_subspace(initial, unit=unit, dim=6, inner=13, seed=FIT.seed)
    weights = [weight.requires_grad_() for weight in space.weights.values()]
    vectors = space.project(prompts)
    loss = 4.0 * space.unexplained(prompts, space.back_project(vectors))
    for prompt, task in zip(space.back_project(vectors), tasks.values(), strict=True):
        rows = rows_of(t5, task)
        states, mask = t5.encoder_states(prompt.expand(len(rows), -1, -1), [row.input_ids for row in rows])
        losses = t5.answer_losses(states, mask, [row.target_ids for row in rows])
        loss = loss + losses.sum() / sum(len(row.target_ids) for row in rows) / 7
    expected = torch.autograd.grad(loss, weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_dim_larger_than_the_prompt_is_refused(t5: Backbone, tasks: dict[str, Task]) -> None:
    with pytest.raises(IptError, match="--dim 49 is larger than the prompt itself, 48 numbers: use a smaller --dim"):
        fit(t5, tasks, dim=49)


def test_a_loss_that_is_not_finite_names_dim_and_step(t5: Backbone, tasks: dict[str, Task]) -> None:
    with pytest.raises(IptError, match=r"dim 6: the loss is not finite at step 1: use a smaller"):
        fit(t5, tasks, alpha=1e39)


def test_a_fit_holds_its_subspaces_once_and_the_gradient_of_one_of_them(
    t5: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the optimiser remembers beside them is small."""
    held, between, step, optimizers = list[float](), list[float](), torch.optim.Adafactor.step, list[torch.optim.Optimizer]()

    def copies() -> float:
        weights = [weight for optimizer in optimizers for weight in optimizer.param_groups[0]["params"]]
        states = [tensor for optimizer in optimizers for state in optimizer.state.values() for tensor in state.values()]
        tensors = [*weights, *(weight.grad for weight in weights if weight.grad is not None), *states]
        return sum(t.numel() for t in tensors) / sum(w.numel() for w in weights)

    def counting(optimizer: torch.optim.Adafactor) -> None:
        step(optimizer)
        held.append(copies())

    def count(fits: ipt.SubspaceFits) -> None:
        optimizers[:] = fits.optimizers
        between.append(copies())

    monkeypatch.setattr(torch.optim.Adafactor, "step", counting)
    initial = t5.initial_prompt(50, seed=0)
    prompts = initial + torch.randn(7, *initial.shape, generator=torch.Generator().manual_seed(0))
    configs = [dataclasses.replace(FIT, dim=dim, inner=100, steps=2, warmup_steps=2) for dim in (100, 90)]
    ipt.fit_subspaces(t5, prompts, initial, [rows_of(t5, task) for task in tasks.values()], configs, on_step=count)
    assert max(between) < 1.1
    assert min(held[2:]) > 1.4
    assert max(held) < 1.7


def test_rescaling_the_code_changes_no_reconstruction(initial: Tensor) -> None:
    space, prompts = random_space(initial), collection(initial)
    scaled = ipt._unit_vectors(space, prompts)
    assert float(space.project(prompts).pow(2).mean().sqrt()) != pytest.approx(1, rel=0.05)
    assert float(scaled.project(prompts).pow(2).mean().sqrt()) == pytest.approx(1, rel=1e-5)
    before, after = (s.back_project(s.project(prompts)) for s in (space, scaled))
    torch.testing.assert_close(before, after)


def test_the_fitted_vectors_have_a_root_mean_square_of_one(t5: Backbone, tasks: dict[str, Task]) -> None:
    space, _, prompts = fit(t5, tasks)
    assert float(space.project(prompts).pow(2).mean().sqrt()) == pytest.approx(1, rel=1e-4)


def test_fitting_depends_on_the_seed_alone(t5: Backbone, tasks: dict[str, Task]) -> None:
    one, same, other = (fit(t5, tasks, warmup_steps=5, steps=5, seed=seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(one.weights[name], same.weights[name]) for name in one.weights)
    assert not torch.equal(one.weights["out.bias"], other.weights["out.bias"])


# --- Evaluation ----------------------------------------------------------------------------------


def test_relative_performance_equals_the_case_worked_by_hand() -> None:
    scores = {"a": 0.4, "b": 0.9, "c": 0.5, "d": 0.1, "no-baseline": 0.7}
    baseline = {"a": 0.8, "b": 0.6, "c": 0.0, "d": -0.2, "other": 1.0}
    result = ipt.relative_performance(scores, baseline)
    assert result["e_rel"] == pytest.approx((0.5 + 1.5) / 2)
    assert (result["n_tasks"], result["n_excluded"]) == (2, 3)
    assert result["mean_score"] == pytest.approx((0.4 + 0.9 + 0.5 + 0.1) / 4)
    assert result["mean_prompt_tuning"] == pytest.approx((0.8 + 0.6 + 0.0 - 0.2) / 4)
    assert result["ratio_of_means"] == pytest.approx(1.9 / 1.2)
    assert (result["e_rel_low"], result["e_rel_high"]) == (0.5, 1.5)


def test_with_nothing_to_divide_by_there_is_no_figure_and_no_zero() -> None:
    result = ipt.relative_performance({"a": 0.5}, {"a": 0.0})
    assert (result["n_tasks"], result["n_excluded"], result["mean_score"]) == (0, 1, 0.5)
    assert all(result[name] is None for name in ("e_rel", "e_rel_low", "e_rel_high", "ratio_of_means"))
    nothing = ipt.relative_performance({}, {"a": 1.0})
    assert nothing["e_rel"] is None and nothing["mean_score"] is None


def test_the_interval_is_a_bootstrap_s_and_always_the_same() -> None:
    rng = random.Random(2)
    scores = {f"t{n}": rng.uniform(0.5, 1.0) for n in range(40)}
    result = ipt.relative_performance(scores, dict.fromkeys(scores, 1.0))
    own = scipy.stats.bootstrap((list(scores.values()),), np.mean, method="percentile", rng=1).confidence_interval
    assert result["e_rel_low"] == pytest.approx(own.low, abs=0.01)
    assert result["e_rel_high"] == pytest.approx(own.high, abs=0.01)
    assert result == ipt.relative_performance(scores, dict.fromkeys(scores, 1.0))


@pytest.mark.parametrize(
    ("stage", "place", "same", "name"),
    [
        ("MSF", "seen", True, "T_train(MSF)"),
        ("MSF", "unseen", True, "T_test(MSF)"),
        ("IST", "seen", True, "T_train_same(IST)"),
        ("IST", "seen", False, "T_train_diff(IST)"),
        ("IST", "unseen", True, "T_test(IST)"),
        ("IST", "unseen-in", True, "T_test_in(IST)"),
        ("MSF", "unseen-out", True, "T_test_out(MSF)"),
    ],
)
def test_scores_have_the_paper_s_names(stage: str, place: str, same: bool, name: str) -> None:
    assert ipt.quantity(stage, place, same_data=same) == name


def test_the_table_keeps_apart_what_differs_and_stands_in_the_paper_s_order() -> None:
    scores = [
        ipt.Score("T_test(IST)", "a", "random", "random", 6, 100, value=0.5),
        ipt.Score("T_test(IST)", "a", "subspace", "seen", 3, 100, value=0.5),
        ipt.Score("T_test(IST)", "a", "subspace", "random", 6, 100, value=0.3),
        ipt.Score("T_test(IST)", "a", "subspace", "seen", 6, 100, value=0.4),
        ipt.Score("T_train_diff(IST)", "b", "subspace", "random", 6, 21, value=0.2),
        ipt.Score("T_train_diff(IST)", "b", "subspace", "random", 6, 13, value=0.6),
        ipt.Score("T_train(MSF)", "b", "subspace", None, 6, 100, value=0.8),
        ipt.Score("T_train(MSF)", "c", "subspace", None, 6, 100, value=0.7),
        ipt.Score("T_test(MSF)", "a", "subspace", None, 6, 100, value=0.8),
    ]
    rows = ipt.result_rows(scores, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert [(r["quantity"], r["space"], r["dim"], r["start"], r["data_seed"], r["n_tasks"]) for r in rows] == [
        ("T_train(MSF)", "subspace", 6, None, 100, 2),
        ("T_train_diff(IST)", "subspace", 6, "random", 13, 1),
        ("T_train_diff(IST)", "subspace", 6, "random", 21, 1),
        ("T_test(MSF)", "subspace", 6, None, 100, 1),
        ("T_test(IST)", "subspace", 6, "random", 100, 1),
        ("T_test(IST)", "subspace", 6, "seen", 100, 1),
        ("T_test(IST)", "subspace", 3, "seen", 100, 1),
        ("T_test(IST)", "random", 6, "random", 100, 1),
    ]
    assert rows[0]["e_rel"] == pytest.approx(0.75)


# --- Files ---------------------------------------------------------------------------------------

HEADER = {"version": ipt.FILE_VERSION, "backbone": "f" * 64, "kind": "soft-prompt", "task": "mood-good", "data_seed": 100}
CPU = torch.device("cpu")


def save_one(folder: Path, **changes: Any) -> tuple[ipt.Cache, Path, Tensor]:
    cache, tensor = ipt.Cache(folder, "f" * 64), torch.arange(15.0).reshape(3, 5)
    header = HEADER | changes
    cache.save(header, {"validation": 0.5, "validation_loss": 1.0}, {"soft_prompt": tensor})
    return cache, cache.path(header), tensor


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    cache, path, tensor = save_one(tmp_path)
    (found,) = cache.find({"kind": "soft-prompt", "data_seed": 100}, ["mood-good"])
    assert (found.path, found.header, found.record["validation"]) == (path, HEADER, 0.5)
    assert torch.equal(ipt.read_tensors(path, {"soft_prompt": (3, 5)}, CPU)["soft_prompt"], tensor)
    assert cache.lacking([HEADER, HEADER | {"data_seed": 21}]) == [1]


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (save_one(tmp_path / name)[1] for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    strided = torch.arange(15.0).reshape(3, 5).T.contiguous().T
    record = {"validation_loss": 1.0, "validation": 0.5}
    ipt.write_file(tmp_path / "three", dict(reversed(HEADER.items())), record, {"soft_prompt": strided})
    assert (tmp_path / "three").read_bytes() == first.read_bytes()


def test_a_file_s_tensors_can_be_read_without_ipt(tmp_path: Path) -> None:
    _, path, tensor = save_one(tmp_path)
    assert torch.equal(safetensors.torch.load_file(path)["soft_prompt"], tensor)
    with safetensors.safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["ipt"])["header"] == HEADER


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense that is no safetensors file",
        safetensors.torch.save({"soft_prompt": torch.zeros(3, 5)}),
        safetensors.torch.save({"soft_prompt": torch.zeros(3, 5)}, {"ipt": "{"}),
        safetensors.torch.save({"soft_prompt": torch.zeros(3, 5)}, {"ipt": "[]"}),
        safetensors.torch.save({"soft_prompt": torch.zeros(3, 5)}, {"ipt": '{"header": [], "record": {}}'}),
    ],
)
def test_a_foreign_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    cache, path, _ = save_one(tmp_path)
    path.write_bytes(content)
    with pytest.raises(
        IptError, match=r"is not a file of ipt, or is damaged .*: remove it, and the command makes it anew"
    ) as caught:
        cache.find({"kind": "soft-prompt"})
    assert str(path) in str(caught.value)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    _, path, _ = save_one(tmp_path)
    whole = path.read_bytes()
    for size in (4, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(IptError, match="damaged"):
            ipt.read_metadata(path)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    cache, path, _ = save_one(tmp_path, version=ipt.FILE_VERSION + 1)
    with pytest.raises(IptError, match=f"{path.name} has file version 2, expected 1: remove it, or use the ipt that made it"):
        cache.find({"kind": "soft-prompt"})


def test_a_file_of_another_backbone_is_refused(tmp_path: Path) -> None:
    cache, path, _ = save_one(tmp_path, backbone="0" * 64)
    with pytest.raises(IptError, match=f"{path.name} was made with another backbone .00000000, expected ffffffff.: remove it"):
        cache.find({"kind": "soft-prompt"})


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [
        ({"soft_prompt": (5, 3)}, torch.float32),
        ({"intrinsic_vector": (3, 5)}, torch.float32),
        ({"soft_prompt": (3, 5)}, torch.float16),
    ],
)
def test_tensors_other_than_expected_are_refused(tmp_path: Path, shapes: Any, dtype: torch.dtype) -> None:
    path = tmp_path / "file.safetensors"
    ipt.write_file(path, HEADER, {}, {"soft_prompt": torch.zeros(3, 5, dtype=dtype)})
    with pytest.raises(IptError, match=r"file\.safetensors holds the tensors .*soft_prompt.*expected"):
        ipt.read_tensors(path, shapes, CPU)


def test_tensors_that_hold_what_is_no_number_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    ipt.write_file(path, HEADER, {}, {"soft_prompt": torch.full((3, 5), math.nan)})
    with pytest.raises(IptError, match=r"file\.safetensors"):
        ipt.read_tensors(path, {"soft_prompt": (3, 5)}, CPU)


def test_a_write_that_fails_leaves_nothing_behind_and_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(IptError, match=r"cannot write .*taken: .*; name another folder with --cache"):
        ipt.write_bytes(tmp_path / "taken", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(IptError, match="cannot write"):
        ipt.write_bytes(tmp_path / "file" / "below", b"content")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_only_files_whose_header_has_the_wanted_values_are_found(tmp_path: Path) -> None:
    for seed, task in ((100, "mood-good"), (21, "mood-good"), (100, "count-next")):
        cache, _, _ = save_one(tmp_path, data_seed=seed, task=task)

    def found(wanted: dict[str, Any], tasks: Iterable[str] | None = None) -> list[tuple[str, int]]:
        return [(a.header["task"], a.header["data_seed"]) for a in cache.find({"kind": "soft-prompt", **wanted}, tasks)]

    assert sorted(found({})) == [("count-next", 100), ("mood-good", 21), ("mood-good", 100)]
    assert found({"data_seed": 100}) == [("count-next", 100), ("mood-good", 100)]
    assert found({"data_seed": 100}, iter(["mood-good", "mood"])) == [("mood-good", 100)]
    assert found({}, []) == []
    assert cache.find({"kind": "subspace"}) == []


def test_the_best_of_a_grid_has_the_highest_validation_score_and_among_equals_the_lowest_loss() -> None:
    records = [(0.5, 1.0, "x"), (0.7, 2.0, "x"), (0.7, 1.5, "x"), (0.1, 9.0, "y")]
    artifacts = [
        ipt.Artifact(Path(str(n)), {"task": task, "other": n}, {"validation": score, "validation_loss": loss})
        for n, (score, loss, task) in enumerate(records)
    ]
    assert [a.path.name for a in ipt.best_of_grid(artifacts, ["task"])] == ["2", "3"]
    assert len(ipt.best_of_grid(artifacts, ["task", "other"])) == 4


def test_a_digest_changes_with_every_value_and_not_with_their_order() -> None:
    assert ipt.digest({"a": 1, "b": 2}) == ipt.digest({"b": 2, "a": 1}) != ipt.digest({"a": 1, "b": 3})
    one = Example("in", ("a", "b"), ("c",))
    others = [Example("IN", ("a", "b"), ("c",)), Example("in", ("a",), ("c",)), Example("in", ("a", "b"), ())]
    assert len({ipt.rows_digest([example]) for example in [one, *others]}) == 4


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IPT_CACHE", str(tmp_path / "own"))
    assert ipt.user_cache() == tmp_path / "own"
    monkeypatch.delenv("IPT_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ipt.user_cache() == tmp_path / "xdg" / "ipt"


# --- Experiment ----------------------------------------------------------------------------------


@pytest.fixture
def experiment(t5_folder: Path, tasks_file: Path, tmp_path: Path) -> ipt.Experiment:
    return ipt.Experiment(
        backbone=str(t5_folder), tasks_file=tasks_file, split="tiny", prompt_length=3, shots=4, test_rows=10, cache=tmp_path, device="cpu"
    )  # fmt: skip


def test_a_split_names_its_seen_and_unseen_tasks(experiment: ipt.Experiment) -> None:
    assert experiment.named("seen") == list(experiment.tasks)[:5]
    assert experiment.named("unseen") == ["even-or-good", "day-then-count"]
    with pytest.raises(IptError, match="'tinny'; did you mean 'tiny'"):
        _ = dataclasses.replace(experiment, split="tinny").places


def test_what_fits_into_memory_is_remembered_for_the_next_command(experiment: ipt.Experiment) -> None:
    experiment.remember_budgets()
    assert not list(experiment.store.folder.glob("budgets/*"))
    experiment.model.budget.tokens, experiment.model.budget.most, experiment.model.answer_budget.tokens = 123, 456, 789
    experiment.remember_budgets()
    again = dataclasses.replace(experiment).model
    assert again.budget == ipt.Budget(123, 456)
    assert again.answer_budget == ipt.Budget(789)


def test_a_job_s_header_changes_with_all_that_its_result_depends_on(experiment: ipt.Experiment) -> None:
    def header(tuning: ipt.Tuning | None = None, task: str = "mood-good", seed: int = 100, **changes: Any) -> str:
        changed = dataclasses.replace(experiment, **changes)
        (job,) = ipt.collect_jobs(changed, tuning or ipt.Tuning(), [task], seed)
        return ipt.digest(job.header)

    tunings = [{"steps": 13}, {"batch_size": 5}, {"learning_rate": [0.2]}, {"evaluations": 4}, {"patience": 2}]
    experiments = [{"prompt_length": 4}, {"shots": 5}, {"decoding": "generate"}, {"max_length": 30}, {"seed": 1}]
    headers = [header(), header(task="animal-class"), header(seed=21)]
    headers += [header(ipt.Tuning(**change)) for change in tunings]
    headers += [header(**change) for change in experiments]
    assert len(set(headers)) == len(headers) == 13
    # Neither test rows nor how many jobs run at once tell on what is tuned.
    assert header() == header(test_rows=7) == header(ipt.Tuning(slots=3))


def test_a_grid_of_learning_rates_is_a_job_for_each(experiment: ipt.Experiment) -> None:
    jobs = ipt.collect_jobs(experiment, ipt.Tuning(learning_rate=[0.1, 0.3]), ["mood-good", "count-next"])
    found = [(job.header["task"], job.header["learning_rate"]) for job in jobs]
    assert found == [("mood-good", 0.1), ("mood-good", 0.3), ("count-next", 0.1), ("count-next", 0.3)]


@pytest.mark.parametrize(("field", "value"), [("decoding", "beam"), ("precision", "fp8")])
def test_an_option_with_few_values_refuses_others(field: str, value: str) -> None:
    with pytest.raises(IptError, match=f"--{field} is '{value}', expected"):
        ipt.Experiment(**{field: value})


def test_intrinsic_vectors_start_by_the_paper_s_rule_or_like_the_seen_tasks_vectors(experiment: ipt.Experiment) -> None:
    initial = experiment.prompt_space.initial_prompt
    prompts = collection(initial, tasks=5, rank=2)
    for job, prompt in zip(ipt.collect_jobs(experiment, ipt.Tuning(), experiment.named("seen")), prompts, strict=True):
        experiment.store.save(job.header, {"validation": 0.5, "validation_loss": 1.0}, {"soft_prompt": prompt})
    space = random_space(initial, dim=20)
    seen = space.project(prompts)

    def starts(start: str) -> Tensor:
        jobs = [
            job
            for seed in range(40)
            for job in ipt.tune_jobs(experiment, ipt.Tuning(), experiment.tasks, data_seed=seed, subspace=space, start=start)
        ]
        return torch.stack([job.start for job in jobs])

    drawn = starts("random")
    assert drawn.shape == (280, 20)
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.05)
    assert len(drawn.unique(dim=0)) == 280
    near = starts("seen")
    torch.testing.assert_close(near.mean(0), seen.mean(0), rtol=0, atol=0.25 * float(seen.std(0).max()))
    covariance = torch.cov(seen.T, correction=0)
    assert float((torch.cov(near.T) - covariance).norm() / covariance.norm()) < 0.25


def test_a_job_s_cost_counts_prompt_text_steps_and_validation_rows(experiment: ipt.Experiment) -> None:
    def cost(task: str, **changes: Any) -> float:
        settings = ipt.Tuning(**{"steps": 10, "batch_size": 2, "evaluations": 1} | changes)
        return ipt.collect_jobs(experiment, settings, [task])[0].cost

    train = experiment.sample("mood-good", 100).train
    length = 3 + sum(len(e.input) for e in train) / len(train) / 4
    assert cost("mood-good") == pytest.approx(length * (2 * 10 * 2 + 8))
    assert cost("mood-good", steps=20) == pytest.approx(length * (2 * 20 * 2 + 8))
    assert cost("mood-good", evaluations=2) == pytest.approx(length * (2 * 10 * 2 + 2 * 8))


def test_a_plan_s_time_comes_from_steps_that_change_nothing(experiment: ipt.Experiment) -> None:
    jobs = ipt.collect_jobs(experiment, ipt.Tuning(steps=5), experiment.tasks)
    pace = ipt.measure_pace(experiment, jobs[:3], CONFIG)
    assert 0 < pace.step < 5
    assert 0 < pace.answer < 5
    assert not experiment.store.folder.exists()
