"""Weight deltas, one per task: low-rank ones, and the hooks that add any to a running model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from mend_lightning.models.forward.hooks import Delta, added, rows_of_tasks, spread


@dataclass(frozen=True)
class LowRankDelta:
    """`ΔW = upᵀ down` of one layer, for each of several independent tasks.

    Attributes:
        down: `[tasks, rank, d_in]` float32; rank is the number of edited tokens, zero-padded.
        up: `[tasks, rank, d_out]` float32.
    """

    down: Tensor
    up: Tensor

    @property
    def tasks(self) -> int:
        return int(self.down.shape[0])

    @property
    def rank(self) -> int:
        return int(self.down.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        return int(self.down.shape[-1]), int(self.up.shape[-1])

    def dense(self) -> Tensor:
        """ΔW as `[tasks, d_out, d_in]`: for tests and small models only."""
        return self.up.transpose(1, 2) @ self.down

    def norm(self) -> Tensor:
        """Frobenius norm of ΔW per task `[tasks]`, from the rank × rank Gram matrices alone."""
        gram = (self.down @ self.down.mT) * (self.up @ self.up.mT)
        return gram.sum((1, 2)).clamp(min=0).sqrt()

    def scaled(self, factor: Tensor | float) -> LowRankDelta:
        """ΔW times a factor: a number, or one of each task `[tasks]`."""
        if isinstance(factor, Tensor):
            factor = factor[:, None, None]
        return LowRankDelta(self.down, self.up * factor)

    def of_task(self, task: int) -> LowRankDelta:
        """The delta of one task, its all-zero padding ranks dropped."""
        down, up = self.down[task].detach(), self.up[task].detach()
        used = (down != 0).any(-1) & (up != 0).any(-1)
        return LowRankDelta(down[used][None].clone(), up[used][None].clone())

    def to(self, target: torch.device | torch.dtype | str) -> LowRankDelta:
        """The same delta on a device, or in a dtype."""
        return LowRankDelta(self.down.to(target), self.up.to(target))

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of a single task's delta: `{"down": [rank, d_in], "up": [rank, d_out]}`."""
        return {"down": self.down[0], "up": self.up[0]}

    def output(self, x: Tensor, task_of_row: Tensor | None = None) -> Tensor:
        """`x ΔWᵀ` for every row with its own task's delta.

        Args:
            x: `[rows, ..., d_in]`, any dtype; computed in the delta's.
            task_of_row: `[rows]`, or None when rows are grouped by task in equal numbers (also a
                single task). Beam search multiplies rows; they stay next to each other.

        Returns:
            `[rows, ..., d_out]` in the delta's dtype.
        """
        down, up = rows_of_tasks((self.down, self.up), x, task_of_row)
        flat = x.to(down.dtype).reshape(down.shape[0], -1, x.shape[-1])
        product = torch.bmm(torch.bmm(flat, down.mT), up)
        return product.reshape(*x.shape[:-1], up.shape[-1])


# FSDP2 looks for tensors in what a module's forward returns: those that bring gradients to the editor's parameters.
register_dataclass(LowRankDelta)


def added_at_once(output: Tensor, x: Tensor, delta: Delta) -> Tensor:
    """`added` of a single task; where all have one dtype, the product is added as it is computed, and rounded once."""
    if not isinstance(delta, LowRankDelta) or delta.tasks != 1 or not delta.up.dtype == x.dtype == output.dtype:
        return added(output, x, delta)
    inner = torch.bmm(x.reshape(1, -1, x.shape[-1]), delta.down.mT)
    return torch.baddbmm(output.reshape(1, -1, output.shape[-1]), inner, delta.up).view_as(output)


def sum_of(deltas: Sequence[Delta]) -> Delta:
    """The sum of deltas of one layer, each of a single task, in the form that is cheapest to apply.

    Factors are set side by side, which is exact, as long as they are smaller than the matrix they stand for; from there
    on, and where a delta is dense, the sum is dense.

    Args:
        deltas: at least one, all of the same shape, on one device.

    Example:
        >>> one = LowRankDelta(torch.ones(1, 1, 8), torch.ones(1, 1, 8))
        >>> sum_of([one, one]).rank, type(sum_of([one] * 5)).__name__, sum_of([one] * 5).dense().max().item()
        (2, 'DenseDelta', 5.0)
    """
    if len(deltas) == 1:
        return deltas[0]
    d_in, d_out = deltas[0].shape
    low_rank = [delta for delta in deltas if isinstance(delta, LowRankDelta)]
    small = sum(delta.rank for delta in deltas) * (d_in + d_out) < d_in * d_out
    if small and len(low_rank) == len(deltas):
        return concatenated(low_rank)
    return DenseDelta(_dense_sum(deltas))


def concatenated(deltas: Sequence[LowRankDelta]) -> LowRankDelta:
    """The sum as one low-rank delta, whose rank is the sum of the ranks: no entry is rounded."""
    return LowRankDelta(torch.cat([delta.down for delta in deltas], 1), torch.cat([delta.up for delta in deltas], 1))


def _dense_sum(deltas: Sequence[Delta]) -> torch.Tensor:
    """`[1, d_out, d_in]`. All low-rank parts are one matrix product."""
    low_rank = [delta for delta in deltas if isinstance(delta, LowRankDelta)]
    dense = [delta.dense() for delta in deltas if not isinstance(delta, LowRankDelta)]
    return _total([concatenated(low_rank).dense(), *dense] if low_rank else dense)


def _total(tensors: Iterable[Tensor]) -> Tensor:
    first, *others = tensors
    return sum(others, first)


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
        return _total(part.dense() for part in self.parts)

    def norm(self) -> Tensor:
        """Frobenius norm of ΔW per task `[tasks]`."""
        return DenseDelta(self.dense()).norm()

    def scaled(self, factor: Tensor | float) -> DenseDelta:
        """ΔW times a factor: a number, or one of each task `[tasks]`."""
        return DenseDelta(self.dense()).scaled(factor)

    def of_task(self, task: int) -> DenseDelta:
        """The delta of one task."""
        return DenseDelta(_total(part.of_task(task if part.tasks > 1 else 0).dense() for part in self.parts))

    def to(self, target: torch.device | torch.dtype | str) -> SumDelta:
        return SumDelta(tuple(part.to(target) for part in self.parts))

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of a single task's delta."""
        return self.of_task(0).tensors()

    def output(self, x: Tensor, task_of_row: Tensor | None = None) -> Tensor:
        """`x ΔWᵀ` for every row with its own task's delta; see `LowRankDelta.output`."""
        return _total(part.output(x, task_of_row if part.tasks > 1 else None) for part in self.parts)
