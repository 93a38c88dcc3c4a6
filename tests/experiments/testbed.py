"""The paper's figures on the testbed: what a subspace recovers by its dimension, its tasks, its rows, and how it was found.

    python tests/experiments/testbed.py dims --cache DIR          # Figs 3 and 4: all spaces by dimension
    python tests/experiments/testbed.py needed --cache DIR        # dimensions that unseen tasks need: random spaces above 250
    python tests/experiments/testbed.py seeds --cache DIR         # three runs with other seeds, and what is above what
    python tests/experiments/testbed.py folds --cache DIR         # each of the 80 tasks that compose unseen once, starts near by
    python tests/experiments/testbed.py grids --cache DIR         # after it: three learning rates a task on every side
    python tests/experiments/testbed.py shots --cache DIR         # Fig 5: likewise, by rows per label of the new task
    python tests/experiments/testbed.py nearby --cache DIR        # known tasks: starts near by, and prompts of the other rows
    python tests/experiments/testbed.py seen --cache DIR          # Fig 6: by the number of seen tasks
    python tests/experiments/testbed.py kinds --cache DIR         # Fig 12: the tasks of one kind are unseen
    python tests/experiments/testbed.py ablations --cache DIR     # without each loss, without noise, other weights
    python tests/experiments/testbed.py stability --cache DIR     # Table 2: ten runs of each task, and two-stage
    python tests/experiments/testbed.py fine_tuning --cache DIR --processes 1    # all weights tuned, the second baseline

Everything is kept in the cache, and the same command goes on where it was; `ipt plot` draws what is there. Whatever is chosen is
chosen on validation rows.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from shared import Spaces, averaged, every, pairs_text, pooled, pooled_text, reported, splits_drawn, write_split

import ipt
from intrinsic_prompt_tuning import Experiment
from intrinsic_prompt_tuning.context import COLLECTION_SEED
from intrinsic_prompt_tuning.evaluation import spread
from intrinsic_prompt_tuning.makers import nearest_prompts
from intrinsic_prompt_tuning.ranks import n_ranks, run_in_processes
from intrinsic_prompt_tuning.report import spread_text
from intrinsic_prompt_tuning.reporter import table_text
from intrinsic_prompt_tuning.results import Choice, Result
from intrinsic_prompt_tuning.spaces import SpaceKind
from intrinsic_prompt_tuning.tuning import minibatch, outcome

OTHER_SEED, GRID = 21, (0.1, 0.3, 1.0)
FINE_TUNED_BATCH, FINE_TUNED_RATES = 4, (1e-4, 3e-4, 1e-3, 3e-3)
DIMS = (250, 10, 50, 100, 25, 5)
SEEDS_SPACES: Spaces = (("subspace", 250), ("random", 250), ("low-rank", 250), ("subspace", 10))
FOLD_SPACES: Spaces = (*SEEDS_SPACES, ("low-rank", 500), ("linear", 99), ("linear", 250))
"""With low-rank prompts of a rank above one, and all that is linear in 100 prompts, also with free numbers."""
SHOTS = (4, 8, 16, 32, 64)


def experiment(cache: Path, **given: Any) -> Experiment:
    """Return the experiment as shipped, but for two tries a task, in every space alike."""
    return Experiment({"cache": cache, "tries": 2, **given}, ipt.Terminal())


def measure(
    x: Experiment, prompts: dict[str, Choice], spaces: Sequence[Result], *,
    seen: Sequence[str] = (), other_seed: int = OTHER_SEED, more: Sequence[Choice] = (),
) -> dict[str, Any]:  # fmt: skip
    """Tune vectors of unseen tasks, and of these seen ones on other data, in some spaces; print the table and return it."""
    vectors = [*more]
    for space in spaces:
        vectors += x.intrinsic_vectors(x.named("unseen"), COLLECTION_SEED, space).values()
        vectors += x.intrinsic_vectors(seen, other_seed, space).values()
    return reported(x, prompts, spaces, vectors)


def dims(cache: Path) -> None:
    """All spaces by dimension, two dims more at a time, so that a table is there early."""
    x = experiment(cache)
    seen, prompts = x.named("seen"), x.soft_prompts(x.named("seen", "unseen"))
    collection = {task: prompts[task] for task in seen}
    kinds: tuple[SpaceKind, ...] = ("subspace", "random", "linear")
    spaces = [x.subspace("low-rank", 250, collection)]
    for number, dim in enumerate(DIMS, start=1):
        spaces += [x.subspace(kind, dim, collection) for kind in kinds if kind != "linear" or dim in (10, 50)]
        if number % 2 == 0 or number == len(DIMS):
            measure(x, prompts, spaces, seen=seen)


def needed(cache: Path) -> None:
    """The dimensions that unseen tasks need in learned spaces and in random ones, which may be as large as their inner layer."""
    x = experiment(cache)
    prompts = x.soft_prompts(x.named("seen", "unseen"))
    collection = {task: prompts[task] for task in x.named("seen")}
    dims: dict[SpaceKind, tuple[int, ...]] = {"subspace": (50, 100, 250), "random": (250, 500, x.fitting.inner)}
    measure(x, prompts, [x.subspace(kind, dim, collection) for kind, own in dims.items() for dim in own])


def seeds(cache: Path) -> None:
    """Other starts, orders of rows, subspaces and other data: the spread over runs, and what is above what, task by task."""
    reports = []
    for n, other_seed in enumerate((OTHER_SEED, 13, 42)):
        x = experiment(cache).with_seeds(n)
        prompts = x.soft_prompts(x.named("seen", "unseen"))
        collection = {task: prompts[task] for task in x.named("seen")}
        spaces = [x.subspace(kind, dim, collection) for kind, dim in SEEDS_SPACES]
        reports.append(measure(x, prompts, spaces, seen=x.named("seen"), other_seed=other_seed))
    ipt.echo(spread_text(spread(reports)))
    for quantity in ("T_train_diff(IST)", "T_test(IST)"):
        scores = {f"{space} {dim}": mean_scores(reports, quantity, space, dim) for space, dim in SEEDS_SPACES}
        own, tuned = next(iter(scores.values())), mean_scores(reports, "prompt tuning", None, None)
        scores["prompt tuning"] = {task: tuned[task] for task in own}
        ipt.echo(f"{quantity}, means over the runs\n\n{pairs_text(scores)}")


def folds(cache: Path) -> None:
    """Each task that composes two parts is unseen once, in four splits, in three runs with other splits and seeds."""
    in_runs(cache, FOLD_SPACES)


def grids(cache: Path) -> None:
    """The first run of `folds`, where all that is tuned of unseen tasks has the best of three rates, task by task."""
    in_runs(cache, FOLD_SPACES, 1, learning_rate=[*GRID], vector_learning_rate=[*GRID])


def shots(cache: Path) -> None:
    """The runs of `folds` with few and many rows per label of the unseen tasks, in spaces of prompts with 16, and on all sides."""
    for count in SHOTS:
        ipt.echo(f"{count} rows per label for training, as many for validation")
        in_runs(cache, FOLD_SPACES[:1], shots=count)


def in_runs(cache: Path, kinds_and_dims: Spaces, runs: int = 3, **change: Any) -> None:
    """Tune the unseen tasks of `folds`, with a change of settings; print each run, and what they say together."""
    told = list[list[dict[str, Any]]]()
    for seed in range(runs):
        told.append([])
        for whole in fold_experiments(cache, seed):
            x = Experiment(whole.given | change, whole.report) if change else whole
            told[-1] += scores_of_unseen(whole, x, kinds_and_dims)
            ipt.echo(pooled_text(told[-1]))
        if seed:
            ipt.echo(spread_text(spread([*map(pooled, told)])) + "means over the runs\n\n" + pooled_text(averaged(told)))


def fold_experiments(cache: Path, seed: int) -> list[Experiment]:
    """Return an experiment for each of four splits that a seed draws, with a random space of its own."""
    whole = experiment(cache)
    tasks = [task for task in whole.roles if not whole.task(task).pretrained]
    splits = splits_drawn(cache, tasks, [*whole.roles], seed)
    return [experiment(cache, split=str(split), seed=seed, subspace_seed=4 * seed + n) for n, split in enumerate(splits)]


def scores_of_unseen(whole: Experiment, x: Experiment, kinds_and_dims: Spaces) -> list[dict[str, Any]]:
    """Tune prompts and vectors of the unseen tasks as x says, also from the nearest seen prompts, in spaces as `whole` has them."""
    unseen, collection = x.named("unseen"), whole.soft_prompts(whole.named("seen"))
    spaces = [whole.subspace(kind, dim, collection) for kind, dim in kinds_and_dims]
    whole.make([*every(collection.values()), *spaces])
    near = [*x.soft_prompts(unseen, near=[*collection.values()]).values()]
    for space in spaces:
        if space.header["space"] == "subspace":
            near += x.intrinsic_vectors(unseen, COLLECTION_SEED, space, "nearest").values()
    scores: list[dict[str, Any]] = measure(x, x.soft_prompts(unseen), spaces, more=near)["scores"]
    return scores


def nearby(cache: Path) -> None:
    """Known tasks on other data: vectors that start from the nearest seen prompt, and what prompt tuning makes of the same rows."""
    x = experiment(cache)
    seen, prompts = x.named("seen"), x.soft_prompts(x.named("seen", "unseen"))
    collection = {task: prompts[task] for task in seen}
    spaces = [x.subspace("subspace", dim, collection) for dim in (250, 10)]
    x.make([*every(prompts.values()), *spaces])
    near = [own for s in spaces for own in x.intrinsic_vectors(seen, OTHER_SEED, s, "nearest").values()]
    near += x.soft_prompts(seen, OTHER_SEED, near=[*collection.values()]).values()
    report = measure(x, prompts, spaces, seen=seen, more=near)
    again = x.soft_prompts(seen, OTHER_SEED)
    x.make(every(again.values()))
    scores = [score for score in x.scores(again, [], []) if score.header["stage"] == "prompt tuning"]
    x.make(scores)
    by_way = {"prompt tuning, the same rows": {s.header["task"]: x.store.read(s)[0]["score"] for s in scores}}
    for score in report["scores"]:
        shown = score["quantity"] in ("prompt tuning", "T_train_diff(IST)", "T_train_diff(warm start)")
        if shown and score["task"] in by_way["prompt tuning, the same rows"]:
            way = " ".join(str(score[name]) for name in ("quantity", "space", "dim", "start") if score[name] is not None)
            by_way.setdefault(way, {})[score["task"]] = score["value"]
    ipt.echo(table_text("way|n|mean score", [[way, len(own), fmean(own.values())] for way, own in by_way.items()]))
    ipt.echo(pairs_text(by_way))
    own = [nearest_prompts(x, [*collection.values()], task, OTHER_SEED)[0].equal(x.tuned(collection[task])) for task in seen]
    ipt.echo(f"the nearest seen prompt is the task's own on {sum(own)} of {len(own)} tasks")


def mean_scores(reports: Sequence[dict[str, Any]], quantity: str, space: str | None, dim: int | None) -> dict[str, float]:
    """Return each task's test score in a space, its mean over runs."""
    found = defaultdict[str, list[float]](list)
    for report in reports:
        for score in report["scores"]:
            if (score["quantity"], score["space"]) == (quantity, space) and (space == "low-rank" or score["dim"] == dim):
                found[score["task"]].append(score["value"])
    return {task: fmean(values) for task, values in found.items()}


