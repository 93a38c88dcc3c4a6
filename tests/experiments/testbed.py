"""The paper's figures on the testbed: what a subspace recovers by its dimension, its tasks, its rows, and how it was found.

    python tests/experiments/testbed.py dims --cache DIR          # Figs 3 and 4: all spaces by dimension
    python tests/experiments/testbed.py seen --cache DIR          # Fig 6: by the number of seen tasks
    python tests/experiments/testbed.py shots --cache DIR         # Fig 5: by rows per label
    python tests/experiments/testbed.py kinds --cache DIR         # Fig 12: the tasks of one kind are unseen
    python tests/experiments/testbed.py ablations --cache DIR     # without each loss, without noise, other weights

Everything is kept in the cache, and the same command goes on where it was; `ipt plot` draws what is there. Whatever is chosen is
chosen on validation rows. Spread over seeds: `ipt run --seeds 4`.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import ipt
from intrinsic_prompt_tuning import Experiment
from intrinsic_prompt_tuning.context import COLLECTION_SEED
from intrinsic_prompt_tuning.ranks import n_ranks, run_in_processes
from intrinsic_prompt_tuning.report import make_report
from intrinsic_prompt_tuning.results import Choice, Result
from intrinsic_prompt_tuning.spaces import SpaceKind

OTHER_SEED = 21
DIMS = (250, 10, 50, 5, 100, 25, 2)


def experiment(cache: Path, **given: Any) -> Experiment:
    return Experiment.of({"cache": cache, **given}, ipt.Terminal())


def every(choices: Sequence[Choice]) -> list[Result]:
    return [result for choice in choices for result in choice]


def measure(x: Experiment, prompts: dict[str, Choice], spaces: Sequence[Result], *, seen: Sequence[str] = ()) -> None:
    """Tune vectors of unseen tasks, and of these seen ones on other data, in some spaces, and print the table."""
    vectors = []
    for space in spaces:
        vectors += x.intrinsic_vectors(x.named("unseen"), COLLECTION_SEED, space).values()
        vectors += x.intrinsic_vectors(seen, OTHER_SEED, space).values()
    scores = x.scores(prompts, spaces, vectors)
    x.make([*every([*prompts.values(), *vectors]), *spaces, *scores])
    ipt.print_report(make_report(x, scores), as_json=False, per_task=False, wide=True)


def dims(cache: Path) -> None:
    """All spaces by dimension, two dims more at a time, so that a table is there early."""
    x = experiment(cache)
    seen, prompts = x.named("seen"), x.soft_prompts(x.named("seen", "unseen"))
    collection = {task: prompts[task] for task in seen}
    kinds: tuple[SpaceKind, ...] = ("subspace", "random", "linear")
    spaces = [x.subspace("low-rank", 250, collection)]
    for number, dim in enumerate(DIMS, start=1):
        spaces += [x.subspace(kind, dim, collection) for kind in kinds if kind != "linear" or dim < len(seen)]
        if number % 2 == 0 or number == len(DIMS):
            measure(x, prompts, spaces, seen=seen)


def seen(cache: Path) -> None:
    """Subspaces of 20, 40 ... 100 seen tasks, drawn by seed 0, each among the next; unseen tasks alone tell."""
    x = experiment(cache)
    prompts = x.soft_prompts(x.named("seen", "unseen"))
    order = random.Random(0).sample(x.named("seen"), len(x.named("seen")))
    spaces = [x.subspace("subspace", dim, {task: prompts[task] for task in order[:n]})
              for n in range(20, len(order) + 1, 20) for dim in (250, 10)]  # fmt: skip
    measure(x, prompts, spaces)


def shots(cache: Path) -> None:
    """The whole experiment by rows per label; prompt tuning beside it gets as many."""
    for count in (4, 8, 16, 32, 64):
        x = experiment(cache, shots=count)
        ipt.echo(f"{count} rows per label for training, as many for validation")
        results, scores = x.whole([250, 10], OTHER_SEED)
        x.make([*results, *scores])
        ipt.print_report(make_report(x, scores), as_json=False, per_task=False, wide=True)


def kinds(cache: Path) -> None:
    """All tasks of one kind are unseen, the seen tasks of the other kinds make the subspace."""
    whole = experiment(cache)
    for kind in sorted({whole.task(task).kind for task in whole.roles}):
        split = {"seen": [task for task in whole.named("seen") if whole.task(task).kind != kind],
                 "unseen": [task for task in whole.roles if whole.task(task).kind == kind]}  # fmt: skip
        cache.mkdir(parents=True, exist_ok=True)
        file = cache / f"without-{kind}.yaml"
        file.write_text(yaml.safe_dump(split), encoding="utf-8")
        x = experiment(cache, split=str(file))
        prompts = x.soft_prompts(x.named("seen", "unseen"))
        collection = {task: prompts[task] for task in x.named("seen")}
        ipt.echo(f"without {kind}: {len(split['seen'])} seen tasks, {len(split['unseen'])} unseen ones")
        measure(x, prompts, [x.subspace(space, dim, collection) for space in ("subspace", "random") for dim in (250, 10)])


def ablations(cache: Path) -> None:
    """One thing changed at a time, at dims 250 and 10, on both challenges."""
    changes: list[dict[str, Any]] = [
        {}, {"lm_loss": False}, {"reconstruction_loss": False}, {"noise": 0.0}, {"alpha": 1.0}, {"alpha": 100.0}, {"inner": 128},
    ]  # fmt: skip
    for change in changes:
        x = experiment(cache, **change)
        seen, prompts = x.named("seen"), x.soft_prompts(x.named("seen", "unseen"))
        ipt.echo(f"as shipped, but {change}" if change else "as shipped")
        collection = {task: prompts[task] for task in seen}
        measure(x, prompts, [x.subspace("subspace", dim, collection) for dim in (250, 10)], seen=seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {part.__name__: part for part in (dims, seen, shots, kinds, ablations)}
    parser.add_argument("what", choices=list(parts))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.processes > 1 and n_ranks() == 1:
        code, told = run_in_processes([sys.executable, *sys.argv], arguments.processes)
        sys.stderr.write(told)
        raise SystemExit(code)
    parts[arguments.what](arguments.cache)


if __name__ == "__main__":
    main()
