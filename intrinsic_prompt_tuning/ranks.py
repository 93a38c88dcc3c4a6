"""Under torchrun, or with --processes, every process is a rank with a device of its own, and all share one cache.

Ranks never talk to each other: which results are whose follows from names and costs, and what is done is seen in the cache.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence

from intrinsic_prompt_tuning.errors import IptError


def rank() -> int:
    """Return this process's number; alone it is rank 0 of 1."""
    return int(os.environ.get("RANK", "0"))


def n_ranks() -> int:
    """Return how many processes share the work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def n_neighbours() -> int:
    """Return how many of them share this machine: all, unless torchrun says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", n_ranks()))


def own_share(costs: Sequence[float]) -> list[int]:
    """Return which pieces of work are this rank's, when the costliest go first, each to the rank with the least so far."""
    shares: list[list[int]] = [[] for _ in range(n_ranks())]
    load = [0.0] * n_ranks()
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        to = load.index(min(load))
        shares[to].append(piece)
        load[to] += costs[piece]
    return sorted(shares[rank()])


def n_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def n_processes(small: bool) -> int:
    """Return how many processes share a command's work where nobody says.

    On the testbed's small matrices two threads are hardly faster than one, but two processes are nearly twice as fast.
    """
    return min(4, n_cores()) if small else 1


def run_in_processes(command: Sequence[str], count: int) -> tuple[int, str]:
    """Run a command in several processes on this machine.

    A person's mistake is met by all of them; the first process alone tells it, unless only another one failed.

    Returns:
        0, or the exit code of the first that failed, and what that one said if nobody has heard it yet.

    Raises:
        IptError: there are more processes than cores; each would hold the backbone, and wait for the others.
    """
    if count > max(2, cores := n_cores()):
        raise IptError(f"--processes is {count}, and there are {cores} cores to use: use at most as many")
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count)))
    shared = os.environ | {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": threads}
    with contextlib.ExitStack() as files:
        # No pipes: one that nobody reads fills up, and then its writer waits for ever.
        said = [files.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        ranks = [
            subprocess.Popen(command, stderr=said[n] if n else None, env=shared | {"RANK": str(n), "LOCAL_RANK": str(n)})
            for n in range(count)
        ]
        try:
            while any(process.poll() is None for process in ranks) and not any(process.poll() for process in ranks):
                time.sleep(0.05)
            if any(process.poll() for process in ranks):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    ranks[0].wait(5)  # it meets the same mistake a moment later, if it is a person's
            first = next((n for n, process in enumerate(ranks) if process.poll()), 0)
            said[first].seek(0)
            code, told = ranks[first].returncode or 0, said[first].read().decode(errors="replace")
            if code >= 0:
                return code, told
            why = ", as a system does that is out of memory" if code == -signal.SIGKILL else ""
            return 128 - code, f"{told}error: process {first + 1} of {count} was ended by signal {-code}{why}\n"
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.terminate()  # which saves unfinished work
            for process in ranks:
                process.wait()


_STOPPED: dict[int, float] = {}
"""The signals that have asked for an end, and when they came."""


def catch_signals() -> None:
    """Let Ctrl-C and SIGTERM save unfinished work; within five seconds they are one wish, which a launcher passes on."""

    def stop(number: int, _: object) -> None:
        now = time.monotonic()
        if not _STOPPED or now > min(_STOPPED.values()) + 5:
            _STOPPED[number] = now
            raise KeyboardInterrupt

    _STOPPED.clear()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def stopped_by() -> int:
    """Return the exit code that tells the first of these signals."""
    return 128 + next(iter(_STOPPED))
