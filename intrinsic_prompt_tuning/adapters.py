"""Soft prompts from and for others' programs: PEFT's adapters, vLLM, plain arrays."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intrinsic_prompt_tuning.backbone import TESTBED_FOLDER
from intrinsic_prompt_tuning.causal import Causal
from intrinsic_prompt_tuning.context import COLLECTION_SEED, sample_digest
from intrinsic_prompt_tuning.errors import IptError, short
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.files import digest, read_file, write_bytes, write_file
from intrinsic_prompt_tuning.lazy import Tensor, np, torch
from intrinsic_prompt_tuning.results import Made, Result
from intrinsic_prompt_tuning.settings import TESTBED
from intrinsic_prompt_tuning.tasks import rows_digest
from intrinsic_prompt_tuning.tuning import outcome

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KINDS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
SIZES = {"num_attention_heads": "num_attention_heads", "num_layers": "num_hidden_layers"}
"""What PEFT asks of models whose configuration has other names for it (MPT) -> transformers' names."""


@dataclass(frozen=True, eq=False)
class TunedPrompt:
    """A soft prompt, and what it is."""

    soft_prompt: Tensor
    """(prompt_length, hidden)."""
    result: Result
    """The soft prompt or the intrinsic vector that it comes from; of an outside file, its digest."""
    record: dict[str, Any]
    vector: Tensor | None
    """(dim,), where it comes from one."""


def read_prompt(x: Experiment, path: Path, task: str | None, task_id: int | None = None) -> TunedPrompt:
    """Read a soft prompt: a file of the cache, an adapter folder of PEFT, a .npy array, a safetensors file of one matrix.

    A file of `ipt` must be of the task, where one is named; `task_id` counts the tasks of a multitask adapter from 0.

    Raises:
        IptError: it is of another kind, size, model or task, or damaged.
    """
    config, header, record, tensors = _content(path)
    if (kind := header.get("kind", "soft-prompt")) not in ("soft-prompt", "intrinsic-vector"):
        raise IptError(f"{path} is a {kind}, expected a soft prompt or an intrinsic vector")
    here = {"backbone": x.backbone.fingerprint, "prompt_at": x.backbone.prompt_at, "chat": x.backbone.layout.chat, "task": task}
    for name, expected in here.items():
        if expected is not None and header.get(name, expected) != expected:
            raise IptError(f"{path} was made for another {name}: {header[name]}, expected {expected}")
    if task_id is not None and not config:
        raise IptError(f"{path} is no multitask adapter: leave --task-id out")
    vector = tensors.pop("intrinsic_vector", None)
    if vector is not None and not tensors:
        tensors = {"prompt": _back_projected(x, path, str(header.get("subspace")), vector)}
    elif config:
        tensors = {"prompt": _adapter(x, path, config, tensors, task_id)}
    length, hidden = x.prompt_space.initial_prompt.shape
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] != hidden:
        raise IptError(f"{path} holds tensors of the shapes {shapes[:5]}, expected one (tokens, {hidden}) for this backbone")
    if shapes[0][0] != length:
        raise IptError(f"{path} holds a prompt of {shapes[0][0]} tokens, expected {length}: use --prompt-length {shapes[0][0]}")
    (prompt,) = tensors.values()
    if not prompt.is_floating_point() or not prompt.float().isfinite().all():
        raise IptError(f"{path} holds numbers that are not floating point or not finite")
    prompt, header = prompt.float().contiguous().to(x.backbone.device), x.header("soft-prompt", task=task) | header
    return TunedPrompt(prompt, Result(header), record, vector)


def _content(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Return an adapter's configuration, and header, record and tensors; where `ipt` wrote no header, it is a digest."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    folder, content, config = path.parent if path.name == WEIGHTS else path, b"", dict[str, Any]()
    file = next((file for file in (folder / WEIGHTS, folder / PICKLED) if file.is_file()), path)
    try:
        if (folder / CONFIG).is_file():
            config = {"peft_type": None} | json.loads((folder / CONFIG).read_bytes())
            if config["peft_type"] not in KINDS:
                raise IptError(f"{folder} is an adapter of the kind {config['peft_type']}, expected one of {', '.join(KINDS)}")
        with file.open("rb") as opened:
            content = opened.read(2**28)  # no prompt is larger; what is cut is refused below
        source = {"source": digest(content.hex())}
        if content.startswith(b"\x93NUMPY"):
            array = np.load(file, allow_pickle=False)
            return config, source, {}, {"array": torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))}
        with safe_open(file, framework="pt") as tensors:
            ours = "ipt" in (tensors.metadata() or {})
        if ours:  # the fingerprint in the header tells more than a name
            return config and config | {"base_model_name_or_path": None}, *read_file(file)
        return config, source, {}, load(content)
    except (OSError, SafetensorError, ValueError, TypeError, EOFError, RecursionError) as error:
        what = "a pickle, which is never read" if content.startswith((b"PK", b"\x80")) else short(error, 200)
        raise IptError(f"{file} is no adapter, .npy array or safetensors file of one matrix ({what})") from error


