"""Make the testbed: draw its tasks, pre-train the backbone that ships with the package, and ask it questions in words.

    python tests/make_testbed.py tasks                             # prints 120 rows such as those in tasks.yaml
    python tests/make_testbed.py backbone --minutes 59 --out DIR   # a T5 of about a million parameters, and its tokenizer
    python tests/make_testbed.py report --out intrinsic_prompt_tuning/testbed

The backbone learns to answer questions in words, such as `subject category then day next`, put in front of a sentence. What a
task of tasks.yaml composes and is not marked `pretrained` is held out: no question of the same two parts, in any order, under
any connective or negation, is ever trained. The held-out rule of a question of three parts is that of all its pairs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from intrinsic_prompt_tuning.tasks import TASKS_FILE, Task, World, load_tasks, load_worlds
from intrinsic_prompt_tuning.tasks.worlds import OPTION_MARK, Scene

FILLER = "_"
"""Stands where the instruction has no word, so that all instructions of a batch are equally long."""
LONG_FROM = 2 / 3
"""The share of the time after which instructions get long."""
MOST_LABELS = 9
KINDS = {"yes-no": 40, "labels": 20, "multiple-choice": 20, "extraction": 16, "transformation": 24}

# --- Questions -----------------------------------------------------------------------------------


def shown_values(world: World) -> list[str]:
    """Return the values that stand in the sentence itself: what extraction asks for."""
    return [f"{slot} {column}" for slot, column in re.findall(r"{(\w+)\.(\w+)}", world.sentence)]


def all_values(world: World) -> list[str]:
    return [f"{slot} {column}" for slot in world.slots for column in world.columns(slot)]


def all_tests(world: World) -> list[str]:
    """Return every single yes/no question about a column of few values, and about two slots that share such a column."""
    few = {(s, c): world.values(s, c) for s in world.slots for c in world.columns(s) if len(world.values(s, c)) <= 5}
    same = [
        f"same {column} {a} {b}"
        for (a, column), (b, other) in itertools.combinations(few, 2)
        if column == other and set(few[a, column]) == set(few[b, column])
    ]
    return [f"{slot} {value}" for (slot, _), values in few.items() for value in values] + same


def composition(question: str) -> frozenset[str]:
    """Return what a question composes: its parts, whatever their order, connective and negation; a bare "not A" is one too."""
    parts = re.split(" then | and | or ", question)
    bare = frozenset(part.removeprefix("not ") for part in parts)
    return bare | {"not"} if parts[0].startswith("not ") and len(parts) == 1 else bare


def draw_values(rng: random.Random, values: list[str]) -> str:
    return " then ".join(rng.sample(values, 2))


def draw_tests(rng: random.Random, tests: list[str]) -> str:
    """Draw a composition of two tests about different slots, each perhaps negated."""
    while True:
        a, b = rng.sample(tests, 2)
        if not set(a.split()) & set(b.split()) - {"same", "size", "tone", "small", "large", "warm", "cool"}:
            negated = [("not " if rng.random() < 0.25 else "") + test for test in (a, b)]
            question = f" {rng.choice(['and', 'or'])} ".join(negated)
            if len(question.split()) <= 8:
                return question


# --- Tasks ---------------------------------------------------------------------------------------


def draw_task_rows(world: World, seed: int = 0) -> Iterator[str]:
    """Draw the 120 tasks: a third of each kind single questions, the rest compositions, a quarter of those unseen."""
    rng = random.Random(seed)
    shown, values, tests = shown_values(world), all_values(world), all_tests(world)
    few = [value for value in values if len(world.labels(value)) <= 5]
    mapped = [value for value in values if value not in shown and value not in few]
    pools = {"labels": few, "multiple-choice": values, "extraction": shown, "transformation": mapped}
    used: set[frozenset[str]] = set()
    for kind, count in KINDS.items():
        pool = pools.get(kind, tests)
        n_single = round(count / 3)
        single = rng.sample(pool, n_single)
        composed: list[str] = []
        while len(composed) < count - n_single:
            if kind == "yes-no":
                question = f"not {rng.choice(tests)}" if rng.random() < 0.15 else draw_tests(rng, tests)
            else:
                question = draw_values(rng, pool)
            if composition(question) in used or (kind == "labels" and len(world.labels(question)) > MOST_LABELS):
                continue
            used.add(composition(question))
            composed.append(question)
        unseen = set(rng.sample(composed, round(len(composed) / 4)))
        for question in single + composed:
            row = {"world": "testbed", "kind": "classification" if kind in ("yes-no", "labels") else kind, "question": question}
            row |= {"splits": {"testbed": "unseen" if question in unseen else "seen"}}
            row |= {"pretrained": True} if question in single else {}
            name = question.replace(" ", "-") + ("-choice" if kind == "multiple-choice" else "")
            yield f"  {name}: " + yaml.safe_dump(row, default_flow_style=True, sort_keys=False, width=1000).strip()


def question_of(task: Task) -> str:
    """Return what a task of the world asks."""
    return task.source.partition(": ")[2]


def held_out_compositions(tasks: dict[str, Task]) -> set[frozenset[str]]:
    """Return what must never be trained: the compositions of the testbed's tasks that are not marked `pretrained`."""
    return {
        composition(question_of(task)) for task in tasks.values() if task.source.startswith("testbed: ") and not task.pretrained
    }


