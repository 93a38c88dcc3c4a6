"""Multi-task subspace finding, MSF (the paper's section 3.2).

An auto-encoder of the collected soft prompts, learned on reconstruction and on the tasks' loss.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from intrinsic_prompt_tuning.backbone import Backbone, Encoded
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.lazy import Tensor, torch
from intrinsic_prompt_tuning.passes import to_device
from intrinsic_prompt_tuning.settings import TUNING
from intrinsic_prompt_tuning.spaces import Space, coded_numbers, freed, unit_of, untrained_space
from intrinsic_prompt_tuning.tuning import prompt_losses


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig:
    """How a subspace is found."""

    subspace_steps: Annotated[int, TUNING("Updates of the subspace on both losses.", least=1)] = 2000
    rows_per_task: int = 4
    """Training rows of each drawn task."""
    alpha: Annotated[float, TUNING("Weight of the reconstruction error beside the tasks' loss.", least=0)] = 10.0
    """The error is the share of variance unexplained, the loss a mean per token."""
    lm_loss: Annotated[bool, TUNING("Learn from the tasks' loss.")] = True
    reconstruction_loss: Annotated[bool, TUNING("Learn to reconstruct the prompts.")] = True
    noise: Annotated[float, TUNING("Standard deviation of noise on intrinsic vectors while learning.", least=0)] = 0.2
    """Makes the subspace smooth between the tasks. The vectors' own standard deviation grows to about two."""
    free: Annotated[float, TUNING("How far numbers beyond what prompts span move one; 0: none do.", least=0)] = 0.5
    """In units of the prompts (see `freed`); 0.5 and 1 score alike on validation rows of the testbed."""
    subspace_seed: Annotated[int, TUNING("Of its first weights, and of what it learns from.", least=0, most=2**32 - 1)] = 0
    inner: int = 768
    """Width of the layer behind the intrinsic vector (the paper's d')."""
    warmup_steps: int = 200
    """Updates before the others, on the reconstruction error alone; they do not touch the backbone."""
    subspace_learning_rate: float = 0.03
    """Of Adafactor, relative to a weight's root mean square; warmed up and decayed linearly, at most 1 / sqrt(step)."""
    tasks_per_step: int = 16
    """Tasks drawn uniformly for a step of the LM loss: all tasks weigh the same."""

    @property
    def steps_before(self) -> int:
        """The updates on the reconstruction error alone."""
        return self.warmup_steps if self.reconstruction_loss else 0

    def __post_init__(self) -> None:
        """Refuse what cannot learn anything."""
        if not (self.lm_loss or self.reconstruction_loss):
            raise IptError("both losses are switched off, nothing is learned: leave --no-lm-loss or --no-reconstruction-loss out")


class SubspaceFit:
    """A subspace that is being learned.

    Adafactor keeps next to nothing beside the weights, where Adam keeps two more copies; it learned better, too.
    """

    def __init__(self, space: Space, config: SubspaceConfig, dim: int) -> None:
        """Begin with an untrained subspace; `dim` is what it will have with its free numbers."""
        self.space, self.config, self.dim = space, config, dim
        self.step, self.total = 0, config.steps_before + config.subspace_steps
        self.optimizer = torch.optim.Adafactor([weight.requires_grad_() for weight in space.weights.values()])
        self.lm_loss = torch.tensor(math.nan)
        """Mean LM loss per target token at the last step, on the backbone's device; nan where it is off."""
        self.unexplained = torch.tensor(math.nan)
        """Reconstruction error at the last step, likewise."""
        self._updating = False

    def state(self) -> dict[str, Tensor]:
        """Return step, losses and by `layer name` weights and optimiser states: all that a checkpoint needs.

        Nothing in the middle of an update, where an interruption may ask.
        """
        if self._updating or not self.step:
            return {}
        state = {"step": torch.tensor(float(self.step)), "lm_loss": self.lm_loss, "unexplained": self.unexplained}
        for layer, weight in self.space.weights.items():
            own = {"weight": weight.detach()} | self.optimizer.state[weight]
            state |= {f"{layer} {name}": tensor for name, tensor in own.items() if name != "step"}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.step, self.lm_loss, self.unexplained = int(state["step"]), state["lm_loss"], state["unexplained"]
        for layer, weight in self.space.weights.items():
            own = {key.partition(" ")[2]: t.to(weight) for key, t in state.items() if key.partition(" ")[0] == layer}
            weight.data.copy_(own.pop("weight"))
            self.optimizer.state[weight] = own | {"step": torch.tensor(float(self.step))}

    def update(self, loss: Tensor) -> None:
        """Take a step, its rate warmed up, then falling linearly over the second half.

        Raises:
            IptError: the loss is not finite.
        """
        taken, total, self._updating = self.step, self.total, True
        if not loss.isfinite():
            raise IptError(
                f"dim {self.dim}: the loss is not finite at step {taken + 1}: use a smaller --alpha, or --precision fp32"
            )
        rate = min(1, (taken + 1) / 50, 2 * (total - taken) / total)
        self.optimizer.param_groups[0]["lr"] = self.config.subspace_learning_rate * rate
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self._updating = taken + 1, False


