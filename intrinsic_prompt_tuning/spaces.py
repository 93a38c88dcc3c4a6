"""theta (tasks, dim) -> soft prompts (tasks, prompt_length, hidden).

Soft prompts are taken as differences to the shared initial prompt, in units of the embeddings (prompt, low-rank) or of the
collected prompts (the others), so that one learning rate suits every backbone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.lazy import Tensor, torch
from intrinsic_prompt_tuning.passes import FEW

SpaceKind = Literal["prompt", "subspace", "linear", "random", "random-unscaled", "low-rank"]


@dataclass(frozen=True)
class Space:
    """A frozen map from what learns to soft prompts.

    Without weights it is the identity: prompt tuning. With a hidden layer it is the paper's auto-encoder of soft prompts
    (section 3.2): one linear layer in, `W2 tanh(W1 v + b1) + b2` out. Without the hidden layer it is linear.
    """

    initial_prompt: Tensor
    """(prompt_length, hidden): where the differences are zero."""
    unit: float
    """What one is in a difference: root mean square of the embeddings, or of the collected prompts' differences."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """in.weight (code, n), in.bias (code), hidden.weight (inner, code), hidden.bias, out.weight (n, inner), out.bias, where n is
    prompt_length * hidden, and code is dim but for free numbers, the last ones, which have free.weight (n, free). In a linear
    space out.weight is (n, code). In a low-rank one there is only basis (rank, hidden)."""

    @property
    def dim(self) -> int:
        """How many numbers one task tunes."""
        length, hidden = self.initial_prompt.shape
        if "basis" in self.weights:
            return length * len(self.weights["basis"]) + 2 * hidden
        return len(self.weights["in.bias"]) + self._n_free if self.weights else length * hidden

    @property
    def _n_free(self) -> int:
        return self.weights["free.weight"].shape[1] if "free.weight" in self.weights else 0

    def project(self, soft_prompts: Tensor) -> Tensor:
        """Map soft prompts (tasks, prompt_length, hidden) to theta (tasks, dim): the paper's Proj."""
        differences = ((soft_prompts - self.initial_prompt) / self.unit).flatten(1)
        return torch.nn.functional.pad(self._linear(differences, "in"), (0, self._n_free)) if self.weights else differences

    def back_project(self, theta: Tensor) -> Tensor:
        """Map theta (tasks, dim) to soft prompts (tasks, prompt_length, hidden): the paper's Proj_b."""
        if "basis" in self.weights:  # `(Z P) * (1 + s) + b`, P being the basis and Z, s, b the parts of theta (ULPT)
            length, hidden = self.initial_prompt.shape
            z, s, b = theta.split([self.dim - 2 * hidden, hidden, hidden], dim=1)
            products = _product(z.reshape(len(theta) * length, -1), self.weights["basis"].T).view(-1, length, hidden)
            differences = torch.addcmul(b[:, None], products, 1 + s[:, None])
        elif self.weights:
            code, free = (part.contiguous() for part in theta.split([self.dim - self._n_free, self._n_free], dim=1))
            inner = torch.tanh(self._linear(code, "hidden")) if "hidden.weight" in self.weights else code
            differences = self._linear(inner, "out")
            if self._n_free:
                differences = differences + _product(free, self.weights["free.weight"])
        else:
            differences = theta
        return self.initial_prompt + self.unit * differences.view(-1, *self.initial_prompt.shape)

    def unexplained(self, soft_prompts: Tensor, reconstructed: Tensor) -> Tensor:
        """Return the reconstruction error: the share of the prompts' variance around the initial prompt left unexplained."""
        return (reconstructed - soft_prompts).pow(2).mean() / (soft_prompts - self.initial_prompt).pow(2).mean()

    def _linear(self, x: Tensor, layer: str) -> Tensor:
        return _product(x, self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x (tasks, k) @ weight.T (k, n) + bias, with zeros added where it is small, as a CPU rounds small products otherwise.

    So no task comes to another thing, not by a bit, beside others than alone: tests/test_tuning.py.
    """
    filled, rows, columns = x, max(0, FEW - len(x)), max(0, 16 - x.shape[1])
    if rows or columns:
        filled, weight = torch.nn.functional.pad(x, (0, columns, 0, rows)), torch.nn.functional.pad(weight, (0, columns))
    return torch.nn.functional.linear(filled, weight, bias)[: len(x)]


def unit_of(soft_prompts: Tensor, initial_prompt: Tensor) -> float:
    """Return the root mean square of soft prompts' differences to the initial prompt.

    Raises:
        IptError: it is zero.
    """
    if unit := float((soft_prompts - initial_prompt).pow(2).mean().sqrt()):
        return unit
    raise IptError("the soft prompts are all where they began: tune them with more steps or a larger --learning-rate")


def untrained_space(initial_prompt: Tensor, *, unit: float, dim: int, inner: int, seed: int) -> Space:
    """Return an untrained auto-encoder with torch's default initialisation of linear layers."""
    n, generator = initial_prompt.numel(), torch.Generator().manual_seed(seed)
    weights = {}
    for layer, rows, columns in (("in", dim, n), ("hidden", inner, dim), ("out", n, inner)):
        bound = 1 / math.sqrt(columns)
        # In place: the last layer is the largest tensor of all.
        weights[f"{layer}.weight"] = torch.rand(rows, columns, generator=generator).mul_(2).sub_(1).mul_(bound)
        weights[f"{layer}.bias"] = torch.rand(rows, generator=generator).mul_(2).sub_(1).mul_(bound)
    return Space(initial_prompt, unit, {k: w.to(initial_prompt.device) for k, w in weights.items()})


def fair_space(space: Space, seed: int) -> Space:
    """Return an untrained space as a fair rival: zero is the initial prompt, and it reaches as far as the code of a learned one.

    An untrained one's biases move the prompt away from where prompt tuning starts, the more the fewer numbers there are: its
    last bias takes that back. A learned one maps vectors of root mean square one (its own code's) to differences of about one
    unit (its prompts'). An untrained one falls short of that by a factor of four, so its last layer is scaled: 256 vectors drawn
    from N(0, 1) map to differences of root mean square one unit.
    """
    origin = -space.weights["out.weight"] @ torch.tanh(space.weights["hidden.bias"])
    centred = replace(space, weights={**space.weights, "out.bias": origin})
    vectors = torch.randn(256, space.dim, generator=torch.Generator().manual_seed(seed)).to(space.initial_prompt)
    reach = unit_of(centred.back_project(vectors), space.initial_prompt) / space.unit
    out = {name: weight / reach for name, weight in centred.weights.items() if name.startswith("out.")}
    return replace(space, weights={**space.weights, **out})


def coded_numbers(dim: int, n_prompts: int, free: float) -> int:
    """Return how many of dim numbers are coordinates in what prompts differ in; the others are free, if they reach anywhere."""
    return min(dim, max(1, n_prompts - 1)) if free else dim


def freed(space: Space, dim: int, *, reach: float, seed: int) -> Space:
    """Return a space with as many free numbers more as make it dim numbers: each moves a prompt along a random direction.

    The prompts of n tasks differ in no more than n - 1 directions. Of what a new task needs beyond those, they teach an
    auto-encoder of more numbers nothing. Standard normal free numbers together move a prompt by `reach` units (root mean square).
    """
    n, free = space.initial_prompt.numel(), dim - space.dim
    if not free:
        return space
    directions = torch.randn(n, free, generator=torch.Generator().manual_seed(seed)) * (reach / math.sqrt(free))
    return replace(space, weights={**space.weights, "free.weight": directions.to(space.initial_prompt)})


def linear_space(soft_prompts: Tensor, initial_prompt: Tensor, *, dim: int, free: float = 0.0, seed: int = 0) -> Space:
    """Return the principal components of soft prompts (tasks, prompt_length, hidden), theta of unit variance; and free numbers.

    Args:
        soft_prompts: what it is made of.
        initial_prompt: (prompt_length, hidden), the start that they share.
        dim: how many numbers it has.
        free: the reach of those that are free (see `freed`); 0: none is.
        seed: of their directions.

    Raises:
        IptError: the prompts span fewer dimensions than are asked for.
    """
    coded, unit = coded_numbers(dim, len(soft_prompts), free), unit_of(soft_prompts, initial_prompt)
    differences = (soft_prompts - initial_prompt).flatten(1) / unit
    mean = differences.mean(0)
    _, s, v = torch.linalg.svd(differences - mean, full_matrices=False)
    n_components = int((s > 1e-4 * s[0]).sum())
    if coded < dim and n_components:  # free numbers stand in for components that are not there
        coded = min(coded, n_components)
    if coded > n_components:
        raise IptError(f"the {len(soft_prompts)} prompts span {n_components} dimensions, not {coded}: use a smaller --dim")
    # Libraries disagree about the sign of a component: here its largest entry is positive.
    v = v[:coded] * v[:coded].gather(1, v[:coded].abs().argmax(1, keepdim=True)).sign()
    scale = s[:coded, None] / math.sqrt(len(soft_prompts))
    inward = v / scale
    weights = {"in.weight": inward, "in.bias": -inward @ mean, "out.weight": (v * scale).T, "out.bias": mean}
    return freed(Space(initial_prompt, unit, {k: w.contiguous() for k, w in weights.items()}), dim, reach=free, seed=seed)


def low_rank(initial_prompt: Tensor, dim: int) -> int:
    """Return the rank with which a low-rank space has the most nearly dim numbers."""
    length, hidden = initial_prompt.shape
    return max(1, round((dim - 2 * hidden) / length))


def low_rank_space(initial_prompt: Tensor, *, unit: float, dim: int, seed: int) -> Space:
    """Return ULPT's space with as nearly dim numbers as it can have: prompt_length * rank + 2 * hidden, rank at least 1."""
    rank, hidden = low_rank(initial_prompt, dim), initial_prompt.shape[1]
    basis = torch.randn(rank, hidden, generator=torch.Generator().manual_seed(seed)) / math.sqrt(rank)
    return Space(initial_prompt, unit, {"basis": basis.to(initial_prompt.device)})
