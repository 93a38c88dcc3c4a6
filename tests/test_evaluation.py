"""What scores come to, against cases worked by hand and SciPy's bootstrap."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import scipy.stats

from intrinsic_prompt_tuning.evaluation import LEAST_BASELINE, dimensions_needed, paper_name, relative_performance, result_rows


def test_relative_performance_equals_the_case_worked_by_hand() -> None:
    scores = {"a": 0.4, "b": 0.9, "c": 0.5, "d": 0.1}
    baseline = {"a": 0.8, "b": 0.6, "c": 0.0, "d": -0.2, "other": 1.0}
    result = relative_performance(scores, baseline, baseline)
    assert result["e_rel"] == pytest.approx((0.5 + 1.5) / 2)
    assert (result["n_tasks"], result["n_excluded"]) == (2, 2)
    assert result["mean_score"] == pytest.approx((0.4 + 0.9 + 0.5 + 0.1) / 4)
    assert result["mean_prompt_tuning"] == pytest.approx((0.8 + 0.6 + 0.0 - 0.2) / 4)
    assert result["ratio_of_means"] == pytest.approx(1.9 / 1.2)
    assert (result["e_rel_low"], result["e_rel_high"]) == (0.5, 1.5)


def test_a_task_without_a_baseline_is_an_error_and_never_left_out() -> None:
    for baseline, floor in (({"b": 1.0}, {"a": 0.0}), ({"a": 1.0}, {"b": 0.0})):
        with pytest.raises(KeyError):
            relative_performance({"a": 0.4}, baseline, floor)


def test_the_median_ratio_is_not_ruled_by_one_task() -> None:
    result = relative_performance({"a": 0.4, "b": 0.3, "c": 0.9}, {"a": 0.5, "b": 0.5, "c": 0.05}, {"a": 0, "b": 0, "c": 0})
    assert result["median_ratio"] == pytest.approx(0.8)
    assert result["e_rel"] == pytest.approx((0.8 + 0.6 + 18) / 3)


def test_the_gain_equals_the_case_worked_by_hand() -> None:
    scores, baseline, floor = {"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.6}, {"a": 0.2, "b": 0.3, "other": 0.9}
    result = relative_performance(scores, baseline, floor)
    assert result["gain"] == pytest.approx((0.2 + 0.6) / (0.6 + 0.3))
    assert result["gain_low"] == pytest.approx(0.2 / 0.6)  # a task drawn twice
    assert result["gain_high"] == pytest.approx(0.6 / 0.3)


def test_where_the_prompt_does_nothing_the_gain_is_nothing_and_where_it_is_as_good_as_prompt_tuning_one() -> None:
    floor = {"a": 0.5, "b": 0.25, "c": 0.0}
    baseline = {"a": 0.75, "b": 0.75, "c": 0.5}
    assert relative_performance(floor, baseline, floor)["gain"] == 0
    assert relative_performance(baseline, baseline, floor)["gain"] == 1
    assert relative_performance(floor, baseline, floor)["e_rel"] > 0.3, "what the model can do anyway inflates the ratio"
    nothing = relative_performance(baseline, floor, floor)
    assert all(nothing[name] is None for name in ("gain", "gain_low", "gain_high"))


def test_a_bound_of_the_gain_that_has_nothing_to_divide_by_is_left_out() -> None:
    """A quarter of the bootstrap's draws hold the second task alone, on which prompt tuning gains nothing."""
    result = relative_performance({"a": 0.6, "b": 0.6}, {"a": 0.8, "b": 0.4}, {"a": 0.5, "b": 0.5})
    assert result["gain"] == pytest.approx(0.2 / 0.2)
    assert result["gain_low"] == pytest.approx(0.1 / 0.3)
    assert result["gain_high"] is None


def test_a_gain_below_nothing_has_no_lower_bound_where_a_draw_has_nothing_to_divide_by() -> None:
    result = relative_performance({"a": 0.4, "b": 0.4}, {"a": 0.8, "b": 0.4}, {"a": 0.5, "b": 0.5})
    assert result["gain"] == pytest.approx(-0.2 / 0.2)
    assert result["gain_low"] is None and result["gain_high"] == pytest.approx(-0.1 / 0.3)


def test_with_nothing_to_divide_by_there_is_no_figure_and_no_zero() -> None:
    result = relative_performance({"a": 0.5}, {"a": 0.0}, {"a": 0.0})
    assert (result["n_tasks"], result["n_excluded"], result["mean_score"]) == (0, 1, 0.5)
    names = ("e_rel", "e_rel_low", "e_rel_high", "median_ratio", "gain", "gain_low", "gain_high", "ratio_of_means")
    assert all(result[name] is None for name in names)


