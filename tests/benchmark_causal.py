"""How fast is the engine on a causal model beside PEFT's prompt tuning?

    python tests/benchmark_causal.py                  # SmolLM2-135M's shape, 2 tasks: some minutes on 2 CPU cores
    python tests/benchmark_causal.py --precision bf16 --tasks 32 --steps 10 --processes 8 16         # on a GPU

Random weights, inputs of 100 tokens on average, prompts of 20, answers of 3. Sides, in turn, medians of the repeats:

    a      PEFT's prompt tuning, task by task, as its documentation writes it: every row padded to the longest of all
    A      the same, padded to the longest row of each batch
    bare   the frozen backbone alone as transformers runs it, on batches of all tasks, the gradient of prompts among inputs
    front  the engine, prompt in front
    end    the engine, prompt behind the input, each input having been through the model once before
    once   that one pass of all inputs of all steps, which a command pays a single time
    AxK, frontxK, endxK    with --processes: K processes of that side at once on one device, each with its share of the tasks and
           a model of its own

A ratio a/b is a's seconds over b's, for the same steps on equally many rows.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from benchmark import in_turn, machine, matrix_rate
from peft import PromptTuningConfig, TaskType, get_peft_model

from intrinsic_prompt_tuning.backbone import Backbone, Encoded
from intrinsic_prompt_tuning.causal import Causal, PromptAt
from intrinsic_prompt_tuning.layout import Layout
from intrinsic_prompt_tuning.passes import Budget, first_budgets
from intrinsic_prompt_tuning.spaces import Space
from intrinsic_prompt_tuning.tasks import Example
from intrinsic_prompt_tuning.tuning import Job, JobTable, TuneConfig, minibatch, step

SIDES = ("a", "A", "bare", "front", "once", "end")
SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip


PeftJob = tuple[Any, torch.optim.Optimizer, list[Encoded]]


def make_rows(tasks: int, batch_size: int, seed: int = 0) -> list[list[Encoded]]:
    rng = random.Random(seed)

    def row() -> Encoded:
        ids = [rng.randrange(5, SHAPE["vocab_size"]) for _ in range(rng.randint(50, 150))]
        answer = [rng.randrange(5, SHAPE["vocab_size"]) for _ in range(3)]
        return Encoded(ids, answer, [], Example("", ("",)), 3, False)

    return [[row() for _ in range(max(32, batch_size))] for _ in range(tasks)]


def engine(
    model: torch.nn.Module, rows: list[list[Encoded]], at: PromptAt, batch_size: int
) -> tuple[Backbone, Space, JobTable, TuneConfig]:
    backbone = Backbone("", Causal(model, at, end=1), Layout(None), 1 << 13, *first_budgets(model, at))
    with torch.no_grad():
        initial = model.get_input_embeddings()(torch.arange(5, 25, device=model.device)).float()
    space, table = Space(initial, backbone.embedding_rms), JobTable(initial.numel(), backbone.device)
    for number, own in enumerate(rows):
        theta = torch.zeros(space.dim)
        table.add(Job(task=str(number), metric="ACC", data_seed=100, learning_rate=0.1, theta=theta, rows=(own, [])))
    return backbone, space, table, TuneConfig(steps=1000, batch_size=batch_size)


def steps_of(side: tuple, steps: int) -> None:
    for _ in range(steps):
        step(*side)


def peft_jobs(model: torch.nn.Module, rows: list[list[Encoded]]) -> list[PeftJob]:
    """Return PEFT's model of each task around the one backbone, its optimizer, and its rows."""
    jobs = list[PeftJob]()
    for own in rows:
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=20)
        tuned: Any = get_peft_model(model, config)  # a Llama has no dropout, so train() would change nothing
        jobs.append((tuned, torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=0.3), own))
    return jobs


