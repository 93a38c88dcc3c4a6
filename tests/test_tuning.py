"""The engine: jobs side by side are jobs alone, whatever the slots, the memory and the interruptions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Questions, like, make_job, make_jobs, make_space, random_prompts, rows_of
from torch import Tensor

from intrinsic_prompt_tuning import tuning
from intrinsic_prompt_tuning.backbone import Backbone, load_backbone
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.metrics import accuracy
from intrinsic_prompt_tuning.passes import FEW, Budget
from intrinsic_prompt_tuning.spaces import Space, fair_space, freed, low_rank_space, untrained_space
from intrinsic_prompt_tuning.tasks import TASKS_FILE, Example, Task, load_tasks
from intrinsic_prompt_tuning.tuning import Job, JobTable, TuneConfig, Tuned, prompt_losses, tune

CONFIG = TuneConfig(steps=12, batch_size=3, evaluations=4, patience=1, clip=1.0)


def tuned(results: Iterable[Tuned]) -> dict[str, Tuned]:
    listed = list(results)
    by_name = {str(result.job): result for result in listed}
    assert len(by_name) == len(listed)
    return by_name


def assert_same(a: dict[str, Tuned], b: dict[str, Tuned], *, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name].theta, b[name].theta, rtol=tolerance, atol=tolerance, msg=name)
        torch.testing.assert_close(a[name].soft_prompt, b[name].soft_prompt, rtol=tolerance, atol=10 * tolerance)
        assert a[name].record == pytest.approx(b[name].record, rel=max(tolerance, 1e-9))


# --- Slots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [16, 31])
def test_without_a_number_of_slots_jobs_fill_four_passes_and_at_least_16_are_tuned(
    t5: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    space, config, counts = make_space(t5, "subspace"), TuneConfig(steps=1, batch_size=2), list[int]()
    lengths = [len(row) for row in rows_of(t5, tasks["mood-good"])]
    tokens = 2 * (3 + sum(lengths) / len(lengths)) * (at_once - 0.5 if at_once > 16 else 5) / 4
    jobs = (make_job(t5, tasks["mood-good"], torch.zeros(space.dim), rate=n) for n in range(1, 40))
    monkeypatch.setattr(tuning, "validate", lambda backbone, space, table, *others: counts.append(len(table.jobs)))
    list(tune(like(t5, budget=Budget(round(tokens))), space, jobs, config))
    assert counts[0] == at_once


def test_of_a_queue_of_10_000_jobs_none_is_made_before_its_turn(t5: Backbone, tasks: dict[str, Task]) -> None:
    space, config, asked = make_space(t5, "subspace"), TuneConfig(steps=1, batch_size=2), list[int]()

    def job(n: int) -> Job:
        asked.append(n)
        return make_job(t5, tasks["mood-good"], torch.zeros(space.dim))

    first = next(tune(t5, space, map(job, range(10_000)), config, slots=16))
    assert first.record["steps"] == 1
    assert asked == list(range(16))


@pytest.mark.parametrize("kind", ["prompt", "subspace"])
def test_a_job_alone_gives_what_it_gives_among_others(backbone: Backbone, tasks: dict[str, Task], kind: str) -> None:
    space = make_space(backbone, kind)
    jobs = make_jobs(backbone, space, tasks)
    together = tuned(tune(backbone, space, jobs, CONFIG, slots=7))
    alone = tuned(result for job in jobs for result in tune(backbone, space, [job], CONFIG, slots=1))
    assert_same(together, alone, tolerance=2e-4)
    moved = [float((result.theta - result.job.theta).abs().max()) for result in alone.values()]
    assert max(moved) > 0.1


def few_is_more_here() -> bool:
    """Tell whether a matrix product of this CPU goes the way of small ones for more rows than `FEW`."""
    x, weight = torch.randn(64, 512), torch.randn(128, 512)
    whole = x @ weight.T
    return any(not (x[:rows] @ weight.T).equal(whole[:rows]) for rows in range(FEW, 64))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the kernels of other CPUs round in ways not measured"
)
@pytest.mark.skipif(few_is_more_here(), reason="this CPU rounds products of few rows in another way, and of more rows than FEW")
@pytest.mark.parametrize(
    ("kind", "dim"), [("prompt", 1024), ("random", 10), ("random", 250), ("low-rank", 264), ("free", 250), ("free", 104)]
)
def test_on_the_testbed_neighbours_and_pass_sizes_change_no_bit(kind: str, dim: int) -> None:
    backbone, tasks = load_backbone("testbed"), load_tasks(TASKS_FILE)
    space = Space(backbone.initial_prompt(8, seed=0), backbone.embedding_rms)
    if kind == "random":
        space = fair_space(untrained_space(space.initial_prompt, unit=0.5 * space.unit, dim=dim, inner=768, seed=0), seed=0)
    elif kind == "free":
        space = untrained_space(space.initial_prompt, unit=0.5 * space.unit, dim=99, inner=768, seed=0)
        space = freed(fair_space(space, seed=0), dim, reach=0.5, seed=0)
    elif kind == "low-rank":
        space = low_rank_space(space.initial_prompt, unit=space.unit, dim=dim, seed=0)
    # Inputs of 12 to 25 tokens, answers of 2 to 3, one word of several.
    names = (
        "verb-word-then-verb-gerund",
        "city-country-then-day-next-choice",
        "object-furniture",
        "number-previous",
        "mood-positive",
    )
    starts = 0.02 * torch.randn(len(names), space.dim, generator=torch.Generator().manual_seed(0))
    rows = {
        name: tuple(rows_of(backbone, tasks[name], part=part, length=8) for part in ("train", "validation")) for name in names
    }
    jobs = [make_job(backbone, tasks[name], start, rate=0.3, rows=rows[name]) for name, start in zip(names, starts, strict=True)]
    config = TuneConfig(steps=12, batch_size=3, evaluations=2, patience=0)

    def thetas(backbone: Backbone, slots: int) -> list[Tensor]:
        found = {result.job: result.theta for result in tune(backbone, space, jobs, config, slots=slots)}
        return [found[job] for job in jobs]

    together = thetas(backbone, 16)
    small = tuple(Budget(tokens, by_block=True) for tokens in (60, 100))
    others = {
        "pairs": thetas(backbone, 2),
        "alone": thetas(backbone, 1),
        "small": thetas(like(backbone, budget=small[0], answer_budget=small[1]), 16),
    }
    assert [name for name, own in others.items() if not all(map(torch.equal, together, own))] == []
    assert all((theta - start).abs().max() > 0.01 for theta, start in zip(together, starts, strict=True))


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_slots_refill_so_that_every_job_is_done_once_with_the_same_result(
    t5: Backbone, tasks: dict[str, Task], slots: int
) -> None:
    space = make_space(t5, "prompt")
    jobs, full = make_jobs(t5, space, tasks), []
    results = tuned(tune(t5, space, jobs, CONFIG, slots=slots, on_step=lambda table: full.append(list(table.jobs))))
    assert {result.job for result in results.values()} == set(jobs)
    assert max(map(len, full)) <= slots
    assert_same(results, tuned(tune(t5, space, jobs, CONFIG, slots=7)), tolerance=2e-4)
    assert len({result.record["steps"] for result in results.values()}) > 1  # jobs end at different steps, so slots mix


def test_jobs_begin_in_their_order_and_as_soon_as_a_slot_is_free(t5: Backbone, tasks: dict[str, Task]) -> None:
    space, config = make_space(t5, "prompt"), dataclasses.replace(CONFIG, steps=4, patience=0)
    begun: list[str] = []

    def spied(job: Job) -> Job:
        begun.append(job.task)
        return job

    results = tune(t5, space, map(spied, make_jobs(t5, space, tasks)), config, slots=3)
    next(results)
    assert begun == list(tasks)[:3]
    list(results)
    assert begun == list(tasks)


def test_jobs_that_look_alike_are_told_apart(t5: Backbone, tasks: dict[str, Task]) -> None:
    space = make_space(t5, "subspace")
    one, other = (make_job(t5, tasks["mood-good"], torch.full((space.dim,), start)) for start in (0.0, 0.5))
    assert str(one) == str(other) == "mood-good (data seed 100, learning rate 0.1)"
    results = {result.job: result for result in tune(t5, space, [one, other], CONFIG, slots=2)}
    assert results.keys() == {one, other} and one != other
    assert not torch.equal(results[one].theta, results[other].theta)


# --- Losses and gradients ------------------------------------------------------------------------


def test_the_backbone_stays_bitwise_the_same_and_gets_no_gradient(backbone: Backbone, tasks: dict[str, Task]) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    for kind in ("prompt", "subspace"):
        space = make_space(backbone, kind)
        frozen = [space.initial_prompt.clone(), *(w.clone() for w in space.weights.values())]
        list(tune(backbone, space, make_jobs(backbone, space, tasks)[:2], CONFIG, slots=2))
        after = [space.initial_prompt, *space.weights.values()]
        assert all(map(torch.equal, frozen, after))
        assert all(tensor.grad is None and not tensor.requires_grad for tensor in after)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.model.state_dict().items())
    assert all(weight.grad is None and not weight.requires_grad for weight in backbone.model.parameters())
    assert not backbone.model.training


def test_a_job_s_own_rows_alone_give_it_a_gradient(t5: Backbone, tasks: dict[str, Task]) -> None:
    prompts, rows = random_prompts(t5, 3), rows_of(t5, tasks["count-next"])
    losses, gradient = prompt_losses(t5, prompts.clone(), [(0, rows[0]), (2, rows[1]), (2, rows[2])])
    assert losses[1] == 0
    assert not gradient[1].any()
    assert gradient[0].any()
    _, alone = prompt_losses(t5, prompts[2:].clone(), [(0, rows[1]), (0, rows[2])])
    torch.testing.assert_close(alone[0], gradient[2])


def test_the_loss_of_a_prompt_is_the_mean_over_the_tokens_of_all_its_rows(t5: Backbone) -> None:
    (prompt,) = random_prompts(t5, 1)
    examples = [Example("the fox sees", ("one",)), Example("the owl", ("two three four five six",))]
    rows = t5.encode(examples, prompt_length=3)
    losses, _ = prompt_losses(t5, prompt[None].clone(), [(0, row) for row in rows])
    alone = [answer.loss * len(row.target_ids) for row in rows for answer in t5.answer(prompt[None], [(0, row)])]
    assert float(losses) == pytest.approx(sum(alone) / (2 + 6), rel=1e-5)


def test_every_row_of_adam_equals_torch_s_adam_with_its_own_clipping_schedule_and_step_count() -> None:
    config = TuneConfig(steps=20, warmup=0.25, clip=1.5)
    rates, begins = torch.tensor([0.1, 0.3, 0.02]), (0, 4, 7)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 9, generator=generator)
    names = {"theta": start.clone(), "mean": torch.zeros(3, 9), "square": torch.zeros(3, 9)}
    state: dict[str, Tensor] = names | {"step": torch.zeros(3, dtype=torch.float64)}
    parameters = [torch.nn.Parameter(row.clone()) for row in start]
    optimizers = [torch.optim.Adam([p], lr=1.0) for p in parameters]
    clipped = 0
    for taken in range(20):
        gradient = torch.randn(3, 9, generator=generator) * (0.2 if taken % 2 else 2.0)
        active = [i for i in range(3) if taken >= begins[i]]
        part = {name: table[active] for name, table in state.items()}
        tuning.adam(part, gradient[active], rates[active], config)
        for name, table in part.items():
            state[name][active] = table
        for i in active:
            own = taken - begins[i] + 1
            parameters[i].grad = gradient[i].clone()
            clipped += int(torch.nn.utils.clip_grad_norm_([parameters[i]], 1.5) > 1.5)
            optimizers[i].param_groups[0]["lr"] = float(rates[i]) * min(own / 5, 1 - (own - 1) / 20)
            optimizers[i].step()
    expected = torch.stack([p.detach() for p in parameters])
    torch.testing.assert_close(state["theta"], expected, rtol=1e-4, atol=1e-5)
    assert state["step"].tolist() == [20, 16, 13]
    assert 0 < clipped < 49
    assert (state["theta"] - start).abs().min() > 1e-4


def table_of(backbone: Backbone, space: Space, tasks: dict[str, Task]) -> JobTable:
    table = JobTable(space.dim, backbone.device)
    for task in tasks.values():
        table.add(make_job(backbone, task, torch.zeros(space.dim)))
    return table


def test_a_step_looks_at_no_number_and_at_no_mask_of_the_device(backbone: Backbone, tasks: dict[str, Task]) -> None:
    space, config = make_space(backbone, "subspace"), TuneConfig(steps=3, batch_size=3)
    table = table_of(backbone, space, tasks)
    with Questions() as questions:
        tuning.step(backbone, space, table, config)
        assert not questions.asked
        float(table.state["last_loss"].sum())
    assert questions.asked == ["_local_scalar_dense"]


def test_running_out_of_memory_halves_the_rows_at_once_and_changes_no_result(t5_folder: Path, tasks: dict[str, Task]) -> None:
    plain, tight = (load_backbone(str(t5_folder), device="cpu") for _ in range(2))
    refused = 0

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal refused
        if len(kwargs["inputs_embeds"]) > 4:
            refused += 1
            raise torch.OutOfMemoryError

    tight.model.get_encoder().register_forward_pre_hook(refuse, with_kwargs=True)
    space = make_space(plain, "prompt")
    results = [tuned(tune(b, space, make_jobs(b, space, tasks), CONFIG, slots=4)) for b in (plain, tight)]
    assert_same(*results, tolerance=2e-4)
    assert refused
    assert tight.budget.tokens < plain.budget.tokens


# --- Validation and ends -------------------------------------------------------------------------


def test_the_best_checkpoint_is_kept_and_is_a_copy(t5: Backbone, tasks: dict[str, Task]) -> None:
    """The jobs train on rows of a task and are validated on another's, so they get worse at some point."""
    space, config = make_space(t5, "prompt"), TuneConfig(steps=12, batch_size=3, evaluations=12, patience=0)
    jobs = [
        make_job(t5, tasks[name], torch.zeros(space.dim), rate=3.0, metric="ACC")
        for name in ("animal-class", "mood-opposite-choice")
    ]
    wrong = rows_of(t5, tasks["even-or-good"])
    jobs = [dataclasses.replace(job, rows=(wrong, job.rows[1])) for job in jobs]
    seen: dict[int, dict[str, Tensor]] = {}

    def on_step(table: JobTable) -> None:
        if table.jobs:
            seen[int(table.state["step"][0])] = {name: t.clone() for name, t in table.state.items()}

    results = list(tune(t5, space, jobs, config, slots=2, on_step=on_step))
    for i, result in enumerate(results):
        best = int(result.record["best_step"])
        assert best < 12, "the case shows nothing when the last step is the best"
        assert torch.equal(result.theta, seen[best]["theta"][i])
        assert torch.equal(result.soft_prompt, space.back_project(result.theta[None])[0])
        rows = rows_of(t5, tasks[result.job.task], part="validation")
        answers = t5.answer(result.soft_prompt[None], [(0, row) for row in rows])
        score = accuracy([a.text for a in answers], [row.example.answers for row in rows])
        assert result.record["validation"] == pytest.approx(score)
        assert result.record["validation_loss"] == pytest.approx(sum(a.loss for a in answers) / len(rows), rel=1e-4)
        scores = [(float(s["best_score"][i]), -float(s["best_loss"][i])) for _, s in sorted(seen.items())]
        assert scores == sorted(scores)


