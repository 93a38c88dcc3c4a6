"""Compare few-shot samples with the MD5s that CrossFit published of its own.

    python tests/verify_crossfit.py                   # every task that has MD5s: hours, and the whole data sets from the Hub
    python tests/verify_crossfit.py ag_news piqa
    python tests/verify_crossfit.py mine --tasks-file mine.yaml

Samples are built anew, never read from the cache: 11 files a task, train and dev of five data seeds and one test file.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from intrinsic_prompt_tuning.errors import IptError, nearest
from intrinsic_prompt_tuning.tasks import CROSSFIT_SEEDS, TASKS_FILE, Example, Task, load_tasks

MD5_FILE = Path(__file__).with_name("crossfit_md5.txt")
VERDICTS = ("equal", "different", "could not be loaded")


def published() -> dict[str, list[str]]:
    """Return task -> the first digits of its MD5s: train and dev of each data seed, then test."""
    lines = [line.split() for line in MD5_FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {name: digits for name, *digits in lines}


def crossfit_tsv(examples: Iterable[Example]) -> bytes:
    """Return the bytes of CrossFit's TSV file: per line the input and all references, tab-separated, nothing escaped."""
    return "".join("\t".join((row.input, *row.answers)) + "\n" for row in examples).encode()


def verify_task(task: Task) -> list[tuple[str, int, str]]:
    """Rebuild a task's samples and compare them with the MD5s that CrossFit published.

    Returns:
        (part, seed, "equal" or "different"): train and dev of five seeds, then test once, as all seeds share it.
    """
    if task.name not in published():
        raise IptError(f"CrossFit published no MD5s for task '{task.name}'; only its own tasks can be verified")
    samples = {seed: task.draw(seed, 16, None) for seed in CROSSFIT_SEEDS}
    parts = [(part, seed, rows) for seed, it in samples.items() for part, rows in (("train", it.train), ("dev", it.validation))]
    parts.append(("test", CROSSFIT_SEEDS[0], samples[CROSSFIT_SEEDS[0]].test))
    verdicts = []
    for (part, seed, rows), digits in zip(parts, published()[task.name], strict=True):
        equal = hashlib.md5(crossfit_tsv(rows)).hexdigest().startswith(digits)
        verdicts.append((part, seed, "equal" if equal else "different"))
    return verdicts


def verify_tasks(tasks: Mapping[str, Task], names: Sequence[str]) -> None:
    """Rebuild samples, compare them with CrossFit's MD5s, a line each, and count."""
    counts = Counter[str]()
    for name in names:
        try:
            if name not in tasks:
                raise IptError(f"there is no such task in the tasks file{nearest(name, tasks)}")
            different = [f"{part} {seed}" for part, seed, verdict in verify_task(tasks[name]) if verdict != "equal"]
            verdict, detail = ("different", f"different: {', '.join(different)}") if different else ("equal", "equal")
        except IptError as error:
            verdict, detail = "could not be loaded", f"could not be loaded: {error}"
        counts[verdict] += 1
        print(f"{name}: {detail}", flush=True)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="task", help="tasks; all that CrossFit published MD5s of without any")
    parser.add_argument("--tasks-file", type=Path, default=TASKS_FILE, help="where the tasks are defined")
    arguments = parser.parse_args()
    try:
        tasks = load_tasks(arguments.tasks_file)
    except IptError as error:
        parser.error(str(error))
    verify_tasks(tasks, arguments.tasks or [name for name in tasks if name in published()])


if __name__ == "__main__":
    main()
