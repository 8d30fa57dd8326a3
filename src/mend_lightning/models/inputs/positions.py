"""Places in padded rows: where a loss looks, as indices that need no look at the data on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# Which of a row's tokens a loss at its labels can give a gradient (`gradient_reach.py`): those at its labels, those up to its last
# label, those of its input, or its first.
Reach = Literal["labels", "until", "inputs", "first"]


@dataclass(frozen=True)
class Positions:
    """Places in `[rows, length]`, row by row.

    `x[mask]` synchronizes host and device, to learn how many places there are. These are counted where the rows are made.

    Attributes:
        row, column: `[n]` int64.

    Example:
        >>> where = Positions.of(torch.tensor([[True, False], [True, True]]))
        >>> where.row.tolist(), where.column.tolist(), where.take(torch.tensor([[5, 6], [7, 8]])).tolist()
        ([0, 1, 1], [0, 0, 1], [5, 7, 8])
    """

    row: Tensor
    column: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Positions:
        """The places where `mask` `[rows, length]` is true; waits for the device the mask lies on."""
        return cls(*mask.nonzero().unbind(1))

    def __len__(self) -> int:
        return int(self.row.shape[0])

    def to(self, *args: Any, **kwargs: Any) -> Positions:
        return Positions(self.row.to(*args, **kwargs), self.column.to(*args, **kwargs))

    @property
    def ends(self) -> Tensor:
        """Which places are their row's last one: `[n]` bool.

        Example:
            >>> Positions(torch.tensor([0, 0, 2]), torch.tensor([1, 4, 0])).ends.tolist()
            [False, True, True]
        """
        # Places stand row by row: a row's last is the one in front of another row's.
        ends = torch.ones_like(self.row, dtype=torch.bool)
        ends[:-1] = self.row[1:] != self.row[:-1]
        return ends

    def take(self, values: Tensor) -> Tensor:
        """The entries of `values` `[rows, length, ...]` there: `[n, ...]`."""
        # index_select: its backward adds rows up, where that of indexing by two tensors sorts them.
        return values.flatten(0, 1).index_select(0, self.row * values.shape[1] + self.column)

    def behind(self, rows: int) -> Positions:
        """The same places where `rows` other rows come first."""
        return Positions(self.row + rows, self.column)


def joined(parts: Sequence[Positions]) -> Positions:
    """Several places after one another."""
    return Positions(torch.cat([part.row for part in parts]), torch.cat([part.column for part in parts]))


@dataclass(frozen=True)
class Tokens:
    """Tokens of some rows that may make factors, each with its place among those of its task.

    Attributes:
        where: n places in `[rows, length]`.
        length: of the sequence they are in.
        task: `[n]` int64.
        slot: `[n]` int64, counts up from 0 within each task.
        rank: tokens of the task that has most.

    Example:
        >>> tokens = Tokens.of(torch.tensor([[True, False], [True, True]]), torch.tensor([0, 0]), tasks=1)
        >>> tokens.where.row.tolist(), tokens.slot.tolist(), tokens.rank
        ([0, 1, 1], [0, 1, 2], 3)
    """

    where: Positions
    length: int
    task: Tensor
    slot: Tensor
    rank: int

    @classmethod
    def of(cls, mask: Tensor, task_of_row: Tensor, tasks: int) -> Tokens:
        """The tokens where `mask` `[rows, length]` is true; waits for the device the mask lies on."""
        where = Positions.of(mask)
        task = task_of_row[where.row]
        slot = slots(task, tasks)
        return cls(where, mask.shape[1], task, slot, int(slot.max()) + 1 if len(where) else 0)

    def to(self, *args: Any, **kwargs: Any) -> Tokens:
        task, slot = self.task.to(*args, **kwargs), self.slot.to(*args, **kwargs)
        return Tokens(self.where.to(*args, **kwargs), self.length, task, slot, self.rank)


def slots(task: Tensor, tasks: int) -> Tensor:
    """Position of every token within its task: `[tokens]`.

    Example:
        >>> slots(torch.tensor([0, 1, 0]), 2)
        tensor([0, 0, 1])
    """
    order = task.argsort(stable=True)
    counts = torch.zeros(tasks, dtype=torch.long, device=task.device).index_add(0, task, torch.ones_like(task))
    first = counts.cumsum(0) - counts
    places = torch.arange(task.shape[0], device=task.device) - first.index_select(0, task.index_select(0, order))
    return torch.empty_like(task).index_copy(0, order, places)
