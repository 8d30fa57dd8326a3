"""Metrics of model editing as torchmetrics: sum states only, so they are right on any number of processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class RowShare(Metric):
    """Share of rows that are true, over everything seen."""

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("hits", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, correct: Tensor) -> None:
        """Takes in `correct` `[rows]` bool or 0/1."""
        self.hits += correct.to(torch.float64).sum()
        self.rows += correct.numel()

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


class Drawdown(Metric):
    """Drawdown (MEND, section 2.2): the accuracy that an edit costs on unrelated inputs `x_out`.

    Example:
        >>> metric = Drawdown()
        >>> metric.update(before=torch.tensor([True, True, False, False]), after=torch.tensor([True, False, False, False]))
        >>> metric.compute()
        tensor(0.2500)
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for name in ("before", "after", "rows"):
            self.add_state(f"{name}_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor) -> None:
        """Takes in whether each row `[rows]` was right before and after the edit."""
        self.before_sum += before.to(torch.float64).sum()
        self.after_sum += after.to(torch.float64).sum()
        self.rows_sum += before.numel()

    def compute(self) -> Tensor:
        """Accuracy before minus accuracy after, float32 scalar; negative where edits helped."""
        return ((self.before_sum - self.after_sum) / self.rows_sum).float()


class PerplexityDrawdown(Metric):
    """Rise of perplexity on `x_out`: the paper's drawdown for generation.

    Example:
        >>> metric = PerplexityDrawdown()
        >>> metric.update(before=torch.tensor([0.0]), after=torch.tensor([0.0]), tokens=torch.tensor([3]))
        >>> metric.compute()
        tensor(0.)
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for name in ("before", "after", "tokens"):
            self.add_state(f"{name}_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor, tokens: Tensor) -> None:
        """Takes in each row's summed NLL `[rows]` before and after, and its number of label tokens `[rows]`."""
        self.before_sum += before.to(torch.float64).sum()
        self.after_sum += after.to(torch.float64).sum()
        self.tokens_sum += tokens.to(torch.float64).sum()

    def compute(self) -> Tensor:
        """Perplexity after minus before, float32 scalar."""
        return ((self.after_sum / self.tokens_sum).exp() - (self.before_sum / self.tokens_sum).exp()).float()


class WeightedMean(Metric):
    """Mean of per-row values with weights (KL over positions, F1 over rows, …), float32 scalar.

    Example:
        >>> metric = WeightedMean()
        >>> metric.update(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0]))
        >>> metric.compute()
        tensor(2.5000)
    """

    full_state_update = False

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for name in ("value", "weight"):
            self.add_state(f"{name}_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Takes in `values` `[rows]` and their weights (1 by default)."""
        weights = torch.ones_like(values) if weights is None else weights
        self.value_sum += (values.to(torch.float64) * weights.to(torch.float64)).sum()
        self.weight_sum += weights.to(torch.float64).sum()

    def compute(self) -> Tensor:
        return (self.value_sum / self.weight_sum).float()
