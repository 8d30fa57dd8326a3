"""Running mean and standard deviation over every token seen in training (MEND, section 3.2)."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

# Of so many edits the statistics are about what they become: a look at an editor that has none is taken with those.
STATISTICS_EDITS = 128
# The original adds this outside the root.
EPSILON = 1e-7


def merge_moments(
    count: Tensor, mean: Tensor, m2: Tensor, other_count: Tensor, other_mean: Tensor, other_m2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges two sets of (count, mean, sum of squared deviations): Chan et al., 1979.

    Equal to Welford's row-by-row update (the original's) up to rounding, in one step a batch.

    Example:
        >>> one = torch.tensor(1), torch.tensor([1.0]), torch.tensor([0.0])
        >>> two = torch.tensor(1), torch.tensor([3.0]), torch.tensor([0.0])
        >>> [value.tolist() for value in merge_moments(*one, *two)]
        [2, [2.0], [2.0]]
    """
    total = count + other_count
    # An empty side has weight 0; the clamp keeps 0/0 away when both are empty.
    weight = other_count / total.clamp(min=1)
    difference = other_mean - mean
    return total, mean + difference * weight, m2 + other_m2 + difference.square() * count * weight


def moments(rows: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, sum of squared deviations) of `rows` `[n, width]`, or of those that `kept` `[n]` says; n may be 0.

    Example:
        >>> rows = torch.tensor([[1.0], [9.0], [3.0]])
        >>> [value.tolist() for value in moments(rows, torch.tensor([True, False, True]))]
        [2, [2.0], [2.0]]
    """
    if kept is None:
        count = torch.full((), rows.shape[0], device=rows.device)
        mean = rows.sum(0) / count.clamp(min=1)
        return count, mean, (rows - mean).square().sum(0)
    count, weight = kept.sum(), kept[:, None].to(rows.dtype)
    mean = (rows * weight).sum(0) / count.clamp(min=1)
    return count, mean, ((rows - mean).square() * weight).sum(0)


def all_reduced_moments(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The moments over all ranks' rows, the same on every rank; no-op in a single process."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return count, mean, m2
    packed = torch.cat([count.to(mean.dtype).view(1), mean, m2])
    gathered = [torch.empty_like(packed) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, packed)
    width = mean.shape[0]
    pieces = [(part[0].long(), part[1 : 1 + width], part[1 + width :]) for part in gathered]
    return reduce(lambda merged, piece: merge_moments(*merged, *piece), pieces)


class RunningNormalizer(nn.Module):
    """Normalises rows with the statistics of every row it was ever updated with.

    All state is in buffers, the count as int64 (a float32 count, as in the original, stops at 2^24).
    Differences from the original, each where it would give garbage:

    * before two rows were seen it returns its input unchanged (the original: NaN);
    * a unit that never varied in training (a dead ReLU) is only centred (`constant_units="center"`); the
      original divides by 1e-7, so the first time the unit fires it is blown up ten million times
      (`constant_units="original"`, which the numeric comparison with the original needs).

    Example:
        >>> normalizer = RunningNormalizer(1)
        >>> normalizer.update(torch.tensor([[1.0], [3.0]]))
        >>> normalizer(torch.tensor([[2.0]])).tolist()
        [[0.0]]
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, width: int, constant_units: str = "center") -> None:
        super().__init__()
        self.constant_units = constant_units
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("m2", torch.zeros(width))

    @torch.no_grad()
    def update(self, rows: Tensor, kept: Tensor | None = None) -> None:
        """Takes in `rows` `[n, width]` (those that `kept` `[n]` says) of this rank and of every other rank."""
        piece = all_reduced_moments(*moments(rows.detach().float(), kept))
        merged = merge_moments(self.count, self.mean, self.m2, *piece)
        for buffer, value in zip((self.count, self.mean, self.m2), merged):
            buffer.copy_(value)

    @property
    def std(self) -> Tensor:
        """Unbiased standard deviation `[width]`; zero before two rows were seen."""
        return (self.m2 / (self.count - 1).clamp(min=1)).sqrt()

    def _shift_and_scale(self) -> tuple[Tensor, Tensor]:
        std = self.std
        scale = std + EPSILON
        if self.constant_units == "center":
            # Not `std > 0`: a constant such as 0.1 keeps a standard deviation of 1e-8 from rounding.
            varied = std > 1e-6 * self.mean.abs()
            scale = torch.where(varied, scale, torch.ones_like(scale))
        # `where` instead of a branch: a branch on a buffer would wait for the device.
        seen = self.count >= 2
        return torch.where(seen, self.mean, 0.0), torch.where(seen, scale, 1.0)

    def forward(self, rows: Tensor) -> Tensor:
        """Normalised `rows` `[n, width]`."""
        shift, scale = self._shift_and_scale()
        return (rows - shift) / scale

    def inverse(self, rows: Tensor) -> Tensor:
        """Takes normalised `rows` `[n, width]` back to the units of the input."""
        shift, scale = self._shift_and_scale()
        return rows * scale + shift
