"""Passes above the trunk in groups of rows of like lengths, as the trunk's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mend_lightning.edits.deltas import Delta, applied
from mend_lightning.models.forward.attention import quick_backward
from mend_lightning.models.forward.head import HeadStates, states_at
from mend_lightning.models.forward.length_groups import narrowed, trunk_groups
from mend_lightning.models.forward.trunk import TrunkOutputs, replayed
from mend_lightning.models.inputs.positions import Positions
from mend_lightning.models.inputs.rows import Rows


def states_above(
    model: nn.Module,
    rows: Rows,
    where: Positions,
    trunk: TrunkOutputs,
    layers: Mapping[str, nn.Module],
    deltas: Mapping[str, Delta] | None = None,
) -> HeadStates:
    """What the head reads at some positions of rows whose trunk outputs are known; `states_at` of the blocks above.

    Args:
        model: the base model.
        rows: its inputs, padded on the right.
        where: the positions.
        trunk: the trunk's outputs for `rows`.
        layers: name -> module of the edited layers.
        deltas: name -> Delta that the model has meanwhile; None: the base model.
    """
    groups = trunk_groups(model, rows)
    if len(groups) == 1:
        with replayed(trunk, slice(None)), applied(layers, deltas or {}, rows.task_of_row), quick_backward(model, rows):
            return states_at(model, rows, where)
    parts, order = [], []
    for group in groups:
        part, part_trunk = _of_group(rows, trunk, group)
        inside, places = _inside(where, group, len(rows))
        task = rows.task_of_row if rows.task_of_row is None else part.task
        with replayed(part_trunk, slice(None)), applied(layers, deltas or {}, task), quick_backward(model, part):
            parts.append(states_at(model, part, inside))
        order.append(places)
    # Back into the order of `where`.
    back = torch.cat(order).argsort()
    return replace(parts[0], hidden=torch.cat([part.hidden for part in parts]).index_select(0, back))


def _of_group(rows: Rows, trunk: TrunkOutputs, group: Sequence[int]) -> tuple[Rows, TrunkOutputs]:
    """The group's rows and trunk outputs, without what is padding in all of them."""
    part, inputs = replace(rows, texts=()).part(torch.tensor(group)), narrowed(rows, group)
    pairs = {(part.inputs[name].shape[1], ids.shape[1]) for name, ids in inputs.items()}
    widths = dict(pairs)
    if len(widths) < len(pairs):
        # Input and output are equally long, and one of them is narrowed: which states are whose, is not known.
        return part, trunk.part(group, {})
    labels = part.labels[:, : widths.get(part.labels.shape[1], part.labels.shape[1])]
    return replace(part, inputs=inputs, labels=labels), trunk.part(group, widths)


def _inside(where: Positions, group: Sequence[int], rows: int) -> tuple[Positions, Tensor]:
    """The positions in a group's rows, counted within it; and which of all positions they are."""
    number = torch.full((rows,), -1)
    number[torch.tensor(group)] = torch.arange(len(group))
    places = (number[where.row] >= 0).nonzero()[:, 0]
    return Positions(number[where.row[places]], where.column[places]), places
