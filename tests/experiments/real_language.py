"""A pre-trained causal model on real tasks: where should the prompt stand, and what does the subspace recover?

    python tests/experiments/real_language.py placement --backbone DIR --data ../shared/crossfit-32
    python tests/experiments/real_language.py defaults --backbone DIR --data ../shared/crossfit-32
    python tests/experiments/real_language.py subspaces --backbone DIR --data ../shared/crossfit-32 ../shared/crossfit

DIR holds a causal model, such as SmolLM2-135M-Instruct (README.md of this repository says where one is had without a download).
Everything is kept in the cache, and the same command goes on where it was; given in two terminals, it is done by both. Whatever is
chosen is chosen on validation rows.

placement   equal steps on six tasks: prompt behind the input or in front, with the chat template or without, by learning rate.
defaults    one setting changed at a time on eight tasks: prompt length, learning rate, steps, rows a step, initial text, placement.
subspaces   what the paper measures. The rule for tasks, stated before any result: those with test rows and at most 12 options, the
            72 with the shortest training inputs (32 + 32 rows from the first folder, 16 + 16 of tasks that only the second has);
            those fall out on whose validation rows a tuned prompt beats neither no prompt nor one answer for all; of the rest
            eight, or a fifth, are unseen, the paper's unseen ones first, then drawn by seed 0. Vectors have, in every space and
            dim, the best of three learning rates by validation on other data of five seen tasks.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import ipt
from intrinsic_prompt_tuning import Experiment
from intrinsic_prompt_tuning.context import COLLECTION_SEED
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
        change = {"data": arguments.data[0], "prompt_at": prompt_at, "chat": chat, "test_rows": 100}
        change["learning_rate"] = RATES[: 2 if prompt_at == "front" else 3]
        x = Experiment.of(settings(arguments) | change, ipt.Terminal())
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


DEFAULTS_TASKS = (
    "glue-sst2", "emo", "sms_spam", "tweet_eval-sentiment", "lama-conceptnet", "rotten_tomatoes", "ade_corpus_v2-classification",
    "hate_speech18",
)  # fmt: skip
START = {"initial_text": "Answer:"}
SHORT = START | {"prompt_length": 5}
CHANGES: tuple[dict[str, Any], ...] = (
    {}, {"prompt_length": 5}, START, SHORT, *(SHORT | {"learning_rate": [rate]} for rate in (0.1, 1.0, 3.0)),
    START | {"learning_rate": [1.0]}, SHORT | {"learning_rate": [1.0], "steps": 200}, SHORT | {"learning_rate": [1.0], "batch_size": 8},
    SHORT | {"learning_rate": [1.0], "chat": True}, SHORT | {"learning_rate": [1.0], "prompt_at": "front"},
)  # fmt: skip


def defaults(arguments: argparse.Namespace) -> None:
    """Print validation scores with one setting changed at a time, and what a job took."""
    for change in CHANGES:
        x = Experiment.of(settings(arguments) | {"data": arguments.data[0], "slots": 4} | change, ipt.Terminal())
        prompts, start = x.soft_prompts(DEFAULTS_TASKS), time.perf_counter()
        x.make(every(prompts.values()))
        seconds = time.perf_counter() - start
        records = [x.store.best(choice)[1] for choice in prompts.values()]
        mean = {name: fmean(record[name] for record in records) for name in ("validation", "validation_loss", "last_loss")}
        told = ", ".join(f"{name} {value:.3f}" for name, value in mean.items())
        print(f"{json.dumps(change)}: {told} (n={len(records)}), {seconds:.0f} s", flush=True)


def subspaces(arguments: argparse.Namespace) -> None:
    """Run the whole experiment, the most telling dims first; the table is printed after each part."""
    arguments.cache.mkdir(parents=True, exist_ok=True)
    data, split = joined(arguments.data, arguments.cache / "data"), arguments.cache / "split.yaml"
    if not split.exists():
        candidates = arguments.cache / "candidates.yaml"
        candidates.write_text(json.dumps({"seen": shortest_tasks(data, arguments.tasks)}), encoding="utf-8")
        found = split_by_validation(experiment(arguments, data, candidates))
        split.write_text(json.dumps(found, indent=1), encoding="utf-8")
    x = experiment(arguments, data, split)
    seen, unseen = x.named("seen"), x.named("unseen")
    ipt.echo(f"{len(seen)} seen, {len(unseen)} unseen tasks ({', '.join(unseen)})")
    prompts = x.soft_prompts([*seen, *unseen])
    collection = {task: prompts[task] for task in seen}
    x.make([*every(prompts.values()), *(x.subspace("subspace", dim, collection) for dim in DIMS)])
    spaces, vectors = list[Result](), list[Choice]()
    for dims in (DIMS[:2], DIMS[2:]):
        new = [x.subspace(kind, dim, collection) for dim in dims for kind in ("subspace", "random")]
        new += [] if spaces else [x.subspace("low-rank", DIMS[0], collection)]
        spaces += new
        new = new[::-1] if arguments.backwards else new
        rates = {space.name: best_rate(x, space, seen[:RATE_TASKS]) for space in new}
        # Seen tasks are many, so there the rivals have one dim.
        some = [space for space in new if space.header["space"] == "subspace" or space.header["dim"] == DIMS[0]]
        for tasks, data_seed, tuned_in in ((unseen, COLLECTION_SEED, new), (seen, OTHER_SEED, some)):
            own = list[Choice]()
            for space in tuned_in:
                x.rates = replace(x.rates, vector_learning_rate=[rates[space.name]])
                own += x.intrinsic_vectors(tasks, data_seed, space).values()
            x.make([*new, *every(own)])
            vectors += own
            tell(x, x.scores(prompts, spaces, vectors))


DIMS = (250, 10, 50, 5)
OTHER_SEED = 21
RATE_TASKS = 5
VECTOR_RATES = [1.0, 0.3, 0.1]


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the experiments share."""
    return {
        "backbone": arguments.backbone, "cache": arguments.cache, "precision": arguments.precision, "prompt_at": "end",
        "chat": False, "shots": 32, "prompt_length": 10, "initial_text": "", "test_rows": 64, "steps": 60, "batch_size": 4, "evaluations": 2,
        "patience": 0, "learning_rate": [0.3], "subspace_steps": 80, "rows_per_task": 2,
    }  # fmt: skip


