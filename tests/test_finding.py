"""Subspace finding: what a step learns from, what is kept of it, and how it goes on."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers import collection, rows_of, summed_losses
from torch import Tensor

from intrinsic_prompt_tuning import finding
from intrinsic_prompt_tuning.backbone import Backbone, Encoded
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.finding import SubspaceConfig, SubspaceFit, _unit_vectors, fit_subspace
from intrinsic_prompt_tuning.spaces import Space, unit_of, untrained_space
from intrinsic_prompt_tuning.tasks import Example, Task

FIT = SubspaceConfig(inner=13, subspace_steps=40, warmup_steps=60, tasks_per_step=5, rows_per_task=2, subspace_learning_rate=0.1)


def fit_inputs(backbone: Backbone, tasks: dict[str, Task]) -> tuple[Tensor, Tensor, list[list[Encoded]]]:
    """Return prompts of all tasks, the initial prompt that they share, and the tasks' rows."""
    initial = backbone.initial_prompt(3, seed=0)
    prompts = initial + 0.3 * (collection(initial, tasks=7) - initial) * backbone.embedding_rms
    return prompts, initial, [rows_of(backbone, task) for task in tasks.values()]


def fit(
    backbone: Backbone, tasks: dict[str, Task], *, dim: int = 6, **changes: Any
) -> tuple[tuple[Space, dict[str, float]], list[tuple[float, float]], Tensor]:
    """Fit a subspace to prompts of all tasks; return it, (LM loss, unexplained variance) of every step, and the prompts."""
    (prompts, initial, rows), told = fit_inputs(backbone, tasks), []
    found = fit_subspace(
        backbone,
        prompts,
        initial,
        rows,
        dim,
        dataclasses.replace(FIT, **changes),
        on_step=lambda fit: told.append((float(fit.lm_loss), float(fit.unexplained))),
    )
    return found, told[1:], prompts


def unexplained(space: Space, prompts: Tensor) -> float:
    return float(space.unexplained(prompts, space.back_project(space.project(prompts))))


def test_fitting_lowers_the_unexplained_variance_and_tells_both_losses(backbone: Backbone, tasks: dict[str, Task]) -> None:
    (space, record), told, prompts = fit(backbone, tasks)
    assert len(told) == 100
    assert told[0][1] > 0.9
    assert unexplained(space, prompts) < 0.6
    assert [math.isnan(lm) for lm, _ in told] == [True] * 60 + [False] * 40
    assert record == {"lm_loss": told[-1][0], "unexplained": told[-1][1]}
    assert all(not weight.requires_grad for weight in space.weights.values())
    assert all(weight.grad is None for weight in backbone.model.parameters())


def test_the_lm_loss_can_be_switched_off(t5: Backbone, tasks: dict[str, Task]) -> None:
    (space, record), told, prompts = fit(t5, tasks, lm_loss=False)
    assert all(math.isnan(lm) for lm, _ in told)
    assert unexplained(space, prompts) < 0.6
    assert list(record) == ["unexplained"]


def test_the_reconstruction_loss_can_be_switched_off(t5: Backbone, tasks: dict[str, Task]) -> None:
    """Then there are no steps on it alone, alpha means nothing, and the LM loss still falls."""
    (space, _), told, _ = fit(t5, tasks, reconstruction_loss=False, subspace_steps=60, alpha=1.0)
    (other, _), _, _ = fit(t5, tasks, reconstruction_loss=False, subspace_steps=60, alpha=1000.0)
    assert all(torch.equal(space.weights[name], other.weights[name]) for name in space.weights)
    losses = [lm for lm, _ in told]
    assert len(losses) == 60
    assert sum(losses[-10:]) < sum(losses[:10])


def test_without_both_losses_nothing_would_be_learned_so_it_is_refused() -> None:
    with pytest.raises(IptError, match="both losses are switched off"):
        SubspaceConfig(lm_loss=False, reconstruction_loss=False)


def test_alpha_weighs_the_reconstruction_error(t5: Backbone, tasks: dict[str, Task]) -> None:
    errors = []
    for alpha in (0.01, 100.0):
        (space, _), _, prompts = fit(t5, tasks, alpha=alpha, warmup_steps=0, subspace_steps=100)
        errors.append(unexplained(space, prompts))
    assert errors[1] < errors[0]