def test_one_task_has_no_interval() -> None:
    result = relative_performance({"a": 0.5}, {"a": 0.8}, {"a": 0.2})
    assert (result["e_rel"], result["gain"]) == (pytest.approx(0.625), pytest.approx(0.5))
    assert all(result[f"{name}_{side}"] is None for name in ("e_rel", "gain") for side in ("low", "high"))


def test_a_tiny_baseline_has_no_ratio_but_counts_in_means_and_gain() -> None:
    scores, floor = {"a": 0.4, "tiny": 0.5, "small": 0.01}, {"a": 0.2, "tiny": 0.0, "small": 0.0}
    baseline = {"a": 0.8, "tiny": LEAST_BASELINE, "small": LEAST_BASELINE + 1e-3}
    result = relative_performance(scores, baseline, floor)
    assert (result["n_tasks"], result["n_excluded"]) == (2, 1)
    assert result["e_rel"] == pytest.approx((0.5 + 0.01 / 0.021) / 2)
    assert result["mean_score"] == pytest.approx(0.91 / 3)
    assert result["gain"] == pytest.approx((0.2 + 0.5 + 0.01) / (0.6 + 0.02 + 0.021))


def test_the_intervals_are_a_bootstrap_s_and_always_the_same() -> None:
    rng = random.Random(2)
    scores = {f"t{n}": rng.uniform(0.5, 1.0) for n in range(40)}
    floor = {task: rng.uniform(0.0, 0.4) for task in scores}
    baseline = dict.fromkeys(scores, 1.0)
    result = relative_performance(scores, baseline, floor)
    own = scipy.stats.bootstrap((list(scores.values()),), np.mean, method="percentile", rng=1).confidence_interval
    assert result["e_rel_low"] == pytest.approx(own.low, abs=0.01)
    assert result["e_rel_high"] == pytest.approx(own.high, abs=0.01)
    gained = [[side[task] - floor[task] for task in scores] for side in (scores, baseline)]

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.mean(axis) / b.mean(axis)

    own = scipy.stats.bootstrap(gained, ratio, paired=True, method="percentile", rng=1).confidence_interval
    assert result["gain_low"] == pytest.approx(own.low, abs=0.01)
    assert result["gain_high"] == pytest.approx(own.high, abs=0.01)
    assert result == relative_performance(scores, baseline, floor)


@pytest.mark.parametrize(
    ("stage", "role", "same", "name"),
    [
        ("MSF", "seen", True, "T_train(MSF)"),
        ("MSF", "unseen", True, "T_test(MSF)"),
        ("IST", "seen", True, "T_train_same(IST)"),
        ("IST", "seen", False, "T_train_diff(IST)"),
        ("IST", "unseen", True, "T_test(IST)"),
        ("IST", "unseen-in", True, "T_test_in(IST)"),
        ("MSF", "unseen-out", True, "T_test_out(MSF)"),
    ],
)
def test_scores_have_the_paper_s_names(stage: str, role: str, same: bool, name: str) -> None:
    assert paper_name(stage, role, same_data=same) == name


def score(quantity: str, task: str, space: str, start: str | None, dim: int, data_seed: int, value: float, **more: Any) -> Any:
    about = {"quantity": quantity, "task": task, "space": space, "start": start, "dim": dim, "data_seed": data_seed}
    return about | {"subspace": f"{space}-{dim}", "candidates": 1, "value": value} | more


