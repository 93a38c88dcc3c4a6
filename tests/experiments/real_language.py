"""A pre-trained causal model on real tasks: where should the prompt stand, and what does the subspace recover?

    python tests/experiments/real_language.py placement --backbone DIR --data ../shared/crossfit-32
    python tests/experiments/real_language.py subspaces --backbone DIR --data ../shared/crossfit-32

DIR holds a causal model, such as SmolLM2-135M-Instruct (README.md of this repository says where one is had without a download).
Everything is kept in the cache, and the same command goes on where it was. Whatever is chosen is chosen on validation rows.

placement   equal steps on six tasks: prompt behind the input or in front, with the chat template or without, by learning rate.
subspaces   what the paper measures. The rule for tasks, stated before any result: those with test rows and at most 12 options, the
            shortest training inputs first; those fall out on whose validation rows a tuned prompt beats neither no prompt nor one
            answer for all; of the rest eight, or a fifth, are unseen, the paper's unseen ones first, then drawn by seed 0.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import ipt
from intrinsic_prompt_tuning import Experiment
from intrinsic_prompt_tuning.context import COLLECTION_SEED, Rates
from intrinsic_prompt_tuning.metrics import METRICS
from intrinsic_prompt_tuning.report import make_report
from intrinsic_prompt_tuning.results import Choice, Result
from intrinsic_prompt_tuning.tasks import TASKS_FILE, find_few_shot_tasks, load_tasks

PLACEMENT_TASKS = ("glue-sst2", "emo", "sms_spam", "tweet_eval-sentiment", "kilt_fever", "numer_sense")
VARIANTS = (("end", False), ("end", True), ("front", False))
RATES = [0.1, 0.3, 1.0]


def placement(arguments: argparse.Namespace) -> None:
    """Print validation scores by placement, template and learning rate; then test scores of what validation chose."""
    for prompt_at, chat in VARIANTS:
        settings: dict[str, Any] = {
            "backbone": arguments.backbone, "data": arguments.data, "cache": arguments.cache, "prompt_at": prompt_at, "chat": chat,
            "shots": 32, "prompt_length": 10, "test_rows": 100, "steps": 60, "batch_size": 4, "evaluations": 2, "patience": 0,
            "learning_rate": RATES[: 2 if prompt_at == "front" else 3],
        }  # fmt: skip
        x = Experiment.of(settings, ipt.Terminal())
        prompts = x.soft_prompts(PLACEMENT_TASKS)
        x.make([result for choice in prompts.values() for result in choice])
        by_rate: dict[float, list[float]] = {}
        for choice in prompts.values():
            for result in choice:
                if x.store.path(result).exists():
                    by_rate.setdefault(result.header["learning_rate"], []).append(x.store.read(result)[0]["validation"])
        scores = x.scores(prompts, [], [])
        x.make(scores)
        means: dict[str, list[float]] = {}
        for score in scores:
            means.setdefault(score.header["stage"], []).append(x.store.read(score)[0]["score"])
        name = f"{prompt_at}, {'chat template' if chat else 'plain'}"
        told = ", ".join(f"rate {rate:g} {fmean(values):.3f} (n={len(values)})" for rate, values in sorted(by_rate.items()))
        tested = ", ".join(f"{stage} {fmean(values):.3f}" for stage, values in means.items())
        print(f"{name}: validation {told}; test, rate by validation: {tested} (n={len(PLACEMENT_TASKS)})", flush=True)


def subspaces(arguments: argparse.Namespace) -> None:
    """Run the whole experiment, the cheapest and most telling part first; the table is printed after each part."""
    arguments.cache.mkdir(parents=True, exist_ok=True)
    split = arguments.cache / "split.yaml"
    candidates = shortest_tasks(arguments.data, arguments.tasks)
    if not split.exists():
        candidates_file = arguments.cache / "candidates.yaml"
        candidates_file.write_text(json.dumps({"seen": candidates}), encoding="utf-8")
        split.write_text(json.dumps(split_by_validation(experiment(arguments, candidates_file)), indent=1), encoding="utf-8")
    x = experiment(arguments, split)
    seen, unseen = x.named("seen"), x.named("unseen")
    ipt.echo(f"{len(seen)} seen, {len(unseen)} unseen tasks ({', '.join(unseen)})")
    prompts = x.soft_prompts([*seen, *unseen])
    collection = {task: prompts[task] for task in seen}
    x.make([*every(prompts.values()), *(x.subspace("subspace", dim, collection) for dim in DIMS)])
    spaces, vectors = list[Result](), list[Choice]()
    for dims in (DIMS[:2], DIMS[2:]):  # the ends first
        new = [x.subspace(kind, dim, collection) for dim in dims for kind in ("subspace", "random")]
        new += [] if spaces else [x.subspace("low-rank", DIMS[0], collection)]
        spaces += new
        x.rates = Rates(learning_rate=[0.3], vector_learning_rate=[0.3, 0.1])
        held_out = {space.name: list(x.intrinsic_vectors(unseen, COLLECTION_SEED, space).values()) for space in new}
        for space in new:
            x.make([space, *every(held_out[space.name])])
            vectors += held_out[space.name]
        tell(x, x.scores(prompts, spaces, vectors))
        for space in new:
            # Seen tasks are more: one rate each, that which validated best on the unseen tasks.
            rate = best_rate(x, held_out[space.name])
            ipt.echo(f"{space.header['space']} {space.header['dim']}: rate {rate} on other data of seen tasks")
            x.rates = Rates(learning_rate=[0.3], vector_learning_rate=[rate])
            other = list(x.intrinsic_vectors(seen, OTHER_SEED, space).values())
            x.make(every(other))
            vectors += other
        tell(x, x.scores(prompts, spaces, vectors))


DIMS = (250, 10, 50, 5)
OTHER_SEED = 21


def experiment(arguments: argparse.Namespace, split: Path) -> Experiment:
    """Return the experiment on a split's tasks: prompts of 10 tokens, 5,760 numbers, behind the input."""
    return Experiment.of(
        {
            "backbone": arguments.backbone, "data": arguments.data, "cache": arguments.cache, "split": str(split),
            "prompt_at": "end", "chat": False, "shots": 32, "prompt_length": 10, "test_rows": 64, "steps": 60, "batch_size": 4,
            "evaluations": 2, "patience": 0, "learning_rate": [0.3],
            "subspace_steps": 80, "rows_per_task": 2,
        },
        ipt.Terminal(),
    )  # fmt: skip


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
    good = []
    for task, choice in prompts.items():
        rows, metric = x.encoded(task, COLLECTION_SEED)[1], METRICS[x.task(task).metric]
        answers = [row.example.answers for row in rows]
        said = x.backbone.answer(x.prompt_space.initial_prompt[None, :0], [(0, row) for row in rows], losses=False)
        known = {example.answers[0] for example in x.sample(task, COLLECTION_SEED).train}
        floor = max(metric([a.text for a in said], answers), *(metric([one] * len(answers), answers) for one in known))
        tuned = x.store.best(choice)[1]["validation"]
        print(
            f"{task}: validation {tuned:.3f}, no prompt or one answer {floor:.3f}{'' if tuned > floor else ': falls out'}",
            flush=True,
        )
        good += [task] * (tuned > floor)
    published = [task for task in good if x.task(task).splits.get("random") == "unseen"]
    others = [task for task in good if task not in published]
    random.Random(0).shuffle(others)
    unseen = (published + others)[: max(8, len(good) // 5)]
    return {"seen": [task for task in good if task not in unseen], "unseen": unseen}


def best_rate(x: Experiment, choices: list[Choice]) -> float:
    """Return the learning rate with the best mean validation score over tasks; one that a solved task did not need counts as 1."""
    by_rate: dict[float, list[float]] = {}
    for result in every(choices):
        there = x.store.path(result).exists()
        by_rate.setdefault(result.header["learning_rate"], []).append(x.store.read(result)[0]["validation"] if there else 1.0)
    return max(by_rate, key=lambda rate: fmean(by_rate[rate]))


def every(choices: Iterable[Choice]) -> list[Result]:
    """Return all results of choices."""
    return [result for choice in choices for result in choice]


def tell(x: Experiment, scores: list[Result]) -> None:
    """Make scores and print the table."""
    x.make(scores)
    ipt.print_report(make_report(x, scores), as_json=False, per_task=True, wide=True)
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["placement", "subspaces"])
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("real-language"))
    parser.add_argument("--tasks", type=int, default=40, help="candidates")
    arguments = parser.parse_args()
    {"placement": placement, "subspaces": subspaces}[arguments.what](arguments)


if __name__ == "__main__":
    main()