def test_a_job_ends_when_patience_is_over_and_never_without_patience(t5: Backbone, tasks: dict[str, Task]) -> None:
    space = make_space(t5, "prompt")
    for patience, steps in ((2, 9), (3, 12), (0, 30)):
        config = TuneConfig(steps=30, batch_size=3, evaluations=10, patience=patience)
        # It moves too little for another score.
        (result,) = tune(t5, space, [make_job(t5, tasks["count-next"], torch.zeros(space.dim), rate=1e-9)], config, slots=1)
        best = result.record["best_step"]
        assert result.record["steps"] == min(30, best + 3 * patience if patience else steps)


def test_a_job_ends_when_all_validation_rows_are_right_and_cost_next_to_nothing(t5: Backbone, tasks: dict[str, Task]) -> None:
    space, task = make_space(t5, "prompt"), tasks["count-next"]
    rows = rows_of(t5, task, part="validation")[:3]
    answers = t5.answer(space.initial_prompt[None], [(0, row) for row in rows])
    examples = [dataclasses.replace(row.example, answers=(a.text,)) for row, a in zip(rows, answers, strict=True)]
    right = [dataclasses.replace(row, example=example) for row, example in zip(rows, examples, strict=True)]
    cases = ((right, 99.0, 3, 4), (right, 1e-9, 3, 12), (rows, 99.0, 3, 12), (right, 99.0, 0, 12))
    for validation, solved, patience, steps in cases:
        config = TuneConfig(steps=12, batch_size=3, evaluations=3, patience=patience, solved=solved)
        job = make_job(t5, task, torch.zeros(space.dim), rate=1e-9)  # the answers stay as they are
        job = dataclasses.replace(job, rows=(job.rows[0], validation))
        (result,) = tune(t5, space, [job], config)
        assert (result.record["steps"], result.record["validation"] == 1) == (steps, validation is right)


