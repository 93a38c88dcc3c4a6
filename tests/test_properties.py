"""What holds for any input, with inputs found by hypothesis."""

from __future__ import annotations

import itertools
import math
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intrinsic_prompt_tuning.backbone import Backbone
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.evaluation import LEAST_BASELINE, dimensions_needed, relative_performance
from intrinsic_prompt_tuning.files import FILE_VERSION, read_file, write_file
from intrinsic_prompt_tuning.metrics import METRICS, macro_f1, pearson
from intrinsic_prompt_tuning.passes import Budget, pass_sizes
from intrinsic_prompt_tuning.spaces import Space, untrained_space
from intrinsic_prompt_tuning.tasks import Example, Task, find_few_shot_tasks, load_tasks
from intrinsic_prompt_tuning.tasks.folders import parse_input
from intrinsic_prompt_tuning.tasks.splits import read_split
from intrinsic_prompt_tuning.tuning import minibatch

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
shapes = st.dictionaries(
    st.text("abc._", min_size=1, max_size=5), st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=3
)


@given(header=st.dictionaries(st.text(), json_values, max_size=4), record=st.dictionaries(st.text(), json_values), shapes=shapes)
def test_a_file_comes_back_as_it_was_and_the_same_content_gives_the_same_bytes(header: Any, record: Any, shapes: Any) -> None:
    header["version"] = FILE_VERSION
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "deep" / "one", Path(folder) / "two"
        write_file(one, header, record, tensors)
        write_file(two, dict(reversed(header.items())), record, dict(reversed(tensors.items())))
        assert one.read_bytes() == two.read_bytes()
        *told, back = read_file(one)
        assert told == [header, record]
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)
        assert sorted(path.name for path in Path(folder).rglob("*") if path.is_file()) == ["one", "two"]


@given(content=st.binary(max_size=200))
def test_no_foreign_bytes_are_ever_taken_for_a_file_or_end_in_another_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "file").write_bytes(content)
        with pytest.raises(IptError):
            read_file(Path(folder) / "file")


