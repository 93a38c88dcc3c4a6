"""Using what was tuned: answers to new inputs, and soft prompts for others' programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from intrinsic_prompt_tuning.backbone import Answer
from intrinsic_prompt_tuning.causal import Causal
from intrinsic_prompt_tuning.context import COLLECTION_SEED
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.files import write_bytes
from intrinsic_prompt_tuning.lazy import torch
from intrinsic_prompt_tuning.results import Choice, Result
from intrinsic_prompt_tuning.tasks import Example
from intrinsic_prompt_tuning.tasks.folders import parse_input

if TYPE_CHECKING:
    from torch import Tensor

Source = Literal["best", "prompt", "vector"]


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


def tuned_prompts(x: Experiment, tasks: Sequence[str], source: Source, dim: int | None) -> dict[str, TunedPrompt]:
    """Return the best tuned soft prompt of each task by validation score, then by validation loss.

    Args:
        x: where to look.
        tasks: their names.
        source: collected prompts, back-projected intrinsic vectors, or whichever is better.
        dim: of intrinsic vectors; None: any.

    Raises:
        IptError: a task has none.
    """
    choices: dict[str, list[Choice]] = {task: [] for task in tasks}
    if source != "vector":
        for task, choice in x.found_prompts(tasks).items():
            choices[task].append(choice)
    if source != "prompt":
        for choice in x.found_vectors(x.found_subspaces()):
            header = choice[0].header
            if header["task"] in choices and dim in (None, header["dim"]):
                choices[header["task"]].append(choice)
    if missing := [task for task, own in choices.items() if not own]:
        what = {"best": "prompt or vector", "prompt": "prompt", "vector": "vector"}[source]
        command = "tune" if source == "vector" else "collect"
        raise IptError(f"{x.store.folder} holds no tuned {what} of task '{missing[0]}': run 'ipt {command} --task {missing[0]}'")
    return {task: _best_of(x, task, own) for task, own in choices.items()}


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
    """Answer lines in order, 64 at a time: text, or JSON objects with `input` and, if wanted, `options` and `task`.

    Args:
        x: holds the backbone.
        prompts: task -> what to answer with.
        lines: inputs; a line that cannot be read gives a prediction with an error.
        default: the task of a line that names none.
    """
    batch: list[tuple[str, Example] | Prediction] = []
    for number, line in enumerate(lines, 1):
        batch.append(_read_line(x, prompts, f"line {number}", line.rstrip("\r\n"), default))
        if len(batch) == 64:
            yield from _answered(x, prompts, batch)
            batch = []
    yield from _answered(x, prompts, batch)


def _read_line(
    x: Experiment, prompts: dict[str, TunedPrompt], where: str, line: str, default: str
) -> tuple[str, Example] | Prediction:
    try:
        task, text, options = parse_input(where, line)
        task = task or default
        if task not in prompts:
            raise IptError(f"{where}: task '{task}' was not named with --task")
    except IptError as error:
        return Prediction(default, line, error=str(error))
    known = {row.options for row in x.sample(task, COLLECTION_SEED).train}
    return task, Example(text, ("",), options or (known.pop() if len(known) == 1 else ()))


def _answered(
    x: Experiment, prompts: dict[str, TunedPrompt], batch: Sequence[tuple[str, Example] | Prediction]
) -> Iterator[Prediction]:
    names = list(prompts)
    rows = []
    for item in batch:
        if not isinstance(item, Prediction):
            limit = x.encoded(item[0], COLLECTION_SEED)[2][0].answer_limit
            length = x.options.prompt_length
            rows.append((names.index(item[0]), x.backbone.encode([item[1]], prompt_length=length, answer_limit=limit)[0]))
    stacked = torch.stack([prompts[name].soft_prompt for name in names])
    answers = iter(x.backbone.answer(stacked, rows, decoding=x.options.decoding, losses=False))
    for item in batch:
        yield item if isinstance(item, Prediction) else _prediction(*item, next(answers))


def _prediction(task: str, example: Example, answer: Answer) -> Prediction:
    weights = [math.exp(min(answer.option_losses) - loss) for loss in answer.option_losses]
    shares = {option: weight / sum(weights) for option, weight in zip(example.options, weights, strict=True)} if weights else None
    return Prediction(task, example.input, answer.text, shares)


def export_adapter(x: Experiment, prompt: TunedPrompt, folder: Path, *, force: bool) -> None:
    """Write a soft prompt as a prompt-tuning adapter of PEFT, with a card; the intrinsic vector travels along.

    Raises:
        IptError: the prompt stands where PEFT has none, or the folder is not empty.
    """
    from safetensors.torch import save

    causal = isinstance(x.backbone.lm, Causal)
    if x.backbone.prompt_at == "end":
        raise IptError(
            "PEFT puts prompts in front of the input: one behind it cannot be exported; collect with --prompt-at front"
        )
    if folder.exists() and any(folder.iterdir()) and not force:
        raise IptError(f"{folder} is not empty: name another folder, or add --force")
    length, hidden = prompt.soft_prompt.shape
    config = {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM" if causal else "SEQ_2_SEQ_LM", "inference_mode": True,
        "base_model_name_or_path": x.options.backbone, "num_virtual_tokens": length, "token_dim": hidden,
        "num_transformer_submodules": 1, "prompt_tuning_init": "RANDOM",
    }  # fmt: skip
    tensors = {"prompt_embeddings": prompt.soft_prompt.detach().float().cpu().contiguous()}
    if prompt.vector is not None:
        tensors["intrinsic_vector"] = prompt.vector.detach().cpu().contiguous()
    header = prompt.result.header
    told = {name: header[name] for name in ("kind", "space", "dim", "data_seed", "learning_rate") if name in header}
    card = CARD.format(
        task=prompt.task, backbone=x.options.backbone, length=length, validation=prompt.record["validation"],
        metric=header["metric"], about=", ".join(f"{name.replace('_', ' ')} {value}" for name, value in told.items()),
        model="AutoModelForCausalLM" if causal else "AutoModelForSeq2SeqLM", folder=folder.name,
    )  # fmt: skip
    write_bytes(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write_bytes(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True).encode())
    write_bytes(folder / "ipt.json", json.dumps({"header": header, "record": prompt.record}, sort_keys=True).encode())
    write_bytes(folder / "README.md", card.encode())


CARD = """---
base_model: {backbone}
library_name: peft
---
# A soft prompt for {task}

{length} virtual tokens for the frozen model {backbone}, tuned by `ipt` ({about}).
{metric} on the validation rows: {validation:.3f}.

```python
from peft import PeftModel
from transformers import {model}

model = PeftModel.from_pretrained({model}.from_pretrained("{backbone}"), "{folder}")
```
"""
