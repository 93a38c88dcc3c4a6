"""A pre-trained causal model on real tasks: where should the prompt stand, and what does the subspace recover?

    python tests/experiments/real_language.py placement --backbone DIR --data ../shared/crossfit-32
    python tests/experiments/real_language.py tasks --data ../shared/crossfit-32 --out split.yaml
    python tests/experiments/real_language.py subspaces --backbone DIR --data ../shared/crossfit-32 --split split.yaml

DIR holds a causal model, such as SmolLM2-135M-Instruct (README.md of this repository says where one is had without a download).
Everything is kept in the cache, and the same command goes on where it was. Whatever is chosen is chosen on validation rows.

placement   equal steps on six tasks: prompt behind the input or in front, with the chat template or without, by learning rate.
tasks       the rule by which tasks are chosen before any result is seen: those with test rows, at most 12 options, by the mean
            length of their training inputs, the shortest first; every fourth is unseen, drawn by seed 0, the paper's unseen
            ones before others.
subspaces   `ipt run` on them: dims 10 and 50, prompts of 10 tokens behind the input.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import ipt
from intrinsic_prompt_tuning import Experiment
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


def choose_tasks(arguments: argparse.Namespace) -> None:
    """Write a split by the rule above."""
    known = load_tasks(TASKS_FILE)
    lengths = {}
    for name in sorted(find_few_shot_tasks(arguments.data, known)):
        folder = arguments.data / name
        rows = [json.loads(line) for line in next(folder.glob("*_100_train.jsonl")).read_text(encoding="utf-8").splitlines()]
        if (folder / f"{name}_test.jsonl").exists() and max(len(row["options"]) for row in rows) <= 12:
            lengths[name] = fmean(len(row["input"]) for row in rows)
    chosen = sorted(lengths, key=lengths.__getitem__)[: arguments.tasks]
    published = [name for name in chosen if name in known and known[name].splits.get("random") == "unseen"]
    others = [name for name in chosen if name not in published]
    random.Random(0).shuffle(others)
    unseen = (published + others)[: len(chosen) // 4]
    split = {"seen": [name for name in chosen if name not in unseen], "unseen": unseen}
    arguments.out.write_text(json.dumps(split, indent=1) + "\n", encoding="utf-8")
    print(f"{len(split['seen'])} seen and {len(unseen)} unseen tasks in {arguments.out}")


def subspaces(arguments: argparse.Namespace) -> None:
    """Run the whole experiment."""
    sys.argv = [
        "ipt", "run", "--backbone", str(arguments.backbone), "--data", str(arguments.data), "--split", str(arguments.split),
        "--cache", str(arguments.cache), "--prompt-at", "end", "--no-chat", "--shots", "32", "--prompt-length", "10",
        "--test-rows", "100", "--steps", "60", "--batch-size", "4", "--evaluations", "2", "--learning-rate", "0.3",
        "--learning-rate", "0.1", "--vector-learning-rate", "0.1", "--vector-learning-rate", "0.3", "--subspace-steps", "200",
        "--dim", "50", "--dim", "10", "--data-seed", "21", "--wide",
    ]  # fmt: skip
    ipt.main()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["placement", "tasks", "subspaces"])
    parser.add_argument("--backbone")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("real-language"))
    parser.add_argument("--split", type=Path, default=Path("split.yaml"))
    parser.add_argument("--out", type=Path, default=Path("split.yaml"))
    parser.add_argument("--tasks", type=int, default=32)
    arguments = parser.parse_args()
    {"placement": placement, "tasks": choose_tasks, "subspaces": subspaces}[arguments.what](arguments)


if __name__ == "__main__":
    main()
