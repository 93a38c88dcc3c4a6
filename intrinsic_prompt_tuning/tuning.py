"""The one engine: prompt tuning and intrinsic tuning of many jobs at once.

A job is one task, one few-shot sample, one start, one learning rate. Jobs share passes through the backbone and nothing else.
Dimensions in comments: tasks (rows of theta), dim, prompt_length, hidden.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated, Any

from intrinsic_prompt_tuning.backbone import Answer, Backbone, Decoding, Encoded
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.lazy import Tensor, np, torch
from intrinsic_prompt_tuning.metrics import METRICS
from intrinsic_prompt_tuning.passes import Budget, to_device
from intrinsic_prompt_tuning.settings import TUNING, Setting
from intrinsic_prompt_tuning.spaces import Space


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How a job is tuned."""

    steps: Annotated[int, Setting("Updates of a job.", least=1)] = 1000
    batch_size: Annotated[int, TUNING("Rows of a job in one update.", least=1, most=4096)] = 8
    evaluations: Annotated[int, TUNING("Validations of a job, at most.", least=1)] = 5
    patience: Annotated[int, TUNING("Validations without gain that end a job; 0: none ends early.", least=0, most=10**6)] = 3
    """With 0 not even a solved one ends early."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; it then falls linearly to zero."""
    clip: float = 0.1
    """Largest norm of a job's gradient; with Adam that makes the gradients of many steps equally large."""
    solved: float = 0.03
    """Loss per token of the validation rows under which a job ends that answers all of them right: nothing is left to learn."""

    @property
    def evaluate_every(self) -> int:
        """The steps between two evaluations: the last one may come sooner, and there are never more of them than asked for."""
        return math.ceil(self.steps / self.evaluations)


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """One row of theta: what is tuned, from where, on what."""

    task: str
    metric: str
    data_seed: int
    learning_rate: float
    number: int = 0
    """Of the try: each takes the rows in another order."""
    seed: int = 0
    """Of the experiment: likewise."""
    theta: Tensor
    """(dim,), float32: where it starts."""
    rows: Sequence[list[Encoded]]
    """Training and validation rows."""
    unfinished: Mapping[str, Tensor] = field(default_factory=dict)
    """The state at which the job goes on, if it began before."""
    of: Any = None
    """What it is for, which the engine does not look at."""

    @property
    def order(self) -> int:
        """The seed of the order of its rows."""
        return self.data_seed + (self.number << 32) + (self.seed << 64)

    def __str__(self) -> str:
        """Return what to call the job in messages."""
        which = f", try {self.number + 1}" if self.number else ""
        return f"{self.task} (data seed {self.data_seed}, learning rate {self.learning_rate:g}{which})"


@dataclass(frozen=True)
class Tuned:
    """A finished job."""

    job: Job
    theta: Tensor
    """(dim,), the best checkpoint by validation score, then by validation loss."""
    soft_prompt: Tensor
    """(prompt_length, hidden), what theta stands for."""
    record: dict[str, float]
    """validation (score), validation_loss, best_step, steps, first_loss, last_loss (training, means over 10 steps)."""


class JobTable:
    """The jobs in the slots: theta, Adam's moments, step counts and best checkpoints, one row a job.

    A step replaces the tensors of `state` and never writes into them, so that `snapshot` needs no copy.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        """Begin with no job; `dim` is the length of a row of theta."""
        self.jobs: list[Job] = []
        self.row_tokens: list[float] = []
        """Of each job's training rows, on average."""
        self.state = {name: torch.zeros(0, dim, device=device) for name in ("theta", "mean", "square", "best_theta")}
        # Losses stay on the device: reading them would make it wait for the host at every step.
        self.state |= {name: torch.zeros(0, device=device) for name in ("first_loss", "last_loss")}
        # What the host decides by is float64: a step count is exact, and a score compares as it was computed.
        names = ("step", "best_score", "best_loss", "best_step")
        self.state |= {name: torch.zeros(0, dtype=torch.float64) for name in names}

    def add(self, job: Job) -> None:
        """Give a job a slot, at its start or where it was interrupted."""
        start = {"theta": job.theta, "best_theta": job.theta, "best_score": torch.tensor(-math.inf), **job.unfinished}
        for name, table in self.state.items():
            row = start.get(name, torch.zeros(table.shape[1:])).to(table)
            self.state[name] = torch.cat([table, row[None]])
        self.jobs.append(job)
        self.row_tokens.append(fmean(map(len, job.rows[0])))

    def snapshot(self) -> Callable[[], dict[Job, dict[str, Tensor]]]:
        """Return a way to read, at any later time, the states that the jobs have now: what `Job.unfinished` can give back."""
        jobs, state = list(self.jobs), dict(self.state)
        return lambda: {job: {name: table[i] for name, table in state.items()} for i, job in enumerate(jobs) if state["step"][i]}

    def retain(self, which: Sequence[int]) -> None:
        """Drop all jobs but these."""
        self.state = {name: table[list(which)] for name, table in self.state.items()}
        self.jobs, self.row_tokens = [self.jobs[i] for i in which], [self.row_tokens[i] for i in which]

    def result(self, i: int, space: Space) -> Tuned:
        """Return a job's outcome, copied out of the table."""
        theta = self.state["best_theta"][i].clone()
        record = {name: float(self.state[name][i]) for name in ("best_step", "first_loss", "last_loss")}
        record |= {"validation": float(self.state["best_score"][i]), "validation_loss": float(self.state["best_loss"][i])}
        return Tuned(self.jobs[i], theta, space.back_project(theta[None])[0], record | {"steps": float(self.state["step"][i])})