def test_a_step_s_gradient_is_that_of_mean_task_loss_plus_alpha_times_reconstruction_error(
    t5: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step over all tasks and rows, without noise, against autograd through the whole thing at once."""
    got: list[Tensor] = []

    def record(optimizer: torch.optim.Optimizer) -> None:
        got.extend(weight.grad.clone() for weight in optimizer.param_groups[0]["params"])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adafactor, "step", record)
    with pytest.raises(KeyboardInterrupt):
        fit(t5, tasks, alpha=4.0, noise=0.0, warmup_steps=0, tasks_per_step=7, rows_per_task=99)
    monkeypatch.undo()
    prompts, initial, rows = fit_inputs(t5, tasks)
    space = untrained_space(initial, unit=unit_of(prompts, initial), dim=6, inner=13, seed=FIT.subspace_seed)
    weights = [weight.requires_grad_() for weight in space.weights.values()]
    vectors = space.project(prompts)
    loss = 4.0 * space.unexplained(prompts, space.back_project(vectors))
    for prompt, own in zip(space.back_project(vectors), rows, strict=True):
        loss = loss + summed_losses(t5, prompt, own).sum() / sum(len(row.target_ids) for row in own) / 7
    expected = torch.autograd.grad(loss, weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_more_numbers_than_prompts_have_in_common_is_free(t5: Backbone, tasks: dict[str, Task]) -> None:
    (coded, record), _, prompts = fit(t5, tasks, dim=6)
    (space, more), _, _ = fit(t5, tasks, dim=10)
    assert (coded.dim, space.dim, len(prompts)) == (6, 10, 7) and record == more
    assert space.weights.keys() - coded.weights.keys() == {"free.weight"} and space.weights["free.weight"].shape == (48, 4)
    assert all(torch.equal(weight, space.weights[name]) for name, weight in coded.weights.items())


def test_a_dim_larger_than_the_prompt_is_refused(t5: Backbone, tasks: dict[str, Task]) -> None:
    with pytest.raises(IptError, match="--dim 49 is larger than the prompt itself, 48 numbers: use a smaller --dim"):
        fit(t5, tasks, dim=49)


def test_a_loss_that_is_not_finite_names_dim_and_step(t5: Backbone, tasks: dict[str, Task]) -> None:
    with pytest.raises(IptError, match=r"dim 6: the loss is not finite at step 1: use a smaller"):
        fit(t5, tasks, alpha=1e39)


def test_a_fit_holds_its_subspace_once_and_a_gradient_only_during_a_step(
    t5: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the optimiser remembers beside it is small."""
    held, between, step = list[float](), list[float](), torch.optim.Adafactor.step

    def copies(optimizer: torch.optim.Optimizer) -> float:
        weights = optimizer.param_groups[0]["params"]
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        tensors = [*weights, *(weight.grad for weight in weights if weight.grad is not None), *states]
        return sum(t.numel() for t in tensors) / sum(w.numel() for w in weights)

    def counting(optimizer: torch.optim.Adafactor) -> None:
        step(optimizer)
        held.append(copies(optimizer))

    monkeypatch.setattr(torch.optim.Adafactor, "step", counting)
    initial = t5.initial_prompt(50, seed=0)
    prompts = initial + torch.randn(7, *initial.shape, generator=torch.Generator().manual_seed(0))
    rows = [rows_of(t5, task) for task in tasks.values()]
    config = dataclasses.replace(FIT, inner=100, subspace_steps=2, warmup_steps=2)
    fit_subspace(t5, prompts, initial, rows, 100, config, on_step=lambda fit: between.append(copies(fit.optimizer)))
    assert len(between) == 5 and max(between) < 1.1
    assert len(held) == 4 and min(held) > 1.9
    assert max(held) < 2.1


def test_prompts_that_are_all_where_they_began_are_refused(t5: Backbone, tasks: dict[str, Task]) -> None:
    _, initial, rows = fit_inputs(t5, tasks)
    with pytest.raises(IptError, match="the soft prompts are all where they began: tune them with more steps"):
        fit_subspace(t5, initial.expand(7, -1, -1), initial, rows, 6, FIT)


def test_rescaling_the_code_changes_no_reconstruction(t5: Backbone) -> None:
    initial = t5.initial_prompt(3, seed=0)
    space, prompts = untrained_space(initial, unit=2.5, dim=6, inner=13, seed=1), collection(initial)
    scaled = _unit_vectors(space, prompts)
    assert float(space.project(prompts).pow(2).mean().sqrt()) != pytest.approx(1, rel=0.05)
    assert float(scaled.project(prompts).pow(2).mean().sqrt()) == pytest.approx(1, rel=1e-5)
    before, after = (s.back_project(s.project(prompts)) for s in (space, scaled))
    torch.testing.assert_close(before, after)


def test_the_fitted_vectors_have_a_root_mean_square_of_one(t5: Backbone, tasks: dict[str, Task]) -> None:
    (space, _), _, prompts = fit(t5, tasks)
    assert float(space.project(prompts).pow(2).mean().sqrt()) == pytest.approx(1, rel=1e-4)


def test_fitting_depends_on_the_seed_alone(t5: Backbone, tasks: dict[str, Task]) -> None:
    one, same, other = (fit(t5, tasks, warmup_steps=5, subspace_steps=5, subspace_seed=seed)[0][0] for seed in (1, 1, 2))
    assert all(torch.equal(one.weights[name], same.weights[name]) for name in one.weights)
    assert not torch.equal(one.weights["out.bias"], other.weights["out.bias"])


# --- Interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [30, 70, 80])
def test_a_fit_that_was_stopped_goes_on_from_its_state_to_the_same_subspace(
    t5: Backbone, tasks: dict[str, Task], at: int
) -> None:
    (prompts, initial, rows), stopped = fit_inputs(t5, tasks), dict[str, Tensor]()
    config = dataclasses.replace(FIT, subspace_steps=20)

    def stop(fit: SubspaceFit) -> None:
        if fit.step == at:
            stopped.update({name: tensor.clone() for name, tensor in fit.state().items()})
            raise KeyboardInterrupt

    whole = fit_subspace(t5, prompts, initial, rows, 6, config)
    with pytest.raises(KeyboardInterrupt):
        fit_subspace(t5, prompts, initial, rows, 6, config, on_step=stop)
    assert float(stopped["step"]) == at
    resumed = fit_subspace(t5, prompts, initial, rows, 6, config, unfinished=stopped)
    assert all(torch.equal(whole[0].weights[name], resumed[0].weights[name]) for name in whole[0].weights)
    assert whole[1] == resumed[1]


def test_there_is_no_state_before_the_first_step_and_in_the_middle_of_an_update(
    t5: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped there, weights and optimiser would be of the next step, the count of the last."""
    prompts, initial, rows = fit_inputs(t5, tasks)
    seen, told, update, updates = list[SubspaceFit](), list[dict[str, Tensor]](), torch.optim.Adafactor.step, 0

    def keep(fit: SubspaceFit) -> None:
        seen[:] = [fit]
        told.append(fit.state())

    def interrupted(optimizer: torch.optim.Adafactor) -> None:
        nonlocal updates
        updates += 1
        update(optimizer)
        if updates == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adafactor, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_subspace(t5, prompts, initial, rows, 6, FIT, on_step=keep)
    assert [float(state["step"]) if state else 0 for state in told] == [0, 1, 2]
    assert seen[0].state() == {}


def test_an_interruption_between_the_updates_finds_the_states_of_the_last(
    t5: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompts, initial, rows), seen = fit_inputs(t5, tasks), list[SubspaceFit]()
    config = dataclasses.replace(FIT, subspace_steps=5, warmup_steps=5)
    whole = fit_subspace(t5, prompts, initial, rows, 6, config)
    project, calls = Space.project, 0

    def interrupted(space: Space, soft_prompts: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return project(space, soft_prompts)

    monkeypatch.setattr(Space, "project", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_subspace(t5, prompts, initial, rows, 6, config, on_step=seen.append)
    monkeypatch.undo()
    state = seen[-1].state()
    assert float(state["step"]) == 7
    resumed = fit_subspace(t5, prompts, initial, rows, 6, config, unfinished=state)
    assert all(torch.equal(whole[0].weights[name], resumed[0].weights[name]) for name in whole[0].weights)


def test_noise_has_the_standard_deviation_that_was_asked_for(
    t5: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, back = list[Tensor](), Space.back_project

    def spied(space: Space, theta: Tensor) -> Tensor:
        seen.append(theta.detach().clone())
        return back(space, theta)

    monkeypatch.setattr(Space, "back_project", spied)
    for noise in (0.0, 0.5):
        fit(t5, tasks, noise=noise, warmup_steps=1, subspace_steps=1)
    plain, noisy = seen[0], seen[2]  # the first step of each fit: the same weights and prompts
    assert float((noisy - plain).std()) == pytest.approx(0.5, rel=0.3)


def test_every_step_draws_tasks_and_rows_anew(t5: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, losses = list[list[Example]](), finding.prompt_losses

    def spied(backbone: Backbone, prompts: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        drawn.append([row.example for _, row in batch])
        return losses(backbone, prompts, batch)

    monkeypatch.setattr(finding, "prompt_losses", spied)
    fit(t5, tasks, warmup_steps=0, subspace_steps=30, tasks_per_step=3, rows_per_task=2)
    assert {len(step) for step in drawn} == {6} and len({tuple(step) for step in drawn}) > 25
    known = {row.example for task in tasks.values() for row in rows_of(t5, task)}
    assert len({row for step in drawn for row in step}) > 0.9 * len(known)
