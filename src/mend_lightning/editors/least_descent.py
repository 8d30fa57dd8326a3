"""Edits that go down their own gradient, however unlike the calibration's they are.

Preconditioning replaces an input u by what it and its rephrases have of their own, `u (B + …)⁻¹ C (A + …)⁻¹`
(`InputPreconditioner`). That matrix is not positive definite, so for inputs unlike those that it was estimated on ΔW can be all
but orthogonal to the gradient, or point up it: no size makes the model confident then, and the search ends at a large one that
does harm. `A⁻¹u` alone always points down. So where the cosine between an edit and steepest descent is small, that is mixed in
until it is not. Not in the MEND paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mend_lightning.editors.factors import Factors, pack_tasks, task_slots
from mend_lightning.errors import ConfigError

# Halvings of the interval in which the share lies.
_HALVINGS = 24


def check_least_descent(least_descent: float | None, precondition: float | None) -> None:
    """Raises ConfigError unless `least_descent` is None or a cosine between 0 and 1, beside a preconditioning."""
    if least_descent is None:
        return
    if not 0 < least_descent < 1:
        raise ConfigError(
            f"least_descent is the least cosine of an edit; it must be between 0 and 1, not {least_descent}."
        )
    if precondition is None:
        raise ConfigError(
            "least_descent mends edits that preconditioning turned away: set precondition (its damping) as well."
        )


def descending(u: Tensor, plain: Tensor, delta: Tensor, factors: Factors, least: float) -> Tensor:
    """The inputs `u` of each task, moved towards `plain` as little as makes `Σ_t delta_t u_tᵀ` descend.

    Args:
        u: `[tokens, d_in]`, the preconditioned ũ.
        plain: `[tokens, d_in]`, `A⁻¹ũ`, up to a factor.
        delta: `[tokens, d_out]`, δ̃.
        factors: the gradient's own, `∇W = Σ_t delta_t u_tᵀ`.
        least: cosine between the two sums that a task must have; a task that has it keeps its `u`, bit for bit.

    Returns:
        `[tokens, d_in]`; of a task that does not descend with `plain` either, `plain`, if that is nearer to it.

    Example:
        >>> one = torch.eye(2)[:1]
        >>> factors = Factors(one, torch.ones(1, 1), torch.tensor([0]), tasks=1)
        >>> descending(torch.eye(2)[1:], one, torch.ones(1, 1), factors, least=0.6)
        tensor([[0.4286, 0.5714]])
    """
    share, ratio = _share(u, plain, delta, factors, least)
    share, ratio = (each[factors.task][:, None].to(u.dtype) for each in (share, ratio))
    return torch.where(share > 0, (1 - share) * u + share * ratio * plain, u)


@torch.no_grad()
def _share(u: Tensor, plain: Tensor, delta: Tensor, factors: Factors, least: float) -> tuple[Tensor, Tensor]:
    """`[tasks]` each: the share of `plain`, and how many times as long as the edit of `plain` that of `u` is."""
    slot, rank = factors.place or task_slots(factors.task, factors.tasks)
    # Tokens that are here only because finding out would synchronize host and device.
    delta = delta if factors.kept is None else delta * factors.kept[:, None]
    given = (delta, u, plain, factors.delta, factors.u)
    of_edit, own, other, of_gradient, seen = (
        pack_tasks(each.double(), factors.task, factors.tasks, rank, slot) for each in given
    )
    edit, towards, gradient = (of_edit, own), (of_edit, other), (of_gradient, seen)
    size, length, slope = (_product(each, each).sqrt().clamp(min=1e-300) for each in (edit, towards, gradient))
    before, with_plain = _product(edit, gradient) / (size * slope), _product(towards, gradient) / (length * slope)
    between = _product(edit, towards) / (size * length)
    low, high = torch.zeros_like(before), torch.ones_like(before)
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        norm = ((1 - share).square() + share.square() + 2 * share * (1 - share) * between).clamp(min=0).sqrt()
        enough = (1 - share) * before + share * with_plain >= least * norm
        low, high = torch.where(enough, low, share), torch.where(enough, share, high)
    needed = (before < least) & (with_plain > before)
    return torch.where(needed, high, 0.0), size / length


def _product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """`⟨Σ_t a_t u_tᵀ, Σ_s b_s v_sᵀ⟩` of every task: `[tasks]`."""
    return ((one[0] @ other[0].mT) * (one[1] @ other[1].mT)).sum((-2, -1))
