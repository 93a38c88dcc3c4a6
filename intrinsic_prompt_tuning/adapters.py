"""Soft prompts from and for others' programs: PEFT's adapters, vLLM, plain arrays; and tuning that starts from a prompt."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from intrinsic_prompt_tuning.backbone import TESTBED_FOLDER
from intrinsic_prompt_tuning.causal import Causal
from intrinsic_prompt_tuning.context import COLLECTION_SEED, sample_digest
from intrinsic_prompt_tuning.errors import IptError, nearest
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.files import digest, read_file, write_bytes, write_file
from intrinsic_prompt_tuning.lazy import np, torch
from intrinsic_prompt_tuning.results import Made, Result
from intrinsic_prompt_tuning.settings import TESTBED
from intrinsic_prompt_tuning.tuning import outcome
from intrinsic_prompt_tuning.using import TunedPrompt, tuned_prompts

if TYPE_CHECKING:
    from torch import Tensor

Format = Literal["peft", "vllm"]
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KINDS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")


def read_prompt(x: Experiment, path: Path, task: str | None, task_id: int | None = None) -> TunedPrompt:
    """Read a soft prompt: a file of the cache, an adapter folder of PEFT, a .npy array, a safetensors file of one matrix.

    Args:
        x: holds the backbone that it is for.
        path: the file or folder.
        task: what it is for; None: it does not matter.
        task_id: which prompt of a multitask adapter, from 0.

    Raises:
        IptError: it is of another kind, size, model or task, or damaged.
    """
    folder = path.parent if path.name == WEIGHTS else path
    config = _config(folder) if (folder / CONFIG).is_file() else {}
    header, record, tensors = _content(next((f for f in (folder / WEIGHTS, folder / PICKLED) if f.is_file()), path))
    here = {"backbone": x.backbone.fingerprint, "prompt_at": x.options.prompt_at, "chat": x.backbone.chat, "task": task}
    for name, expected in here.items():
        if expected is not None and header.get(name, expected) != expected:
            raise IptError(f"{path} was made for another {name}: {header[name]}, expected {expected}")
    vector = tensors.pop("intrinsic_vector", None)
    if vector is not None and not tensors:
        subspace = next((s for s in x.found("subspace") if s.name == header.get("subspace")), None)
        if subspace is None:
            raise IptError(f"{x.store.folder} lacks the subspace of {path}, {header.get('subspace')}, or has it of other options")
        tensors = {"prompt": x.space(subspace).back_project(vector.to(x.backbone.device)[None])[0]}
    elif config:
        tensors = {"prompt": _adapter(x, folder, config, tensors, task_id, ours="kind" in header)}
    return TunedPrompt(task or "", _checked(x, path, tensors), Result(header), record, vector)


def _config(folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter of a kind that is a soft prompt."""
    try:
        config: dict[str, Any] = {"peft_type": None} | json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise IptError(f"{folder / CONFIG} cannot be read: {error!r}") from error
    if config["peft_type"] not in KINDS:
        raise IptError(f"{folder} is an adapter of the kind {config['peft_type']}, expected one of {', '.join(KINDS)}")
    return config


def _content(file: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Return header, record and tensors; of a file that is not of `ipt`, the header is its digest."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    content = b""
    try:
        content = file.read_bytes()
        source = {"source": hashlib.sha256(content).hexdigest()[:16]}
        if content.startswith(b"\x93NUMPY"):
            array = np.load(file, allow_pickle=False)
            return source, {}, {"array": torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))}
        with safe_open(file, framework="pt") as opened:
            ours = "ipt" in (opened.metadata() or {})
        return read_file(file) if ours else (source, {}, load(content))
    except (OSError, SafetensorError, ValueError, TypeError, EOFError) as error:
        what = "a pickle, which is never read" if content.startswith((b"PK", b"\x80")) else " ".join(str(error).split())[:200]
        raise IptError(f"{file} is no adapter, .npy array or safetensors file of one matrix ({what})") from error


