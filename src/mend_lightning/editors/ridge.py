"""From the edit factors of single tokens to one `ΔW` by ridge regression (MALMEN), instead of MEND's plain sum.

Tokens of one edit, and many edits made at once, have inputs that resemble each other, so the rank-one updates of a plain sum
disturb each other's effects. MALMEN (Tan, Zhang, Fu, ICLR 2024, arXiv 2311.04661, equation 4) asks each token's update only
for its effect on its own input, `d_t = ΔW_t u_t`, and takes the `ΔW` that comes closest to all of these effects:

    ΔW = argmin Σ_t ‖ΔW u_t − d_t‖² + λ ‖ΔW‖²  =  D (UᵀU + λI)⁻¹ Uᵀ  =  D Uᵀ (UUᵀ + λI)⁻¹

with the inputs u_t as columns of U and the effects as columns of D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mend_lightning.editors.factors import Factors, pack_tasks, task_slots
from mend_lightning.edits.deltas import LowRankDelta


def ridge_delta(u: Tensor, delta: Tensor, factors: Factors, rate: Tensor, damping: Tensor) -> LowRankDelta:
    """The ridge regression on the effects `d_t = −α (ũ_tᵀ u_t) δ̃_t`, for each task.

    Solved in the space of tokens, or of features where a task has more tokens than features: the smaller system.

    Args:
        u: `[tokens, d_in]` ũ; delta: `[tokens, d_out]` δ̃.
        factors: what they were made of: the inputs u_t, and the task of each token.
        rate: scalar α.
        damping: scalar λ.

    Example:
        >>> factors = Factors(torch.eye(2), torch.ones(2, 1), torch.zeros(2, dtype=torch.long), tasks=1)
        >>> ridge_delta(factors.u, factors.delta, factors, torch.tensor(1.0), torch.tensor(1.0)).dense().tolist()
        [[[-0.5, -0.5]]]
    """
    effect = -rate * (u * factors.u).sum(-1, keepdim=True) * delta
    slot, rank = factors.place or task_slots(factors.task, factors.tasks)
    place = (factors.task, factors.tasks, rank, slot)
    inputs, effects = pack_tasks(factors.u, *place), pack_tasks(effect, *place)
    # In float64: similar inputs make a Gram matrix that is singular but for λ, and float32 would find it indefinite.
    wide, effects = inputs.double(), effects.double()
    if rank <= inputs.shape[-1]:
        up = _solve(wide @ wide.mT, effects, damping)
        return LowRankDelta(down=inputs, up=up.to(inputs.dtype))
    down = _solve(wide.mT @ wide, _identity(wide), damping)
    return LowRankDelta(down=down.to(inputs.dtype), up=(wide.mT @ effects).to(inputs.dtype))


def _solve(gram: Tensor, right: Tensor, damping: Tensor) -> Tensor:
    """`(gram + λI)⁻¹ right`, both `[tasks, n, ·]` float64, by a Cholesky factor: the matrix is positive definite."""
    # torch.linalg.cholesky waits for the device to see whether it failed, as it does of what is not finite.
    factor, failed = torch.linalg.cholesky_ex(gram + damping.double() * _identity(gram))
    return torch.cholesky_solve(right, torch.where(failed[:, None, None] > 0, torch.nan, factor))


def _identity(like: Tensor) -> Tensor:
    width = like.shape[-1]
    return torch.eye(width, dtype=like.dtype, device=like.device).expand(like.shape[0], width, width)