def check_dim(dim: int, initial_prompt: Tensor) -> None:
    """Refuse an intrinsic dimension that exceeds the prompt's."""
    if dim > initial_prompt.numel():
        raise IptError(f"--dim {dim} is larger than the prompt itself, {initial_prompt.numel()} numbers: use a smaller --dim")


def fit_subspace(
    backbone: Backbone, soft_prompts: Tensor, initial_prompt: Tensor, rows: Sequence[Sequence[Encoded]], dim: int,
    config: SubspaceConfig, *, unfinished: Mapping[str, Tensor] | None = None,
    on_step: Callable[[SubspaceFit], None] = lambda fit: None,
) -> tuple[Space, dict[str, float]]:  # fmt: skip
    """Find the subspace of collected prompts; return it, and the losses at the last step.

    The decoder maps each drawn task's vector once a step, whatever the number of its rows: the rows only see prompts, and what
    comes back is the loss's gradient with respect to those.

    Args:
        backbone: frozen.
        soft_prompts: (tasks, prompt_length, hidden).
        initial_prompt: (prompt_length, hidden), the start that they share.
        rows: each task's training rows.
        dim: the intrinsic dimension.
        config: the losses and the optimiser.
        unfinished: a state to go on from.
        on_step: called before the first step and after each.

    Raises:
        IptError: the intrinsic dimension exceeds the prompt's, the prompts are all where they began, or a loss is not finite.
    """
    check_dim(dim, initial_prompt)
    unit, inner, seed = unit_of(soft_prompts, initial_prompt), config.inner, config.subspace_seed
    coded = coded_numbers(dim, len(soft_prompts), config.free)
    fit = SubspaceFit(untrained_space(initial_prompt, unit=unit, dim=coded, inner=inner, seed=seed), config, dim)
    if unfinished:
        fit.restore(unfinished)
    on_step(fit)
    while fit.step < fit.total:
        _fit_step(backbone, fit, soft_prompts, rows)
        on_step(fit)
    record = {"lm_loss": float(fit.lm_loss), "unexplained": float(fit.unexplained)}
    space = freed(_unit_vectors(fit.space, soft_prompts), dim, reach=config.free, seed=seed)
    return space, {name: value for name, value in record.items() if math.isfinite(value)}


def _fit_step(backbone: Backbone, fit: SubspaceFit, soft_prompts: Tensor, rows: Sequence[Sequence[Encoded]]) -> None:
    """Draw tasks and rows, and update the subspace on them."""
    config, space, tasks = fit.config, fit.space, range(len(soft_prompts))
    on_rows = fit.step >= config.steps_before
    # All randomness follows from seed and step, so that a checkpoint need not hold it.
    rng = random.Random(f"{config.subspace_seed} {fit.step}")
    generator = torch.Generator().manual_seed(config.subspace_seed + 7919 * fit.step)
    drawn = rng.sample(tasks, min(config.tasks_per_step, len(tasks))) if on_rows else list(tasks)
    vectors = space.project(wanted := soft_prompts[drawn])
    noise = to_device(torch.randn(vectors.shape, generator=generator), vectors.device)
    reconstructed = space.back_project(vectors + config.noise * noise)
    unexplained = space.unexplained(wanted, reconstructed)
    loss = config.alpha * unexplained * config.reconstruction_loss
    if config.lm_loss and on_rows:
        count = config.rows_per_task
        batch = [(i, e) for i, task in enumerate(drawn) for e in rng.sample(rows[task], min(count, len(rows[task])))]
        lm_losses, gradient = prompt_losses(backbone, reconstructed.detach(), batch)
        fit.lm_loss = lm_losses.mean()
        loss = loss + (reconstructed * gradient).sum() / len(drawn)  # its gradient is the mean LM loss's
    fit.unexplained = unexplained.detach()
    fit.update(loss)


def _unit_vectors(space: Space, soft_prompts: Tensor) -> Space:
    """Rescale the code so that the collected prompts' intrinsic vectors have a root mean square of one."""
    space = replace(space, weights={name: weight.detach() for name, weight in space.weights.items()})
    scale = space.project(soft_prompts).pow(2).mean().sqrt()
    inward = {name: space.weights[name] / scale for name in ("in.weight", "in.bias")}
    return replace(space, weights={**space.weights, **inward, "hidden.weight": space.weights["hidden.weight"] * scale})