def tune(
    backbone: Backbone, space: Space, jobs: Iterable[Job], config: TuneConfig, *, slots: int | None = None,
    decoding: Decoding = "options", on_step: Callable[[JobTable], None] = lambda table: None,
    on_validation: Callable[[Job, dict[str, float]], None] = lambda job, figures: None,
) -> Iterator[Tuned]:  # fmt: skip
    """Tune jobs and yield each as it finishes, its slot going to the next.

    Args:
        backbone: frozen; only theta gets gradients.
        space: maps theta to soft prompts, once per job and step.
        jobs: in the order in which they get slots.
        config: the same for all jobs.
        slots: jobs that are tuned at once; without it as many as fill four passes, so that rows of like length meet, and at
            least 16.
        decoding: how validation rows are answered.
        on_step: called after each step of all slots, with the table.
        on_validation: called after each validation of a job, with `step`, `score`, `loss` and `training_loss`.

    Raises:
        IptError: a loss is not finite.
    """
    table, queue = JobTable(space.dim, backbone.device), iter(jobs)
    while True:
        while _has_slot(table, slots, backbone.budget, config, len(space.initial_prompt)) and (job := next(queue, None)):
            table.add(job)
        if not table.jobs:
            return
        step(backbone, space, table, config)
        steps = table.state["step"].tolist()
        if due := [i for i, taken in enumerate(steps) if taken % config.evaluate_every == 0 or taken == config.steps]:
            validate(backbone, space, table, due, decoding, on_validation)
            over = _over(table.state, config, due)
            yield from (table.result(i, space) for i in over)
            table.retain([i for i in range(len(steps)) if i not in over])
        on_step(table)


def _over(state: Mapping[str, Tensor], config: TuneConfig, due: Sequence[int]) -> list[int]:
    """Return which of the jobs just validated end here: their steps are done, they get no better, or they cannot."""
    over = state["step"] == config.steps
    if config.patience:
        over |= state["step"] - state["best_step"] >= config.patience * config.evaluate_every
        over |= (state["best_score"] == 1) & (state["best_loss"] < config.solved)
    return [i for i in due if over[i]]


def _has_slot(table: JobTable, slots: int | None, budget: Budget, config: TuneConfig, prompt_length: int) -> bool:
    """Tell whether one more job can be tuned beside those in the table."""
    if slots:
        return len(table.jobs) < slots
    row_tokens = len(table.jobs) * prompt_length + sum(table.row_tokens)
    return len(table.jobs) < 16 or config.batch_size * row_tokens < 4 * budget.tokens


def step(backbone: Backbone, space: Space, table: JobTable, config: TuneConfig) -> None:
    """Update every job in the table once, each on its own next minibatch."""
    state, size = table.state, config.batch_size
    theta = state["theta"].detach().requires_grad_()
    prompts = space.back_project(theta)  # (tasks, prompt_length, hidden)
    batch = list[tuple[int, Encoded]]()
    for i, (job, at) in enumerate(zip(table.jobs, state["step"].long().tolist(), strict=True)):
        train, _ = job.rows
        batch += [(i, train[n]) for n in minibatch(len(train), size, job.order, at)]
    losses, prompt_gradient = prompt_losses(backbone, prompts.detach(), batch)
    (gradient,) = torch.autograd.grad(prompts, theta, prompt_gradient)
    _record_losses(losses, state)
    adam(state, gradient, torch.tensor([job.learning_rate for job in table.jobs], dtype=torch.float64), config)


def prompt_losses(backbone: Backbone, soft_prompts: Tensor, batch: Sequence[tuple[int, Encoded]]) -> tuple[Tensor, Tensor]:
    """Return each prompt's loss on its own rows of a batch, and the gradient of it.

    Args:
        backbone: frozen.
        soft_prompts: (tasks, prompt_length, hidden).
        batch: (index of the soft prompt, row).

    Returns:
        Losses (tasks,), each the mean over the target tokens of the prompt's rows; gradients (tasks, prompt_length, hidden).
    """
    losses, gradients = torch.zeros(len(soft_prompts), device=soft_prompts.device), torch.zeros_like(soft_prompts)
    tokens = Counter[int]()
    for i, example in batch:
        tokens[i] += len(example.target_ids)

    def work(numbers: list[int]) -> None:
        own = [batch[n][1] for n in numbers]
        at = to_device([batch[n][0] for n in numbers], soft_prompts.device)
        leaf = soft_prompts[at].requires_grad_()
        begun: Any = backbone.lm.begin(leaf, [e.input_ids for e in own])
        sums = backbone.lm.text_losses(begun, range(len(own)), [e.target_ids for e in own])
        means = sums / to_device([tokens[batch[n][0]] for n in numbers], soft_prompts.device)
        means.sum().backward()
        # Row by row, so that it does not matter which passes a prompt's rows are in.
        gradients.index_add_(0, at, leaf.grad)  # type: ignore[arg-type]
        losses.index_add_(0, at, means.detach())

    backbone.budget.in_passes([example.widths(soft_prompts.shape[1]) for _, example in batch], work)
    return losses, gradients


