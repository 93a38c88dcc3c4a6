"""CrossFit's metrics against scikit-learn, SciPy, rouge_score, and cases worked by hand."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import scipy.stats
import sklearn.metrics
from rouge_score import rouge_scorer

from intrinsic_prompt_tuning.metrics import METRICS, accuracy, exact_match, macro_f1, matthews, pearson, rouge_l, token_f1


@pytest.mark.parametrize("seed", range(5))
def test_classification_metrics_equal_scikit_learn(seed: int) -> None:
    rng = random.Random(seed)
    truths = rng.choices(["red", "green", "blue"], k=37)
    guesses = [t if rng.random() < 0.5 else rng.choice(["red", "green", "blue", "never right"]) for t in truths]
    references = [(t,) for t in truths]
    assert accuracy(guesses, references) == pytest.approx(sklearn.metrics.accuracy_score(truths, guesses))
    expected = sklearn.metrics.f1_score(truths, guesses, average="macro", zero_division=0)
    assert macro_f1(guesses, references) == pytest.approx(expected)


def test_accuracy_ignores_letter_case_and_white_space_at_the_ends_as_in_crossfit_and_nothing_else() -> None:
    references = [("Not Duplicate",), ("yes", "SURE"), ("a b",), ("end",)]
    assert accuracy(["not duplicate ", "\tsure", "a  b", "end."], references) == 0.5


def test_macro_f1_tells_letter_case_apart_but_not_white_space_at_the_ends() -> None:
    assert macro_f1([" yes", "no\n"], [("yes",), ("no ",)]) == 1
    assert macro_f1(["Yes", "no"], [("yes",), ("no",)]) == pytest.approx(1 / 3)  # of the labels Yes, yes and no


@pytest.mark.parametrize("labels", [("acceptable", "unacceptable"), ("no", "yes")])
@pytest.mark.parametrize("seed", range(5))
def test_matthews_equals_scikit_learn(seed: int, labels: tuple[str, str]) -> None:
    rng = random.Random(seed)
    truths = [labels[0], labels[1], *rng.choices(labels, k=29)]
    guesses = [t if rng.random() < 0.7 else rng.choice(labels) for t in truths]
    expected = sklearn.metrics.matthews_corrcoef(truths, guesses)
    assert matthews(guesses, [(t,) for t in truths]) == pytest.approx(expected)
    assert -1 <= expected < 1


def test_matthews_of_one_answer_for_all_is_zero_and_of_all_wrong_minus_one() -> None:
    references = [("acceptable",), ("unacceptable",), ("acceptable",)]
    assert matthews(["acceptable"] * 3, references) == 0
    assert matthews(["unacceptable", "acceptable", "unacceptable"], references) == pytest.approx(-1)


def test_pearson_equals_scipy_and_a_prediction_that_is_no_number_counts_as_zero() -> None:
    rng = random.Random(3)
    y = [rng.uniform(0, 5) for _ in range(23)]
    x = [v + rng.gauss(0, 1) for v in y]
    expected = scipy.stats.pearsonr([*x, 0.0], [*y, 2.5])[0]
    assert pearson([*map(str, x), "four"], [*((str(v),) for v in y), ("2.5",)]) == pytest.approx(expected)
    assert pearson(["1", "1"], [("1",), ("2",)]) == 0


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity"])
def test_pearson_stays_a_number_whatever_is_predicted(text: str) -> None:
    assert math.isfinite(pearson([text, "1", "3"], [("1",), ("2",), ("4",)]))


@pytest.mark.parametrize(
    ("predictions", "truths"),
    [
        (["1e308", "-1e308", "1e308"], ["1", "2", "3"]),
        (["1.7e308", "1.7e308", "-1.7e308"], ["-1.7e308", "1.7e308", "1.7e308"]),
        (["1e200", "1", "-1e200"], ["1", "0", "3"]),
        (["-1", "1.7e308", "0", "-1e200"], ["1e200", "-1", "0", "1e200"]),
        (["5e-324", "0", "1"], ["1", "2", "5e-324"]),
        (["9" * 400, "1", "2"], ["1", "2", "3"]),
        (["1_000", "\u0661", "2"], ["1", "2", "3"]),
    ],
)
def test_pearson_stays_in_its_range_on_huge_and_tiny_numbers(predictions: list[str], truths: list[str]) -> None:
    assert -1 <= pearson(predictions, [(truth,) for truth in truths]) <= 1


def test_rouge_l_equals_rouge_score() -> None:
    rng, scorer = random.Random(7), rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    words = ["The", "cat", "sat", "on", "a", "mat", "it's", "2,000", "re-run", "end.", "Ünder", ""]
    texts = [" ".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(80)]
    for prediction, reference in itertools.pairwise(texts):
        expected = scorer.score(reference, prediction)["rougeL"].fmeasure
        assert rouge_l([prediction], [(reference,)]) == pytest.approx(expected), (prediction, reference)


@pytest.mark.parametrize(
    ("prediction", "reference", "match", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0, 1.0),
        ("a tower", "the tower, of an iron", 0.0, 0.5),  # tower | tower of iron
        ("big big cat", "big cat cat", 0.0, 2 / 3),  # words count as often as they stand in both
        ("", "", 1.0, 1.0),
        ("the", "a", 1.0, 1.0),
        ("", "cat", 0.0, 0.0),
        ("dog", "cat", 0.0, 0.0),
        ("theatre", "atre", 0.0, 0.0),  # only whole words are articles
    ],
)
def test_squad_metrics_equal_cases_worked_by_hand(prediction: str, reference: str, match: float, f1: float) -> None:
    assert exact_match([prediction], [(reference,)]) == match
    assert token_f1([prediction], [(reference,)]) == pytest.approx(f1)


def test_letter_case_punctuation_articles_and_white_space_do_not_count_in_an_exact_match() -> None:
    assert exact_match(["  The  Cat's\tA-game, an  END. "], [("cats agame end",)]) == 1


@pytest.mark.parametrize("metric", ["ACC", "EM", "QA-F1", "Rouge-L"])
def test_with_several_references_the_best_counts_and_rows_are_averaged(metric: str) -> None:
    assert METRICS[metric](["two words", "x", "y"], [("no", "two words"), ("x",), ("z",)]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_refuses_as_many_predictions_as_there_are_no_rows_for(metric: str) -> None:
    with pytest.raises(ValueError, match="zip"):
        METRICS[metric](["1", "2", "3"], [("1",), ("2",)])


@pytest.mark.parametrize("metric", METRICS)
def test_empty_answers_to_rows_that_have_one_score_nothing(metric: str) -> None:
    references = [("0.1", "7"), ("0.5",), ("0.9",), ("2",)]
    assert METRICS[metric](["", " ", "", "\n"], references) == 0
    assert METRICS[metric]([refs[0] for refs in references], references) > 0
