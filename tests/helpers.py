"""What several test files make: rows, prompts, spaces and jobs of the small world, and a spy on what is asked of the device."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ipt
from intrinsic_prompt_tuning.backbone import Backbone, Encoded
from intrinsic_prompt_tuning.passes import Budget
from intrinsic_prompt_tuning.reporter import Reporter
from intrinsic_prompt_tuning.spaces import Space, untrained_space
from intrinsic_prompt_tuning.tasks import TASKS_FILE, Example, Task
from intrinsic_prompt_tuning.tasks.checks import read_mapping
from intrinsic_prompt_tuning.tasks.hub import HubRow, read_hub_row
from intrinsic_prompt_tuning.tuning import Job

REAL = Path(os.environ.get("IPT_CROSSFIT", Path(ipt.__file__).resolve().parent.parent / "shared" / "crossfit"))
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real few-shot files in {REAL}; set IPT_CROSSFIT")


@cache
def hub_rows() -> dict[str, HubRow]:
    """Return the rows of tasks.yaml that are of data sets."""
    rows = read_mapping(TASKS_FILE, "tasks")["tasks"]
    return {name: read_hub_row(name, row, TASKS_FILE) for name, row in rows.items() if "world" not in row}


class Listener(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.sentences: list[str] = []

    def say(self, text: str) -> None:
        self.sentences.append(text)


def like(backbone: Backbone, *, lm: Any = None, budget: Budget | None = None, answer_budget: Budget | None = None) -> Backbone:
    """Return a backbone with another model or other budgets."""
    own, answers = budget or replace(backbone.budget), answer_budget or replace(backbone.answer_budget)
    return replace(backbone, lm=lm or backbone.lm, budget=own, answer_budget=answers)


def rows_of(
    backbone: Backbone, task: Task, *, seed: int = 100, part: str = "train", length: int = 3, shots: int = 4
) -> list[Encoded]:
    return backbone.encode(getattr(task.sample(seed, shots, 11), part), prompt_length=length)


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


def random_prompts(backbone: Backbone, tasks: int, length: int = 3, seed: int = 0) -> Tensor:
    noise = torch.randn(tasks, length, backbone.hidden, generator=torch.Generator().manual_seed(seed))
    return noise * backbone.embedding_rms


def summed_losses(backbone: Backbone, prompt: Tensor, rows: Sequence[Encoded]) -> Tensor:
    """Return the losses of rows' answers behind one prompt, in one pass, each summed over its tokens."""
    begun = backbone.lm.begin(prompt.expand(len(rows), -1, -1), [row.input_ids for row in rows])
    return backbone.lm.text_losses(begun, range(len(rows)), [row.target_ids for row in rows])


def collection(initial: Tensor, tasks: int = 11, rank: int = 5, seed: int = 0) -> Tensor:
    """Return soft prompts whose differences to the initial one lie near a space of few dimensions."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tasks, rank, generator=g) @ torch.randn(rank, initial.numel(), generator=g)
    noise = 0.1 * torch.randn(tasks, initial.numel(), generator=g)
    return initial + 3 * (mixed + noise).unflatten(1, initial.shape)


def make_space(backbone: Backbone, kind: str) -> Space:
    initial = backbone.initial_prompt(3, seed=0)
    if kind == "prompt":
        return Space(initial, backbone.embedding_rms)
    return untrained_space(initial, unit=2 * backbone.embedding_rms, dim=6, inner=13, seed=1)


def make_job(
    backbone: Backbone, task: Task, theta: Tensor, *, rate: float = 0.1, seed: int = 100, metric: str | None = None, **more: Any
) -> Job:
    rows = rows_of(backbone, task, seed=seed), rows_of(backbone, task, seed=seed, part="validation")
    about = {"task": task.name, "metric": metric or task.metric, "data_seed": seed, "learning_rate": rate}
    return Job(**about | {"theta": theta, "rows": rows} | more)


def make_jobs(backbone: Backbone, space: Space, tasks: dict[str, Task]) -> list[Job]:
    """Return seven jobs of all kinds, with learning rates of their own, that end at different steps."""
    starts = 0.3 * torch.randn(len(tasks), space.dim, generator=torch.Generator().manual_seed(4))
    rates = (0.1, 0.01, 0.3, 0.03, 0.2, 0.05, 0.15)
    return [make_job(backbone, task, start, rate=r) for task, start, r in zip(tasks.values(), starts, rates, strict=True)]


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
