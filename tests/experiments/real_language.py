"""A pre-trained causal model on real tasks: where should the prompt stand, and what does the subspace recover?

    python tests/experiments/real_language.py placement --backbone DIR --data ../shared/crossfit-32
    python tests/experiments/real_language.py defaults --backbone DIR --data ../shared/crossfit-32
    python tests/experiments/real_language.py chat --backbone DIR --data ../shared/crossfit-32
    python tests/experiments/real_language.py subspaces --backbone DIR --data ../shared/crossfit-32 ../shared/crossfit
    python tests/experiments/real_language.py folds --backbone DIR --data ../shared/crossfit-32 ../shared/crossfit

DIR holds a causal model, such as SmolLM2-135M-Instruct (README.md of this repository says where one is had without a download).
Everything is kept in the cache, and the same command goes on where it was; given in several terminals, it is done by all. On one
GPU, `--gpu-share 0.2` lets five of them share its memory. Whatever is chosen is chosen on validation rows.

placement   equal steps on six tasks: prompt behind the input or in front, with the chat template or without, by learning rate.
defaults    one setting changed at a time on twenty tasks: learning rate, steps, placement, template, prompt length.
chat        the chat template or plain text, task by task on the same twenty, at the few steps that the README names for CPUs.
subspaces   what the paper measures. The rule for tasks, stated before any result: those with test rows and at most 12 options, the
            `--tasks` with the shortest training inputs (32 + 32 rows from the first folder, 16 + 16 of tasks that only the second
            has); those fall out on whose validation rows a tuned prompt beats neither no prompt nor one answer for all; of the rest
            eight, or a fifth, are unseen, the paper's unseen ones first, then drawn by seed 0. Prompts and vectors alike have the
            better of two learning rates, task by task.
folds       unseen tasks, as many as there are: each of the tasks that the rule keeps is unseen once, in four splits drawn anew. The
            few steps that the README names for CPUs, or `--steps`; 50 test rows a task, or `--test-rows`; one learning rate for
            prompts (1.0), and for the vectors of each space that of three which has the best mean on the validation rows of the
            first split's unseen tasks. For prompts, too, the mean at each of the three is printed. `--splits 2` does the first two,
            `--also other-data` the first one's seen tasks on other data instead of prompts that start nearby.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import random
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from shared import Spaces, every, mean_with_error, pooled_text, reported, splits_drawn, with_rates

import ipt
from intrinsic_prompt_tuning import Experiment
from intrinsic_prompt_tuning.context import COLLECTION_SEED
from intrinsic_prompt_tuning.evaluation import spread
from intrinsic_prompt_tuning.files import write_bytes
from intrinsic_prompt_tuning.metrics import METRICS
from intrinsic_prompt_tuning.report import make_report, spread_text
from intrinsic_prompt_tuning.reporter import table_text
from intrinsic_prompt_tuning.results import Choice, Result
from intrinsic_prompt_tuning.spaces import SpaceKind
from intrinsic_prompt_tuning.tasks import TASKS_FILE, find_few_shot_tasks, load_tasks

PLACEMENT_TASKS = ("glue-sst2", "emo", "sms_spam", "tweet_eval-sentiment", "kilt_fever", "numer_sense")
VARIANTS = (("end", False), ("end", True), ("front", False))
RATES = [0.1, 0.3, 1.0]


def placement(arguments: argparse.Namespace) -> None:
    """Print validation scores by placement, template and learning rate; then test scores of what validation chose."""
    for prompt_at, chat in VARIANTS:
        change = {"prompt_at": prompt_at, "chat": chat, "test_rows": 100}
        change["learning_rate"] = RATES[: 2 if prompt_at == "front" else 3]
        x = experiment(arguments, change)
        prompts = x.soft_prompts(PLACEMENT_TASKS)
        x.make(tuned := every(prompts.values()))
        by_rate: dict[float, list[float]] = {}
        for result in tuned:
            if x.store.path(result).exists():
                by_rate.setdefault(result.header["learning_rate"], []).append(x.store.read(result)[0]["validation"])
        scores = x.scores(prompts, [], [])
        x.make(scores)
        by_stage: dict[str, list[float]] = {}
        for score in scores:
            by_stage.setdefault(score.header["stage"], []).append(x.store.read(score)[0]["score"])
        name = f"{prompt_at}, {'chat template' if chat else 'plain'}"
        told = ", ".join(f"rate {rate:g} {fmean(values):.3f} (n={len(values)})" for rate, values in sorted(by_rate.items()))
        tested = ", ".join(f"{stage} {fmean(values):.3f}" for stage, values in by_stage.items())
        print(f"{name}: validation {told}; test, rate by validation: {tested} (n={len(PLACEMENT_TASKS)})", flush=True)


DEFAULTS_TASKS = (
    "glue-sst2", "emo", "sms_spam", "tweet_eval-sentiment", "lama-conceptnet", "rotten_tomatoes", "ade_corpus_v2-classification",
    "hate_speech18", "ag_news", "kilt_trex", "lama-trex", "qasc", "google_wellformed_query", "glue-cola", "tweet_eval-hate", "wikisql",
    "squad-no_context", "mc_taco", "medical_questions_pairs", "kilt_nq",
)  # fmt: skip
BASE: dict[str, Any] = {"learning_rate": [0.3], "steps": 200, "batch_size": 8, "evaluations": 8}
FRONT = {"prompt_at": "front", "prompt_length": 100, "initial_text": ""}
CHANGES: tuple[dict[str, Any], ...] = (
    {}, {"steps": 1000}, {"learning_rate": [1.0]}, {"chat": True}, FRONT, {"learning_rate": [0.1]}, {"steps": 500}, {"prompt_length": 20},
    {"prompt_at": "front"}, {"steps": 1000, "learning_rate": [0.1]}, {"prompt_length": 5}, {"steps": 1000, "chat": True},
    FRONT | {"steps": 1000}, {"initial_text": ""}, {"steps": 1000, "learning_rate": [1.0]}, {"steps": 100}, {"prompt_length": 50},
)  # fmt: skip


def defaults(arguments: argparse.Namespace) -> None:
    """Print scores with one setting changed at a time, and what the jobs took."""
    for change in CHANGES:
        if not begins(arguments.cache, json.dumps(change)):
            continue
        start = time.perf_counter()
        told = means(measured(experiment(arguments, BASE | change)))
        print(f"{json.dumps(change)}: {told}, {time.perf_counter() - start:.0f} s", flush=True)


def measured(x: Experiment) -> dict[str, dict[str, float]]:
    """Tune and score the twenty tasks; return what a prompt's record and the test rows say, by figure and task."""
    prompts = x.soft_prompts(DEFAULTS_TASKS)
    scores = x.scores(prompts, [], [])
    x.make([*every(prompts.values()), *scores])
    found: dict[str, dict[str, float]] = {}
    for task, choice in prompts.items():
        record = x.store.best(choice)[1]
        for name in ("validation", "validation_loss", "last_loss", "best_step"):
            found.setdefault(name, {})[task] = record[name]
    for score in scores:
        found.setdefault(f"test, {score.header['stage']}", {})[score.header["task"]] = x.store.read(score)[0]["score"]
    return found