def test_steps_that_do_not_divide_still_end_with_an_evaluation(t5: Backbone, tasks: dict[str, Task]) -> None:
    space = make_space(t5, "prompt")
    for evaluations, expected in ((3, [3, 6, 7]), (4, [2, 4, 6, 7]), (5, [2, 4, 6, 7]), (100, [1, 2, 3, 4, 5, 6, 7])):
        config, told = TuneConfig(steps=7, batch_size=2, evaluations=evaluations, patience=0), list[dict[str, float]]()
        job = make_job(t5, tasks["animal-class"], torch.zeros(space.dim))
        (result,) = tune(t5, space, [job], config, slots=1, on_validation=partial(lambda told, _, own: told.append(own), told))
        assert result.record["steps"] == 7
        assert [figures["step"] for figures in told] == expected


def test_a_job_answers_its_validation_rows_as_it_is_told_to(t5: Backbone, tasks: dict[str, Task]) -> None:
    """Free generations of an untrained backbone are never one of two words, the most likely of the two options always is."""
    space, config = make_space(t5, "prompt"), TuneConfig(steps=1, batch_size=2)
    job = make_job(t5, tasks["mood-good"], torch.zeros(space.dim), rate=1e-6)
    scores = {d: next(iter(tune(t5, space, [job], config, slots=1, decoding=d))).record for d in ("options", "generate")}
    assert scores["options"]["validation"] > scores["generate"]["validation"] == 0


