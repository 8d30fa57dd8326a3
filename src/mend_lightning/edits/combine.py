"""Several deltas as one: what a stack of edits is at a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mend_lightning.edits.deltas import Delta, LowRankDelta
from mend_lightning.edits.dense_delta import DenseDelta


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
    small = all(isinstance(delta, LowRankDelta) for delta in deltas)
    if small and sum(delta.rank for delta in deltas) * (d_in + d_out) < d_in * d_out:
        return concatenated(deltas)
    return DenseDelta(_dense_sum(deltas))


def concatenated(deltas: Sequence[LowRankDelta]) -> LowRankDelta:
    """The sum as one low-rank delta, whose rank is the sum of the ranks: no entry is rounded."""
    return LowRankDelta(torch.cat([delta.down for delta in deltas], 1), torch.cat([delta.up for delta in deltas], 1))


def _dense_sum(deltas: Sequence[Delta]) -> torch.Tensor:
    """`[1, d_out, d_in]`. All low-rank parts are one matrix product."""
    low_rank = [delta for delta in deltas if isinstance(delta, LowRankDelta)]
    dense = [delta.dense() for delta in deltas if not isinstance(delta, LowRankDelta)]
    return sum(dense, concatenated(low_rank).dense() if low_rank else 0)
