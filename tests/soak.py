"""Attack the program and see what it loses.

    python tests/soak.py kill --kills 30                  # SIGKILL at random moments, one process
    python tests/soak.py kill --kills 30 --processes 2

`ipt run --quick` on the testbed with few steps is killed at random moments until it has finished. Then its files must be those of
an undisturbed run (byte for byte with one process; with two, the same names, as passes hold other rows after a kill), and
nothing may be left over: no claims, no unfinished states, no temporary files.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ipt

SETTINGS = ("--quick", "--steps", "30", "--evaluations", "3", "--subspace-steps", "10", "--test-rows", "8", "--dim", "10")


def start(cache: Path, processes: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, ipt.__file__, "run", *SETTINGS, "--cache", str(cache), "--processes", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill(kills: int, processes: int, seed: int) -> int:
    """Return how many files are not as they should be."""
    rng, wrong = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        begin = time.monotonic()
        assert start(whole, processes).wait() == 0
        length, killed, runs = time.monotonic() - begin, 0, 0
        print(f"undisturbed: {length:.0f} s, {len(files_in(whole))} files", flush=True)
        while killed < kills:
            for path in sorted(cut.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            code, runs = 1, runs + 1
            while code:
                process = start(cut, processes)
                # Mostly soon after the start-up, so that a run takes many kills.
                try:
                    code = process.wait(rng.uniform(3, max(8, length / 2)) if killed < kills else None)
                    if code:
                        print((process.stderr.read() if process.stderr else b"").decode()[-2000:])
                        return 1
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    killed += 1
            expected, found = files_in(whole), files_in(cut)
            odd = sorted(expected.keys() ^ found.keys())
            other = [name for name in expected.keys() & found.keys() if expected[name] != found[name] and "budgets" not in name]
            wrong += len(odd) + (len(other) if processes == 1 else 0)
            print(
                f"run {runs}: {killed} kills so far, {len(odd)} files missing or left over {odd[:3]}, {len(other)} differ {other[:3]}",
                flush=True,
            )
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill"])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    raise SystemExit(bool(kill(arguments.kills, arguments.processes, arguments.seed)))


if __name__ == "__main__":
    main()
