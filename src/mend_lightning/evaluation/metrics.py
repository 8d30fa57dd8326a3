"""Metrics of model editing as torchmetrics: sum states only, so they are right on any number of processes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric


class _RowSums(Metric):
    """A metric whose states are float64 sums over rows.

    torchmetrics' `MeanMetric` is not used: once moved to a device it adds up in float32 even after `set_dtype`, and a NaN,
    which says that training has diverged, is left out, ends the run, or costs the weights (1.9), by its `nan_strategy`.

    Attributes:
        sums: names of the states.
    """

    full_state_update = False
    is_differentiable = False
    sums: ClassVar[tuple[str, ...]]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self.sums:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, *rows: Tensor) -> None:
        """Adds `[rows]` of any dtype to each of the sums, in their order."""
        for name, values in zip(self.sums, rows, strict=True):
            setattr(self, name, getattr(self, name) + values.to(torch.float64).sum())


class RowShare(_RowSums):
    """Share of rows that are true, over everything seen."""

    higher_is_better = True
    sums = ("hits", "rows")
    hits: Tensor
    rows: Tensor

    def update(self, correct: Tensor) -> None:
        """Takes in `correct` `[rows]` bool or 0/1."""
        self._add(correct, torch.ones_like(correct))

    def compute(self) -> Tensor:
        """Share in 0..1 as float32 scalar; NaN before any row was seen."""
        return (self.hits / self.rows).float()


class EditSuccess(RowShare):
    """Edit Success (MEND, section 2.2): accuracy after the edit on `{x_e} ∪ rephrases`.

    A row is right when every target token is the most probable one given the target so far (teacher forced).
    The original's `edit/acc` is the same over the rephrases only; `RowShare` gives that.

    Example:
        >>> metric = EditSuccess()
        >>> metric.update(torch.tensor([True, True, False, True]))
        >>> metric.compute()
        tensor(0.7500)
    """


class Drawdown(_RowSums):
    """Drawdown (MEND, section 2.2): the accuracy that an edit costs on unrelated inputs `x_out`.

    Example:
        >>> metric = Drawdown()
        >>> metric.update(before=torch.tensor([True, True, False, False]), after=torch.tensor([True, False, False, False]))
        >>> metric.compute()
        tensor(0.2500)
    """

    higher_is_better = False
    sums = ("before_sum", "after_sum", "rows_sum")
    before_sum: Tensor
    after_sum: Tensor
    rows_sum: Tensor

    def update(self, before: Tensor, after: Tensor) -> None:
        """Takes in whether each row `[rows]` was right before and after the edit."""
        self._add(before, after, torch.ones_like(before))

    def compute(self) -> Tensor:
        """Accuracy before minus accuracy after, float32 scalar; negative where edits helped."""
        return ((self.before_sum - self.after_sum) / self.rows_sum).float()


class PerplexityDrawdown(_RowSums):
    """Rise of perplexity on `x_out`: the paper's drawdown for generation.

    Example:
        >>> metric = PerplexityDrawdown()
        >>> metric.update(before=torch.tensor([0.0]), after=torch.tensor([0.0]), tokens=torch.tensor([3]))
        >>> metric.compute()
        tensor(0.)
    """

    higher_is_better = False
    sums = ("before_sum", "after_sum", "tokens_sum")
    before_sum: Tensor
    after_sum: Tensor
    tokens_sum: Tensor

    def update(self, before: Tensor, after: Tensor, tokens: Tensor) -> None:
        """Takes in each row's summed NLL `[rows]` before and after, and its number of label tokens `[rows]`."""
        self._add(before, after, tokens)

    def compute(self) -> Tensor:
        """Perplexity after minus before, float32 scalar."""
        return ((self.after_sum / self.tokens_sum).exp() - (self.before_sum / self.tokens_sum).exp()).float()


class WeightedMean(_RowSums):
    """Mean of per-row values with weights (KL over positions, F1 over rows, …), float32 scalar.

    Example:
        >>> metric = WeightedMean()
        >>> metric.update(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0]))
        >>> metric.compute()
        tensor(2.5000)
    """

    sums = ("value_sum", "weight_sum")
    value_sum: Tensor
    weight_sum: Tensor

    def update(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Takes in `values` `[rows]` and their weights (1 by default)."""
        weights = (torch.ones_like(values) if weights is None else weights).to(torch.float64)
        self._add(values * weights, weights)

    def compute(self) -> Tensor:
        return (self.value_sum / self.weight_sum).float()


class MedianShare(Metric):
    """Median of numbers between 0 and 1, to within 0.0005: how many there are in each thousandth is a sum state.

    Of an even number of values it is the lower one of the two in the middle.

    Example:
        >>> metric = MedianShare()
        >>> metric.update(torch.tensor([0.1, 0.9, 0.7]))
        >>> round(float(metric.compute()), 3)
        0.7
    """

    full_state_update = False
    is_differentiable = False
    parts = 1000
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(self.parts, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Takes in `values` `[rows]`; one that is not a number counts as 0."""
        part = (values.double().nan_to_num(0.0) * self.parts).long().clamp(0, self.parts - 1)
        # Not bincount: CUDA has no deterministic one.
        self.counts = self.counts + (part[:, None] == torch.arange(self.parts, device=part.device)).sum(0)

    def compute(self) -> Tensor:
        """Middle of the thousandth that the median is in, float32 scalar; NaN before any value was seen."""
        below = self.counts.cumsum(0)
        middle = ((below < below[-1] / 2).sum() + 0.5) / self.parts
        return torch.where(below[-1] > 0, middle, torch.nan).float()
