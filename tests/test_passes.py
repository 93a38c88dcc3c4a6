"""How rows are cut into passes, and what happens when memory runs out or is left."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from intrinsic_prompt_tuning import passes
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.passes import Budget, available_memory, first_budgets, pass_sizes

CPU = torch.device("cpu")


def of_length(*lengths: int) -> list[tuple[int, int]]:
    """Return the widths of rows of so many tokens."""
    return [(length - 2, 2) for length in lengths]


def test_the_budget_halves_when_memory_runs_out_and_still_does_every_row_once() -> None:
    budget, done, sizes = Budget(100), [], []

    def work(numbers: list[int]) -> None:
        sizes.append(len(numbers))
        if len(numbers) > 3:
            raise torch.OutOfMemoryError
        done.extend(numbers)

    budget.in_passes(of_length(10, 9, 11, 10, 8, 10, 7, 10, 10, 10, 10), work)
    assert sorted(done) == list(range(11))
    assert done[0] == 2  # the longest first
    assert sizes[:3] == [1, 10, 5]  # none is padded to the longest


def test_the_budget_grows_while_memory_is_left_but_never_again_to_what_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "memory_share", lambda: 0.1)
    budget, sizes = Budget(20), []

    def work(numbers: list[int]) -> None:
        sizes.append(len(numbers))
        if len(numbers) > 10:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    budget.in_passes(of_length(*[10] * 100), work)
    assert sizes[:5] == [2, 4, 8, 16, 8]
    assert set(sizes[5:-1]) == {8}
    assert (budget.tokens, budget.most) == (80, 160)


def test_a_pass_that_is_small_because_rows_differ_tells_less_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "memory_share", lambda: 0.3)
    cases = [
        ([10] * 30, 200, 400),  # a full pass, 0.3 of the memory: twice as much fits
        ([100] + [10] * 20, 400, 400),  # two passes, neither of them near full: perhaps all of it
        ([90] + [10] * 20, 2000, 2000),  # all would fit into one pass, two of them hold less padding
        ([900, 900], 100, 400),  # rows longer than a pass, twice
        ([10], 100, 100),
    ]
    for lengths, tokens, then in cases:
        budget = Budget(tokens)
        budget.in_passes(of_length(*lengths), lambda numbers: None)
        assert (budget.tokens, budget.most) == (then, math.inf), lengths


def test_on_a_cpu_the_budget_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    budget = Budget(20)
    budget.in_passes(of_length(*[10] * 100), lambda numbers: None)
    assert (passes.memory_share(), budget) == (1, Budget(20))


def test_on_a_gpu_the_smaller_a_model_the_fewer_its_passes() -> None:
    rows = of_length(*range(70, 370))
    counts = []
    for millions in (100, 500, 1000, 7000):
        forward_backward, forward = first_budgets(gpu_model(millions * 10**6))
        assert forward_backward.overhead == forward.overhead
        done = list[list[int]]()
        forward.in_passes(rows, done.append)
        assert sorted(row for own in done for row in own) == list(range(len(rows)))
        counts.append(len(done))
    assert counts[0] == 1 < counts[1] <= counts[2] == counts[3]  # a large model's passes have a fixed cost, too


def gpu_model(parameters: int) -> Any:
    """Return what is asked of a model on a GPU."""
    return SimpleNamespace(device=SimpleNamespace(type="cuda"), num_parameters=lambda: parameters)


def test_where_neighbours_must_change_no_bit_only_rows_of_one_block_share_a_pass() -> None:
    widths, passes_of = [(17, 2), (40, 3), (31, 5), (16, 12), (15, 2), (33, 4)], list[list[int]]()
    Budget(1000, by_block=True).in_passes(widths, passes_of.append)
    assert passes_of == [[1, 5], [3], [2, 0], [4]]
    assert list(map(passes.block, (1, 11, 12, 15, 16, 31, 32))) == [-1, -1, 0, 0, 1, 1, 2]


def test_no_rows_need_no_pass() -> None:
    Budget(20).in_passes([], lambda numbers: pytest.fail("there is nothing to do"))
    assert pass_sizes([], 20, 1) == []


def test_another_error_than_lack_of_memory_is_not_hidden() -> None:
    def work(numbers: list[int]) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Budget(100).in_passes(of_length(*[10] * 10), work)


def test_a_row_that_does_not_fit_alone_is_an_error_that_says_what_to_do() -> None:
    def work(numbers: list[int]) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(IptError, match=r"one row of 40 tokens does not fit into memory: shorten it with --max-length"):
        Budget(1000).in_passes(of_length(30, 40), work)


def test_what_is_padded_stands_on_the_left_and_the_mask_says_what_is_real() -> None:
    ids, real = passes.padded([[5, 6, 7], [8], []], CPU)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
    assert passes.padded([[5], [6, 7]], CPU, least=4)[0].tolist() == [[5, 0, 0, 0], [6, 7, 0, 0]]
    assert real.tolist() == [[True, True, True], [True, False, False], [False, False, False]]


@pytest.mark.parametrize(("longest", "before", "width"), [(8, 0, 8), (9, 0, 16), (3, 5, 3), (4, 5, 11), (1, 100, 4)])
def test_on_a_gpu_padding_makes_the_whole_width_a_multiple_of_8(
    monkeypatch: pytest.MonkeyPatch, longest: int, before: int, width: int
) -> None:
    monkeypatch.setattr(passes, "to_device", lambda values, device: torch.as_tensor(values))
    gpu: Any = SimpleNamespace(type="cuda")
    ids, real = passes.padded([[1] * longest, [1]], gpu, before=before)
    assert ids.shape == (2, width) and real.shape == (2, before + width)
    assert real.sum(1).tolist() == [before + longest, before + 1] and real[:, :before].all()
    assert (before + width) % 8 == 0


def test_numbers_reach_a_device_as_they_are() -> None:
    assert passes.to_device([1, 2], CPU).tolist() == [1, 2]
    assert passes.to_device(np.array([True, False]), CPU).dtype == torch.bool
    assert passes.to_device(torch.tensor([0.5]), CPU).dtype == torch.float32


@pytest.mark.parametrize(
    ("environment", "share"), [({}, 1), ({"WORLD_SIZE": "4"}, 4), ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "2"}, 2)]
)
def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], share: int) -> None:
    told = "MemTotal:  900 kB\nMemFree:  10 kB\nMemAvailable:  4000 kB\n"
    monkeypatch.setattr(passes.Path, "read_text", lambda path, encoding: told)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert available_memory(CPU) == 4096000 / share

    gpu: Any = SimpleNamespace(type="cuda")
    about = SimpleNamespace(total_memory=80)
    for name, value in {
        "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_properties": about, "mem_get_info": (40, 80),
        "max_memory_allocated": 8, "reset_peak_memory_stats": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert (passes.memory_share(), available_memory(gpu)) == (0.1 * share, 40 / share)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert available_memory(gpu) == 40 / max(1, share / 2)