def _adapter(x: Experiment, path: Path, config: dict[str, Any], tensors: dict[str, Tensor], task_id: int | None) -> Tensor:
    """Return the soft prompt of an adapter that is for this backbone: (num_virtual_tokens, hidden)."""
    kind, base = config.get("task_type"), str(config.get("base_model_name_or_path") or x.options.backbone)
    if kind not in (None, "CAUSAL_LM" if isinstance(x.backbone.lm, Causal) else "SEQ_2_SEQ_LM") or x.backbone.prompt_at == "end":
        raise IptError(f"{path} stands in front of the input of a {kind}, which {x.options.backbone} with these options is not")
    if Path(base).name.lower() != Path(x.options.backbone).name.lower():
        raise IptError(f"{path} is for the model {base}, not {x.options.backbone}: if they are one, correct its {CONFIG}")
    try:
        count = len(tensors.get("prefix_task_cols", ()))
        if (task_id is None) != (count == 0) or (task_id or 0) >= max(1, count):
            raise IptError(f"{path} holds {count or 'no'} numbered tasks: mind the option --task-id of 'ipt import', from 0")
        prompt, length = tensors["prompt_embeddings"].float(), int(config["num_virtual_tokens"])
        if task_id is not None:
            prompt = prompt * (tensors["prefix_task_cols"][task_id].float() @ tensors["prefix_task_rows"][task_id].float())
        own = prompt[:length]  # plain prompt tuning may have as many rows again for a decoder, and never uses them
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise IptError(f"{path} is no whole adapter: {error!r}") from error
    if count and len(prompt) > length:
        x.report.say(f"{path}: what stands in front of the decoder is left out, so answers differ from PEFT's")
    return own


def _back_projected(x: Experiment, path: Path, name: str, vector: Tensor) -> Tensor:
    """Return what a file's vector comes to in the subspace of this name."""
    subspace = next((subspace for subspace in x.found("subspace") if subspace.name == name), None)
    if subspace is None:
        raise IptError(f"{x.store.folder} lacks the subspace of {path}, {name}, or has it of other options")
    space = x.space(subspace)
    if vector.shape != (space.dim,):
        raise IptError(f"{path} holds a vector of the shape {tuple(vector.shape)}, expected ({space.dim},)")
    return space.back_project(vector.to(x.backbone.device)[None])[0]


def import_prompt(x: Experiment, path: Path, task: str, task_id: int | None) -> None:
    """Take a soft prompt as collected, and tell its validation score; its header says that it was not tuned here.

    Raises:
        IptError: it cannot be used, rows cannot be had, or the loss behind it is not finite.
    """
    found = read_prompt(x, path, task, task_id)
    metric, rows = x.task(task).metric, x.encoded(task, COLLECTION_SEED)[1]
    answers = x.backbone.answer(found.soft_prompt[None], [(0, row) for row in rows], decoding=x.options.decoding)
    score, loss = outcome(metric, rows, answers)
    if not math.isfinite(loss):
        raise IptError(f"{path}: behind this prompt the loss on {task} is {loss}")
    about = {"metric": metric, "data": sample_digest(x.sample(task, COLLECTION_SEED))}
    about |= {"imported": digest(found.soft_prompt.tolist()), "source": found.result.header.get("source", found.result.name)}
    header = x.header("soft-prompt", task=task, data_seed=COLLECTION_SEED, **about)
    record = {"validation": score, "validation_loss": loss, **x.answering(task, COLLECTION_SEED)}
    x.store.save(Made(Result(header), record, {"soft_prompt": found.soft_prompt}))
    x.report.say(f"{path}: {metric} {score:.3f} on the validation rows of {task}")


