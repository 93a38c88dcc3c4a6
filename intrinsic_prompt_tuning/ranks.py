"""Under torchrun, or with --processes, every process is a rank, and all share one cache.

Ranks never talk to each other: which results are whose follows from names, and what is done is seen in the cache.
"""

import contextlib
import math
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
        IptError: there are more than two processes, and more than cores; each would hold the backbone, and wait for the others.
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
            while not any(codes := [process.poll() for process in ranks]) and None in codes:
                time.sleep(0.05)
            if any(codes):
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
                process.terminate()  # which saves unfinished work, where it still runs
            for process in ranks:
                process.wait()


def catch_signals() -> None:
    """Let Ctrl-C and SIGTERM save unfinished work; within five seconds they are one wish, which a launcher passes on."""
    last = -math.inf

    def stop(number: int, _: object) -> None:
        nonlocal last
        if time.monotonic() > last + 5:
            last = time.monotonic()
            raise KeyboardInterrupt(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
