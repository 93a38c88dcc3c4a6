"""Using what was tuned: the best soft prompt of a task, and answers to new inputs."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intrinsic_prompt_tuning.adapters import TunedPrompt, read_prompt
from intrinsic_prompt_tuning.backbone import Answer, Encoded
from intrinsic_prompt_tuning.context import COLLECTION_SEED
from intrinsic_prompt_tuning.errors import IptError, nearest
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.lazy import torch
from intrinsic_prompt_tuning.results import by_validation
from intrinsic_prompt_tuning.tasks import Example
from intrinsic_prompt_tuning.tasks.folders import parse_input


def tuned_prompts(
    x: Experiment, tasks: Sequence[str], source: str, like: Mapping[str, Any] | None = None, *, some: bool = False
) -> dict[str, TunedPrompt]:
    """Return the best tuned soft prompt of each task by validation score, then by validation loss.

    Args:
        x: where to look.
        tasks: their names.
        source: `prompt`, soft prompts; `collected`, those that did not start from others; `vector`, back-projected intrinsic
            vectors; `best`, all; or what `read_prompt` reads.
        like: what the headers of intrinsic vectors must say, such as their dim.
        some: leave tasks out that have none, unless that is all of them.

    Raises:
        IptError: a task has none.
    """
    if like and source not in ("best", "vector"):
        raise IptError(f"--from {source} has no --dim, only best and vector have")
    if source not in ("best", "prompt", "vector", "collected"):
        if len(tasks) != 1 or not Path(source).exists():
            raise IptError(f"--from is '{source}', expected best, prompt, vector, or, with one --task, a file that is there")
        return {tasks[0]: read_prompt(x, Path(source), tasks[0])}
    found, like = [] if source == "vector" else list(x.found_prompts(tasks).values()), like or {}
    if source != "collected":  # what a vector's subspace was made of is not needed
        for choice in x.found_vectors(x.found("subspace"), tasks):
            header = choice[0].header
            kind = "vector" if "subspace" in header else "prompt"
            if source in ("best", kind) and (kind == "prompt" or like.items() <= header.items()):
                found.append(choice)
    choices = {task: [choice for choice in found if choice[0].header["task"] == task] for task in tasks}
    missing = [task for task, own in choices.items() if not own]
    if missing and (not some or len(missing) == len(choices)):
        what = {"best": "prompt or vector", "vector": "vector"}.get(source, "prompt")
        command = "tune" if source == "vector" else "collect"
        told = "".join(f" --{name.replace('_', '-')} {value}" for name, value in like.items() if source == "vector")
        remedy = f"run 'ipt {command} --task {missing[0]}{told}' with the same options"
        raise IptError(f"{x.store.folder} holds no tuned {what} of task '{missing[0]}': {remedy}")
    # The best of each grid, and of these that with the least loss: several may answer all validation rows right.
    best = {task: max(map(x.store.best, own), key=by_validation) for task, own in choices.items() if own}
    return {
        task: TunedPrompt(x.tuned((result,)), result, record, tensors.get("intrinsic_vector"))
        for task, (result, record, tensors) in best.items()
    }


def warm_starts(x: Experiment, start: str, tasks: Sequence[str], data_seed: int, dim: int | None) -> dict[str, dict[str, str]]:
    """Give `x` starts for tasks' soft prompts, and return what their headers say of them.

    A start is `subspace` (each task's best intrinsic vector of the same rows and dim), a task (its collected prompt), or a file.

    Raises:
        IptError: there is nothing to start from.
    """
    if start == "subspace":
        found = tuned_prompts(x, tasks, "vector", {"space": start, "data_seed": data_seed} | ({"dim": dim} if dim else {}))
    elif start in x.tasks:
        found = dict.fromkeys(tasks, tuned_prompts(x, [start], "collected")[start])
    elif Path(start).exists():
        found, start = dict.fromkeys(tasks, read_prompt(x, Path(start), None)), "file"
    else:
        told = "expected subspace, nearest, a task, or a file that is there"
        raise IptError(f"--start is '{start}', {told}{nearest(start, x.tasks)}")
    x.starts |= {own.result.name: own.soft_prompt for own in found.values()}
    about = {task: {"start": start, "start_prompt": own.result.name} for task, own in found.items()}
    if start in x.tasks:
        return about
    # The table tells apart what started from vectors of several subspaces, or from several files.
    of = {task: own.result.header["subspace"] if start == "subspace" else own.result.name for task, own in found.items()}
    return {task: {**own, "collection": of[task]} for task, own in about.items()}


@dataclass(frozen=True)
class Prediction:
    """An answer, or why there is none."""

    task: str
    input: str
    answer: str = ""
    options: dict[str, float] | None = None
    """Option -> probability among the options."""
    error: str | None = None


def predict(x: Experiment, prompts: dict[str, TunedPrompt], lines: Iterable[str], default: str) -> Iterator[Prediction]:
    """Answer lines in order, 64 at a time.

    Args:
        x: holds the backbone.
        prompts: task -> what to answer with.
        lines: inputs, as `parse_input` reads them; a line that cannot be read gives a prediction with an error.
        default: the task of a line that names none.
    """
    tasks, names, numbered = {name: x.task(name) for name in prompts}, list(prompts), enumerate(lines, 1)
    known = {name: p.record if "answer_limit" in p.record else x.answering(name, COLLECTION_SEED) for name, p in prompts.items()}
    stacked = torch.stack([prompt.soft_prompt for prompt in prompts.values()])

    def read(number: int, text: str) -> tuple[int, Encoded] | Prediction:
        try:
            task, example = parse_input(tasks, default, text)
            example = replace(example, options=example.options or tuple(known[task]["options"]))
            limit = known[task]["answer_limit"]
            (row,) = x.backbone.encode([example], prompt_length=stacked.shape[1], answer_limit=limit)
            if row.truncated:
                x.say_once(f"lines that are too long are cut to {x.backbone.max_length} tokens")
            return names.index(task), row
        except IptError as error:
            return Prediction(default, text, error=f"line {number}: {error}")

    while batch := [read(number, line.strip("\ufeff\r\n")) for number, line in itertools.islice(numbered, 64)]:
        rows = [item for item in batch if not isinstance(item, Prediction)]
        answers = iter(x.backbone.answer(stacked, rows, decoding=x.options.decoding, losses=False))
        for item in batch:
            yield item if isinstance(item, Prediction) else _prediction(names[item[0]], item[1].example, next(answers))


def _prediction(task: str, example: Example, answer: Answer) -> Prediction:
    # None where the answer was generated; of options that the data repeat one.
    losses = dict(zip(example.options, answer.option_losses, strict=False))
    weights = {option: math.exp(min(losses.values()) - loss) for option, loss in losses.items()}
    shares = {option: weight / sum(weights.values()) for option, weight in weights.items()} or None
    return Prediction(task, example.input, answer.text, shares)