def test_a_loss_that_is_not_finite_names_task_step_and_learning_rate(t5: Backbone, tasks: dict[str, Task]) -> None:
    space = make_space(t5, "prompt")
    good = make_job(t5, tasks["mood-good"], torch.zeros(space.dim), rate=0.125)
    bad = make_job(t5, tasks["count-next"], torch.full((space.dim,), math.nan), rate=0.25)
    with pytest.raises(
        IptError, match=r"task count-next \(data seed 100, learning rate 0.25\) is nan by step 3: .*--learning-rate"
    ):
        list(tune(t5, space, [good, bad], CONFIG, slots=2))


def test_a_prompt_that_only_the_last_step_broke_is_an_error_too(bart: Backbone, tasks: dict[str, Task]) -> None:
    """The loss of a step is that before its update; what the last update makes is first seen by the validation."""
    space, config = make_space(bart, "prompt"), TuneConfig(steps=1, batch_size=3, warmup=0)
    job = make_job(bart, tasks["mood-good"], torch.zeros(space.dim), rate=1e39)
    with pytest.raises(IptError, match=r"mood-good .*1e\+39"):
        list(tune(bart, space, [job], config, slots=1))


def test_tuning_lowers_the_loss_of_every_job(backbone: Backbone, tasks: dict[str, Task]) -> None:
    space, config = make_space(backbone, "prompt"), TuneConfig(steps=60, batch_size=8, patience=0)
    jobs = [make_job(backbone, task, torch.zeros(space.dim), rate=0.1) for task in tasks.values()]
    for result in tune(backbone, space, jobs, config, slots=7):
        assert result.record["last_loss"] < result.record["first_loss"], str(result.job)


