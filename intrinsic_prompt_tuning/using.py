"""Using what was tuned: the best soft prompt of a task, and answers to new inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from intrinsic_prompt_tuning.backbone import Answer
from intrinsic_prompt_tuning.context import COLLECTION_SEED
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.lazy import torch
from intrinsic_prompt_tuning.results import Choice, Result
from intrinsic_prompt_tuning.tasks import Example
from intrinsic_prompt_tuning.tasks.folders import parse_input

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class TunedPrompt:
    """A soft prompt of a task, and what it is."""

    task: str
    soft_prompt: Tensor
    """(prompt_length, hidden)."""
    result: Result
    """The soft prompt or the intrinsic vector that it comes from."""
    record: dict[str, Any]
    vector: Tensor | None
    """(dim,), where it comes from one."""


def tuned_prompts(
    x: Experiment, tasks: Sequence[str], source: str, like: Mapping[str, Any] | None = None, *, some: bool = False
) -> dict[str, TunedPrompt]:
    """Return the best tuned soft prompt of each task by validation score, then by validation loss.

    Args:
        x: where to look.
        tasks: their names.
        source: `prompt`, soft prompts; `collected`, those of them that started at the initial prompt or were imported; `vector`,
            back-projected intrinsic vectors; `best`, all.
        like: what the headers of intrinsic vectors must say, such as their dim.
        some: leave tasks out that have none, unless that is all of them.

    Raises:
        IptError: a task has none.
    """
    found = list(x.found_prompts(tasks).values()) if source != "vector" else []
    if source != "collected":  # what a vector's subspace was made of is not needed
        for choice in x.found_vectors(x.found("subspace"), tasks):
            is_vector = choice[0].kind == "intrinsic-vector"
            fits = source in ("best", "vector" if is_vector else "prompt")
            if fits and (not is_vector or (like or {}).items() <= choice[0].header.items()):
                found.append(choice)
    choices = {task: [choice for choice in found if choice[0].header["task"] == task] for task in tasks}
    missing = [task for task, own in choices.items() if not own]
    if missing and (not some or len(missing) == len(choices)):
        what = {"best": "prompt or vector", "vector": "vector"}.get(source, "prompt")
        told = "".join(f" --{name.replace('_', '-')} {value}" for name, value in (like or {}).items() if source == "vector")
        command = f"ipt {'tune' if source == 'vector' else 'collect'} --task {missing[0]}{told}"
        raise IptError(f"{x.store.folder} holds no tuned {what} of task '{missing[0]}': run '{command}'")
    return {task: _best_of(x, task, own) for task, own in choices.items() if own}


def _best_of(x: Experiment, task: str, choices: Sequence[Choice]) -> TunedPrompt:
    result, record, tensors = x.store.best(tuple(result for choice in choices for result in choice))
    if result.kind == "soft-prompt":
        return TunedPrompt(task, x.prompts([(result,)])[0], result, record, None)
    vector = tensors["intrinsic_vector"].to(x.backbone.device)
    return TunedPrompt(task, x.space(result.inputs[0][0]).back_project(vector[None])[0], result, record, vector)


@dataclass(frozen=True)
class Prediction:
    """An answer, or why there is none."""

    task: str
    input: str
    answer: str = ""
    options: dict[str, float] | None = None
    """Option -> probability among the options."""
    error: str = ""


def predict(x: Experiment, prompts: dict[str, TunedPrompt], lines: Iterable[str], default: str) -> Iterator[Prediction]:
    """Answer lines in order, 64 at a time.

    Args:
        x: holds the backbone.
        prompts: task -> what to answer with.
        lines: inputs, as `parse_input` reads them; a line that cannot be read gives a prediction with an error.
        default: the task of a line that names none.
    """
    tasks = {name: x.task(name) for name in prompts}
    known = {name: p.record if "answer_limit" in p.record else x.answering(name, COLLECTION_SEED) for name, p in prompts.items()}
    batch: list[tuple[str, Example] | Prediction] = []
    for number, line in enumerate(lines, 1):
        text = line.strip("\ufeff\r\n")
        try:
            task, example = parse_input(tasks, default, text)
            batch.append((task, replace(example, options=example.options or tuple(known[task]["options"]))))
        except IptError as error:
            batch.append(Prediction(default, text, error=f"line {number}: {error}"))
        if len(batch) == 64:
            yield from _answered(x, prompts, known, batch)
            batch = []
    yield from _answered(x, prompts, known, batch)


def _answered(
    x: Experiment, prompts: dict[str, TunedPrompt], known: Mapping[str, Mapping[str, Any]],
    batch: Sequence[tuple[str, Example] | Prediction],
) -> Iterator[Prediction]:  # fmt: skip
    names, length = list(prompts), x.options.prompt_length
    rows = []
    for item in batch:
        if not isinstance(item, Prediction):
            task, example = item
            (row,) = x.backbone.encode([example], prompt_length=length, answer_limit=known[task]["answer_limit"])
            rows.append((names.index(task), row))
    stacked = torch.stack([prompts[name].soft_prompt for name in names])
    answers = iter(x.backbone.answer(stacked, rows, decoding=x.options.decoding, losses=False))
    for item in batch:
        yield item if isinstance(item, Prediction) else _prediction(*item, next(answers))


def _prediction(task: str, example: Example, answer: Answer) -> Prediction:
    weights = [math.exp(min(answer.option_losses) - loss) for loss in answer.option_losses]
    shares = {option: weight / sum(weights) for option, weight in zip(example.options, weights, strict=True)} if weights else None
    return Prediction(task, example.input, answer.text, shares)