def means(figures: dict[str, dict[str, float]]) -> str:
    """Write means over tasks."""
    return ", ".join(f"{name} {fmean(by_task.values()):.3f} (n={len(by_task)})" for name, by_task in figures.items())


FEW_STEPS: dict[str, Any] = {
    "steps": 60, "batch_size": 4, "evaluations": 5, "learning_rate": [1.0], "test_rows": 50, "slots": 4,
}  # fmt: skip


def chat(arguments: argparse.Namespace) -> None:
    """Print scores of plain text and of the chat template, and the differences between them task by task."""
    plain, written = (measured(experiment(arguments, FEW_STEPS | {"chat": chat})) for chat in (False, True))
    print(f"plain: {means(plain)}\nchat template: {means(written)}", flush=True)
    for name, by_task in written.items():
        more = [value - plain[name][task] for task, value in by_task.items()]
        mean, error = mean_with_error(more)
        print(f"{name}: {mean} by the template, standard error {error:.3f}", flush=True)


def subspaces(arguments: argparse.Namespace) -> None:
    """Run the whole experiment, once a seed, and print a table of each and how they differ."""
    split, first = ruled(arguments, {"slots": 16})  # few, so that all terminals have some
    x, reports = experiment(arguments, {"split": str(split)}, first), []
    ipt.echo(f"{len(x.named('seen'))} seen, {len(x.named('unseen'))} unseen tasks ({', '.join(x.named('unseen'))})")
    for seed in range(arguments.seeds):
        ipt.echo(f"seed {seed}")
        reports.append(one_seed(x.with_seeds(seed), OTHER_SEEDS[seed], arguments.challenges, SPACES[: arguments.spaces]))
    if len(reports) > 1:
        ipt.echo(spread_text(spread(reports)))