def test_the_first_loss_is_a_mean_over_the_steps_that_were_taken(bart: Backbone, tasks: dict[str, Task]) -> None:
    """A job that hardly moves, and ends after two steps of which its first loss would be a mean over ten."""
    space = make_space(bart, "prompt")
    job = make_job(bart, tasks["mood-good"], torch.zeros(space.dim), rate=1e-9)
    (result,) = tune(bart, space, [job], TuneConfig(steps=20, batch_size=8, evaluations=10, patience=1))
    assert result.record["steps"] < 10
    assert result.record["first_loss"] == pytest.approx(result.record["last_loss"], rel=0.2)


# --- Interruptions -------------------------------------------------------------------------------


def test_a_snapshot_taken_before_a_step_is_unchanged_after_it(t5: Backbone, tasks: dict[str, Task]) -> None:
    space = make_space(t5, "subspace")
    table = table_of(t5, space, tasks)
    assert not table.snapshot()(), "a job without a step has nothing to go on from"
    tuning.step(t5, space, table, CONFIG)
    tuning.validate(t5, space, table, [0, 3], "options")
    jobs, snapshot = list(table.jobs), table.snapshot()
    before = {job: {name: t.detach().clone() for name, t in state.items()} for job, state in snapshot().items()}
    assert list(before) == jobs
    for _ in range(3):
        tuning.step(t5, space, table, CONFIG)
        tuning.validate(t5, space, table, range(len(table.jobs)), "options")
        table.retain(range(1, len(table.jobs)))
    table.add(make_job(t5, tasks["mood-good"], torch.ones(space.dim)))
    after = snapshot()
    assert list(after) == jobs
    for job in jobs:
        assert after[job].keys() == before[job].keys() == table.state.keys()
        assert all(torch.equal(after[job][name], before[job][name]) for name in before[job])
    assert not torch.equal(table.state["theta"][0], before[table.jobs[0]]["theta"]), "without a change the case shows nothing"


