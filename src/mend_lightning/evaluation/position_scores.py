"""How the base and the edited model predict label positions, a few at a time: no matrix of positions and vocabulary in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mend_lightning.models.forward.head import HeadStates

# As many fit into a processor's cache beside what is made of them: 270 of 49,152 logits took 57 ms 4 at a time, 82 ms 16
# at a time and 99 ms 32 at a time, and 330 ms in one pass for each number.
POSITIONS = 4


@dataclass(frozen=True)
class PositionScores:
    """Scores of n positions.

    Attributes:
        nll: `[n]` float32, negative log-likelihood of the target.
        best: `[n]` int64, the most probable id.
        hit: `[n]` bool, whether that is the target.
    """

    nll: Tensor
    best: Tensor
    hit: Tensor


def score_positions(states: HeadStates, targets: Tensor) -> PositionScores:
    """Scores of a model at n positions.

    Args:
        states: at the positions.
        targets: `[n]` ids, or 0 and 1 for a binary classifier.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        >>> score_positions(HeadStates(logits, lambda hidden: hidden, at_once=2), torch.tensor([1, 1])).hit.tolist()
        [True, False]
    """
    found = [_scores(logits, targets[rows]) for rows, (logits,) in _few_at_a_time(states)]
    return _joined([scores for scores, _ in found], targets)


def compare_positions(
    before: HeadStates, after: HeadStates, targets: Tensor
) -> tuple[PositionScores, PositionScores, Tensor]:
    """Scores of two models at the same positions, and KL(before ‖ after) of each position, `[n]` float32 in nats."""
    befores, afters, kls = [], [], []
    for rows, (old, new) in _few_at_a_time(before, after):
        (old_scores, log_p), (new_scores, log_q) = _scores(old, targets[rows]), _scores(new, targets[rows])
        befores.append(old_scores)
        afters.append(new_scores)
        kls.append((log_p.exp() * log_p.sub_(log_q)).sum(-1))
    return (
        _joined(befores, targets),
        _joined(afters, targets),
        torch.cat([targets.new_zeros(0, dtype=torch.float32), *kls]),
    )


def _few_at_a_time(*states: HeadStates) -> Iterator[tuple[slice, list[Tensor]]]:
    """Which positions, and the float32 logits of each of `states` there: `[positions, vocabulary]`."""
    # The head's matrix is read for each part of `hidden`: that part may be larger.
    step = min(each.at_once for each in states)
    for start in range(0, len(states[0]), step):
        logits = [each.logits_of(each.hidden[start : start + step]) for each in states]
        for i in range(0, len(logits[0]), POSITIONS):
            few = [_of_classes(each[i : i + POSITIONS].float()) for each in logits]
            yield slice(start + i, start + i + len(few[0])), few


def _of_classes(logits: Tensor) -> Tensor:
    """A binary classifier's logit `[n, 1]` as the logits of both classes; others as they are."""
    return F.pad(logits, (1, 0)) if logits.shape[-1] == 1 else logits


def _scores(logits: Tensor, targets: Tensor) -> tuple[PositionScores, Tensor]:
    """Scores, and the log-probabilities. Not argmax: it takes twice the time of max on CPUs."""
    log_p, best, targets = logits.log_softmax(-1), logits.max(-1).indices, targets.long()
    return PositionScores(-log_p.gather(1, targets[:, None])[:, 0], best, best == targets), log_p


def _joined(parts: list[PositionScores], targets: Tensor) -> PositionScores:
    none = targets[:0]
    return PositionScores(
        torch.cat([none.float(), *(each.nll for each in parts)]),
        torch.cat([none.long(), *(each.best for each in parts)]),
        torch.cat([none.bool(), *(each.hit for each in parts)]),
    )
