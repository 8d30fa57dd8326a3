"""The losses of MEND as pure functions over gathered positions; none of them shifts or masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def mean_by_task(values: Tensor, task: Tensor, tasks: int) -> Tensor:
    """Mean of `values` `[n]` within each task: `[tasks]` float. A task without values gives NaN.

    Example:
        >>> mean_by_task(torch.tensor([1., 3., 5.]), torch.tensor([0, 0, 1]), 2).tolist()
        [2.0, 5.0]
    """
    sums = values.new_zeros(tasks).index_add(0, task, values)
    counts = values.new_zeros(tasks).index_add(0, task, torch.ones_like(values))
    return sums / counts


def mean_shares(task: Tensor, tasks: int) -> Tensor:
    """The weight of every value in the mean of its task: `[n]` float32.

    Example:
        >>> mean_shares(torch.tensor([0, 0, 1]), 2).tolist()
        [0.5, 0.5, 1.0]
    """
    return _counts(task, tasks).reciprocal().index_select(0, task)


def sum_shares(weighted: Tensor, task: Tensor, tasks: int) -> Tensor:
    """`mean_by_task` of values that were multiplied by `mean_shares` already."""
    sums = weighted.new_zeros(tasks).index_add(0, task, weighted)
    return torch.where(_counts(task, tasks) > 0, sums, torch.nan)


def _counts(task: Tensor, tasks: int) -> Tensor:
    # Not bincount: it synchronizes host and device, to learn how many there are.
    return torch.zeros(tasks, device=task.device).index_add(0, task, torch.ones(task.shape[0], device=task.device))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target: `[n]` float32.

    Args:
        logits: `[n, vocabulary]`; or `[n, 1]` for a binary classifier (one logit, Bernoulli).
        targets: `[n]` ids, or 0/1 for a binary classifier.
    """
    logits = logits.float()
    if logits.shape[-1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], targets.float(), reduction="none")
    return F.cross_entropy(logits, targets.long(), reduction="none")


def token_kl(base_logits: Tensor, edited_logits: Tensor) -> Tensor:
    """KL(base ‖ edited) of each position: `[n]` float32, in nats.

    Computed in float32 whatever the logits' dtype: a good edit leaves differences that bfloat16
    cannot hold. One logit means a Bernoulli (classifier), as in the original code.

    Example:
        >>> bool(token_kl(torch.zeros(1, 4), torch.zeros(1, 4)) == 0)
        True
    """
    if base_logits.shape[-1] == 1:
        base_logits, edited_logits = (
            torch.cat([torch.zeros_like(logits), logits], -1) for logits in (base_logits, edited_logits)
        )
    return _Divergence.apply(base_logits.detach(), edited_logits)


class _Divergence(torch.autograd.Function):
    """KL(softmax(base) ‖ softmax(edited)) by position, a few positions at a time.

    Autograd would keep four float32 matrices of positions × vocabulary. The gradient is known, `q − p`, so one is
    enough. With `F.kl_div` the losses of 400 positions at GPT-2's head take twice the memory, in head.py's parts of 166
    positions too (224 instead of 112 MB; bfloat16 192 instead of 67). No gradient goes to the base's logits.
    """

    POSITIONS = 16

    @staticmethod
    def forward(ctx: Any, base: Tensor, edited: Tensor) -> Tensor:
        values = torch.empty(base.shape[0], dtype=torch.float32, device=base.device)
        gradient = torch.empty_like(edited) if ctx.needs_input_grad[1] else None
        for start in range(0, base.shape[0], _Divergence.POSITIONS):
            rows = slice(start, start + _Divergence.POSITIONS)
            log_p, log_q = (F.log_softmax(logits[rows].float(), -1) for logits in (base, edited))
            p = log_p.exp()
            values[rows] = (p * (log_p - log_q)).sum(-1)
            if gradient is not None:
                gradient[rows] = log_q.exp_().sub_(p)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grad[:, None].to(gradient.dtype)


def is_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each position's most probable id is the target: `[n]` bool."""
    if logits.shape[-1] == 1:
        return (logits[:, 0] > 0) == (targets > 0.5)
    return logits.argmax(-1) == targets


def rows_all_true(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Whether all of a row's values are true: `[rows]` bool. A row without values counts as true.

    Args:
        values: `[n]` bool; row: `[n]` int64, the row of each value.

    Example:
        >>> rows_all_true(torch.tensor([True, False, True]), torch.tensor([0, 0, 1]), 2).tolist()
        [False, True]
    """
    misses = torch.zeros(rows, device=values.device).index_add(0, row, (~values).float())
    return misses == 0


def rows_sum(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sum of each row's values: `[rows]` float32."""
    return torch.zeros(rows, device=values.device).index_add(0, row, values.float())