def export_prompts(x: Experiment, prompts: Mapping[Path, TunedPrompt], kind: str, *, force: bool) -> None:
    """Write soft prompts for PEFT or vLLM, a folder with a card each; intrinsic vectors travel along.

    Raises:
        IptError: the other program has no place for the prompts, or a folder is not empty.
    """
    causal = isinstance(x.backbone.lm, Causal)
    if kind == "peft" and x.backbone.prompt_at == "end":
        raise IptError("PEFT puts prompts before the input: one behind it cannot be exported; collect with --prompt-at front")
    if kind == "vllm" and (not causal or x.options.backbone.endswith(".gguf")):
        raise IptError("vLLM takes a prompt's embeddings for causal models that are no .gguf file: use --format peft")
    if taken := [f for f in prompts if f.exists() and not (f.is_dir() and (force or not any(f.iterdir())))]:
        raise IptError(f"{taken[0]} is not empty, or no folder: name another, or add --force to write into a folder")
    path = TESTBED_FOLDER if x.options.backbone == TESTBED else Path(x.options.backbone)
    base = str((path.parent if path.suffix == ".gguf" else path).resolve()) if path.exists() else x.options.backbone
    template = (Path(__file__).parent / "cards" / f"{kind}.md").read_text(encoding="utf-8")
    scores = [score for score in x.store.found("score")[0] if score.header["stage"] not in ("MSF", "mean", "nearest")]
    made = {result.name: result for result in (*x.store.found("soft-prompt")[0], *x.store.found("intrinsic-vector")[0])}
    exported = {prompt.result.name for prompt in prompts.values()}
    ours = [s for s in scores if s.header["of"] and exported & {*s.header["of"][0]} and _is_of_today(x, s)]
    # A score is of the best of its candidates, which is not known when some are gone.
    tests = {x.store.best(of)[0].name: score for score in ours if (of := x.store.complete(score.header["of"][0], made))}
    for folder, prompt in prompts.items():
        vector = {} if prompt.vector is None else {"intrinsic_vector": prompt.vector}
        write_file(folder / WEIGHTS, prompt.result.header, prompt.record, {"prompt_embeddings": prompt.soft_prompt} | vector)
        test = x.store.read(tests[prompt.result.name])[0] if prompt.result.name in tests else {"score": "not measured"}
        write_bytes(folder / "README.md", _card(x, prompt, folder, base, template, test).encode())
        config = {
            "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM" if causal else "SEQ_2_SEQ_LM", "inference_mode": True,
            "base_model_name_or_path": base, "num_virtual_tokens": len(prompt.soft_prompt), "token_dim": x.backbone.hidden,
            "num_transformer_submodules": 1, "prompt_tuning_init": "RANDOM",
            **{name: size for name, of in SIZES.items() if (size := getattr(x.backbone.model.config, of, None))},
        }  # fmt: skip
        if kind == "peft":
            write_bytes(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
        else:  # perhaps that of an earlier export, of which nothing else is left
            (folder / CONFIG).unlink(missing_ok=True)


def _is_of_today(x: Experiment, score: Result) -> bool:
    """Tell whether a score is on the test rows that its task has now."""
    try:
        return bool(score.header["test"] == rows_digest(x.sample(score.header["task"], COLLECTION_SEED).test))
    except IptError:  # they cannot be had
        return False


def _card(x: Experiment, prompt: TunedPrompt, folder: Path, base: str, template: str, test: Mapping[str, Any]) -> str:
    """Return what a person needs to know of a prompt, and code that uses it behind the model that `base` names."""
    causal, file, layout = isinstance(x.backbone.lm, Causal), Path(x.options.backbone).name, x.backbone.layout
    generation = x.backbone.model.generation_config.to_diff_dict()  # special tokens alone: see `load_backbone`
    told = {"tokens": len(prompt.soft_prompt), "space": "prompt", "dim": prompt.soft_prompt.numel()} | prompt.result.header
    told |= prompt.record | {f"test_{name}": value for name, value in test.items()}
    shown = "metric data_seed rows validation validation_loss test_score test_n tokens space dim start imported source precision"
    ids = 'tokenizer.encode("the input", return_tensors="pt")'
    if layout.chat:  # the tokens that rows were tuned with: the template itself may write today's date, or open thoughts
        ids = f'torch.tensor([[*{layout.before}, *tokenizer.encode("the input", add_special_tokens=False), *{layout.after}]])'
    return template.format(
        name=base, task=told["task"], backbone=x.options.backbone, folder=folder.resolve().name,
        about="\n".join(f"- {name.replace('_', ' ')}: {told[name]}" for name in shown.split() if name in told),
        base=repr(base) + (f", gguf_file={file!r}" if file.endswith(".gguf") else ""), begin="ids.shape[1]" if causal else "0",
        model="AutoModelForCausalLM" if causal else "AutoModelForSeq2SeqLM", limit=told.get("answer_limit", 20),
        generation=", ".join(f"{name}={value}" for name, value in generation.items() if name.endswith("_token_id")),
        ids=ids, end=layout.end if causal else x.backbone.model.generation_config.eos_token_id,
        parts="prompt, embed(ids[0])" if x.backbone.prompt_at == "front" else "embed(ids[0]), prompt",
    )  # fmt: skip