@pytest.mark.parametrize("kind", ["prompt", "subspace"])
def test_going_on_after_an_interruption_gives_the_theta_of_an_uninterrupted_run(
    backbone: Backbone, tasks: dict[str, Task], kind: str
) -> None:
    space = make_space(backbone, kind)
    jobs = make_jobs(backbone, space, tasks)
    whole, steps = tuned(tune(backbone, space, jobs, CONFIG, slots=2)), 0

    def interrupt(table: JobTable) -> None:
        nonlocal states, steps
        states, steps = table.snapshot()(), steps + 1
        if steps == 14:
            raise KeyboardInterrupt

    states: dict[Job, dict[str, Tensor]] = {}
    results, finished = tune(backbone, space, jobs, CONFIG, slots=2, on_step=interrupt), list[Tuned]()
    with pytest.raises(KeyboardInterrupt):
        finished.extend(iter(lambda: next(results), None))
    rest = [job for job in jobs if job not in {result.job for result in finished}]
    assert finished
    assert len(rest) > len(states) > 0
    again = [dataclasses.replace(job, unfinished=states.get(job, {})) for job in rest]
    both = tuned([*finished, *tune(backbone, space, again, CONFIG, slots=2)])
    assert all(torch.equal(both[name].theta, whole[name].theta) for name in whole)
    assert {name: result.record for name, result in both.items()} == {name: result.record for name, result in whole.items()}