def ruled(arguments: argparse.Namespace, change: dict[str, Any]) -> tuple[Path, Experiment]:
    """Choose tasks by the rule; return the file of their split, and the experiment that tuned a prompt of every candidate."""
    data, split, candidates = (arguments.cache / name for name in ("data", "split.yaml", "candidates.yaml"))
    arguments.data = [joined(arguments.data, data)]
    if not candidates.exists():
        write_bytes(candidates, json.dumps({"seen": shortest_tasks(data, arguments.tasks)}).encode())
    first = experiment(arguments, change | {"split": str(candidates)})
    if not split.exists():
        write_bytes(split, json.dumps(split_by_validation(first), indent=1).encode())
    return split, first


@dataclass(frozen=True)
class Fold:
    """A split with its prompts and its spaces."""

    x: Experiment
    seen: dict[str, Choice]
    """Its seen tasks' prompts."""
    unseen: dict[str, Choice]
    """Its unseen tasks' prompts."""
    spaces: list[Result]

    def vectors(self, tasks: Iterable[str], number: int, rate: float, data_seed: int = COLLECTION_SEED) -> list[Choice]:
        """Return the vectors of some tasks in one of the spaces."""
        return [*with_rates(self.x, rate).intrinsic_vectors(tasks, data_seed, self.spaces[number]).values()]

    def from_nearest(self) -> list[Choice]:
        """Return prompts of the unseen tasks that start from the nearest seen one."""
        return [*self.x.soft_prompts(self.unseen, near=[*self.seen.values()]).values()]

    def make(self, what: str, choices: Sequence[Choice], prompts: dict[str, Choice], spaces: Sequence[Result] = ()) -> None:
        """Make spaces, vectors or prompts and their scores, unless another process has begun to."""
        if begins(self.x.cache, f"{self.x.options.split} {what}"):
            self.x.make([*spaces, *every(choices), *self.x.scores(prompts, spaces, choices)])


def folds(arguments: argparse.Namespace) -> None:
    """Tune every task where it is unseen, in several spaces and from the nearest seen prompt; print what all splits say together."""
    splits = folds_of_kept(arguments)
    first, numbers, rates = splits[0], range(len(splits[0].spaces)), tuned_in_spaces(splits)
    nearby = [split.from_nearest() if "nearest" in arguments.also else [] for split in splits]
    for split, prompts in zip(splits, nearby, strict=True):
        split.make("from the nearest", prompts, split.unseen)
    others = list[list[Choice]]()
    if "other-data" in arguments.also:
        others += [first.vectors(first.seen, number, rates[number], OTHER_SEEDS[0]) for number in numbers]
    for number, vectors in enumerate(others):
        first.make(f"other data {number}", vectors, first.seen, [first.spaces[number]])

    told = list[dict[str, Any]]()
    for split, prompts in zip(splits, nearby, strict=True):
        tuned = [choice for number in numbers for choice in split.vectors(split.unseen, number, rates[number])]
        told += reported(split.x, split.unseen, split.spaces, tuned + prompts)["scores"]
    ipt.echo(records_text(splits, rates) + "\n" + pooled_text(told))
    if others:
        ipt.echo("other data of the first split's seen tasks")
        ipt.echo(pooled_text(reported(first.x, first.seen, first.spaces, [*itertools.chain(*others)])["scores"]))


