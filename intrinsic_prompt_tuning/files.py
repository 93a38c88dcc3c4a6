"""Safetensors files that describe themselves.

One metadata entry, "ipt", holds the header (what the tensors are a function of), the record (what came out) and a checksum of
all of it. The same inputs give the same bytes. Nothing else is ever read: no pickle, no code.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intrinsic_prompt_tuning.errors import IptError, UnwritableError, damaged, short
from intrinsic_prompt_tuning.lazy import Tensor, torch

FILE_VERSION = 2
LEFTOVER = 600
"""Seconds after which a temporary file that nobody writes to is one that was left."""


def digest(value: Any) -> str:
    """Return a name for what JSON can say: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_name(text: str) -> str:
    """Return text with what a file's name should not hold replaced."""
    return re.sub(r"[^\w.-]+", "-", text)


def user_cache() -> Path:
    """Return $IPT_CACHE, or the folder `ipt` in the platform's place for caches.

    Raises:
        IptError: there is no home folder.
    """
    if own := os.environ.get("IPT_CACHE"):
        return Path(own)
    mac = sys.platform == "darwin"
    base = "" if mac else os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    try:
        return Path(base or Path.home() / ("Library/Caches" if mac else ".cache")) / "ipt"
    except RuntimeError as error:  # such as a container's user that the system does not know
        raise IptError("there is no home folder to keep results in: name another folder with --cache or $IPT_CACHE") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush, rename.

    Raises:
        UnwritableError: the disk is full, or the folder cannot be written.
    """
    temporary = path.parent / f".{path.name}.{platform.node()}-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that somebody put there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as why:
        raise UnwritableError(f"cannot write {path}: {why.strerror or why}; name another folder with --cache or --out") from why
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sweep(folder: Path) -> None:
    """Remove what a process of this machine was writing when it was killed, minutes ago.

    A machine's name and a process's number are not enough: a process in another container may have both, and live.
    """
    half = re.compile(rf"\..+\.{re.escape(platform.node())}-(\d+)")
    for parent, _, names in os.walk(folder) if os.name == "posix" else ():  # folders may go meanwhile
        for match in filter(None, map(half.fullmatch, names)):
            with contextlib.suppress(OSError, OverflowError):  # it is another person's, or no number of a process
                left = Path(parent, match[0])
                try:
                    os.kill(int(match[1]), 0)  # asks only whether it lives
                except ProcessLookupError:
                    if left.lstat().st_mtime < time.time() - LEFTOVER:
                        left.unlink()


def write_file(path: Path, header: Mapping[str, Any], record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file as a whole or not at all."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = {"header": header, "record": record, "checksum": _checksum(header, record, plain)}
    write_bytes(path, save(plain, {"ipt": json.dumps(content, sort_keys=True)}))


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Return header, record and tensors of a file.

    Raises:
        IptError: it is not a safetensors file of ipt, is of another version, or not a bit of it is as it was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if path.exists() and not path.is_file():  # a pipe would make its reader wait for ever
            raise OSError("it is no plain file")
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["ipt"])
            header, record, version = content["header"] | {}, content["record"] | {}, content["header"].get("version")
            if version != FILE_VERSION:
                what = f"{path} has file version {version}, expected {FILE_VERSION}"
                raise IptError(f"{what}: remove it, and the command makes it anew, or use the ipt that made it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
            if content["checksum"] != _checksum(header, record, tensors):
                raise ValueError("its checksum is another")
            return header, record, tensors
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"is not a file of ipt, or is damaged ({short(error, 200)})") from error


def _checksum(header: Mapping[str, Any], record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256(json.dumps([header, record], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