def seen(cache: Path) -> None:
    """Subspaces of 20, 40 ... 100 seen tasks, drawn by seed 0, each among the next; unseen tasks alone tell."""
    x = experiment(cache)
    prompts = x.soft_prompts(x.named("seen", "unseen"))
    order = random.Random(0).sample(x.named("seen"), len(x.named("seen")))
    spaces = [x.subspace("subspace", dim, {task: prompts[task] for task in order[:n]})
              for n in range(20, len(order) + 1, 20) for dim in (250, 10)]  # fmt: skip
    measure(x, prompts, spaces)


def kinds(cache: Path) -> None:
    """All tasks of one kind are unseen, the seen tasks of the other kinds make the subspace."""
    whole = experiment(cache)
    for kind in sorted({whole.task(task).kind for task in whole.roles}):
        seen = [task for task in whole.named("seen") if whole.task(task).kind != kind]
        unseen = [task for task in whole.roles if whole.task(task).kind == kind]
        x = experiment(cache, split=str(write_split(cache, f"without-{kind}", seen, unseen)))
        prompts = x.soft_prompts(x.named("seen", "unseen"))
        collection = {task: prompts[task] for task in x.named("seen")}
        ipt.echo(f"without {kind}: {len(seen)} seen tasks, {len(unseen)} unseen ones")
        spaces = [x.subspace(space, dim, collection) for space in ("subspace", "random") for dim in (250, 10)]
        ipt.echo(pooled_text([score for score in measure(x, prompts, spaces)["scores"] if score["task"] in unseen]))


