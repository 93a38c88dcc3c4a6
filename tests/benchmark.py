"""How fast is the engine beside PEFT's prompt tuning, and beside the backbone alone?

    python tests/benchmark.py                                     # T5-small, 8 tasks: some minutes on 2 CPU cores
    python tests/benchmark.py --shape t5-base --tasks 64          # on a GPU
    python tests/benchmark.py --budgets 1024 4096 16384           # the engine alone, at several sizes of a pass
    python tests/benchmark.py --shape t5-base --subspace 250      # learning to reconstruct prompts: time and memory

Real shapes, random weights, prompts of 100 tokens, rows as long as those of real few-shot tasks. Four sides do the same
updates of the same tasks on the same rows, in turn, several times; medians are shown, and throughput ratios:

    a  PEFT's prompt tuning, task by task, as its documentation's example for sequence-to-sequence models writes it: every row
       padded to max_length, AdamW, linear schedule, fp32
    A  the same, but padded only to the longest row of each batch, which the documentation does not do
    b  a in bf16
    c  the engine of ipt: all tasks in shared passes; bf16 on a GPU, fp32 on a CPU
    d  the frozen backbone alone as transformers runs it, forward and backward, on c's rows in c's padded batches: the limit

Useful tokens are those of prompts, inputs and targets, not the padding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader

from intrinsic_prompt_tuning import finding
from intrinsic_prompt_tuning.backbone import Backbone, Encoded
from intrinsic_prompt_tuning.layout import Layout
from intrinsic_prompt_tuning.passes import first_budgets, padded
from intrinsic_prompt_tuning.seq2seq import Seq2Seq, share_position_bias
from intrinsic_prompt_tuning.spaces import Space
from intrinsic_prompt_tuning.tasks import Example
from intrinsic_prompt_tuning.tuning import Job, JobTable, TuneConfig, minibatch, step

SHAPES = {
    "t5-small": transformers.T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0
    ),
    "t5-base": transformers.T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0
    ),
    "bart-base": transformers.BartConfig(
        vocab_size=50265, d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
        encoder_attention_heads=12, decoder_attention_heads=12,
    ),
}  # fmt: skip
CROSSFIT = Path(__file__).parents[2] / "shared" / "crossfit"
TOKENS_PER_WORD = 1.3
"""Of English text in T5's vocabulary, roughly."""
MEAN_LENGTHS = [(20, 3), (35, 4), (50, 3), (60, 4), (80, 5), (100, 4), (130, 6), (200, 8)]
"""Mean tokens of a task's inputs and targets where no real data is at hand; rows vary around them by half."""


def task_rows(tasks: int, vocabulary: int, longest: int, seed: int = 0) -> list[list[Encoded]]:
    """Return 32 rows of random tokens for each task, as long as the rows of real tasks where those are at hand."""
    rng, lengths = random.Random(seed), []
    files = sorted(CROSSFIT.glob("*/*_16_100_train.jsonl"))
    if files:
        for file in rng.sample(files, len(files)):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][:32]
            lengths.append([(len(row["input"].split()), len(row["output"].split())) for row in rows if row["input"].split()])
    else:
        lengths = [[(n * rng.uniform(0.5, 1.5), m) for _ in range(32)] for n, m in MEAN_LENGTHS]
    rows = []
    for task in range(tasks):
        rows.append([])
        for words, answer in lengths[task % len(lengths)]:
            input_ids, target_ids = (
                [*(rng.randrange(5, vocabulary) for _ in range(min(most - 1, 1 + round(TOKENS_PER_WORD * count)))), 1]
                for count, most in ((words, longest), (answer, 64))
            )
            rows[-1].append(Encoded(input_ids, target_ids, [], Example("", ("",)), len(target_ids), False))
    return rows


# --- The four sides ------------------------------------------------------------------------------


def make_engine(
    model: torch.nn.Module, rows: Sequence[Sequence[Encoded]], arguments: argparse.Namespace, budget: int | None = None
) -> tuple[Backbone, Space, JobTable, TuneConfig]:
    """Return what the engine works on: the backbone, the space of prompts, a table with a job per task, the settings."""
    device = next(model.parameters()).device
    own, answers = first_budgets(model)
    own.tokens = budget or own.tokens
    model.generation_config.decoder_start_token_id = 0
    backbone = Backbone("benchmark", Seq2Seq(model), Layout(SimpleNamespace(pad_token_id=0)), 1 << 20, own, answers)
    ids = torch.randint(5, model.config.vocab_size, (arguments.prompt_length,), device=device)
    with torch.no_grad():
        initial = model.get_input_embeddings()(ids).float()
    space, table = Space(initial, backbone.embedding_rms), JobTable(initial.numel(), device)
    for number, own in enumerate(rows):
        theta, drawn = torch.zeros(space.dim), (list(own), [])
        table.add(Job(task=str(number), metric="ACC", data_seed=100, learning_rate=0.1, theta=theta, rows=drawn))
    return backbone, space, table, TuneConfig(steps=1000, batch_size=arguments.batch_size)


