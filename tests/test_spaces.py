"""Spaces: theta to soft prompts, against NumPy, the paper's formulas and scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sklearn.decomposition
import torch
from helpers import collection
from torch import Tensor

from intrinsic_prompt_tuning.backbone import Backbone
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.spaces import Space, fair_space, freed, linear_space, unit_of, untrained_space


@pytest.fixture
def initial(t5: Backbone) -> Tensor:
    return t5.initial_prompt(3, seed=0)


def random_space(initial: Tensor, dim: int = 6) -> Space:
    return untrained_space(initial, unit=2.5, dim=dim, inner=13, seed=1)


def test_theta_zero_is_the_initial_prompt_and_theta_counts_in_units_of_the_embeddings(initial: Tensor) -> None:
    space = Space(initial, 2.5)
    assert space.dim == 3 * 16
    theta = torch.zeros(4, 48)
    assert torch.equal(space.back_project(theta), initial.expand(4, -1, -1))
    theta[2, 17] = 2
    changed = space.back_project(theta)[2] - initial
    assert float(changed[1, 1]) == pytest.approx(5)
    assert changed.count_nonzero() == 1


def test_a_space_without_weights_is_the_identity_on_soft_prompts(initial: Tensor) -> None:
    space, prompts = Space(initial, 2.5), collection(initial)
    theta = space.project(prompts)
    torch.testing.assert_close(theta, ((prompts - initial) / 2.5).flatten(1))
    torch.testing.assert_close(space.back_project(theta), prompts)


def test_a_subspace_is_the_paper_s_auto_encoder_of_the_standardised_differences(initial: Tensor) -> None:
    space, prompts = random_space(initial), collection(initial)
    w = {name: tensor.double().numpy() for name, tensor in space.weights.items()}
    x = ((prompts - initial) / 2.5).reshape(11, 48).double().numpy()
    v = x @ w["in.weight"].T + w["in.bias"]
    y = np.tanh(v @ w["hidden.weight"].T + w["hidden.bias"]) @ w["out.weight"].T + w["out.bias"]
    vectors = space.project(prompts)
    assert vectors.shape == (11, 6)
    np.testing.assert_allclose(vectors.numpy(), v, atol=1e-5)
    expected = initial.numpy() + 2.5 * y.reshape(11, 3, 16)
    np.testing.assert_allclose(space.back_project(vectors).numpy(), expected, atol=1e-4)
    unexplained = ((y - x) ** 2).sum() / (x**2).sum()
    assert float(space.unexplained(prompts, space.back_project(vectors))) == pytest.approx(unexplained, rel=1e-5)


def test_the_unit_is_the_root_mean_square_of_all_differences(initial: Tensor) -> None:
    changes = torch.zeros(2, 3, 16)
    changes[0, 1, 2], changes[1, 2, 0] = 3, -4
    assert unit_of(initial + changes, initial) == pytest.approx((25 / (2 * 48)) ** 0.5, rel=1e-5)


# --- Untrained -----------------------------------------------------------------------------------


def test_the_untrained_space_depends_on_its_seed_and_has_the_scale_of_torch_s_linear_layers(initial: Tensor) -> None:
    one, same, other = (untrained_space(initial, unit=1.0, dim=6, inner=13, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(one.weights[name], same.weights[name]) for name in one.weights)
    assert not torch.equal(one.weights["out.weight"], other.weights["out.weight"])
    for name, columns in (("in", 48), ("hidden", 6), ("out", 13)):
        for part in ("weight", "bias"):
            largest = float(one.weights[f"{name}.{part}"].abs().max())
            assert 0.5 < largest * columns**0.5 <= 1


@pytest.mark.parametrize("dim", [2, 6, 40])
def test_a_fair_space_reaches_one_unit_and_an_untrained_one_does_not(initial: Tensor, dim: int) -> None:
    untrained = untrained_space(initial, unit=2.5, dim=dim, inner=64, seed=1)
    fair = fair_space(untrained, seed=1)
    vectors = torch.randn(1000, dim, generator=torch.Generator().manual_seed(99))
    assert unit_of(fair.back_project(vectors), initial) == pytest.approx(2.5, rel=0.05)
    assert unit_of(untrained.back_project(vectors), initial) < 0.5 * 2.5


@pytest.mark.parametrize("dim", [2, 6, 40])
def test_the_origin_of_a_fair_space_is_the_initial_prompt_and_that_of_an_untrained_one_is_not(initial: Tensor, dim: int) -> None:
    untrained, zero = untrained_space(initial, unit=2.5, dim=dim, inner=64, seed=1), torch.zeros(1, dim)
    torch.testing.assert_close(fair_space(untrained, seed=1).back_project(zero)[0], initial, atol=1e-5, rtol=0)
    assert unit_of(untrained.back_project(zero), initial) > 0.1


def test_a_fair_space_differs_in_its_last_layer_alone_whose_weights_are_scaled_alike(initial: Tensor) -> None:
    untrained = random_space(initial)
    before = {name: weight.clone() for name, weight in untrained.weights.items()}
    fair = fair_space(untrained, seed=1)
    assert all(torch.equal(untrained.weights[name], before[name]) for name in before)
    for name in ("in.weight", "in.bias", "hidden.weight", "hidden.bias"):
        assert torch.equal(fair.weights[name], before[name])
    factors = (fair.weights["out.weight"] / before["out.weight"]).flatten()
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    again, other = (fair_space(untrained, seed=s) for s in (1, 2))
    assert torch.equal(again.weights["out.weight"], fair.weights["out.weight"])
    assert not torch.equal(other.weights["out.weight"], fair.weights["out.weight"])


# --- Free numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [random_space, lambda initial: linear_space(collection(initial), initial, dim=4)])
def test_free_numbers_move_prompts_beside_what_the_others_do_and_no_prompt_has_any(
    initial: Tensor, make: Callable[[Tensor], Space]
) -> None:
    plain, prompts = make(initial), collection(initial)
    space = freed(plain, plain.dim + 30, reach=0.7, seed=1)
    assert space.dim == plain.dim + 30 and freed(plain, plain.dim, reach=0.7, seed=1) is plain
    vectors = space.project(prompts)
    assert torch.equal(vectors[:, : plain.dim], plain.project(prompts)) and not vectors[:, plain.dim :].any()
    torch.testing.assert_close(space.back_project(vectors), plain.back_project(plain.project(prompts)))
    free = torch.randn(1000, 30, generator=torch.Generator().manual_seed(99))
    moved = space.back_project(torch.cat([vectors[:1, : plain.dim].expand(1000, -1), free], dim=1))
    assert unit_of(moved, space.back_project(vectors[:1])[0]) == pytest.approx(0.7 * space.unit, rel=0.1)
    assert torch.linalg.matrix_rank(moved[:40].flatten(1) - moved[0].flatten(), rtol=1e-4) == 30
    again, other = (freed(plain, plain.dim + 30, reach=0.7, seed=seed) for seed in (1, 2))
    assert torch.equal(again.back_project(vectors + 1), space.back_project(vectors + 1))
    assert not torch.equal(other.back_project(vectors + 1), space.back_project(vectors + 1))


# --- Linear --------------------------------------------------------------------------------------


def test_the_linear_space_reconstructs_as_scikit_learn_s_pca(initial: Tensor) -> None:
    prompts = collection(initial)
    space = linear_space(prompts, initial, dim=4)
    assert space.dim == 4
    flat = prompts.flatten(1).double().numpy()
    pca = sklearn.decomposition.PCA(n_components=4).fit(flat)
    expected = pca.inverse_transform(pca.transform(flat))
    got = space.back_project(space.project(prompts)).flatten(1).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert np.abs(got - flat).max() > 0.1
    torch.testing.assert_close(space.project(prompts).pow(2).mean(0), torch.ones(4), rtol=1e-3, atol=1e-3)


def test_the_signs_of_the_linear_space_do_not_depend_on_those_of_the_svd(
    initial: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, svd = collection(initial), torch.linalg.svd
    plain = linear_space(prompts, initial, dim=4)
    components = plain.weights["out.weight"].T
    assert all(float(row[row.abs().argmax()]) > 0 for row in components)
    for flipped in range(4):

        def other_library(matrix: Tensor, flipped: int = flipped, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
            u, s, v = svd(matrix, **options)
            signs = torch.ones(len(s))
            signs[flipped] = -1
            return u * signs, s, v * signs[:, None]

        monkeypatch.setattr(torch.linalg, "svd", other_library)
        other = linear_space(prompts, initial, dim=4)
        assert all(torch.equal(plain.weights[name], other.weights[name]) for name in plain.weights)
        assert torch.equal(plain.project(prompts), other.project(prompts))


@pytest.mark.parametrize(("tasks", "dim"), [(5, 5), (80, 49)])
def test_the_linear_space_has_no_more_dimensions_than_its_prompts_have(initial: Tensor, tasks: int, dim: int) -> None:
    with pytest.raises(IptError, match="smaller --dim"):
        linear_space(collection(initial, tasks, rank=40), initial, dim=dim)


def test_free_numbers_stand_in_for_components_that_are_not_there(initial: Tensor) -> None:
    few = collection(initial, 5, rank=40)
    for prompts, coded in ((few, 4), (torch.cat([few, few]), 4), (few[:2], 1)):  # such as prompts that were imported twice
        space = linear_space(prompts, initial, dim=12, free=0.5)
        assert (space.dim, len(space.weights["in.bias"]), space.weights["free.weight"].shape[1]) == (12, coded, 12 - coded)


def test_prompts_that_repeat_themselves_span_fewer_dimensions_and_that_is_said(initial: Tensor) -> None:
    prompts = collection(initial, tasks=3)
    with pytest.raises(IptError, match=r"the 9 prompts span 2 dimensions, not 4: use a smaller --dim"):
        linear_space(prompts.repeat(3, 1, 1), initial, dim=4)
    assert linear_space(prompts.repeat(3, 1, 1), initial, dim=2).dim == 2