def records_text(splits: Sequence[Fold], rates: Mapping[int, float]) -> str:
    """Write how the unseen tasks' prompts and vectors were tuned, means over tasks."""
    choices = {("prompt tuning", FEW_STEPS["learning_rate"][0]): [c for split in splits for c in split.unseen.values()]}
    for number, rate in sorted(rates.items()):
        header = splits[0].spaces[number].header
        own = [choice for split in splits for choice in split.vectors(split.unseen, number, rate)]
        choices[f"{header['space']} {header['dim']}", rate] = own
    figures, rows = ("validation", "first_loss", "last_loss", "best_step"), list[list[Any]]()
    for (what, rate), own in choices.items():
        records = [splits[0].x.store.best(choice)[1] for choice in own]
        rows.append([what, rate, *(fmean(record[figure] for record in records) for figure in figures)])
    return table_text("tuned|rate|validation|first training loss|last|best step", rows)


def tuned_in_spaces(splits: Sequence[Fold]) -> dict[int, float]:
    """Tune vectors of the unseen tasks in every space of every split; return the learning rate of each space by number."""
    first, rates = splits[0], dict[int, float]()
    x = with_rates(first.x, *FOLD_RATES)
    numbers = sorted(range(len(first.spaces)), key=lambda number: first.spaces[number].header["space"] == "subspace")
    # Every process begins with spaces of its own, and claims the next when one is done; then it helps the others.
    own = (number for number in numbers if begins(first.x.cache, f"space {number}"))
    for number in itertools.chain(own, numbers):
        if number not in rates:
            space = first.spaces[number]
            rates[number] = best_rate(x, x.intrinsic_vectors(first.unseen, COLLECTION_SEED, space), [space])
        for split in splits:
            vectors = split.vectors(split.unseen, number, rates[number])
            split.make(f"space {number}", vectors, split.unseen, [split.spaces[number]])
    best_rate(x, x.soft_prompts(first.unseen))  # to know whether prompt tuning has a good one
    return rates


def folds_of_kept(arguments: argparse.Namespace) -> list[Fold]:
    """Return the first of four splits of the tasks that the rule keeps, their prompts tuned, their spaces not made yet."""
    change = FEW_STEPS | {"steps": arguments.steps, "test_rows": arguments.test_rows, "slots": arguments.slots}
    split, candidates = ruled(arguments, change)
    change["slots"] *= len(FOLD_RATES)  # as many tasks, at every rate
    kept = [task for tasks in json.loads(split.read_text(encoding="utf-8")).values() for task in tasks]
    files = splits_drawn(arguments.cache, sorted(kept), sorted(kept))[: arguments.splits]
    xs = [experiment(arguments, change | {"split": str(file), "subspace_seed": n}, candidates) for n, file in enumerate(files)]
    asked = (*FOLD_SPACES, ("linear", min(len(x.named("seen")) for x in xs) - 1))[: arguments.spaces]
    prompts, found = xs[0].soft_prompts(kept), list[Fold]()  # the same in every split
    xs[0].make(every(prompts.values()))
    for x in xs:
        seen, unseen = ({task: prompts[task] for task in x.named(group)} for group in ("seen", "unseen"))
        found.append(Fold(x, seen, unseen, [x.subspace(kind, dim, seen) for kind, dim in asked]))
    return found


def best_rate(x: Experiment, choices: Mapping[str, Choice], spaces: Sequence[Result] = ()) -> float:
    """Return the rate at which what is tuned of some tasks has the best mean on validation rows, and print all of them."""
    tuned = [replace(result, instead_of=()) for result in every(choices.values())]  # also those of a task that one rate solves
    x.make([*spaces, *tuned])
    by_rate = {
        rate: fmean(x.store.read(r)[0]["validation"] for r in tuned if r.header["learning_rate"] == rate)
        for rate in sorted({result.header["learning_rate"] for result in tuned})
    }
    told = ", ".join(f"rate {rate:g} {mean:.3f}" for rate, mean in by_rate.items())
    what = " ".join(f"{space.header['space']} {space.header['dim']}" for space in spaces) or "prompt tuning"
    print(f"{what}: validation {told} (n={len(choices)})", flush=True)
    return max(by_rate, key=by_rate.__getitem__)