@pytest.mark.parametrize("where", ["adam", "prompt_losses", "_record_losses", "validate"])
def test_an_interruption_in_the_middle_of_a_step_goes_on_from_the_last_one(
    t5: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    space, part, calls = make_space(t5, "subspace"), getattr(tuning, where), 0
    jobs = make_jobs(t5, space, tasks)[:2]
    config = dataclasses.replace(CONFIG, patience=0)
    whole = tuned(tune(t5, space, jobs, config))
    latest: Callable[[], dict[Job, dict[str, Tensor]]] = dict

    def keep(table: JobTable) -> None:
        nonlocal latest
        latest = table.snapshot()

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        result, calls = part(*arguments), calls + 1
        if calls == (2 if where == "validate" else 8):
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(tuning, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(tune(t5, space, jobs, config, on_step=keep))
    monkeypatch.undo()
    states = latest()
    assert [int(state["step"]) for state in states.values()] == [5 if where == "validate" else 7] * 2
    again = [dataclasses.replace(job, unfinished=states[job]) for job in jobs]
    both = tuned(tune(t5, space, again, config))
    assert all(torch.equal(both[name].theta, whole[name].theta) for name in whole)
    assert {name: result.record for name, result in both.items()} == {name: result.record for name, result in whole.items()}


# --- Pace ----------------------------------------------------------------------------------------


def test_the_pace_is_measured_by_steps_that_change_nothing(t5: Backbone, tasks: dict[str, Task]) -> None:
    space = make_space(t5, "prompt")
    jobs = make_jobs(t5, space, tasks)[:3]
    before = [job.theta.clone() for job in jobs]
    trained, answered = tuning.pace_of(t5, space, jobs, TuneConfig(steps=5, batch_size=4), "options")
    assert 0 < trained < 5
    assert 0 < answered < 5
    assert all(map(torch.equal, before, [job.theta for job in jobs]))
    assert all(weight.grad is None for weight in t5.model.parameters())


def test_the_pace_is_a_step_s_time_over_its_rows_and_a_validation_s_over_its_rows(
    t5: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, now = make_space(t5, "subspace"), 0.0

    def takes(seconds: float) -> Callable[..., None]:
        def pretend(*arguments: Any) -> None:
            nonlocal now
            now += seconds

        return pretend

    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now)
    monkeypatch.setattr(tuning, "step", takes(6.0))
    monkeypatch.setattr(tuning, "validate", takes(16.0))
    jobs = make_jobs(t5, space, tasks)[2:4]  # of 8 validation rows each
    assert tuning.pace_of(t5, space, jobs, TuneConfig(batch_size=3), "options") == (1.0, 1.0)


def test_another_try_and_another_seed_take_the_rows_in_another_order(t5: Backbone, tasks: dict[str, Task]) -> None:
    """A prompt's second try starts where its first did, so with the rows in one order it would be the first once more."""
    space, config = make_space(t5, "prompt"), TuneConfig(steps=3, batch_size=2, evaluations=1)
    first = make_job(t5, tasks["count-next"], torch.zeros(space.dim))
    jobs = [first, dataclasses.replace(first, number=1), dataclasses.replace(first, seed=1)]
    thetas = [result.theta for result in tune(t5, space, jobs, config, slots=3)]
    assert len(torch.stack(thetas).unique(dim=0)) == 3