def _adapter(
    x: Experiment, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], task_id: int | None, *, ours: bool
) -> Tensor:
    """Return the soft prompt of an adapter that is for this backbone: (num_virtual_tokens, hidden)."""
    kind, base = config.get("task_type"), str(config.get("base_model_name_or_path") or x.options.backbone)
    if kind not in (None, "CAUSAL_LM" if isinstance(x.backbone.lm, Causal) else "SEQ_2_SEQ_LM") or x.options.prompt_at == "end":
        raise IptError(f"{folder} stands in front of the input of a {kind}, which {x.options.backbone} with these options is not")
    if not ours and Path(base).name.lower() != Path(x.options.backbone).name.lower():
        raise IptError(f"{folder} is for the model {base}, not {x.options.backbone}: if they are one, correct its {CONFIG}")
    count = len(tensors.get("prefix_task_cols", ()))
    if (task_id is None) != (count == 0) or (task_id or 0) >= max(1, count):
        raise IptError(
            f"{folder} holds {count or 'no'} numbered tasks: name one with 'ipt import --task-id', from 0, or leave it out"
        )
    try:
        prompt, length = tensors["prompt_embeddings"].float(), int(config["num_virtual_tokens"])
        if task_id is not None:
            prompt = prompt * (tensors["prefix_task_cols"][task_id].float() @ tensors["prefix_task_rows"][task_id].float())
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise IptError(f"{folder} is no whole adapter: {error!r}") from error
    if count and len(prompt) > length:
        x.report.say(f"{folder}: what stands in front of the decoder is left out, so answers differ from PEFT's")
    return prompt[:length]  # plain prompt tuning may have as many rows again for a decoder, and never uses them


