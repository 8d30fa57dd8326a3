"""Edits of a lower rank: the best approximation, and how far it is from the edit."""

from __future__ import annotations

import torch
from torch import Tensor

from mend_lightning.edits.deltas import LowRankDelta
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.hooks import Delta


def truncated(delta: Delta, rank: int | None = None, energy: float | None = None) -> tuple[LowRankDelta, float]:
    """The delta of a lower rank that is nearest to this one (singular value decomposition), and its distance.

    Args:
        delta: of a single task, low-rank or dense.
        rank: largest rank that is kept.
        energy: share of ‖ΔW‖² that must be kept, in (0, 1]; the smallest rank that does is taken. With both, the
            smaller rank.

    Returns:
        The truncated delta, float32, and ‖ΔW − truncated‖ / ‖ΔW‖ (Frobenius; 0 of a zero delta).

    Raises:
        ConfigError: neither rank nor energy is given, or one of them cannot be.

    Example:
        >>> delta = LowRankDelta(torch.eye(3)[None], torch.diag(torch.tensor([3.0, 4.0, 0.0]))[None])
        >>> smaller, error = truncated(delta, rank=1)
        >>> smaller.rank, round(error, 4)
        (1, 0.6)
    """
    _check(rank, energy)
    left, values, right = _singular(delta)
    kept = _kept(values, rank, energy)
    total = float(values.square().sum())
    # From the values that are left out, not as a difference of norms: small errors would be lost in it.
    lost = float(values[kept:].square().sum())
    root = values[:kept].sqrt()
    up, down = (left[:, :kept] * root).T, root[:, None] * right[:kept]
    return LowRankDelta(down[None].float(), up[None].float()), (lost / total) ** 0.5 if total else 0.0


def spectrum(delta: Delta) -> Tensor:
    """Singular values of ΔW of a single task, largest first, float64: `[rank]`.

    Example:
        >>> spectrum(LowRankDelta(torch.eye(2)[None], 2 * torch.eye(2)[None])).tolist()
        [2.0, 2.0]
    """
    return _singular(delta)[1]


def _singular(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """`ΔW = left diag(values) right` in float64: `[d_out, r]`, `[r]`, `[r, d_in]`."""
    if not isinstance(delta, LowRankDelta):
        return torch.linalg.svd(delta.dense()[0].double(), full_matrices=False)
    # upᵀ = Q_up R_up, downᵀ = Q_down R_down: the decomposition is one of a rank × rank matrix, never of ΔW.
    q_up, r_up = torch.linalg.qr(delta.up[0].double().T)
    q_down, r_down = torch.linalg.qr(delta.down[0].double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ left, values, right @ q_down.T


def _kept(values: Tensor, rank: int | None, energy: float | None) -> int:
    """How many singular values stay; at least one, for a rank of zero is no adapter."""
    kept = len(values) if rank is None else min(rank, len(values))
    if not bool(values.any()):
        return 1
    if energy is not None:
        share = values.square().cumsum(0) / values.square().sum()
        # The last share is 1 but for rounding, and must not be missed by it.
        share[-1] = 1.0
        kept = min(kept, int((share < energy).sum()) + 1)
    return max(kept, 1)


def _check(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise ConfigError(
            "Say how far to compress: rank (the largest rank to keep), or energy (share of ‖ΔW‖² to keep)."
        )
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1; it is {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy is a share of ‖ΔW‖² between 0 and 1, such as 0.99; it is {energy}.")
