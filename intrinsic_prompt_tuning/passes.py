"""How rows go through the frozen backbone: as many at once as memory and caches hold. It changes no result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.lazy import Tensor, np, torch
from intrinsic_prompt_tuning.ranks import n_neighbours

FEW = 4
"""Rows of a matrix product under which a CPU takes another way, that rounds otherwise: so few are filled up.

A newer CPU with AVX-512 was found to do so under 16 rows; there, neighbours change bits.
"""

LAUNCH = 2.5e12
"""Parameters times tokens that a GPU (H200, bf16) works off while the host launches one pass.

Launching takes about 0.1 s for 30 layers forward and backward (SmolLM2-135M's shape), however many tokens the pass holds.
"""


@dataclass
class Budget:
    """How many tokens go through the backbone at once: as many as memory holds, found by trying."""

    tokens: int
    most: float = math.inf
    """What has not fitted before, if anything."""
    by_block: bool = False
    """Whether only rows of one block share a pass, so that no row's neighbours change a bit of its results."""
    overhead: float | None = None
    """What a pass costs whatever it holds, in tokens; None: an eighth of `tokens` (measured with the testbed on a CPU)."""

    def in_passes(self, widths: Sequence[tuple[int, int]], work: Callable[[list[int]], None]) -> None:
        """Call `work` on lists of row numbers, the longest rows first and rows of like length together.

        Args:
            widths: of each row, the tokens of prompt and input, and of the text behind them.
            work: one pass.
        """
        lengths = [sum(width) for width in widths]
        for group in self.groups(widths):
            left = sorted(group, key=lambda row: -lengths[row])
            while left:
                tokens = self.tokens
                overhead = tokens / 8 if self.overhead is None else self.overhead
                for size in pass_sizes([lengths[row] for row in left], tokens, overhead):
                    if self._try(left[:size], lengths, work):
                        del left[:size]
                    if self.tokens != tokens:
                        break

    def groups(self, widths: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """Return the numbers of rows that may share a pass, those of the largest widths first."""
        found: dict[tuple[int, ...], list[int]] = {}
        for row, width in enumerate(widths):
            found.setdefault(tuple(map(block, width)) if self.by_block else (), []).append(row)
        return [found[blocks] for blocks in sorted(found, reverse=True)]

    def _try(self, rows: list[int], lengths: Sequence[int], work: Callable[[list[int]], None]) -> bool:
        """Tell whether a pass fitted into memory; if it did not, the next are half as large, and if it did, perhaps twice."""
        longest, used, in_one = lengths[rows[0]], lengths[rows[0]] * len(rows), max(lengths) * len(lengths)
        try:
            work(rows)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            if len(rows) == 1:
                told = f"one row of {longest} tokens does not fit into memory"
                raise IptError(f"{told}: shorten it with --max-length or use a smaller backbone") from error
            self.most, self.tokens = min(self.most, used), longest * (len(rows) // 2)
            return False
        # Not all rows fit into one pass, and by what this one has used there is memory for more.
        if in_one > self.tokens and 2 * self.tokens < self.most and memory_share() * max(1, self.tokens / used) < 0.4:
            self.tokens *= 2
        return True


def block(width: int) -> int:
    """Return a number that rows must share to be padded to one width, if that is to change no bit of what they come to.

    Padding adds zeros to sums, which is exact; but kernels of a CPU add up 16 numbers at a time and then the rest, and have
    others for the smallest matrices, so a zero too many can move a number from the rest into the sixteen. Measured with MKL and
    AVX-512; tests/test_tuning.py holds it.
    """
    return -1 if width < 12 else width // 16


def pass_sizes(lengths: Sequence[int], tokens: int, overhead: float) -> list[int]:
    """Cut rows, the longest first, into passes of at most so many tokens with the padding, so that they cost the least.

    A pass costs its tokens, padding included, and `overhead` more.
    """
    # From the last row on: the first pass of the cheapest way to do a row and all behind it, and the cost of that way.
    first, costs = [0] * len(lengths), np.zeros(len(lengths) + 1)
    counts = np.arange(1, len(lengths) + 1)
    for row in reversed(range(len(lengths))):
        most = min(max(1, tokens // lengths[row]), len(lengths) - row)
        totals = lengths[row] * counts[:most] + costs[row + 1 : row + most + 1]
        first[row] = most - int(totals[::-1].argmin())  # of equals the largest
        costs[row] = overhead + totals[first[row] - 1]
    sizes = list[int]()
    while (row := sum(sizes)) < len(lengths):
        sizes.append(first[row])
    return sizes


def memory_share() -> float:
    """Return which share of its part of the GPU's memory this rank has used at most since last asked; 1 on a CPU.

    On a CPU the passes that fit its caches are the fastest (`tests/benchmark.py --budgets`), so its memory is not to be filled.
    """
    if not torch.cuda.is_initialized():
        return 1.0
    share = torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.reset_peak_memory_stats()
    return share * _ranks_a_gpu()


def _ranks_a_gpu() -> int:
    return -(-n_neighbours() // torch.cuda.device_count())


def available_memory(device: torch.device) -> float:
    """Return about how many bytes are free for this process, ranks on the same device sharing alike."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]) / _ranks_a_gpu()
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return 1024.0 * int(lines["MemAvailable"].split()[0]) / n_neighbours()
    except (ValueError, OSError, KeyError):
        return 4e9


def first_budgets(model: Any, prompt_at: str = "front") -> tuple[Budget, Budget]:
    """Return what is tried first with a model of transformers where it is, forward and backward, and forward only.

    Of a causal model all rows share passes: its bits are not promised beside neighbours, and fuller passes are faster. Behind an
    input that runs once there is room for more rows.
    """
    if model.device.type != "cpu":
        overhead = max(1 << 12, LAUNCH / model.num_parameters())
        return Budget(1 << 15, overhead=overhead), Budget(1 << 17, overhead=overhead)
    tokens, by_block = 1 << (11 if prompt_at == "end" else 10), model.config.is_encoder_decoder
    return Budget(tokens, by_block=by_block), Budget(2 * tokens, by_block=by_block)


def only(model: Any, flat: Tensor) -> Any:
    """Let only some positions of the flattened rows reach the vocabulary, the widest layer by far, while the result is open."""
    return model.get_output_embeddings().register_forward_pre_hook(lambda _, x: (x[0].flatten(0, 1).index_select(0, flat),))


def to_device(values: Any, device: torch.device) -> Tensor:
    """Return numbers of the host as a tensor of the device, without waiting for what the device is at."""
    tensor = torch.as_tensor(np.asarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def padded(rows: Sequence[Sequence[int]], device: torch.device, *, before: int = 0, least: int = 1) -> tuple[Tensor, np.ndarray]:
    """Pad with 0 on the right; return ids (rows, width) on the device, and on the host what is real (rows, before + width).

    No row sees what is not real, so any token would do. On a GPU, the width is such that it is a multiple of 8 together with
    the places before it, which are real: kernels want that.
    """
    width = max(least, *map(len, rows))
    if device.type == "cuda":
        width = -(-(before + width) // 8) * 8 - before
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return to_device(ids, device), np.arange(-before, width) < np.array([[len(row)] for row in rows])