def engine(side: tuple, steps: int) -> None:
    backbone, space, table, config = side
    share_position_bias(backbone.model)
    for _ in range(steps):
        step(backbone, space, table, config)
    backbone.model.set_attn_implementation("sdpa")  # the other sides use the same model


def bare(side: tuple, steps: int) -> None:
    """Run the backbone as transformers does, on the rows and in the batches of the engine's steps."""
    backbone, space, table, config = side
    model, embed = backbone.model, backbone.model.get_input_embeddings()
    prompt = space.initial_prompt.to(next(model.parameters()).dtype)
    for number in range(steps):
        drawn = ((job.rows[0], minibatch(len(job.rows[0]), config.batch_size, 100, number)) for job in table.jobs)
        rows = [train[row] for train, which in drawn for row in which]

        def work(numbers: list[int], rows: list[Encoded] = rows) -> None:
            ids, real = padded([rows[n].input_ids for n in numbers], backbone.device, before=len(prompt))
            targets, said = padded([rows[n].target_ids for n in numbers], backbone.device)
            labels = targets.masked_fill(~torch.from_numpy(said).to(targets.device), -100)
            embeds = torch.cat([prompt.expand(len(ids), -1, -1), embed(ids)], dim=1).requires_grad_()
            model(inputs_embeds=embeds, attention_mask=torch.from_numpy(real).to(ids), labels=labels).loss.backward()

        backbone.budget.in_passes([row.widths(len(prompt)) for row in rows], work)


def peft_loop(
    model: torch.nn.Module,
    rows: Sequence[Sequence[Encoded]],
    arguments: argparse.Namespace,
    steps: int,
    *,
    full: bool,
    half: bool,
) -> None:
    """Tune one task after the other, a new PEFT model around the same backbone for each."""
    device = next(model.parameters()).device
    longest = max(len(row.input_ids) for own in rows for row in own)
    longest_target = max(len(row.target_ids) for own in rows for row in own)

    def collate(batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        width = longest if full else max(len(row.input_ids) for row in batch)
        target = longest_target if full else max(len(row.target_ids) for row in batch)
        return {
            "input_ids": torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in batch]),
            "attention_mask": torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in batch]),
            "labels": torch.tensor([row.target_ids + [-100] * (target - len(row.target_ids)) for row in batch]),
        }

    for own in rows:
        config = PromptTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=arguments.prompt_length)
        peft_model = get_peft_model(model, config).to(device).train()
        optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=0.3)
        scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
        loader, done = DataLoader(own, batch_size=arguments.batch_size, shuffle=True, collate_fn=collate), 0
        while done < steps:
            for batch in loader:
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
                    loss = peft_model(**batch).loss
                loss.backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                done += 1
                if done == steps:
                    break
    model.eval()


def fit_subspace(shape: str, dim: int) -> None:
    """Learn to reconstruct 100 prompts of 100 tokens; print how long a step takes and what it keeps in memory."""
    hidden, times = SHAPES[shape].d_model, []
    prompts, initial = torch.randn(100, 100, hidden), torch.zeros(100, hidden)
    config = finding.SubspaceConfig(subspace_steps=1, warmup_steps=5, lm_loss=False)
    size = 4 * (dim * (prompts[0].numel() + 1 + config.inner) + config.inner + prompts[0].numel() * (config.inner + 1)) / 1e9
    before = peak_memory(lambda: None)[1]
    _, peak = peak_memory(
        lambda: finding.fit_subspace(
            None, prompts, initial, [[]] * 100, dim, config, on_step=lambda fit: times.append(time.perf_counter())
        )
    )  # fmt: skip
    seconds = statistics.median(b - a for a, b in itertools.pairwise(times))
    print(
        f"{shape}, 100 prompts, dim {dim}: a subspace of {size:.2f} GB, {seconds:.2f} s per step on the reconstruction, peak "
        f"memory {peak - before:.2f} GB above the {before:.2f} GB from before: {(peak - before) / size:.1f} times the subspace"
    )


# --- Measuring -----------------------------------------------------------------------------------