def peft_loop(jobs: list[PeftJob], steps: int, batch_size: int, *, full: bool) -> None:
    """Tune one task after the other."""
    longest = max(len(row.input_ids) + len(row.target_ids) for *_, own in jobs for row in own)
    for tuned, optimizer, own in jobs:
        for number in range(steps):
            batch = [own[n] for n in minibatch(len(own), batch_size, 100, number)]
            width = longest if full else max(len(row.input_ids) + len(row.target_ids) for row in batch)
            gaps = [width - len(row.input_ids) - len(row.target_ids) for row in batch]
            ids = [[0] * gap + row.input_ids + row.target_ids for gap, row in zip(gaps, batch, strict=True)]
            labels = [[-100] * (width - len(row.target_ids)) + row.target_ids for row in batch]
            mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
            on_device = (torch.tensor(values, device=tuned.device) for values in (ids, mask, labels))
            tuned(**dict(zip(("input_ids", "attention_mask", "labels"), on_device, strict=True))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def bare_loop(model: torch.nn.Module, rows: list[list[Encoded]], steps: int, batch_size: int, budget: Budget) -> None:
    """The same rows through the model with 20 embeddings in front, sorted by length, in passes as large as the engine's."""
    for number in range(steps):
        batch = [own[n] for own in rows for n in minibatch(len(own), batch_size, 100, number)]

        def work(which: list[int], batch: list[Encoded] = batch) -> None:
            ids = [batch[n].input_ids + batch[n].target_ids for n in which]
            width = max(map(len, ids))
            with torch.no_grad():
                padded = torch.tensor([[0] * 20 + own + [0] * (width - len(own)) for own in ids], device=model.device)
                mask = torch.tensor([[1] * (20 + len(own)) + [0] * (width - len(own)) for own in ids], device=model.device)
                embeddings = model.get_input_embeddings()(padded)
            answers = [batch[n].target_ids for n in which]
            both = zip(ids, answers, strict=True)
            wanted = [[-100] * (20 + len(own) - len(a)) + a + [-100] * (width - len(own)) for own, a in both]
            labels = torch.tensor(wanted, device=model.device)
            model(inputs_embeds=embeddings.requires_grad_(), attention_mask=mask, labels=labels, use_cache=False).loss.backward()

        budget.in_passes([row.widths(20) for row in batch], work)


def one_by_one(rows: list[list[Encoded]], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of every repeat of each side; print them, and the peak memory, in which are all sides' models."""
    model = make_model(arguments.precision)
    device: torch.device = model.device
    print(f"{machine(device)}; a large matrix product runs at {matrix_rate(device, model.dtype) / 1e9:,.0f} GFLOP/s")
    sides = {
        name: partial(side_of(name, model, rows, arguments.batch_size), arguments.steps)
        for name in SIDES
        if name in arguments.sides
    }
    seconds, memory = in_turn(sides, arguments.repeats)
    for name, own in seconds.items():
        print(f"{name}: {steps_told(own)} for {arguments.steps} steps of {arguments.tasks} tasks, peak {memory[name]:.2f} GB")
    return seconds


def steps_told(seconds: list[float]) -> str:
    """Write the median and all rounds."""
    return f"{statistics.median(seconds):.3f} s, of {' '.join(f'{s:.3f}' for s in seconds)},"


def one_process(
    barrier: Any, make: Callable[[], torch.nn.Module], rows: list[list[Encoded]], arguments: argparse.Namespace, threads: int
) -> None:
    """One of K: waits for the others before and after its work, so that the parent can time all of them."""
    try:
        torch.set_num_threads(threads)
        model = make()
        for name in arguments.at_once:
            work = side_of(name, model, rows, arguments.batch_size)
            for steps in (1, arguments.steps, arguments.steps):  # the first warms
                barrier.wait(600)
                work(steps)
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                barrier.wait(600)
    except BaseException:
        barrier.abort()  # the others need not wait
        raise


def at_once(k: int, rows: list[list[Encoded]], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds that K processes of each side need for all tasks together, of two rounds."""
    context = torch.multiprocessing.get_context("spawn")
    barrier, threads = context.Barrier(k + 1), max(1, torch.get_num_threads() // k)
    make = partial(make_model, arguments.precision)
    processes = [context.Process(target=one_process, args=(barrier, make, rows[n::k], arguments, threads)) for n in range(k)]
    for process in processes:
        process.start()
    seconds: dict[str, list[float]] = {}
    for name in arguments.at_once:
        rounds = []
        for _ in range(3):
            barrier.wait(600)
            begin = time.perf_counter()
            barrier.wait(600)
            rounds.append(time.perf_counter() - begin)
        seconds[f"{name}x{k}"] = rounds[1:]
        print(f"{name}x{k}: {steps_told(rounds[1:])} of {k} processes at once", flush=True)
    for process in processes:
        process.join()
    return seconds


def side_of(name: str, model: torch.nn.Module, rows: list[list[Encoded]], batch_size: int) -> Callable[[int], None]:
    """Return what takes so many steps of all tasks in a side's way."""
    if name in ("a", "A"):
        jobs = peft_jobs(model, rows)
        return lambda steps: peft_loop(jobs, steps, batch_size, full=name == "a")
    if name == "bare":
        budget = first_budgets(model, "front")[0]
        return lambda steps: bare_loop(model, rows, steps, batch_size, budget)
    at: PromptAt = "front" if name == "front" else "end"
    own = engine(model, rows, at, batch_size)
    if name == "once":
        return lambda steps: inputs_once(own[0].lm, rows)
    if name == "end":
        inputs_once(own[0].lm, rows)
    return lambda steps: steps_of(own, steps)


def inputs_once(lm: Any, rows: list[list[Encoded]]) -> None:
    """Send each input through the model, as if none had been before."""
    lm.kept.clear()
    lm._kept_bytes = 0
    inputs, many = [row.input_ids for own in rows for row in own], 8 if lm.model.device.type == "cpu" else 128
    for start in range(0, len(inputs), many):
        with torch.no_grad():
            lm._inputs_once(inputs[start : start + many])


def make_model(precision: str) -> torch.nn.Module:
    """Return the frozen model, the same every time."""
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as `load_backbone`: every batch has another shape, on all sides
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    return model.to({"bf16": torch.bfloat16, "fp32": torch.float32}[precision]).eval().requires_grad_(False)


def tell(seconds: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    """Print the ratios of medians."""
    middle = {name: statistics.median(own) for name, own in seconds.items()}
    engines = [name for name in middle if name.startswith(("front", "end"))]
    rivals = [name for name in middle if name not in (*engines, "once")]
    for name in engines:
        print(", ".join(f"{other}/{name} {middle[other] / middle[name]:.2f}" for other in rivals))
    for steps in (100, 1000) if {"a", "A", "once", "end"} <= middle.keys() else ():
        share = steps / arguments.steps
        whole = middle["once"] + share * middle["end"]
        told = ", ".join(f"{side}/end {share * middle[side] / whole:.2f}" for side in ("A", "a"))
        print(f"{steps} steps with the one pass of all inputs: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32", help="of the model, on all sides")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--processes", type=int, nargs="*", default=[], help="K, at most as many as tasks")
    parser.add_argument("--at-once", nargs="*", default=["A", "front", "end"], choices=["A", "front", "end"])
    arguments = parser.parse_args()
    rows = make_rows(arguments.tasks, arguments.batch_size)
    seconds = one_by_one(rows, arguments)
    for k in arguments.processes:  # when nothing of the sides in turn is left on the device
        gc.collect()
        torch.cuda.empty_cache()
        seconds |= at_once(k, rows, arguments)
    tell(seconds, arguments)


if __name__ == "__main__":
    main()