def test_the_table_keeps_apart_what_differs_and_stands_in_the_paper_s_order() -> None:
    scores = [
        score("T_test(IST)", "a", "random-unscaled", "random", 6, 100, 0.5),
        score("T_test(IST)", "a", "random", "random", 6, 100, 0.5),
        score("T_test(IST)", "a", "linear", "random", 6, 100, 0.5),
        score("T_test(IST)", "a", "subspace", "seen", 3, 100, 0.5),
        score("T_test(IST)", "a", "subspace", "random", 6, 100, 0.3),
        score("T_test(IST)", "a", "subspace", "seen", 6, 100, 0.4),
        score("T_test(MSF)", "a", "subspace", None, 6, 100, 0.8),
        score("T_train_diff(IST)", "b", "subspace", "random", 6, 21, 0.2),
        score("T_train_diff(IST)", "b", "subspace", "random", 6, 13, 0.6),
        score("T_train_same(IST)", "b", "subspace", "random", 6, 100, 0.6),
        score("T_train(MSF)", "b", "subspace", None, 6, 100, 0.8),
        score("T_train(MSF)", "c", "subspace", None, 6, 100, 0.7, candidates=4),
    ]
    baseline, floor = {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.5, "b": 0.5, "c": 0.5}
    rows = result_rows(scores, baseline, floor)
    assert [(r["quantity"], r["space"], r["dim"], r["start"], r["data_seed"], r["n_tasks"]) for r in rows] == [
        ("T_train(MSF)", "subspace", 6, None, 100, 2),
        ("T_train_same(IST)", "subspace", 6, "random", 100, 1),
        ("T_train_diff(IST)", "subspace", 6, "random", 13, 1),
        ("T_train_diff(IST)", "subspace", 6, "random", 21, 1),
        ("T_test(MSF)", "subspace", 6, None, 100, 1),
        ("T_test(IST)", "subspace", 6, "random", 100, 1),
        ("T_test(IST)", "subspace", 6, "seen", 100, 1),
        ("T_test(IST)", "subspace", 3, "seen", 100, 1),
        ("T_test(IST)", "linear", 6, "random", 100, 1),
        ("T_test(IST)", "random", 6, "random", 100, 1),
        ("T_test(IST)", "random-unscaled", 6, "random", 100, 1),
    ]
    assert rows[0]["e_rel"] == pytest.approx(0.75)
    assert rows[0]["gain"] == pytest.approx(0.5)
    assert (rows[0]["candidates"], rows[4]["candidates"], rows[0]["numbers"]) == (4, 1, 6)
    assert rows == result_rows(scores[::-1], baseline, floor)


def test_the_table_keeps_two_subspaces_of_one_dim_apart() -> None:
    scores = [
        score("T_test(MSF)", "a", "subspace", None, 6, 100, value, subspace=name) for name, value in (("y", 0.2), ("x", 0.4))
    ]
    rows = result_rows(scores, {"a": 0.8}, {"a": 0.0})
    assert [(row["subspace"], row["e_rel"]) for row in rows] == [("x", 0.5), ("y", 0.25)]


# --- Dimensions needed ---------------------------------------------------------------------------


def row(dim: int, gain: float | None, *, space: str = "subspace", quantity: str = "T_test(IST)", start: str = "random") -> Any:
    return {"space": space, "quantity": quantity, "start": start, "dim": dim, "gain": gain}


def test_the_dimensions_needed_lie_between_two_that_were_run_on_a_logarithmic_scale() -> None:
    needed = dimensions_needed([row(32, 1.1), row(2, 0.5), row(8, 0.7), row(128, 0.2)])
    assert needed == {"subspace": {"T_test(IST)": pytest.approx(16)}}  # 0.9 is half way from 0.7 to 1.1, 16 from 8 to 32
    (quarter,) = dimensions_needed([row(1, 0.8), row(16, 1.2)])["subspace"].values()
    assert quarter == pytest.approx(2)
    (exactly,) = dimensions_needed([row(1, 0.8), row(16, 0.9)])["subspace"].values()
    assert exactly == pytest.approx(16)


def test_a_space_that_recovers_enough_at_the_smallest_dim_needs_at_most_that() -> None:
    assert dimensions_needed([row(4, 0.9), row(8, 0.5)]) == {"subspace": {"T_test(IST)": 4.0}}


def test_a_space_that_never_recovers_enough_has_no_dimensions_needed() -> None:
    assert dimensions_needed([row(4, 0.1), row(8, 0.89)]) == {"subspace": {"T_test(IST)": None}}


def test_the_dimensions_needed_are_told_by_space_and_quantity_of_intrinsic_vectors_from_a_random_start() -> None:
    rows = [
        row(4, 1.0, space="random"),
        row(8, 1.0),
        row(16, 1.0, quantity="T_train_same(IST)"),
        row(2, 1.0, start="seen"),
        row(2, 1.0, quantity="T_test(MSF)", start=""),
        row(2, None),
    ]
    assert dimensions_needed(rows) == {
        "random": {"T_test(IST)": 4.0},
        "subspace": {"T_test(IST)": 8.0, "T_train_same(IST)": 16.0},
    }
    assert dimensions_needed([]) == {}


def test_of_several_subspaces_or_data_seeds_of_one_dim_the_mean_gain_counts() -> None:
    rows = [row(2, 0.5), row(8, 0.5), row(8, 1.3), row(32, 1.1)]  # 0.5, 0.9, 1.1
    assert dimensions_needed(rows) == {"subspace": {"T_test(IST)": pytest.approx(8)}}
    assert dimensions_needed(rows[::-1]) == dimensions_needed(rows)