def one_seed(
    x: Experiment, other_seed: int, challenges: list[str], kinds_and_dims: Sequence[tuple[SpaceKind, int]]
) -> dict[str, Any]:
    """Tune, find subspaces, tune in them on unseen tasks and on other data of the seen ones; print the table and return it."""
    prompts = x.soft_prompts(x.named("seen", "unseen"))
    collection = {task: prompts[task] for task in x.named("seen")}
    spaces = [x.subspace(kind, dim, collection) for kind, dim in kinds_and_dims]
    tuned_on = {"seen": (x.named("seen"), other_seed), "unseen": (x.named("unseen"), COLLECTION_SEED)}
    groups = (spaces[:MOST_TELLING], spaces[MOST_TELLING:])
    stages = [
        (space, {task: prompts[task] for task in tasks}, [*x.intrinsic_vectors(tasks, data_seed, space).values()])
        for group in groups
        for tasks, data_seed in map(tuned_on.__getitem__, challenges)
        for space in group
    ]
    told = {task: prompts[task] for task in x.named(*challenges)}
    scores = x.scores(told, spaces, [choice for *_, vectors in stages for choice in vectors])
    if x.store.missing(scores):
        x.make(every(prompts.values()))
        for space, own, vectors in stages:
            if begins(x.cache, space.name + next(iter(own))):
                x.make([space, *every(vectors), *x.scores(own, [space], vectors)])
        x.make([*spaces, *every(choice for *_, vectors in stages for choice in vectors), *scores])
    report = make_report(x, scores)
    ipt.print_report(report, as_json=False, per_task=True, wide=True)
    sys.stdout.flush()
    return report


