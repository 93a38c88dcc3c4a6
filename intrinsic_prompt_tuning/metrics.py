"""CrossFit's metrics: predictions and references as text, a score in [0, 1] ([-1, 1] for correlations).

Of several references the best counts. Rouge-L is as rouge_score computes it, which knows no case and no punctuation.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import correlation, fmean

References = Sequence[str]


def row_by_row(score: Callable[[str, str], float]) -> Callable[[Sequence[str], Sequence[References]], float]:
    """Make a metric of a score of one prediction by one reference: the mean over rows of what the best reference gives."""
    return lambda said, right: fmean(max(score(p, r) for r in refs) for p, refs in zip(said, right, strict=True))


@row_by_row
def accuracy(prediction: str, reference: str) -> float:
    """Return whether a prediction is a reference, letter case and white space at the ends aside, as in CrossFit."""
    return float(prediction.strip().lower() == reference.strip().lower())


def macro_f1(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Return the mean F1 over the labels that occur among predictions or first references."""
    truths = [refs[0].strip() for refs in references]
    guesses = [p.strip() for p in predictions]
    scores = []
    for label in set(truths) | set(guesses):
        hits = sum(t == g == label for t, g in zip(truths, guesses, strict=True))
        scores.append(2 * hits / (truths.count(label) + guesses.count(label)))
    return fmean(scores)


def normalise_answer(text: str) -> str:
    """Lower the case, drop punctuation and articles, and fold white space (SQuAD's rule)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@row_by_row
def exact_match(prediction: str, reference: str) -> float:
    """Return whether a prediction is a reference after normalisation."""
    return float(normalise_answer(prediction) == normalise_answer(reference))


@row_by_row
def token_f1(prediction: str, reference: str) -> float:
    """Return the F1 of normalised words in common (SQuAD's rule)."""
    p, r = normalise_answer(prediction).split(), normalise_answer(reference).split()
    common = sum((Counter(p) & Counter(r)).values())
    return 2 * common / (len(p) + len(r)) if p and r else float(p == r)


@row_by_row
def rouge_l(prediction: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of words (letters and digits, lower case, no stemming)."""
    p, r = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))
    lengths = [0] * (len(r) + 1)
    for word in p:
        diagonal = 0
        for j, other in enumerate(r, start=1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
    return 2 * lengths[-1] / (len(p) + len(r)) if p and r else 0.0


def matthews(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Return Matthews' correlation of two classes; a prediction that is not the positive one counts as the other.

    The positive class is `acceptable` (CoLA, the only task that CrossFit scores so), else the last label in order.
    """
    truths = [refs[0].strip() for refs in references]
    positive = "acceptable" if "acceptable" in truths else max(truths)
    return pearson([str(int(p.strip() == positive)) for p in predictions], [[str(int(t == positive))] for t in truths])


def pearson(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Return the correlation of numbers; 0 when either side is constant, and a prediction that is no number counts as 0."""
    pairs = [(_number(prediction), _number(refs[0])) for prediction, refs in zip(predictions, references, strict=True)]
    try:
        value = correlation(*zip(*pairs, strict=True))
    except (ValueError, OverflowError):  # a side is constant, or beyond what numbers hold
        return 0.0
    return min(1.0, max(-1.0, value)) if math.isfinite(value) else 0.0


METRICS: dict[str, Callable[[Sequence[str], Sequence[References]], float]] = {
    "ACC": accuracy,
    "Classification-F1": macro_f1,
    "EM": exact_match,
    "QA-F1": token_f1,
    "Rouge-L": rouge_l,
    "Matthew-Correlation": matthews,
    "Pearson-Correlation": pearson,
}


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0
