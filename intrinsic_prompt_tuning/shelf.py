"""Looking into the cache: which files there are, and what one is."""

import contextlib
import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from intrinsic_prompt_tuning.context import Context
from intrinsic_prompt_tuning.errors import IptError, damaged
from intrinsic_prompt_tuning.files import LEFTOVER, digest, read_file
from intrinsic_prompt_tuning.lazy import torch
from intrinsic_prompt_tuning.reporter import size, table_text
from intrinsic_prompt_tuning.results import UNFINISHED, Claims
from intrinsic_prompt_tuning.spaces import Space
from intrinsic_prompt_tuning.tasks.folders import FEW_SHOT_FILE, read_rows

PLACE = re.compile(
    r"(?:samples/[^/]+-[0-9a-f]{16}/[^/]+|commands|[^/]+-[0-9a-f]{8}/(?:soft-prompts|subspaces|intrinsic-vectors|scores|budgets))/"
    r"\.?[^/]+?(?:-[0-9a-f]{16}\.safetensors|-[0-9a-f]{16}\.unfinished|\.jsonl?|\.checksum|\.yaml)(\.(?:[^/]*-)?\d+)?"
)
"""Where below the cache its files are; the rest is nothing of ipt's. A temporary name ends in its machine and process."""


def cache_files(cache: Path, query: str = "*") -> dict[Path, tuple[str, int]]:
    """Return path below the cache -> kind and bytes, of the files that a query means: a kind, or a pattern of such paths.

    Raises:
        IptError: the query leads out of the cache, or means no file. Links are not followed.
    """
    if ".." in PurePath(query).parts or PurePath(query).is_absolute():
        raise IptError(f"'{query}' leads out of the cache: name a kind, such as scores, or a pattern of paths below {cache}")
    found = dict[Path, tuple[str, int]]()
    for path in sorted(Path(folder, name).relative_to(cache) for folder, _, names in os.walk(cache) for name in names):
        sample, match = path.parts[0] == "samples", PLACE.fullmatch(path.as_posix())
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            about = (cache / path).lstat()
            if not match or stat.S_ISLNK(about.st_mode) or (match[1] and about.st_mtime > time.time() - LEFTOVER):
                continue  # not ipt's, or being written
            kind = "samples" if sample else "unfinished" if path.suffix == UNFINISHED else path.parent.name
            kind = "leftovers" if match[1] else kind
            name = (path.parent if sample else path).as_posix()  # the files of a sample need each other
            if query == kind or fnmatchcase(name, query) or fnmatchcase(name, f"{query.rstrip('/')}/*"):
                found[path] = kind, about.st_size
    if not found:
        raise IptError(f"the cache {cache} holds no file of ipt" + (f" that '{query}' means" if query != "*" else ""))
    return found


def files_text(files: Mapping[Path, tuple[str, int]], *, each: bool) -> str:
    """List files, a line each or a line for each backbone and kind, and their sizes."""
    sizes: dict[tuple[Any, ...], list[int]] = {}
    for path, (kind, n_bytes) in files.items():
        sizes.setdefault((path if each else path.parts[0], kind), []).append(n_bytes)
    sizes["all", ""] = [n_bytes for _, n_bytes in files.values()]
    return table_text("where|kind|files|size", [[*group, len(own), size(sum(own))] for group, own in sizes.items()]).rstrip()


def remove(cache: Path, files: dict[Path, tuple[str, int]]) -> int:
    """Remove files of a cache, but for claims and for results that a living process is making; return how many.

    Raises:
        IptError: a file cannot be removed.
    """
    gone = 0
    for path in sorted(files, key=lambda path: "_test." not in path.name):  # a sample without test rows is drawn again
        claims, names = Claims(cache / path.parts[0] / ".claims"), re.findall(r"-([0-9a-f]{16})\.", path.name)
        try:
            if all(map(claims.take, names)):
                (cache / path).unlink(missing_ok=True)
                gone += 1
            claims.give_back()
        except OSError as error:
            raise IptError(f"cannot remove {cache / path}: {error.strerror}; {gone} were removed before") from error
    return gone


def about_file(x: Context, given: str) -> dict[str, Any]:
    """Return what a file, given by its path or the beginning of a result's name in the cache, says of itself.

    Raises:
        IptError: there is no such file, or it is damaged or nothing of ipt's.
    """
    path = Path(given)
    if given and "/" not in given and not os.path.exists(given):  # noqa: PTH110 (it takes any text)
        by_digest = f"-{given}" if re.fullmatch("[0-9a-f]{1,16}", given) else "/"
        named = [file for file in cache_files(x.cache) if by_digest in file.name or file.name.startswith(given)]
        path = x.cache / named[0] if len(named) == 1 else path
    match = FEW_SHOT_FILE.fullmatch(path.name)
    if not os.path.isfile(path) or not (match or path.suffix in (".safetensors", UNFINISHED)):  # noqa: PTH113 (it takes any text)
        raise IptError(f"{path} is no file of ipt, nor the beginning of one result's name in {x.cache}: see 'ipt cache'")
    if match:
        rows = read_rows(path)
        answers = dict(Counter(row.answers[0] for row in rows).most_common(20))
        first = [{"input": row.input, "answers": list(row.answers)} for row in rows[:5]]
        return {"file": str(path), **match.groupdict(), "rows": len(rows), "answers": answers, "first": first}
    header, record, tensors = read_file(path)
    about: dict[str, Any] = {"file": str(path), "name": digest(header), "header": header, "record": record}
    about["tensors"] = {name: " x ".join(map(str, tensor.shape)) for name, tensor in tensors.items()}
    try:
        if path.suffix == UNFINISHED:
            is_score = header["kind"] == "score"
            said = json.loads(bytes(tensors["said"].tolist())) if is_score else []
            about["unfinished"] = f"{len(said)} answers" if is_score else f"at step {float(tensors['step']):.0f}"
        elif header["kind"] == "subspace":
            about |= {"tasks": list(header.pop("prompts"))} | _spectrum(header["prompt_length"], tensors)
        elif header["kind"] == "soft-prompt":
            (prompt,) = tensors.values()  # of another name in what was exported
            about["nearest words"] = _nearest_words(x, header["backbone"], prompt)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise damaged(path, f"is not what its header says ({error!r})") from error
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
    embed = x.backbone.model.get_input_embeddings()  # of fewer words than some tokenizers have
    words = x.backbone.tokenizer.batch_decode([[n] for n in range(min(len(x.backbone.tokenizer), len(embed.weight)))])
    vocabulary = embed(torch.arange(len(words), device=x.backbone.device)).float()
    cosines = [torch.nn.functional.cosine_similarity(row, vocabulary) for row in soft_prompt.to(vocabulary)[:, None]]
    return [{words[i]: round(float(own[i]), 3) for i in own.argsort(descending=True)[:5].tolist()} for own in cosines]