SPACES: Spaces = (
    ("subspace", 250), ("random", 250), ("low-rank", 250), ("subspace", 10), ("random", 10), ("subspace", 50), ("random", 50),
    ("subspace", 5), ("random", 5),
)  # fmt: skip
FOLD_SPACES: Spaces = (*SPACES, ("random", 1162))
FOLD_RATES = (0.3, 1.0, 3.0)
MOST_TELLING = 5
"""So many come first."""
OTHER_SEEDS = (21, 42, 13)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the experiments share: prompts of 10 tokens behind the input, 5,760 numbers on SmolLM2-135M."""
    return {
        "backbone": arguments.backbone, "data": arguments.data[0], "cache": arguments.cache, "precision": arguments.precision, "prompt_at": "end", "chat": False,
        "shots": 32, "prompt_length": 10, "initial_text": "Answer:", "test_rows": 100, "steps": 150, "batch_size": 4, "evaluations": 6,
        "learning_rate": [0.3, 1.0], "vector_learning_rate": [0.3, 1.0], "subspace_steps": arguments.subspace_steps, "rows_per_task": 2, "slots": 64,
    }  # fmt: skip


def experiment(arguments: argparse.Namespace, change: dict[str, Any], other: Experiment | None = None) -> Experiment:
    """Return an experiment, on another's loaded backbone; with a share of a GPU's memory, half of it is for inputs that run once."""
    x = Experiment(settings(arguments) | change, ipt.Terminal())
    if other:
        vars(x).update(backbone=other.backbone, _samples=other._samples, _encoded=other._encoded)
    elif arguments.gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(arguments.gpu_share)
        x.backbone.lm.memory = arguments.gpu_share / 2 * torch.cuda.get_device_properties(0).total_memory
    return x


def begins(cache: Path, what: str) -> bool:
    """Tell whether this process is the one to begin something; as long as it lives, the others go on to the next."""
    folder = cache / "begun"
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / sha256(what.encode()).hexdigest()[:16]).open("w")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        BEGUN.append(file)
        return True
    file.close()
    return False


BEGUN: list[Any] = []
"""Locked files."""


def joined(folders: list[Path], to: Path) -> Path:
    """Return a folder of links to the tasks of several, each to the first that has it; every K is called 32."""
    for folder in folders:
        for file in folder.glob("*/*.jsonl"):
            link = to / file.parent.name / re.sub(r"_16_(\d+_(train|dev))", r"_32_\1", file.name)
            link.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                link.symlink_to(file.resolve())
    return to


def shortest_tasks(data: Path, count: int) -> list[str]:
    """Return tasks that have test rows and at most 12 options, those with the shortest training inputs."""
    lengths = {}
    for name in sorted(find_few_shot_tasks(data, load_tasks(TASKS_FILE))):
        folder = data / name
        rows = [json.loads(line) for line in next(folder.glob("*_100_train.jsonl")).read_text(encoding="utf-8").splitlines()]
        if (folder / f"{name}_test.jsonl").exists() and max(len(row["options"]) for row in rows) <= 12:
            lengths[name] = fmean(len(row["input"]) for row in rows)
    return sorted(lengths, key=lengths.__getitem__)[:count]


def split_by_validation(x: Experiment) -> dict[str, list[str]]:
    """Tune a prompt of every candidate; keep those where it beats no prompt and one answer on validation rows; draw the unseen."""
    prompts = x.soft_prompts(x.named("seen"))
    x.make(every(prompts.values()))
    rows = {task: x.encoded(task, COLLECTION_SEED)[1] for task in prompts}
    nothing = x.prompt_space.initial_prompt[None, :0]
    said = iter(x.backbone.answer(nothing, [(0, row) for own in rows.values() for row in own], losses=False))
    good = []
    for task, choice in prompts.items():
        metric, answers = METRICS[x.task(task).metric], [row.example.answers for row in rows[task]]
        known = {example.answers[0] for example in x.sample(task, COLLECTION_SEED).train}
        floor = max(
            metric([next(said).text for _ in answers], answers), *(metric([one] * len(answers), answers) for one in known)
        )
        tuned = x.store.best(choice)[1]["validation"]
        falls = "" if tuned > floor else ": falls out"
        print(f"{task}: validation {tuned:.3f}, no prompt or one answer {floor:.3f}{falls}", flush=True)
        good += [task] * (tuned > floor)
    published = [task for task in good if x.task(task).splits.get("random") == "unseen"]
    others = [task for task in good if task not in published]
    random.Random(0).shuffle(others)
    unseen = (published + others)[: max(8, len(good) // 5)]
    return {"seen": [task for task in good if task not in unseen], "unseen": unseen}


PARTS = (placement, defaults, chat, subspaces, folds)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--cache", type=Path, default=Path("real-language"))
    parser.add_argument("--tasks", type=int, default=94, help="candidates")
    parser.add_argument(
        "--precision", default="fp32", help="bf16 is twice as fast on a CPU that multiplies it (AVX512-BF16, AMX)"
    )
    parser.add_argument("--challenges", nargs="+", default=["seen", "unseen"], choices=["seen", "unseen"], help="in this order")
    parser.add_argument("--spaces", type=int, help="so many of them, the most telling first, instead of all; 0: only prompts")
    parser.add_argument("--steps", type=int, default=FEW_STEPS["steps"], help="of a job of `folds`")
    parser.add_argument("--test-rows", type=int, default=FEW_STEPS["test_rows"], help="of a task of `folds`")
    parser.add_argument("--subspace-steps", type=int, default=80, help="updates of a learned space on both losses")
    parser.add_argument(
        "--splits", type=int, default=4, choices=range(1, 5), help="so many of the four of `folds`, the first drawn"
    )
    parser.add_argument("--slots", type=int, default=FEW_STEPS["slots"], help="tasks of `folds` tuned at once; on a GPU try 12")
    parser.add_argument(
        "--also", nargs="*", default=["nearest"], choices=["nearest", "other-data"],
        help="what `folds` tunes besides: prompts that start nearby, the first split's seen tasks on other data",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, choices=range(1, len(OTHER_SEEDS) + 1))
    parser.add_argument("--gpu-share", type=float, default=1.0, help="of the GPU's memory, for one of several terminals")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    {part.__name__: part for part in PARTS}[arguments.what](arguments)


if __name__ == "__main__":
    main()