@given(header=json_values.filter(lambda value: not isinstance(value, dict)))
def test_a_header_that_is_no_mapping_is_refused(header: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_file(Path(folder) / "file", header, {}, {"x": torch.zeros(2)})
        with pytest.raises(IptError):
            read_file(Path(folder) / "file")


@settings(max_examples=200)
@given(position=st.integers(0, 10**6), new=st.integers(0, 255))
def test_a_file_of_which_any_byte_is_another_is_refused_or_reads_as_it_was(position: int, new: int) -> None:
    header = {"version": FILE_VERSION, "kind": "soft-prompt", "tuning": {"steps": 5, "rate": 1e-05}, "chat": None}
    record, tensors = {"validation": 0.5, "name": "Ünder"}, {"b": torch.arange(6.0).reshape(2, 3), "a": torch.zeros(1)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write_file(path, header, record, tensors)
        content = bytearray(path.read_bytes())
        content[position % len(content)] = new
        path.write_bytes(content)
        try:
            *told, back = read_file(path)
        except IptError:
            return
        assert told == [header, record]
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@given(rows=st.integers(1, 40), size=st.integers(1, 17), seed=st.integers(0, 2**32), epochs=st.integers(1, 3))
def test_minibatches_visit_every_row_once_per_epoch(rows: int, size: int, seed: int, epochs: int) -> None:
    steps = -(-rows * epochs // size)
    visited = [row for step in range(steps) for row in minibatch(rows, size, seed, step)]
    for epoch in range(epochs):
        assert sorted(visited[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert minibatch(rows, size, seed, steps) == minibatch(rows, size, seed, steps)


@given(
    length=st.integers(1, 4), hidden=st.integers(1, 6), dim=st.integers(1, 9), inner=st.integers(1, 7), tasks=st.integers(1, 5)
)
def test_projecting_and_back_keeps_the_shape(length: int, hidden: int, dim: int, inner: int, tasks: int) -> None:
    space = untrained_space(torch.randn(length, hidden), unit=0.5, dim=dim, inner=inner, seed=0)
    prompts = torch.randn(tasks, length, hidden)
    vectors = space.project(prompts)
    assert vectors.shape == (tasks, dim) == (tasks, space.dim)
    assert space.back_project(vectors).shape == prompts.shape
    whole = Space(torch.randn(length, hidden), 0.5)
    assert whole.back_project(torch.randn(tasks, whole.dim)).shape == prompts.shape


@given(lengths=st.lists(st.integers(1, 50), max_size=60), tokens=st.integers(1, 300), most=st.integers(1, 9))
def test_the_budget_does_every_row_once_however_often_memory_runs_out(lengths: list[int], tokens: int, most: int) -> None:
    done: list[int] = []
    tried: list[list[int]] = []

    def work(numbers: list[int]) -> None:
        tried.append(numbers)
        if len(numbers) > most:
            raise torch.OutOfMemoryError
        done.extend(numbers)

    budget = Budget(tokens)
    budget.in_passes([(length, 0) for length in lengths], work)
    assert sorted(done) == list(range(len(lengths)))
    assert [lengths[row] for row in done] == sorted(lengths, reverse=True)
    assert all(len(numbers) == 1 or len(numbers) * lengths[numbers[0]] <= tokens for numbers in tried)
    assert budget.tokens <= tokens


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), tokens=st.integers(1, 40), overhead=st.integers(1, 80))
def test_no_other_way_to_cut_rows_into_passes_costs_less(lengths: list[int], tokens: int, overhead: int) -> None:
    lengths = sorted(lengths, reverse=True)

    def cost(sizes: Sequence[int]) -> float:
        starts = itertools.accumulate(sizes, initial=0)
        padded = [size * lengths[start] for size, start in zip(sizes, starts, strict=False)]
        fits = all(size == 1 or own <= tokens for size, own in zip(sizes, padded, strict=True))
        return sum(padded) + len(sizes) * overhead if fits else math.inf

    bars = itertools.product((False, True), repeat=len(lengths) - 1)
    cuts = [[0, *(n for n, bar in enumerate(own, 1) if bar), len(lengths)] for own in bars]
    ways = [[stop - start for start, stop in itertools.pairwise(cut)] for cut in cuts]
    sizes = pass_sizes(lengths, tokens, overhead)
    assert sum(sizes) == len(lengths)
    assert cost(sizes) == pytest.approx(min(map(cost, ways)))


labels = st.sampled_from(["red", "green", "blue", "never right"])


@given(pairs=st.lists(st.tuples(labels, labels), min_size=1, max_size=30), order=st.permutations(range(4)))
def test_macro_f1_does_not_move_when_labels_are_renamed(pairs: list[tuple[str, str]], order: list[int]) -> None:
    names = ["red", "green", "blue", "never right"]
    renamed = {name: f"label {number}" for name, number in zip(names, order, strict=True)}
    before = macro_f1([p for p, _ in pairs], [(t,) for _, t in pairs])
    after = macro_f1([renamed[p] for p, _ in pairs], [(renamed[t],) for _, t in pairs])
    assert after == pytest.approx(before)


@pytest.mark.parametrize("metric", METRICS)
@given(rows=st.lists(st.tuples(st.text(), st.lists(st.text(), min_size=1, max_size=3)), min_size=1, max_size=6))
def test_a_score_lies_in_its_range_and_being_right_is_the_best(metric: str, rows: list[tuple[str, list[str]]]) -> None:
    references = [tuple(refs) for _, refs in rows]
    score = METRICS[metric]([prediction for prediction, _ in rows], references)
    right = METRICS[metric]([refs[0] for refs in references], references)
    assert (-1 if "Correlation" in metric else 0) - 1e-9 <= score <= 1 + 1e-9
    if metric in ("ACC", "Classification-F1", "EM", "QA-F1"):
        assert right == pytest.approx(1)


numbers = st.floats() | st.sampled_from([0.0, 1.0, 1e200, -1e200, 1.7e308, -1.7e308, 5e-324]) | st.integers()


@given(rows=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6))
def test_a_correlation_of_any_numbers_lies_in_its_range(rows: list[tuple[float, float]]) -> None:
    assert -1 <= pearson([str(a) for a, _ in rows], [(str(b),) for _, b in rows]) <= 1


scores_of_a_task = st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 1))