def experiment(arguments: argparse.Namespace, data: Path, split: Path) -> Experiment:
    """Return the experiment on a split's tasks: prompts of 5 tokens, 2,880 numbers, behind the input."""
    return Experiment.of(
        settings(arguments) | SHORT | {"learning_rate": [1.0], "data": data, "split": str(split), "slots": 8}, ipt.Terminal()
    )


def joined(folders: list[Path], to: Path) -> Path:
    """Return a folder of links to the tasks of several, each to the first that has it; every K is called 32."""
    for folder in folders:
        for file in folder.glob("*/*.jsonl"):
            link = to / file.parent.name / re.sub(r"_16_(\d+_(train|dev))", r"_32_\1", file.name)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
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


def best_rate(x: Experiment, space: Result, tasks: list[str]) -> float:
    """Return the learning rate of vectors with the best mean validation score on other data of some seen tasks."""
    by_rate = dict[float, float]()
    for rate in VECTOR_RATES:
        x.rates = replace(x.rates, vector_learning_rate=[rate])
        vectors = x.intrinsic_vectors(tasks, OTHER_SEED, space).values()
        x.make([space, *every(vectors)])
        by_rate[rate] = fmean(x.store.best(choice)[1]["validation"] for choice in vectors)
    told = ", ".join(f"{rate:g} {score:.3f}" for rate, score in by_rate.items())
    ipt.echo(f"{space.header['space']} {space.header['dim']}: validation by learning rate on {len(tasks)} tasks: {told}")
    return max(by_rate, key=by_rate.__getitem__)


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
    parser.add_argument("what", choices=["placement", "defaults", "subspaces"])
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--cache", type=Path, default=Path("real-language"))
    parser.add_argument("--tasks", type=int, default=72, help="candidates")
    parser.add_argument(
        "--precision", default="fp32", help="bf16 is twice as fast on a CPU that multiplies it (AVX512-BF16, AMX)"
    )
    parser.add_argument(
        "--backwards", action="store_true", help="the last space first: for one of two terminals, as stages are short"
    )
    arguments = parser.parse_args()
    {"placement": placement, "defaults": defaults, "subspaces": subspaces}[arguments.what](arguments)


if __name__ == "__main__":
    main()
