"""Places in padded rows: where a loss looks, as indices that need no look at the data on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """Places in `[rows, length]`, row by row.

    `x[mask]` asks the device how many places there are, and waits for it. These are counted where the rows are made.

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

    def to(self, *args, **kwargs) -> Positions:
        return Positions(self.row.to(*args, **kwargs), self.column.to(*args, **kwargs))

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
