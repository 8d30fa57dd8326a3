"""Dense weight deltas: what fine-tuning and ENN make, for which no low-rank form is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mend_lightning.edits.deltas import Delta, spread


@dataclass(frozen=True)
class DenseDelta:
    """`ΔW` of one layer as it is, for each of several independent tasks.

    It costs as much memory as the weight, once for every task.

    Attributes:
        weight: `[tasks, d_out, d_in]` float32.

    Example:
        >>> delta = DenseDelta(torch.ones(1, 3, 2))
        >>> delta.output(torch.ones(4, 5, 2)).shape, round(delta.norm().item(), 3)
        (torch.Size([4, 5, 3]), 2.449)
    """

    weight: Tensor

    @property
    def tasks(self) -> int:
        return int(self.weight.shape[0])

    @property
    def rank(self) -> int:
        """The largest rank that ΔW can have."""
        return min(self.weight.shape[1:])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        return int(self.weight.shape[2]), int(self.weight.shape[1])

    def dense(self) -> Tensor:
        """ΔW as `[tasks, d_out, d_in]`."""
        return self.weight

    def norm(self) -> Tensor:
        """Frobenius norm of ΔW per task `[tasks]`."""
        return self.weight.flatten(1).norm(dim=1)

    def scaled(self, factor: Tensor | float) -> DenseDelta:
        """ΔW times a factor: a number, or one of each task `[tasks]`."""
        return DenseDelta(self.weight * (factor[:, None, None] if isinstance(factor, Tensor) else factor))

    def of_task(self, task: int) -> DenseDelta:
        """The delta of one task."""
        return DenseDelta(self.weight[task].detach()[None].clone())

    def to(self, target: torch.device | torch.dtype | str) -> DenseDelta:
        return DenseDelta(self.weight.to(target))

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of a single task's delta: `{"weight": [d_out, d_in]}`."""
        return {"weight": self.weight[0]}

    def output(self, x: Tensor, task_of_row: Tensor | None = None) -> Tensor:
        """`x ΔWᵀ` for every row with its own task's delta; see `LowRankDelta.output`."""
        task_of_row = None if self.tasks == 1 else task_of_row
        flat = x.to(self.weight.dtype).reshape(self.tasks if task_of_row is None else x.shape[0], -1, x.shape[-1])
        product = torch.bmm(flat, self.weight.mT) if task_of_row is None else self._by_task(flat, task_of_row)
        return product.reshape(*x.shape[:-1], self.weight.shape[1])

    def _by_task(self, x: Tensor, task_of_row: Tensor) -> Tensor:
        """Task by task: a weight for every row would be a copy for every row."""
        index = spread(task_of_row, x.shape[0])
        order = index.argsort(stable=True)
        rows = x[order].split(torch.bincount(index, minlength=self.tasks).tolist())
        return torch.cat([each @ weight.T for each, weight in zip(rows, self.weight)])[order.argsort()]


@dataclass(frozen=True)
class SumDelta:
    """The sum of several deltas of one layer; parts of a single task hold for all tasks.

    Example:
        >>> both = SumDelta((DenseDelta(torch.ones(1, 1, 1)), DenseDelta(torch.ones(2, 1, 1))))
        >>> both.output(torch.ones(2, 1)).flatten().tolist(), both.tasks
        ([2.0, 2.0], 2)
    """

    parts: Sequence[Delta]

    @property
    def tasks(self) -> int:
        return max(part.tasks for part in self.parts)

    @property
    def rank(self) -> int:
        """The largest rank that ΔW can have."""
        return min(sum(part.rank for part in self.parts), *self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        return self.parts[0].shape

    def dense(self) -> Tensor:
        """ΔW as `[tasks, d_out, d_in]`."""
        return sum(part.dense() for part in self.parts)

    def norm(self) -> Tensor:
        """Frobenius norm of ΔW per task `[tasks]`."""
        return DenseDelta(self.dense()).norm()

    def scaled(self, factor: Tensor | float) -> DenseDelta:
        """ΔW times a factor: a number, or one of each task `[tasks]`."""
        return DenseDelta(self.dense()).scaled(factor)

    def of_task(self, task: int) -> DenseDelta:
        """The delta of one task."""
        return DenseDelta(sum(part.of_task(task if part.tasks > 1 else 0).dense() for part in self.parts))

    def to(self, target: torch.device | torch.dtype | str) -> SumDelta:
        return SumDelta(tuple(part.to(target) for part in self.parts))

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of a single task's delta."""
        return self.of_task(0).tensors()

    def output(self, x: Tensor, task_of_row: Tensor | None = None) -> Tensor:
        """`x ΔWᵀ` for every row with its own task's delta; see `LowRankDelta.output`."""
        return sum(part.output(x, task_of_row if part.tasks > 1 else None) for part in self.parts)