@given(rows=st.lists(scores_of_a_task, min_size=1, max_size=20))
def test_the_interval_holds_the_mean_and_every_task_is_counted(rows: list[tuple[float, float, float]]) -> None:
    scores, baseline, floor = ({str(n): row[side] for n, row in enumerate(rows)} for side in range(3))
    result = relative_performance(scores, baseline, floor)
    assert result["n_tasks"] + result["n_excluded"] == len(rows)
    values = [score / base for score, base, _ in rows if base > LEAST_BASELINE]
    assert result["n_tasks"] == len(values)
    if values:
        assert result["e_rel"] == pytest.approx(sum(values) / len(values))
        assert min(values) - 1e-9 <= result["median_ratio"] <= max(values) + 1e-9
    else:
        assert result["e_rel"] is None and result["median_ratio"] is None
    if len(values) > 1:
        assert min(values) - 1e-9 <= result["e_rel_low"] <= result["e_rel_high"] <= max(values) + 1e-9
    else:
        assert result["e_rel_low"] is None and result["e_rel_high"] is None


@given(rows=st.lists(scores_of_a_task, min_size=1, max_size=20), shift=st.floats(-1, 1))
def test_the_gain_does_not_move_when_every_score_of_a_task_does(rows: list[tuple[float, float, float]], shift: float) -> None:
    sides = [{str(n): row[side] for n, row in enumerate(rows)} for side in range(3)]
    moved = [{task: value + (shift if task == "0" else 0) for task, value in side.items()} for side in sides]
    before, after = relative_performance(*sides), relative_performance(*moved)
    if before["gain"] is not None and after["gain"] is not None:
        gained = sum(base - floor for _, base, floor in rows)
        assert after["gain"] * gained == pytest.approx(before["gain"] * gained, abs=1e-6)
    if before["gain_low"] is not None and before["gain_high"] is not None:
        assert before["gain_low"] <= before["gain_high"]


@given(points=st.dictionaries(st.integers(1, 500), st.floats(-2, 2), max_size=6), order=st.randoms(use_true_random=False))
def test_the_dimensions_needed_lie_among_those_that_were_run_and_none_before_would_do(
    points: dict[int, float], order: random.Random
) -> None:
    rows = [{"space": "random", "quantity": "T_test(IST)", "start": "random", "dim": d, "gain": g} for d, g in points.items()]
    order.shuffle(rows)
    needed = dimensions_needed(rows).get("random", {}).get("T_test(IST)")
    enough = [dim for dim, gain in sorted(points.items()) if gain >= 0.9]
    if not enough:
        assert needed is None
    else:
        before = max((dim for dim in points if dim < enough[0]), default=enough[0])
        assert needed is not None and before - 1e-6 <= needed <= enough[0] + 1e-6


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_row_s_loss_alone_equals_its_loss_in_a_padded_batch(request: pytest.FixtureRequest, name: str, seed: int) -> None:
    backbone: Backbone = request.getfixturevalue(name)
    rng = random.Random(seed)
    words = [word for word in backbone.tokenizer.get_vocab() if not word.startswith("<")]
    draw: Callable[[int], str] = lambda most: " ".join(rng.choices(words, k=rng.randint(1, most)))  # noqa: E731
    examples = [Example(draw(15), (draw(6),)) for _ in range(5)]
    rows = [(rng.randrange(3), row) for row in backbone.encode(examples, prompt_length=2)]
    prompts = torch.randn(3, 2, backbone.hidden, generator=torch.Generator().manual_seed(seed)) * backbone.embedding_rms
    together, alone = backbone.answer(prompts, rows), [backbone.answer(prompts, [row])[0] for row in rows]
    assert [a.loss for a in together] == pytest.approx([a.loss for a in alone], rel=1e-5, abs=1e-5)


