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
from intrinsic_prompt_tuning.spaces import Space, unit_of, untrained_space
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
    noise: Annotated[
        float, TUNING("Standard deviation of noise on intrinsic vectors while learning; their own grows to about two.", least=0)
    ] = 0.2
    """Makes the subspace smooth between the tasks."""
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


class SubspaceFits:
    """Subspaces of several dimensions that are learned side by side, on the same draws of tasks and rows.

    Adafactor keeps next to nothing beside the weights, where Adam keeps two more copies; it learned better, too.
    """

    def __init__(self, initial_prompt: Tensor, unit: float, dims: Sequence[int], config: SubspaceConfig) -> None:
        """Begin with untrained subspaces, one per dimension."""
        self.step, self.config = 0, config
        self.total = config.steps_before + config.subspace_steps
        seed, inner = config.subspace_seed, config.inner
        self.spaces = [untrained_space(initial_prompt, unit=unit, dim=dim, inner=inner, seed=seed) for dim in dims]
        self.optimizers = [torch.optim.Adafactor([w.requires_grad_() for w in s.weights.values()]) for s in self.spaces]
        self.lm_losses = torch.full((len(dims),), math.nan)
        """Mean LM loss per target token at the last step, on the backbone's device; nan where it is off."""
        self.unexplained = self.lm_losses
        """Reconstruction error at the last step, likewise."""
        self._updating = False

    def states(self) -> list[dict[str, Tensor]]:
        """Return, of each subspace, step, losses and by `layer name` weights and optimiser states: all that a checkpoint needs.

        Nothing in the middle of an update, where an interruption may ask.
        """
        if self._updating or not self.step:
            return []
        states: list[dict[str, Tensor]] = []
        for space, optimizer, lm, error in zip(self.spaces, self.optimizers, self.lm_losses, self.unexplained, strict=True):
            states.append({"step": torch.tensor(float(self.step)), "lm_loss": lm, "unexplained": error})
            for layer, weight in space.weights.items():
                own = {"weight": weight.detach()} | optimizer.state[weight]
                states[-1] |= {f"{layer} {name}": tensor for name, tensor in own.items() if name != "step"}
        return states

    def restore(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from states, all of one step."""
        self.step = int(states[0]["step"])
        self.lm_losses, self.unexplained = (torch.stack([s[name] for s in states]) for name in ("lm_loss", "unexplained"))
        for space, optimizer, state in zip(self.spaces, self.optimizers, states, strict=True):
            for layer, weight in space.weights.items():
                own = {key.partition(" ")[2]: t.to(weight) for key, t in state.items() if key.partition(" ")[0] == layer}
                weight.data.copy_(own.pop("weight"))
                optimizer.state[weight] = own | {"step": torch.tensor(float(self.step))}

    def update(self, losses: Sequence[Tensor]) -> None:
        """Take a step for each subspace, its rate warmed up, then falling linearly over the second half.

        Raises:
            IptError: a loss is not finite.
        """
        taken, total, self._updating = self.step, self.total, True
        for optimizer, space, loss in zip(self.optimizers, self.spaces, losses, strict=True):
            if not loss.isfinite():
                raise IptError(
                    f"dim {space.dim}: the loss is not finite at step {taken + 1}: use a smaller --alpha, or --precision fp32"
                )
            rate = min(1, (taken + 1) / 50, 2 * (total - taken) / total)
            optimizer.param_groups[0]["lr"] = self.config.subspace_learning_rate * rate
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()  # at once, so that gradients of one subspace at a time are in memory
        self.step, self._updating = taken + 1, False


def check_dim(dim: int, initial_prompt: Tensor) -> None:
    """Refuse an intrinsic dimension that exceeds the prompt's."""
    if dim > initial_prompt.numel():
        raise IptError(f"--dim {dim} is larger than the prompt itself, {initial_prompt.numel()} numbers: use a smaller --dim")


def fit_subspaces(
    backbone: Backbone, soft_prompts: Tensor, initial_prompt: Tensor, rows: Sequence[Sequence[Encoded]], dims: Sequence[int],
    config: SubspaceConfig, *, unfinished: Sequence[Mapping[str, Tensor]] = (),
    on_step: Callable[[SubspaceFits], None] = lambda fits: None,
) -> list[tuple[Space, dict[str, float]]]:  # fmt: skip
    """Find subspaces of collected prompts, and the losses at the last step; what each comes to does not depend on the others.

    A decoder maps each drawn task's vector once a step, whatever the number of its rows: the rows only see prompts, and what
    comes back is the loss's gradient with respect to those.

    Args:
        backbone: frozen.
        soft_prompts: (tasks, prompt_length, hidden).
        initial_prompt: (prompt_length, hidden), the start that they share.
        rows: each task's training rows.
        dims: intrinsic dimensions, one subspace each.
        config: the losses and the optimiser.
        unfinished: states to go on from, one a dimension, all of one step.
        on_step: called before the first step and after each.

    Raises:
        IptError: an intrinsic dimension exceeds the prompt's, or a loss is not finite.
    """
    for dim in dims:
        check_dim(dim, initial_prompt)
    fits = SubspaceFits(initial_prompt, unit_of(soft_prompts, initial_prompt), dims, config)
    if unfinished:
        fits.restore(unfinished)
    on_step(fits)
    while fits.step < fits.total:
        _fit_step(backbone, fits, soft_prompts, rows)
        on_step(fits)
    figures = [{"lm_loss": float(lm), "unexplained": float(e)} for lm, e in zip(fits.lm_losses, fits.unexplained, strict=True)]
    records = [{name: value for name, value in own.items() if math.isfinite(value)} for own in figures]
    return [(_unit_vectors(space, soft_prompts), own) for space, own in zip(fits.spaces, records, strict=True)]


def _fit_step(backbone: Backbone, fits: SubspaceFits, soft_prompts: Tensor, rows: Sequence[Sequence[Encoded]]) -> None:
    """Draw tasks and rows, and update every subspace on them."""
    config, tasks, on_rows = fits.config, range(len(soft_prompts)), fits.step >= fits.config.steps_before
    # All randomness follows from seed and step, so that a checkpoint need not hold it.
    rng = random.Random(f"{config.subspace_seed} {fits.step}")
    generator = torch.Generator().manual_seed(config.subspace_seed + 7919 * fits.step)
    drawn = rng.sample(tasks, min(config.tasks_per_step, len(tasks))) if on_rows else list(tasks)
    wanted, noise = soft_prompts[drawn], generator.get_state()
    reconstructed = [_reconstruct(s, wanted, config.noise, generator.set_state(noise)) for s in fits.spaces]
    unexplained = [s.unexplained(wanted, r) for s, r in zip(fits.spaces, reconstructed, strict=True)]
    losses = [config.alpha * share * config.reconstruction_loss for share in unexplained]
    if config.lm_loss and on_rows:
        count = config.rows_per_task
        batch = [(i, e) for i, task in enumerate(drawn) for e in rng.sample(rows[task], min(count, len(rows[task])))]
        batches = [(i + n * len(drawn), e) for n in range(len(losses)) for i, e in batch]
        lm_losses, gradients = prompt_losses(backbone, torch.cat(reconstructed).detach(), batches)
        fits.lm_losses = lm_losses.view(len(losses), -1).mean(1)
        for n, (prompts, gradient) in enumerate(zip(reconstructed, gradients.chunk(len(losses)), strict=True)):
            losses[n] = losses[n] + (prompts * gradient).sum() / len(drawn)  # its gradient is the mean LM loss's
    fits.unexplained = torch.stack(unexplained).detach()
    fits.update(losses)


def _reconstruct(space: Space, soft_prompts: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Map prompts through the subspace, with noise on their intrinsic vectors."""
    vectors = space.project(soft_prompts)
    return space.back_project(vectors + noise * to_device(torch.randn(vectors.shape, generator=generator), vectors.device))


def _unit_vectors(space: Space, soft_prompts: Tensor) -> Space:
    """Rescale the code so that the collected prompts' intrinsic vectors have a root mean square of one."""
    space = replace(space, weights={name: weight.detach() for name, weight in space.weights.items()})
    scale = space.project(soft_prompts).pow(2).mean().sqrt()
    inward = {name: space.weights[name] / scale for name in ("in.weight", "in.bias")}
    return replace(space, weights={**space.weights, **inward, "hidden.weight": space.weights["hidden.weight"] * scale})
