"""Metrics as pure functions over rows; what a row is, is said by `evaluate.py`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def exact_match(prediction: str, target: str) -> bool:
    """Whether two answers are the same text, apart from blanks around them.

    Example:
        >>> exact_match(" Paris", "Paris"), exact_match("Paris, France", "Paris")
        (True, False)
    """
    return prediction.strip() == target.strip()


def token_f1(prediction: str, target: str) -> float:
    """F1 of the words two answers share (as in SQuAD, without its article stripping).

    Example:
        >>> round(token_f1("New York City", "New York"), 2)
        0.8
    """
    predicted, wanted = Counter(prediction.lower().split()), Counter(target.lower().split())
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = sum((predicted & wanted).values())
    return 2 * shared / (sum(predicted.values()) + sum(wanted.values()))


def holds_words(answer: str, target: str) -> bool:
    """Whether the words of a target stand in an answer, one after another, whatever stands around them.

    Example:
        >>> holds_words("The capital of France is New York.", "new York"), holds_words("Parisian", "Paris")
        (True, False)
    """
    said, wanted = (re.findall(r"\w+", text.lower()) for text in (answer, target))
    if not wanted:
        # Signs alone.
        return target.strip() in answer
    return any(said[i : i + len(wanted)] == wanted for i in range(len(said)))


def bootstrap_interval(
    values: Sequence[float], weights: Sequence[float] | None = None, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of a (weighted) mean.

    Resample whole edits, not rows: give one value an edit, with its number of rows as weight.

    Example:
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        (1.0, 1.0)
    """
    data = torch.tensor(values, dtype=torch.float64)
    weight = torch.ones_like(data) if weights is None else torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(data), (draws, len(data)), generator=generator)
    means = (data[index] * weight[index]).sum(1) / weight[index].sum(1)
    low, high = torch.quantile(means[means.isfinite()], torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def paired_interval(
    values: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]], draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two (weighted) means over the same tasks, and its 95 % bootstrap interval.

    Both means are taken over the same resampled tasks, so what makes a task easy for both drops out.

    Args:
        values, others: (mean, weight) of every task, in the same order.

    Returns:
        difference, low, high.

    Example:
        >>> paired_interval([(1.0, 1), (0.5, 1)], [(0.75, 1), (0.25, 1)])
        (0.25, 0.25, 0.25)
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(values), (draws, len(values)), generator=generator)

    def means(pairs: Sequence[tuple[float, float]], rows: Tensor) -> Tensor:
        value, weight = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        return (value[rows] * weight[rows]).sum(-1) / weight[rows].sum(-1)

    found = means(values, index) - means(others, index)
    whole = torch.arange(len(values))
    low, high = torch.quantile(found[found.isfinite()], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(means(values, whole) - means(others, whole)), low, high