# --- What others write: IPT_EXAMPLES=20000 pytest tests/test_properties.py -k others_write tries more ----------------

others_write = settings(max_examples=int(os.environ.get("IPT_EXAMPLES", "60")))
yaml_pieces = st.sampled_from([
    "tasks:", "worlds:", "seen:", "unseen:", " t: ", "\n", "\n  ", "\n    ", "{", "}", "[", "]", ", ", ": ", "- ", "&a ", "*a", "<<: *a", "!!python/name:os.system ",
    "!!binary ", "!!set ", "? ", "| ", "> ", "'", '"', "\\uD800", "dataset: d", "template: '{a}'", "answer: b", "metric: ACC", "world: small", "question: mood good",
    "kind: classification", "keep: ", "reader: ", "transform: ", "merge", "verbalizer: ", "yes", "0x1", "1:59:59", "2020-01-01", ".inf", "~", "#", "%YAML 1.1", "---", "...", "\t",
    "\0", "\ufeff", "é",
])  # fmt: skip
yaml_texts = st.lists(yaml_pieces | st.text(max_size=5), max_size=40).map("".join) | st.text(max_size=60)
json_pieces = st.sampled_from([
    '{"input": "i", ', '"output": "o"', '"options": ["o", "p"]', '"answers": ["o"]', '"tail": 1', '"task": "t"', ", ", "}", "{", "[", "]", "\n", "\r\n", "\r", "\t", "NaN", "1e999",
    "-Infinity", "null", "true", '"\\ud800"', '"\\u0000"', "\0", "\ufeff", '"input": ', "\u2028", "1" * 400, "[" * 400,
])  # fmt: skip
row_bytes = st.lists(json_pieces | st.text(max_size=5), max_size=30).map(
    lambda parts: "".join(parts).encode(errors="ignore")
) | st.binary(max_size=80)


def read_or_refused(read: Callable[[], Any]) -> tuple[Any, str]:
    """Return what was read, or in which words of one line it was refused."""
    try:
        return read(), ""
    except IptError as error:
        words = str(error)
    assert words and "\n" not in words
    return None, words


@others_write
@given(text=yaml_texts)
def test_any_tasks_file_or_split_that_others_write_is_read_or_refused_by_name(tasks: dict[str, Task], text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "own.yaml"
        file.write_text(text, encoding="utf-8", errors="replace")
        for read in (lambda: load_tasks(file), lambda: read_split(file, tasks)):
            found, refused = read_or_refused(read)
            assert isinstance(found, dict) or "own.yaml" in refused
        assert [path.name for path in Path(folder).iterdir()] == ["own.yaml"]


@others_write
@given(content=row_bytes, suffix=st.sampled_from(["tsv", "jsonl"]))
def test_any_few_shot_file_that_others_write_is_rows_of_text_or_refused_by_name(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "t").mkdir()
        for part in ("train", "dev", "test"):
            (Path(folder) / "t" / f"t_16_13_{part}.{suffix}").write_bytes(content)
        sample, refused = read_or_refused(lambda: find_few_shot_tasks(Path(folder), {})["t"].sample(13, 16, None))
        assert sample or "'t'" in refused or "t_16_13_train" in refused
        for row in itertools.chain(*(sample or ())):
            assert row.answers and "".join([row.input, *row.answers, *row.options]).encode() is not None


@others_write
@given(line=row_bytes)
def test_any_input_line_that_others_write_is_text_or_refused(tasks: dict[str, Task], line: bytes) -> None:
    found, refused = read_or_refused(lambda: parse_input(tasks, "mood-good", line.decode(errors="ignore")))
    if found:
        assert found[0] in tasks and "".join([found[1].input, *found[1].options]).encode() is not None
    else:
        assert refused.startswith("expected text") or refused.endswith("was not named with --task")
