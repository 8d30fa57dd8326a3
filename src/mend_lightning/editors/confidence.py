"""How far an edit goes: just far enough for the model to be confident of the new answer.

The gradient of a log-likelihood says in which direction to go and not how far: δ at the logits is `p − y`, the same for an
answer that has probability 10⁻³ and for one that has 10⁻⁹. With one learned rate for all edits the easy ones overshoot, and
it is overshooting that harms unrelated facts. So each edit's `ΔW` is multiplied by a scale of its own: the smallest at which
the edited model gives the edit's own target the wanted probability. Only `z_edit` is looked at, and only the blocks above the
trunk run again. This is not in the MEND paper, and off by default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

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
SCALES = (0.25, 0.4, 0.63, 1.0, 1.6, 2.5, 4.0)
# So many tokens share a pass, whatever their scales: few rows at a time leave a processor idle, all of them take memory.
TOKENS_AT_ONCE = 4096


def check_confidence(confidence: float | None) -> None:
    """Raises ConfigError unless `confidence` is None or a probability between 0 and 1."""
    if confidence is not None and not 0 < confidence < 1:
        raise ConfigError(
            f"confidence is the probability that an edited model shall give the new answer; it must be between 0 and 1, "
            f"not {confidence}. None leaves every edit as large as the learned edit rate makes it."
        )


def target_nll(model: nn.Module, rows: Rows, where: Positions | None = None) -> Tensor:
    """−log p of every row's whole target, summed over its tokens: `[rows]` float32.

    Args:
        model: what is asked.
        rows: questions and targets.
        where: `rows.label_positions`, where they are known already.
    """
    where = where or rows.label_positions
    states, targets = states_at(model, rows, where), where.take(rows.labels)
    tokens = rows_sum(torch.ones_like(targets), where.row, len(rows))
    return torch.where(tokens > 0, head_nll(states, targets, where.row, len(rows)) * tokens, 0.0)


def worst_of_task(values: Tensor, rows: Rows) -> Tensor:
    """The largest of `values` `[rows]` in each task: `[tasks]`."""
    of_task = rows.task == torch.arange(rows.tasks, device=values.device)[:, None]
    return torch.where(of_task, values, -math.inf).amax(1)


@phase(CONFIDENCE)
@torch.no_grad()
def confident_scales(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    deltas: Mapping[str, Delta],
    z_edit: Rows,
    trunk: TrunkOutputs,
    confidence: float,
) -> Tensor:
    """The factor by which each task's deltas must be multiplied for the model to be confident of its targets.

    Args:
        model: the base model.
        layers: name -> module of the edited layers.
        deltas: name -> Delta of all tasks, at the learned edit rate.
        z_edit: the edits.
        trunk: the trunk's outputs for `z_edit`.
        confidence: wanted probability of a whole target; of several edits in a task, of the least probable one.

    Returns:
        `[tasks]` float32 between the first and the last of `SCALES`, interpolated between them. Where none is enough, the
        one that comes closest.
    """
    count = len(z_edit)
    together = all_reduce_min(max(1, TOKENS_AT_ONCE // z_edit.labels.numel()), model)
    tried = []
    for scales in _scales(z_edit.task.device).split(together):
        rows = torch.arange(count, device=z_edit.task.device).repeat(len(scales))
        repeated, factor = replace(z_edit, texts=()).part(rows), scales.repeat_interleave(count)
        where = joined([z_edit.label_positions.behind(count * i) for i in range(len(scales))])
        larger = {name: _ScaledRows(delta, factor, z_edit.task.repeat(len(scales))) for name, delta in deltas.items()}
        with replayed(trunk, rows), applied(layers, larger):
            nll = target_nll(model, repeated, where).view(len(scales), count)
        tried += [worst_of_task(values, z_edit) for values in nll]
    return first_crossing(torch.stack(tried), -math.log(confidence))


@cache
def _scales(device: torch.device) -> Tensor:
    """`SCALES` on the device, sent there once: such a copy is waited for."""
    # What is made in inference mode could not be used outside of it.
    with torch.inference_mode(False):
        return torch.tensor(SCALES, device=device)


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


def first_crossing(nll: Tensor, wanted: float) -> Tensor:
    """The smallest scale at which `nll` falls to `wanted`, for every task.

    Args:
        nll: `[len(SCALES), tasks]`, at each of `SCALES`.
        wanted: the negative log-likelihood to reach.

    Returns:
        `[tasks]`, geometrically interpolated in both; the scale of the lowest `nll` where it is never reached.

    Example:
        >>> nll = torch.tensor([9.0, 8.0, 6.0, 4.0, 1.0, 0.5, 3.0])[:, None]
        >>> [round(first_crossing(nll, wanted).item(), 2) for wanted in (20.0, 4.0, 2.0, 0.1)]
        [0.25, 1.0, 1.26, 2.5]
    """
    scales = _scales(nll.device).log()
    logs = nll.clamp(min=1e-12).log()
    reached = nll <= wanted
    # argmax of bools: the first that is true.
    above = torch.where(reached.any(0), reached.int().argmax(0), nll.argmin(0))
    below = (above - 1).clamp(min=0)
    high, low = (logs.gather(0, index[None])[0] for index in (above, below))
    between = reached.any(0) & (above > 0)
    share = torch.where(between, (low - math.log(wanted)) / (low - high).clamp(min=1e-12), 1.0)
    return (scales[below] + share * (scales[above] - scales[below])).exp()


def least_probability(model: nn.Module, rows: Rows) -> float:
    """The probability that `model` gives the least probable target of `rows`, which are of one task."""
    return math.exp(-float(worst_of_task(target_nll(model, rows), rows)))
