"""Under torchrun, or with --processes, every process is a rank with a device of its own, and all share one cache.

Ranks never talk to each other: which results are whose follows from names and costs, and what is done is seen in the cache.
"""

from __future__ import annotations

import os
from collections.abc import Sequence


def rank() -> int:
    """Return this process's number; alone it is rank 0 of 1."""
    return int(os.environ.get("RANK", "0"))


def n_ranks() -> int:
    """Return how many processes share the work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_share(costs: Sequence[float]) -> list[int]:
    """Return which pieces of work are this rank's, when the costliest go first, each to the rank with the least so far."""
    shares: list[list[int]] = [[] for _ in range(n_ranks())]
    load = [0.0] * n_ranks()
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        to = load.index(min(load))
        shares[to].append(piece)
        load[to] += costs[piece]
    return sorted(shares[rank()])
