"""Looking into the cache: which files there are, and what one is."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from intrinsic_prompt_tuning.context import Context
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.files import digest, read_file
from intrinsic_prompt_tuning.lazy import torch
from intrinsic_prompt_tuning.results import UNFINISHED, Claims
from intrinsic_prompt_tuning.spaces import Space
from intrinsic_prompt_tuning.tasks.folders import FEW_SHOT_FILE, FewShotFiles

PLACE = re.compile(
    r"(samples|[^/]+-[0-9a-f]{8})/(soft-prompts|subspaces|intrinsic-vectors|scores|claims|budgets|[^/]+-[0-9a-f]{16}/[^/]+)/"
    r"\.?[^/]+?(-[0-9a-f]{16}\.safetensors|-[0-9a-f]{16}\.unfinished|\.jsonl?|-\d+)(\.\d+)?"
)
"""Where below the cache its files are; the rest is nothing of ipt's. A temporary name ends in the number of its process."""


def cache_files(cache: Path, query: str = "*") -> dict[Path, tuple[str, int]]:
    """Return kind and bytes of the cache's files, paths below it, that a query means: a kind, or a pattern of such paths.

    Raises:
        IptError: the query leads out of the cache, or means no file. Links are not followed.
    """
    if ".." in PurePath(query).parts or PurePath(query).is_absolute():
        raise IptError(f"'{query}' leads out of the cache: name a kind, such as scores, or a pattern of paths below {cache}")
    found = dict[Path, tuple[str, int]]()
    for path in sorted(Path(folder, name).relative_to(cache) for folder, _, names in os.walk(cache) for name in names):
        if (match := PLACE.fullmatch(path.as_posix())) and not (cache / path).is_symlink():
            top, kind, end, temporary = match.groups()
            kind = "samples" if top == "samples" else "unfinished" if end.endswith(UNFINISHED) else kind
            # The files of a sample need each other, so only their folder can be meant.
            name, kind = (path.parent if kind == "samples" else path).as_posix(), "leftovers" if temporary else kind
            meant = query == kind or any(fnmatchcase(name, pattern) for pattern in (query, f"{query.rstrip('/')}/*"))
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                about = (cache / path).stat()
                if meant and (not temporary or about.st_mtime < time.time() - 600):  # else it is being written
                    found[path] = kind, about.st_size
    if not found:
        raise IptError(f"the cache {cache} holds no file of ipt" + (f" that '{query}' means" if query != "*" else ""))
    return found


def remove(cache: Path, files: dict[Path, tuple[str, int]]) -> int:
    """Remove files of a cache, but for claims and for results that a living process is making; return how many.

    Raises:
        IptError: a file cannot be removed.
    """
    gone = 0
    for path in sorted(files, key=lambda path: "_test." not in path.name):  # a sample without test rows is drawn again
        claims, names = Claims(cache / path.parts[0] / "claims"), re.findall(r"-([0-9a-f]{16})\.", path.name)
        try:
            if path.parent.name != "claims" and claims.take(names) == names:
                (cache / path).unlink(missing_ok=True)
                gone += 1
        except OSError as error:
            raise IptError(f"cannot remove {cache / path}: {error.strerror}; {gone} were removed before") from error
        finally:
            claims.give_back()
    return gone


def about_file(x: Context, given: str) -> dict[str, Any]:
    """Return what a file, given by its path or the beginning of a result's name in the cache, says of itself.

    Raises:
        IptError: there is no such file, or it is damaged or nothing of ipt's.
    """
    path = Path(given)
    if re.fullmatch("[0-9a-f]{4,16}", given) and not path.exists():
        named = [file for file in cache_files(x.cache) if f"-{given}" in file.name]
        path = x.cache / named[0] if len(named) == 1 else path
    if not os.path.isfile(path):  # noqa: PTH113 (it takes any text)
        raise IptError(f"{path} is no file, nor the beginning of one result's name; 'ipt cache' tells what {x.cache} holds")
    if match := FEW_SHOT_FILE.fullmatch(path.name):
        rows = FewShotFiles(task=match["task"], files={}).read(path)
        answers = dict(Counter(row.answers[0] for row in rows).most_common(20))
        first = [f"{row.input} -> {' / '.join(row.answers)}" for row in rows[:5]]
        return {"file": given, **match.groupdict(), "rows": len(rows), "answers": answers, "first": first}
    if path.suffix not in (".safetensors", UNFINISHED):
        raise IptError(
            f"{path} is no file of ipt: expected .safetensors, {UNFINISHED} or few-shot rows (TASK_K_SEED_train.jsonl)"
        )
    header, record, tensors = read_file(path)
    about: dict[str, Any] = {"file": str(path), "name": digest(header), "header": header, "record": record}
    about["tensors"] = {name: " x ".join(map(str, tensor.shape)) for name, tensor in tensors.items()}
    try:
        if path.suffix == UNFINISHED:
            about["unfinished"] = f"at step {float(tensors['step']):.0f}"
        elif header["kind"] == "subspace":
            about |= {"tasks": list(header.pop("prompts"))} | _spectrum(header["prompt_length"], tensors)
        elif header["kind"] == "soft-prompt":
            about["nearest words"] = _nearest_words(x, header["backbone"], tensors["soft_prompt"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise IptError(f"{path} is not what its header says ({error!r}): remove it, and the command makes it anew") from error
    return about


def _spectrum(length: int, weights: dict[str, Any]) -> dict[str, Any]:
    """Return how far a step of one from zero moves a prompt (root mean square, in units) along each main direction of a space."""
    hidden = weights["basis"].shape[1] if "basis" in weights else len(weights["out.bias"]) // length
    space = Space(torch.zeros(length, hidden), (length * hidden) ** -0.5, weights)
    values = torch.linalg.svdvals(torch.func.jacfwd(lambda v: space.back_project(v[None]).flatten())(torch.zeros(space.dim)))
    shares = values.square().cumsum(0) / values.square().sum()
    held = {f"{percent} %": int((shares < percent / 100).sum()) + 1 for percent in (50, 90, 99)}
    return {"directions with so much of the squares": held, "singular values": [round(value, 4) for value in values.tolist()]}


def _nearest_words(x: Context, made: str, soft_prompt: Any) -> list[dict[str, float]] | str:
    """Return the words nearest to each row of a soft prompt, with cosines, or why there are none."""
    if (here := x.backbone.fingerprint) != made:
        return f"its backbone is {made[:8]}, but {x.options.backbone} is {here[:8]}: name its own with --backbone"
    words = x.backbone.tokenizer.batch_decode([[token] for token in range(len(x.backbone.tokenizer))])
    vocabulary = x.backbone.model.get_input_embeddings()(torch.arange(len(words), device=x.backbone.device)).float()
    cosines = [torch.nn.functional.cosine_similarity(row, vocabulary) for row in soft_prompt.to(vocabulary)[:, None]]
    found = [list(zip(*own.topk(min(5, len(words))), strict=True)) for own in cosines]
    return [{words[token]: round(float(value), 3) for value, token in own} for own in found]
