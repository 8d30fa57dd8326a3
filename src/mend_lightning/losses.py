"""The losses of MEND as pure functions over gathered positions; none of them shifts or masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mend_lightning.types import IGNORED_LABEL


def align_labels(labels: Tensor, shift: bool) -> Tensor:
    """Aligns Hugging Face labels with the logits that predict them.

    Args:
        labels: `[rows, length]` int64, -100 where no loss looks.
        shift: True where `logits[:, t]` predicts `labels[:, t + 1]` (causal models; also BART as the
            original code trained it). T5 needs no shift.

    Returns:
        `[rows, length]` int64: entry `t` is what `logits[:, t]` must predict.

    Example:
        >>> align_labels(torch.tensor([[-100, 5, 6]]), shift=True).tolist()
        [[5, 6, -100]]
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL) if shift else labels


def mean_by_task(values: Tensor, task: Tensor, tasks: int) -> Tensor:
    """Mean of `values` `[n]` within each task: `[tasks]` float. A task without values gives NaN.

    Example:
        >>> mean_by_task(torch.tensor([1., 3., 5.]), torch.tensor([0, 0, 1]), 2).tolist()
        [2.0, 5.0]
    """
    sums = values.new_zeros(tasks).index_add(0, task, values)
    counts = values.new_zeros(tasks).index_add(0, task, torch.ones_like(values))
    return sums / counts


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
    log_p = F.log_softmax(base_logits.float(), -1)
    log_q = F.log_softmax(edited_logits.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def is_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each position's most probable id is the target: `[n]` bool."""
    if logits.shape[-1] == 1:
        return (logits[:, 0] > 0) == (targets > 0.5)
    return logits.argmax(-1) == targets