def minibatch(rows: int, size: int, seed: int, step: int) -> list[int]:
    """Return the row numbers of a step: without end through the rows, freshly shuffled each time; no state to save."""
    return [int(_order(rows, seed, n // rows)[n % rows]) for n in range(step * size, (step + 1) * size)]


@functools.lru_cache(1 << 12)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the rows of an epoch, freshly shuffled; kept, as a generator a job and step costs a hundredth of a run."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def adam(state: dict[str, Tensor], gradient: Tensor, learning_rates: Tensor, config: TuneConfig) -> None:
    """Take each job's own step of Adam (betas 0.9 and 0.999), its gradient clipped, its rate warmed up and decayed."""
    norms = gradient.norm(dim=1, keepdim=True)
    gradient = gradient * (config.clip / norms.clamp_min(config.clip))
    state["step"] = state["step"] + 1
    state["mean"] = state["mean"].lerp(gradient, 0.1)
    state["square"] = state["square"].lerp(gradient.square(), 0.001)
    step = state["step"]
    warm = (step / max(1.0, config.warmup * config.steps)).clamp_max(1)
    left = (1 - (step - 1) / config.steps).clamp_min(0)
    rates = torch.stack([learning_rates * torch.minimum(warm, left) / (1 - 0.9**step), 1 - 0.999**step]).float()
    rate, share = to_device(rates, gradient.device)[..., None]  # (tasks, 1) each
    state["theta"] = state["theta"] - rate * state["mean"] / ((state["square"] / share).sqrt() + 1e-8)


def _record_losses(losses: Tensor, state: dict[str, Tensor]) -> None:
    """Add each job's loss to its mean over its first ten and over its last ten steps; one that is not finite stays in both."""
    step, first = to_device(state["step"].float(), losses.device), state["first_loss"]
    state["first_loss"] = torch.where(step < 10, first.lerp(losses, 1 / (step + 1)), first)
    state["last_loss"] = torch.where(step == 0, losses, state["last_loss"].lerp(losses, 0.1))


def validate(
    backbone: Backbone, space: Space, table: JobTable, due: Sequence[int], decoding: Decoding,
    told: Callable[[Job, dict[str, float]], None] = lambda job, figures: None,
) -> None:  # fmt: skip
    """Score the validation rows of some jobs, and keep their theta where it is the best so far."""
    with torch.no_grad():
        prompts = space.back_project(table.state["theta"][list(due)])
    rows = [(at, example) for at, i in enumerate(due) for example in table.jobs[i].rows[1]]
    answers = iter(backbone.answer(prompts, rows, decoding=decoding))
    state = table.state
    for name in ("best_theta", "best_score", "best_loss", "best_step"):
        state[name] = state[name].clone()  # written into below
    for i in due:
        job, examples = table.jobs[i], table.jobs[i].rows[1]
        score, loss = outcome(job.metric, examples, list(itertools.islice(answers, len(examples))))
        at, training_loss = int(state["step"][i]), float(state["last_loss"][i])
        for which, value in (("training", training_loss), ("validation", loss)):
            if not math.isfinite(value):
                raise IptError(
                    f"the {which} loss of task {job} is {value} by step {at}: use a smaller --learning-rate or --precision fp32"
                )
        told(job, {"step": at, "score": score, "loss": loss, "training_loss": training_loss})
        if (score, -loss) > (float(state["best_score"][i]), -float(state["best_loss"][i])):
            state["best_theta"][i] = state["theta"][i]
            for name, value in (("best_score", score), ("best_loss", loss), ("best_step", at)):
                state[name][i] = value


def outcome(metric: str, rows: Sequence[Encoded], answers: Sequence[Answer]) -> tuple[float, float]:
    """Return score and mean loss per token of answers to rows."""
    score = METRICS[metric]([answer.text for answer in answers], [row.example.answers for row in rows])
    return score, sum(answer.loss for answer in answers) / len(answers)


def pace_of(backbone: Backbone, space: Space, jobs: Sequence[Job], config: TuneConfig, decoding: Decoding) -> tuple[float, float]:
    """Return seconds per row trained and per row answered, by a few steps of some jobs of which nothing is kept."""
    table = JobTable(space.dim, backbone.device)
    for job in jobs:
        table.add(job)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        step(backbone, space, table, config)
        float(table.state["last_loss"].sum())  # waits for the device
        seconds.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    validate(backbone, space, table, range(len(jobs)), decoding)
    answering = time.perf_counter() - begin
    return min(seconds[1:]) / (len(jobs) * config.batch_size), answering / sum(len(job.rows[1]) for job in jobs)