def _checked(x: Experiment, path: Path, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the one tensor, float32, when it is a soft prompt of this size."""
    length, hidden = x.prompt_space.initial_prompt.shape
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if len(shapes) != 1 or shapes[0] != (*shapes[0][:1], hidden) or not shapes[0][0]:
        raise IptError(
            f"{path} holds tensors of the shapes {shapes[:5]}, expected one (tokens, {hidden}) for {x.options.backbone}"
        )
    if shapes[0][0] != length:
        raise IptError(f"{path} holds a prompt of {shapes[0][0]} tokens, expected {length}: use --prompt-length {shapes[0][0]}")
    (prompt,) = tensors.values()
    if not prompt.is_floating_point() or not prompt.isfinite().all():
        raise IptError(f"{path} holds numbers that are not floating point or not finite")
    return prompt.float().contiguous().to(x.backbone.device)


def prompts_from(
    x: Experiment, tasks: Sequence[str], source: str, dim: int | None, *, some: bool = False
) -> dict[str, TunedPrompt]:
    """Return tuned prompts of tasks, as `tuned_prompts` does, or of one task what a file holds."""
    if source in ("best", "prompt", "vector"):
        return tuned_prompts(x, tasks, source, {"dim": dim} if dim else {}, some=some)
    if some or len(tasks) != 1 or not Path(source).exists():
        raise IptError(f"--from is '{source}', expected best, prompt, vector, or, with one --task, a file that is there")
    return {tasks[0]: read_prompt(x, Path(source), tasks[0])}


def import_prompt(x: Experiment, path: Path, task: str, task_id: int | None) -> float:
    """Take a soft prompt as collected; its header says that it was not tuned here. Return its validation score.

    Raises:
        IptError: it cannot be used, rows cannot be had, or the loss behind it is not finite.
    """
    found = read_prompt(x, path, task, task_id)
    metric, rows = x.task(task).metric, x.encoded(task, COLLECTION_SEED)[1]
    answers = x.backbone.answer(found.soft_prompt[None], [(0, row) for row in rows], decoding=x.options.decoding)
    score, loss = outcome(metric, rows, answers)
    if not math.isfinite(loss):
        raise IptError(f"{path}: behind this prompt the loss on {task} is {loss}")
    header = x.header(
        "soft-prompt", task=task, data_seed=COLLECTION_SEED, metric=metric, data=sample_digest(x.sample(task, COLLECTION_SEED)),
        imported=digest(found.soft_prompt.tolist()), source=found.result.header.get("source", found.result.name),
    )  # fmt: skip
    record = {"validation": score, "validation_loss": loss, **x.answering(task, COLLECTION_SEED)}
    x.store.save(Made(Result(header), record, {"soft_prompt": found.soft_prompt}))
    return score


def warm_starts(x: Experiment, start: str, tasks: Sequence[str], data_seed: int, dim: int | None) -> dict[str, dict[str, str]]:
    """Return what headers of soft prompts say that start elsewhere than at the initial prompt, and give `x` those starts.

    Args:
        x: where to look.
        start: `subspace`, each task's best intrinsic vector of the same rows; a task, its collected soft prompt; or a file.
        tasks: what is tuned.
        data_seed: of the rows.
        dim: of the vectors; None: any.

    Raises:
        IptError: there is nothing to start from.
    """
    if start == "subspace":
        like = {"space": "subspace", "data_seed": data_seed} | ({"dim": dim} if dim else {})
        found = tuned_prompts(x, tasks, "vector", like)
    elif start in x.tasks:
        found = dict.fromkeys(tasks, tuned_prompts(x, [start], "collected")[start])
    elif Path(start).exists():
        found, start = dict.fromkeys(tasks, read_prompt(x, Path(start), None)), "file"
    else:
        raise IptError(f"--start is '{start}', expected subspace, a task, or a file that is there{nearest(start, x.tasks)}")
    x.given |= {own.result.name: own.soft_prompt for own in found.values()}
    return {task: {"start": start, "start_prompt": own.result.name} for task, own in found.items()}


def export_prompts(x: Experiment, prompts: Mapping[Path, TunedPrompt], kind: Format, *, force: bool) -> None:
    """Write soft prompts for PEFT or vLLM, a folder with a card each; intrinsic vectors travel along.

    Raises:
        IptError: the other program has no place for the prompts, or a folder is not empty.
    """
    causal = isinstance(x.backbone.lm, Causal)
    if kind == "peft" and x.options.prompt_at == "end":
        raise IptError("PEFT puts prompts in front of the input: one behind it (--prompt-at end) cannot be exported")
    if kind == "vllm" and (not causal or x.options.backbone.endswith(".gguf")):
        raise IptError("vLLM takes a prompt's embeddings for causal models that are no .gguf file: use --format peft")
    for folder in prompts:
        if folder.exists() and not (folder.is_dir() and (force or not any(folder.iterdir()))):
            raise IptError(f"{folder} is not empty, or no folder: name another, or add --force to write into a folder")
    stages = ("prompt tuning", "two-stage", "warm start", "IST")
    tests = {name: s for s in x.store.found("score")[0] if s.header["stage"] in stages for name in s.header["of"][0]}
    for folder, prompt in prompts.items():
        tensors = {"prompt_embeddings": prompt.soft_prompt} | (
            {} if prompt.vector is None else {"intrinsic_vector": prompt.vector}
        )
        write_file(folder / WEIGHTS, prompt.result.header, prompt.record, tensors)
        test = x.store.read(tests[prompt.result.name])[0] if prompt.result.name in tests else {"score": "not measured"}
        write_bytes(folder / "README.md", _card(x, prompt, folder, kind, test).encode())
        config = {
            "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM" if causal else "SEQ_2_SEQ_LM", "inference_mode": True,
            "base_model_name_or_path": _base(x), "num_virtual_tokens": len(prompt.soft_prompt), "token_dim": x.backbone.hidden,
            "num_transformer_submodules": 1, "prompt_tuning_init": "RANDOM",
        }  # fmt: skip
        if kind == "peft":
            write_bytes(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def _base(x: Experiment) -> str:
    """Return what transformers loads the backbone by."""
    path = TESTBED_FOLDER if x.options.backbone == TESTBED else Path(x.options.backbone)
    return str((path.parent if path.suffix == ".gguf" else path).resolve()) if path.exists() else x.options.backbone


def _card(x: Experiment, prompt: TunedPrompt, folder: Path, kind: Format, test: Mapping[str, Any]) -> str:
    """Return what a person needs to know of a prompt, and code that uses it."""
    causal, file, base = isinstance(x.backbone.lm, Causal), Path(x.options.backbone).name, _base(x)
    told = {"tokens": len(prompt.soft_prompt), "space": "prompt", "dim": prompt.soft_prompt.numel()} | prompt.result.header
    told |= prompt.record | {f"test_{name}": value for name, value in test.items()}
    names = "metric data_seed rows validation validation_loss test_score test_n tokens space dim start imported source precision"
    chat = 'apply_chat_template([{"role": "user", "content": "the input"}], add_generation_prompt=True, return_dict=False, '
    return Path(__file__).with_name("cards").joinpath(f"{kind}.md").read_text(encoding="utf-8").format(
        name=base, task=prompt.task, backbone=x.options.backbone, folder=folder.name, limit=told.get("answer_limit", 20),
        about="\n".join(f"- {name.replace('_', ' ')}: {told[name]}" for name in names.split() if name in told),
        base=repr(base) + (f", gguf_file={file!r}" if file.endswith(".gguf") else ""), begin="ids.shape[1]" if causal else "0",
        model="AutoModelForCausalLM" if causal else "AutoModelForSeq2SeqLM",
        ids="tokenizer." + (chat if x.backbone.chat else 'encode("the input", ') + 'return_tensors="pt")',
        parts="prompt, embed(ids[0])" if x.options.prompt_at == "front" else "embed(ids[0]), prompt",
    )  # fmt: skip