def ablations(cache: Path) -> None:
    """One thing changed at a time, at dims 250 and 10, on both challenges."""
    changes: list[dict[str, Any]] = [
        {}, {"free": 0.0}, {"lm_loss": False}, {"reconstruction_loss": False}, {"noise": 0.0}, {"alpha": 1.0}, {"alpha": 100.0},
        {"inner": 128},
    ]  # fmt: skip
    for change in changes:
        x = experiment(cache, **change)
        seen, prompts = x.named("seen"), x.soft_prompts(x.named("seen", "unseen"))
        ipt.echo(f"as shipped, but {change}" if change else "as shipped")
        collection = {task: prompts[task] for task in seen}
        measure(x, prompts, [x.subspace("subspace", dim, collection) for dim in (250, 10)], seen=seen)


def stability(cache: Path) -> None:
    """Table 2: ten runs of each task from other starts, with rows in other orders, at the first rate of the grid. Of unseen tasks
    also prompt tuning from where IPT ends; and, as that has the steps of both, one stage of as many."""
    whole, x = experiment(cache), experiment(cache, tries=10)
    tasks, collection = x.named("unseen"), whole.soft_prompts(x.named("seen"))
    spaces = [whole.subspace(kind, dim, collection) for kind in ("subspace", "random") for dim in (250, 10)]
    whole.make([*every(collection.values()), *spaces])
    runs = runs_of(x, tasks, COLLECTION_SEED, spaces)
    for steps in (x.tuning.steps, x.tuning.steps // 4):
        runs[f"two-stage, {steps} steps"] = gone_on(experiment(cache, tries=10, steps=steps), runs["subspace 250"])
    runs["prompt tuning twice"] = gone_on(x, runs["prompt tuning"])
    large, learned = [spaces[0], spaces[2]], spaces[:2]
    for way, own in runs_of(experiment(cache, tries=10, steps=2 * x.tuning.steps), tasks, COLLECTION_SEED, large).items():
        runs[f"{way}, {2 * x.tuning.steps} steps"] = own
    compare_runs(x, "unseen tasks", runs | runs_from_nearest(whole, tasks, COLLECTION_SEED, learned))
    known = runs_of(x, x.named("seen"), OTHER_SEED, spaces[:3])
    compare_runs(x, "other data of seen tasks", known | runs_from_nearest(whole, x.named("seen"), OTHER_SEED, learned))


def compare_runs(x: Experiment, what: str, runs: dict[str, list[Choice]]) -> None:
    """Print what ten runs of each task score, how much one task's score varies over them, and differences task by task."""
    told = {way: scores_of_runs(x, own) for way, own in runs.items()}
    tasks = [choice[0].header["task"] for choice in runs["prompt tuning"]]
    ipt.echo(f"{what}, n={len(tasks)}, ten runs each: mean test score, mean over tasks of the standard deviation over runs")
    ipt.echo(table_text("way|mean|deviation", [[w, *(fmean(map(of, own)) for of in (fmean, stdev))] for w, own in told.items()]))
    ipt.echo(pairs_text({way: dict(zip(tasks, map(fmean, own), strict=True)) for way, own in told.items()}))


def runs_of(x: Experiment, tasks: Sequence[str], data_seed: int, spaces: Sequence[Result]) -> dict[str, list[Choice]]:
    """Return the runs of tasks that x describes, in prompt tuning and in some spaces, all made: also of what one solves."""
    ways = {"prompt tuning": x.soft_prompts(tasks, data_seed)}
    ways |= {f"{s.header['space']} {s.header['dim']}": x.intrinsic_vectors(tasks, data_seed, s) for s in spaces}
    runs = {way: [alone(choice) for choice in choices.values()] for way, choices in ways.items()}
    assert all(len(choice) == x.rates.tries for own in runs.values() for choice in own), "one rate"
    x.make(every(itertools.chain(*runs.values())))
    return runs


def runs_from_nearest(
    whole: Experiment, tasks: Sequence[str], data_seed: int, spaces: Sequence[Result]
) -> dict[str, list[Choice]]:
    """Return ten runs of each task that start from the nearest seen prompt, all made. Seeds tell runs apart: a second try would
    start from the second nearest."""
    runs = defaultdict[str, list[dict[str, Choice]]](list)
    for x in map(whole.with_seeds, range(10)):
        runs["prompt tuning, nearest start"].append(x.soft_prompts(tasks, data_seed, near=spaces[0].inputs))
        for space in spaces:
            runs[f"subspace {space.header['dim']}, nearest start"].append(x.intrinsic_vectors(tasks, data_seed, space, "nearest"))
    told = {way: [tuple(run[task][0] for run in own) for task in tasks] for way, own in runs.items()}
    whole.make(every(itertools.chain(*told.values())))
    return told


def alone(choice: Choice) -> Choice:
    """Return results none of which makes another needless."""
    return tuple(replace(result, instead_of=()) for result in choice)


def gone_on(x: Experiment, runs: Sequence[Choice]) -> list[Choice]:
    """Tune tasks' prompts, each from where one of the task's vectors or prompts ended."""
    more = list[Choice]()
    for choice in runs:
        task, found = choice[0].header["task"], list[Result]()
        for n, at in enumerate(choice):
            x.starts[at.name] = x.tuned((at,))
            told = {task: {"start": "subspace" if at.kind == "intrinsic-vector" else task, "start_prompt": at.name}}
            found.append(alone(x.soft_prompts([task], starts=told)[task])[n])
        more.append(tuple(found))
    x.make(every(more))
    return more


def scores_of_runs(x: Experiment, runs: Sequence[Choice]) -> list[list[float]]:
    """Return the test scores of several runs of each task."""
    wanted = {r.name: x.scores({r.header["task"]: (r,)}, [], [])[2] if r.kind == "soft-prompt" and "start" not in r.header
              else x.scores({r.header["task"]: (r,)}, [], [(r,)])[-1] for choice in runs for r in choice}  # fmt: skip
    x.make(wanted.values())
    return [[x.store.read(wanted[r.name])[0]["score"] for r in choice] for choice in runs]


def fine_tuning(cache: Path) -> None:
    """The paper's second baseline: all weights tuned on the same rows for as many steps, by the best of four rates and checkpoints."""
    x = experiment(cache)
    shipped = {name: weight.clone() for name, weight in x.backbone.model.state_dict().items()}
    told = {}
    for task in x.named("unseen"):
        tries = []
        for rate in FINE_TUNED_RATES:
            x.backbone.model.load_state_dict(shipped)
            tries += fine_tuned(x, task, rate)
        told[task] = max(tries, key=lambda tried: tried[0])[1]  # of two alike on validation rows the first, whatever they score
        ipt.echo(f"{task}: {told[task]:.3f}")
    numbers = sum(weight.numel() for weight in x.backbone.model.parameters())
    ipt.echo(f"fine-tuning, unseen tasks (n={len(told)}), {numbers:,} numbers: mean test score {fmean(told.values()):.3f}")


def fine_tuned(x: Experiment, task: str, rate: float) -> list[tuple[tuple[float, float], float]]:
    """Tune all weights on a task; return validation score and negative loss, and the test score, as often as prompts are validated."""
    (train, validation, test), model, lm = x.encoded(task, COLLECTION_SEED), x.backbone.model, x.backbone.lm
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0), []
    empty = torch.zeros(FINE_TUNED_BATCH, 0, x.backbone.hidden)
    model.requires_grad_(True)
    for step in range(x.tuning.steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 15) * (1 - step / x.tuning.steps)
        rows = [train[row] for row in minibatch(len(train), FINE_TUNED_BATCH, COLLECTION_SEED, step)]
        begun = lm.begin(empty, [row.input_ids for row in rows])
        losses = lm.text_losses(begun, range(len(rows)), [row.target_ids for row in rows])
        (losses.sum() / sum(len(row.target_ids) for row in rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % x.tuning.evaluate_every == 0:
            (score, loss), (tested, _) = (
                outcome(x.task(task).metric, part, x.backbone.answer(empty[:1], [(0, row) for row in part]))
                for part in (validation, test)
            )
            found.append(((score, -loss), tested))
    model.requires_grad_(False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {
        part.__name__: part
        for part in (dims, needed, seeds, folds, grids, shots, nearby, seen, kinds, ablations, stability, fine_tuning)
    }
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
