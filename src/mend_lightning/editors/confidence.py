"""How far an edit goes: just far enough for the model to be confident of the new answer.

The gradient of a log-likelihood says in which direction to go and not how far: δ at the logits is `p − y`, the same for an
answer that has probability 10⁻³ and for one that has 10⁻⁹. With one learned rate for all edits the easy ones overshoot, and
it is overshooting that harms unrelated facts. So each edit's `ΔW` is multiplied by a scale of its own: the smallest at which
the edited model gives the edit's own target the wanted probability. Facts unlike those that the rate was learned on need
another size altogether, so the search goes over powers of two far to either side, and then once more between the two that it
found. Only `z_edit` is looked at, and only the blocks above the trunk run again. This is not in the MEND paper, and off by
default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.head import head_nll, states_at
from mend_lightning.models.forward.hooks import Delta, applied
from mend_lightning.models.forward.losses import rows_sum
from mend_lightning.models.forward.phases import CONFIDENCE, phase
from mend_lightning.models.forward.trunk import TrunkOutputs, replayed
from mend_lightning.models.inputs.positions import Positions, joined
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.sharding.collectives import all_reduce_min

# Multiples of the learned edit rate that are tried. Always all of them: under FSDP every process must run the same
# number of forward passes, and a loop that stops early would wait for the device.
SCALES = tuple(2.0**power for power in range(-8, 9))
# Then, for each edit, these multiples of the largest scale that was too small.
STEPS = tuple(2.0 ** (quarter / 4) for quarter in range(1, 4))
# So many tokens share a pass, whatever their scales: few rows at a time leave a processor idle, all of them take memory.
TOKENS_AT_ONCE = 4096
# Of scales that reach nothing, the smallest whose nll is within so much of the lowest.
WITHIN = 1.3
# In place of what is not finite: an edit so large that the model overflows reaches nothing.
_UNREACHABLE = 1e30


def check_confidence(confidence: float | None) -> None:
    """Raises ConfigError unless `confidence` is None or a probability between 0 and 1."""
    if confidence is not None and not 0 < confidence < 1:
        raise ConfigError(
            f"confidence is the probability that an edited model shall give the new answer; it must be between 0 and 1, "
            f"not {confidence}. None leaves every edit as large as the learned edit rate makes it."
        )


@dataclass(frozen=True)
class TargetScores:
    """How a model scores targets, of rows or of tasks; several scales may stand in front.

    Attributes:
        nll: `[..., rows]` float32, −log p of the whole target, summed over its tokens.
        end: `[..., rows]` float32, −log p of its last token alone: of the stop, where answers have one.
    """

    nll: Tensor
    end: Tensor

    def worst_of_task(self, rows: Rows) -> TargetScores:
        """The largest of either in each task: `[..., tasks]`."""
        of_task = rows.task == torch.arange(rows.tasks, device=self.nll.device)[:, None]
        nll, end = (torch.where(of_task, each[..., None, :], -math.inf).amax(-1) for each in (self.nll, self.end))
        return TargetScores(nll, end)


@dataclass(frozen=True)
class ConfidentScales:
    """What `confident_scales` found.

    Attributes:
        scale: `[tasks]` float32.
        reached: `[tasks]` bool, whether the confidence is reached at any size.
    """

    scale: Tensor
    reached: Tensor


def target_scores(model: nn.Module, rows: Rows, where: Positions | None = None) -> TargetScores:
    """How `model` scores every row's target; 0 for a row without any.

    Args:
        model: what is asked.
        rows: questions and targets.
        where: `rows.label_positions`, where they are known already.
    """
    where = where or rows.label_positions
    states, targets, places = states_at(model, rows, where), where.take(rows.labels), len(where)
    # Each position a task of its own: no mean is taken.
    nll = head_nll(states, targets, torch.arange(places, device=targets.device), places)
    return TargetScores(rows_sum(nll, where.row, len(rows)), rows_sum(nll * where.ends, where.row, len(rows)))


@phase(CONFIDENCE)
@torch.no_grad()
def confident_scales(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    deltas: Mapping[str, Delta],
    z_edit: Rows,
    trunk: TrunkOutputs,
    confidence: float,
    under: Mapping[str, Delta] | None = None,
) -> ConfidentScales:
    """The factor by which each task's deltas must be multiplied for the model to be confident of its targets.

    Args:
        model: the base model.
        layers: name -> module of the edited layers.
        deltas: name -> Delta of all tasks, at the learned edit rate.
        z_edit: the edits.
        trunk: the trunk's outputs for `z_edit`.
        confidence: wanted probability of a whole target; of several edits in a task, of the least probable one.
        under: name -> Delta that the model has already, of the steps before; it stays as it is.

    Returns:
        Scales between the first and the last of `SCALES`; see `first_crossing` and `best_scale`.
    """
    wanted, device = -math.log(confidence), z_edit.task.device
    tried = partial(_scores_at, model, layers, deltas, under or {}, z_edit, trunk)
    coarse = _constants(SCALES, device)[:, None].expand(-1, z_edit.tasks)
    found = tried(coarse)
    below = last_below(found.nll, wanted)
    between = coarse.gather(0, below[None]) * _constants(STEPS, device)[:, None]
    ends = torch.stack([below, (below + 1).clamp(max=len(SCALES) - 1)])
    scales, nll = coarse.gather(0, ends), found.nll.gather(0, ends)
    fine = first_crossing(
        torch.cat([scales[:1], between, scales[1:]]), torch.cat([nll[:1], tried(between).nll, nll[1:]]), wanted
    )
    reached = (found.nll <= wanted).any(0)
    return ConfidentScales(torch.where(reached, fine, best_scale(coarse, found)), reached)


def _scores_at(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    deltas: Mapping[str, Delta],
    under: Mapping[str, Delta],
    z_edit: Rows,
    trunk: TrunkOutputs,
    scales: Tensor,
) -> TargetScores:
    """The worst scores `[scales, tasks]` of each task's targets under multiples `scales` `[scales, tasks]` of its deltas."""
    count = len(z_edit)
    together = all_reduce_min(max(1, TOKENS_AT_ONCE // z_edit.labels.numel()), model)
    nll, end = [], []
    for part in scales.split(together):
        rows = torch.arange(count, device=scales.device).repeat(len(part))
        repeated, factor = replace(z_edit, texts=()).part(rows), part[:, z_edit.task].flatten()
        where = joined([z_edit.label_positions.behind(count * i) for i in range(len(part))])
        task = z_edit.task.repeat(len(part))
        larger = {name: _ScaledRows(delta, factor, task) for name, delta in deltas.items()}
        with replayed(trunk, rows), applied(layers, under, task), applied(layers, larger):
            scores = target_scores(model, repeated, where)
        nll.append(scores.nll.view(len(part), count).nan_to_num(_UNREACHABLE, _UNREACHABLE))
        end.append(scores.end.view(len(part), count).nan_to_num(_UNREACHABLE, _UNREACHABLE))
    return TargetScores(torch.cat(nll), torch.cat(end)).worst_of_task(z_edit)


@cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`values` on the device, sent there once: such a copy is waited for."""
    # What is made in inference mode could not be used outside of it.
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


@dataclass(frozen=True)
class _ScaledRows:
    """A delta of which every row sees a multiple.

    Attributes:
        delta: of all tasks.
        factor: `[rows]`.
        task: `[rows]` int64, whose ΔW each row sees.
    """

    delta: Delta
    factor: Tensor
    task: Tensor

    @property
    def tasks(self) -> int:
        return self.delta.tasks

    def output(self, x: Tensor, task_of_row: Tensor | None = None) -> Tensor:
        product = self.delta.output(x, self.task)
        return product * self.factor.view(-1, *(1,) * (product.dim() - 1))


def last_below(nll: Tensor, wanted: float) -> Tensor:
    """The scale in front of the first at which `nll` `[scales, tasks]` falls to `wanted`; the first where there is none.

    Example:
        >>> last_below(torch.tensor([[5.0, 0.0], [4.0, 0.0], [1.0, 0.0]]), 2.0).tolist()
        [1, 0]
    """
    # argmax of bools: the first that is true.
    return ((nll <= wanted).int().argmax(0) - 1).clamp(min=0)


def first_crossing(scales: Tensor, nll: Tensor, wanted: float) -> Tensor:
    """The smallest scale at which `nll` falls to `wanted`, for every task.

    Args:
        scales: `[scales, tasks]`, ascending.
        nll: `[scales, tasks]`, at each of them.
        wanted: the negative log-likelihood to reach.

    Returns:
        `[tasks]`, geometrically interpolated in both; the first scale where `nll` begins below, or never gets there.

    Example:
        >>> scales = torch.tensor([0.5, 1.0, 2.0, 4.0])[:, None]
        >>> nll = torch.tensor([6.0, 4.0, 1.0, 3.0])[:, None]
        >>> [round(first_crossing(scales, nll, wanted).item(), 2) for wanted in (20.0, 4.0, 2.0)]
        [0.5, 1.0, 1.41]
    """
    above = (nll <= wanted).int().argmax(0)
    below = (above - 1).clamp(min=0)
    logs, scales = nll.clamp(min=1e-12).log(), scales.log()
    high, low = (logs.gather(0, index[None])[0] for index in (above, below))
    start, stop = (scales.gather(0, index[None])[0] for index in (below, above))
    share = ((low - math.log(wanted)) / (low - high).clamp(min=1e-12)).clamp(0, 1)
    return (start + share * (stop - start)).exp()


def best_scale(scales: Tensor, scores: TargetScores) -> Tensor:
    """The scale of the most probable targets, for edits that never reach their confidence.

    Large edits say one token for ever: they give the answer's first tokens a high probability and its end none. So only
    scales at which the answer ends rather than not are looked at, while there are any. And what grows without an end to little
    avail does harm elsewhere: of scales that do about as well the smallest is taken.

    Args:
        scales: `[scales, tasks]`.
        scores: `[scales, tasks]`, at each of them.

    Returns:
        `[tasks]`.

    Example:
        >>> scales = torch.tensor([1.0, 2.0, 4.0])[:, None]
        >>> nll, end = torch.tensor([5.0, 3.0, 2.0])[:, None], torch.tensor([0.1, 0.3, 1.9])[:, None]
        >>> best_scale(scales, TargetScores(nll, end)).tolist()
        [2.0]
    """
    endless = scores.end > math.log(2)
    nll = torch.where(endless & ~endless.all(0), math.inf, scores.nll)
    return scales.gather(0, (nll <= WITHIN * nll.amin(0)).int().argmax(0)[None])[0]


def least_probability(model: nn.Module, rows: Rows) -> float:
    """The probability that `model` gives the least probable target of `rows`, which are of one task."""
    return math.exp(-float(target_scores(model, rows).worst_of_task(rows).nll))