def peak_memory(run: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds of a call, until the GPU is done, and its peak memory in GB, the GPU's or this process's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (reset := Path("/proc/self/clear_refs")).exists():
        reset.write_text("5")
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter() - begin, torch.cuda.max_memory_allocated() / 1e9
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status")
    if status.exists():
        (peak,) = [int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return seconds, peak / 1e6
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def in_turn(sides: dict[str, Callable[[], None]], repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Run all sides in turn, several times after a run to warm up; return their seconds and their peak memory in GB."""
    for run in sides.values():
        peak_memory(run)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    memory = dict.fromkeys(sides, 0.0)
    for _ in range(repeats):
        for name, run in sides.items():
            took, peak = peak_memory(run)
            seconds[name].append(took)
            memory[name] = max(memory[name], peak)
    return seconds, memory


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large matrix product, the best of five."""
    n = 8192 if device.type == "cuda" else 1024
    a, seconds = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(6):
        begin = time.perf_counter()
        float((a @ a)[0, 0])
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / min(seconds[1:])


def operations(model: torch.nn.Module, tokens: int, target_tokens: int) -> float:
    """Return the operations of a step by the usual count: 2 per weight and token forward, as many backward to the inputs."""
    encoder = sum(p.numel() for n, p in model.get_encoder().named_parameters() if "embed" not in n)
    decoder = sum(p.numel() for n, p in model.get_decoder().named_parameters() if "embed" not in n)
    head = model.get_input_embeddings().weight.numel()
    return 4.0 * (encoder * tokens + (decoder + head) * target_tokens)


def machine(device: torch.device) -> str:
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{os.cpu_count()} cores {platform.processor() or platform.machine()}"
    )
    import peft

    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="t5-small")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="updates of each task in one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-length", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=128, help="tokens of an input at most; PEFT's example has 128")
    parser.add_argument("--sides", help="default: all, but b only where bf16 is not emulated")
    parser.add_argument("--budgets", type=int, nargs="*", help="only the engine, with so many tokens a pass")
    parser.add_argument("--subspace", type=int, help="only fit a subspace of so many dimensions")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(machine(device))
    if device.type == "cpu":
        print("no GPU here: what is said of GPUs, 64 tasks on the shapes t5-base and bart-base, is not measured")
    if arguments.subspace:
        fit_subspace(arguments.shape, arguments.subspace)
    else:
        tune_prompts(arguments, device)


def tune_prompts(arguments: argparse.Namespace, device: torch.device) -> None:
    """Measure the sides in turn and print what they reach."""
    model = transformers.AutoModelForSeq2SeqLM.from_config(SHAPES[arguments.shape]).to(device).requires_grad_(False).eval()
    fast = model if device.type == "cpu" else transformers.AutoModelForSeq2SeqLM.from_config(
        SHAPES[arguments.shape], dtype=torch.bfloat16
    ).to(device).requires_grad_(False).eval()  # fmt: skip
    rows = task_rows(arguments.tasks, model.config.vocab_size, arguments.max_length)
    steps, count = arguments.steps, arguments.tasks * arguments.batch_size * arguments.steps
    sides: dict[str, Callable[[], None]]
    if arguments.budgets:
        sides = {
            f"c at {budget} tokens a pass": partial(engine, make_engine(fast, rows, arguments, budget), steps)
            for budget in arguments.budgets
        }
    else:
        shared = make_engine(fast, rows, arguments)
        every: dict[str, Callable[[], None]] = {
            "a": lambda: peft_loop(model, rows, arguments, steps, full=True, half=False),
            "A": lambda: peft_loop(model, rows, arguments, steps, full=False, half=False),
            "b": lambda: peft_loop(model, rows, arguments, steps, full=True, half=True),
            "c": lambda: engine(shared, steps),
            "d": lambda: bare(shared, steps),
        }
        if not arguments.sides and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            print("b is left out: this processor has no bf16, and emulation takes minutes (--sides ab measures it all the same)")
            del every["b"]
        sides = {name: every[name] for name in arguments.sides or every}
    seen = [own[n] for own in rows for number in range(steps) for n in minibatch(len(own), arguments.batch_size, 100, number)]
    targets = sum(len(row.target_ids) for row in seen)
    useful = count * arguments.prompt_length + sum(len(row.input_ids) for row in seen) + targets
    print(
        f"{arguments.shape}, {arguments.tasks} tasks, {arguments.batch_size} rows, {steps} steps, prompts of "
        f"{arguments.prompt_length}, inputs of {statistics.mean(len(row.input_ids) for row in seen):.0f} tokens on average and "
        f"{max(len(row.input_ids) for row in seen)} at most, {'real' if CROSSFIT.exists() else 'assumed'} lengths"
    )
    seconds, memory = in_turn(sides, arguments.repeats)
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name in sides:
        print(
            f"{name}: {useful / middle[name]:,.0f} useful tokens/s, {count / middle[name]:.1f} rows/s, "
            f"{1000 * middle[name] / (steps * arguments.tasks):.0f} ms per job-step, peak {memory[name]:.2f} GB, "
            f"seconds {' '.join(f'{s:.1f}' for s in seconds[name])}",
            flush=True,
        )
    for over in "aAbd":
        if over in middle and "c" in middle:
            print(f"c/{over}: {middle[over] / middle['c']:.2f}")
    if "c" in middle:
        rate = matrix_rate(device, next(fast.parameters()).dtype)
        share = operations(fast, useful - targets, targets) / middle["c"] / rate
        print(f"c reaches {100 * share:.0f} % of the {rate / 1e12:.2f} Tflop/s of a large matrix product, padding not counted")


if __name__ == "__main__":
    main()
