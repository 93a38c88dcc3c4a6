"""CrossFit's few-shot samples: the same rows in the same order, so that its published MD5s can be compared."""

from collections.abc import Sequence

from intrinsic_prompt_tuning.lazy import np
from intrinsic_prompt_tuning.tasks.examples import Example, Rows

CROSSFIT_SEEDS = (100, 13, 21, 42, 87)


def crossfit_sample(rows: Sequence[Example], *, seed: int, k: int, per_label: bool) -> tuple[Rows, Rows]:
    """Draw train and validation rows exactly as CrossFit does.

    Args:
        rows: The whole training set, in the order of its files.
        seed: Of numpy's legacy generator, which shuffles a copy of `rows`.
        k: Rows per label where `per_label`, else in total: train takes the first so many, validation the next.
        per_label: A label is a row's first reference; labels follow each other in the order of their first row after the shuffle.

    Returns:
        Train and validation rows. A label with too few rows gives fewer, as in CrossFit.
    """
    groups: dict[str, list[Example]] = {}
    for row in shuffled(rows, seed):
        groups.setdefault(row.answers[0] if per_label else "", []).append(row)
    train = tuple(row for group in groups.values() for row in group[:k])
    validation = tuple(row for group in groups.values() for row in group[k : 2 * k])
    return train, validation


def shuffled(rows: Sequence[Example], seed: int) -> list[Example]:
    """Return rows in the order of numpy's legacy generator."""
    copy = list(rows)
    np.random.RandomState(seed).shuffle(copy)  # type: ignore[arg-type]  # the draws of np.random.seed and shuffle
    return copy


def drawn_test_rows(rows: Sequence[Example], count: int | None) -> Rows:
    """Return at most so many test rows, drawn with a fixed seed: files are often sorted by label. None: all, in their order."""
    return tuple(rows if count is None else shuffled(rows, 42)[:count])