# --- Pre-training data ---------------------------------------------------------------------------


def partial_answers(world: World, question: str, scene: Scene) -> list[str | None]:
    """Return, for each word of a question, the answer to what it completes (a value, a test) or combines (not, and, or)."""
    answers: list[str | None] = []
    for part in question.split(" then "):
        if connective := re.search(" (and|or) ", part):
            left, right = part[: connective.start()], part[connective.end() :]
            own = [*partial_answers(world, left, scene), world.answer(part, scene), *partial_answers(world, right, scene)]
        elif part.startswith("not "):
            own = [world.answer(part, scene), *partial_answers(world, part.removeprefix("not "), scene)]
        else:
            own = [None] * (len(part.split()) - 1) + [world.answer(part, scene)]
        answers += own if not answers else [None, *own]  # nothing stands at `then`
    return answers


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of everything that a sentence, a question or an answer can contain."""
    words = {
        "yes",
        "no",
        "then",
        "and",
        "or",
        "not",
        "same",
        OPTION_MARK,
        FILLER,
        *re.findall(r"\b\w+\b", re.sub(r"{.*?}", "", world.sentence)),
    }
    for slot in world.slots:
        words |= {slot, *world.columns(slot), *(value for column in world.columns(slot) for value in world.values(slot, column))}
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


class Batches:
    """Endless batches of (instruction, sentence, answer), all of one length so that nothing is padding but answers."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerFast, held_out: set[frozenset[str]], seed: int) -> None:
        self.world, self.held_out, self.rng = world, held_out, random.Random(seed)
        self.values, self.tests = all_values(world), all_tests(world)
        self.short_tests = [test for test in self.tests if not test.startswith("same ")]
        self.same_tests = [test for test in self.tests if test.startswith("same ")]
        self.ids = tokenizer.get_vocab()

    def draw_question(self, kind: str) -> str:
        """Draw a question of a kind that is not held out."""
        while True:
            match kind:
                case "value":
                    question = self.rng.choice(self.values)
                case "test":
                    tests = self.same_tests if self.rng.random() < 0.2 else self.tests  # two words more to look up: hardest
                    question = ("not " if self.rng.random() < 0.3 else "") + self.rng.choice(tests)
                case "values":
                    question = draw_values(self.rng, self.values)
                case "parts":
                    question = " then ".join(self.rng.sample(self.values, 1) + self.rng.sample(self.short_tests, 2))
                case _:
                    question = draw_tests(self.rng, self.tests)
            parts = composition(question)
            if parts not in self.held_out and not any(
                frozenset(pair) in self.held_out for pair in itertools.combinations(parts, 2)
            ):
                return question

    def draw_scene(self, question: str) -> tuple[Scene, str]:
        """Draw a scene and the answer to a question; yes and no are about equally frequent."""
        wanted = self.rng.choice(["yes", "no"])
        for _ in range(8):
            scene = self.world.draw(self.rng)
            answer = self.world.answer(question, scene)
            if answer not in ("yes", "no") or answer == wanted:
                break
        return scene, answer

    def draw_options(self, question: str, answer: str) -> str:
        options = {answer}
        while len(options) < 3 and len(options) < len(self.world.labels(question)):
            options.add(self.world.answer(question, self.world.draw(self.rng)))
        shuffled = sorted(options)
        self.rng.shuffle(shuffled)
        return "".join(f" {OPTION_MARK} {option}" for option in shuffled)

    def instruction(self, question: str, scene: Scene, length: int) -> tuple[list[int], list[int]]:
        """Return a question's words in order, strewn over `length` positions among fillers, and the answers to its parts."""
        ids, hints = [self.ids[FILLER]] * length, [-100] * length
        words, answers = question.split(), partial_answers(self.world, question, scene)
        for place, word, answer in zip(sorted(self.rng.sample(range(length), len(words))), words, answers, strict=True):
            ids[place] = self.ids[word]
            hints[place] = self.ids[answer] if answer else -100
        return ids, hints

    def draw(self, size: int, share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return input ids (size, length + sentence), partial answers (size, length) and labels (size, answer).

        While less than a fifth (`share`) of the time is over, no composed test comes: it needs single tests first. In the last
        third instructions are strewn over as many positions as a soft prompt has tokens.
        """
        length = self.rng.choice([8, 8, 9, 10] if share < LONG_FROM else [8, 16, 22, 24, 24, 24, 24, 26])
        choice = self.rng.choice([None] * 6 + ["value", "values"])
        kinds, weights = (
            ("value", "test", "values", "tests", "parts"),
            (8, 36, 16, 0, 40) if share < 1 / 5 else (5, 20, 24, 36, 15),
        )
        rows, hints, answers = [], [], []
        while len(rows) < size:
            question = self.draw_question(choice or self.rng.choices(kinds, weights)[0])
            scene, answer = self.draw_scene(question)
            sentence = self.world.describe(scene)
            if choice:
                sentence += self.draw_options(question, answer)
                if sentence.count(OPTION_MARK) < 3:
                    continue
            instruction, own_hints = self.instruction(question, scene, length)
            rows.append(instruction + [self.ids[w] for w in sentence.split()] + [self.ids["</s>"]])
            hints.append(own_hints)
            answers.append([self.ids[w] for w in answer.split()] + [self.ids["</s>"]])
        width = max(map(len, answers))
        labels = torch.tensor([a + [-100] * (width - len(a)) for a in answers])
        return torch.tensor(rows), torch.tensor(hints), labels


# --- Pre-training --------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices (Jordan et al. 2024), in fp32; equal shapes go through one batched product."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, same in by_shape.items():
                updates = []
                for p in same:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                for p, update in zip(same, orthogonalise(torch.stack(updates)), strict=True):
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices (n, a, b) with all singular values near one (five Newton-Schulz steps)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def train(
    world: World, held_out: set[frozenset[str]], folder: Path, *, minutes: float, seed: int, batch: int, lr: float, resume: bool
) -> None:
    """Pre-train for a time, learning rate warmed up and then decayed linearly to zero; report and save every five minutes."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(world)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=384, num_layers=3, num_decoder_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, feed_forward_proj="relu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration.from_pretrained(folder) if resume else T5ForConditionalGeneration(config)
    model.train()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "block" in n and "relative" not in n]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(held_out)} held-out compositions", flush=True)
    optimizers = [Muon(matrices, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)]
    batches, filler = Batches(world, tokenizer, held_out, seed), tokenizer.get_vocab()[FILLER]
    start, step, reported, running = time.time(), 0, time.time(), 0.0
    begun = LONG_FROM if resume else 0.0
    while (share := begun + (1 - begun) * (time.time() - start) / (60 * minutes)) < 1:
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 200) * (1 - share)
        ids, hints, labels = batches.draw(batch, share)
        length, embeds = hints.shape[1], model.shared(ids)
        # What a soft prompt will be: words that are not quite words, and between them vectors that mean nothing.
        size = embeds.detach().pow(2).mean().sqrt()
        scale = 0.5 * torch.rand(batch, length, 1) + (ids[:, :length, None] == filler) * torch.rand(batch, 1, 1)
        noise = torch.nn.functional.pad(scale * size * torch.randn_like(embeds[:, :length]), (0, 0, 0, ids.shape[1] - length))
        out = model(inputs_embeds=embeds + noise, labels=labels)
        # The encoder, too, has to say what each part of the question comes to: with the answer's loss alone, yes and no stayed
        # near chance after 100 minutes; with both they are learned in five.
        states = out.encoder_last_hidden_state[:, :length] * model.config.d_model**-0.5
        parts = torch.nn.functional.cross_entropy((states @ model.shared.weight.T).flatten(0, 1), hints.flatten())
        loss = out.loss + parts
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step, running = step + 1, 0.98 * running + 0.02 * out.loss.item()
        if step % 200 == 0:
            print(f"step {step} minute {(time.time() - start) / 60:.1f} loss {running / (1 - 0.98**step):.4f}", flush=True)
        if time.time() - reported > 300:
            report(model, world, tokenizer, held_out)
            model.save_pretrained(folder)
            reported = time.time()
    report(model, world, tokenizer, held_out)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def report(
    model: T5ForConditionalGeneration,
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    held_out: set[frozenset[str]],
    n: int = 512,
) -> None:
    """Print the share of exactly right answers to instructions in words, per kind of question, trained and held out."""
    batches = Batches(world, tokenizer, set(), seed=12345)
    scores: dict[str, list[bool]] = {}
    for kind in ("value", "test", "values", "tests"):
        for part in ("trained", "held-out"):
            rows, answers = [], []
            for _ in range(200 * n):
                question = batches.draw_question(kind)
                if (composition(question) in held_out) == (part == "held-out"):
                    scene, answer = batches.draw_scene(question)
                    words = (question.split() + [FILLER] * 8)[:8]
                    rows.append([batches.ids[w] for w in words + world.describe(scene).split()] + [1])
                    answers.append(answer)
                if len(rows) == n:
                    break
            if rows:
                with torch.no_grad():
                    out = model.generate(input_ids=torch.tensor(rows), max_new_tokens=4, do_sample=False)
                texts = tokenizer.batch_decode(out, skip_special_tokens=True)
                scores[f"{kind} {part}"] = [t == a for t, a in zip(texts, answers, strict=True)]
    print("  ".join(f"{name} {sum(s) / len(s):.3f} (n={len(s)})" for name, s in scores.items()), flush=True)
    for part in ("trained", "held-out"):
        pooled = [x for name, s in scores.items() if name.endswith(part) for x in s]
        print(f"{part}: {sum(pooled) / len(pooled):.3f} ± {1.96 * math.sqrt(0.25 / len(pooled)):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tasks", "backbone", "report"])
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="only the last third, from the model in --out")
    parser.add_argument("--out", type=Path, default=Path("testbed"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    world = load_worlds(TASKS_FILE)["testbed"]
    if arguments.what == "tasks":
        sys.stdout.writelines(f"{row}\n" for row in draw_task_rows(world, arguments.seed))
        return
    held_out = held_out_compositions(load_tasks(TASKS_FILE))
    if arguments.what == "report":
        report(T5ForConditionalGeneration.from_pretrained(arguments.out).eval(), world, make_tokenizer(world), held_out, n=1000)
        return
    train(
        world,
        held_out,
        arguments.out,
        minutes=arguments.minutes,
        seed=arguments.seed,
        batch=arguments.batch,
        lr=arguments.lr,
        resume=arguments.resume,
    )


if __name__ == "__main__":
    main()
