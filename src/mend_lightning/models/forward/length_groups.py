"""The trunk pass in a few groups of rows of like lengths, so that short rows are not padded to the longest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.models.forward.attention import quick_backward
from mend_lightning.models.forward.device import is_synchronous
from mend_lightning.models.forward.head import HeadStates, states_at
from mend_lightning.models.forward.hooks import Delta, applied
from mend_lightning.models.forward.trunk import StackOutput, TrunkOutputs, replayed
from mend_lightning.models.inputs.positions import Positions
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.sharding.collectives import is_sharded

MOST_GROUPS = 6

# Groups must leave out as much of what one pass would run, what the further passes cost already taken off.
LEAST_SAVING = 0.05

# What a further pass costs, in tokens: every block is called again, and reads its weights again.
PASS_TOKENS = 32
_NARROWED = {"input_ids", "attention_mask"}
_KEPT = {"decoder_input_ids", "decoder_attention_mask"}


class _Unjoinable(Exception):
    """What blocks returned is not known to be of single rows; never leaves this file."""


def length_groups(lengths: Sequence[int], pass_tokens: int = PASS_TOKENS, most: int = MOST_GROUPS) -> list[list[int]]:
    """Rows in groups of like lengths, each to be padded to its own longest: the cheapest ones, the longest rows first.

    Args:
        lengths: of the rows.
        pass_tokens: what a further group costs, in tokens.
        most: groups at most.

    Returns:
        Indices of the rows of each group; one group where several would not save `LEAST_SAVING` of its tokens.

    Example:
        >>> length_groups([9, 90, 8, 80], pass_tokens=16)
        [[1, 3], [0, 2]]
        >>> length_groups([9, 10, 8, 9])
        [[0, 1, 2, 3]]
    """
    everything = [list(range(len(lengths)))]
    if not lengths:
        return everything
    whole = max(lengths) * len(lengths)
    if whole - sum(lengths) - pass_tokens < LEAST_SAVING * whole:
        return everything
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    tokens, bounds = _cheapest_cut([lengths[i] for i in order], pass_tokens, most)
    if whole - tokens < LEAST_SAVING * whole:
        return everything
    return [sorted(order[start:end]) for start, end in pairwise(bounds)]


def _cheapest_cut(lengths: Sequence[int], pass_tokens: int, most: int) -> tuple[int, list[int]]:
    """Tokens and bounds of the cheapest cut of `lengths`, which fall, into at most `most` stretches."""
    # Rows of one length stay together.
    starts = [i for i in range(len(lengths)) if i == 0 or lengths[i] != lengths[i - 1]] + [len(lengths)]
    best = {0: (0, [0])}
    for _ in range(most):
        further = dict(best)
        for start, (tokens, bounds) in best.items():
            for end in (end for end in starts if end > start):
                cost = tokens + lengths[start] * (end - start) + (pass_tokens if start else 0)
                if end not in further or cost < further[end][0]:
                    further[end] = cost, [*bounds, end]
        best = further
    return best[len(lengths)]


def trunk_groups(model: nn.Module, rows: Rows, skipped: int = 0) -> list[list[int]]:
    """The groups in which `rows` pass the trunk of `model`.

    One where lengths are not known on the host (to learn them would synchronize host and device), and where blocks are
    sharded: each pass would gather them again, and equally often on all processes.

    Args:
        model: the base model.
        rows: padded on the right.
        skipped: so many leading tokens of each row were run already.
    """
    mask = rows.inputs.get("attention_mask")
    known = set(rows.inputs) <= _NARROWED | _KEPT
    if mask is None or not known or not is_synchronous(mask.device) or is_sharded(model):
        return [list(range(len(rows)))]
    return length_groups((mask.sum(1) - skipped).tolist(), PASS_TOKENS, MOST_GROUPS)


def narrowed(rows: Rows, group: Sequence[int]) -> dict[str, Tensor]:
    """Model inputs of some of the rows, without what is padding in all of them; a decoder's are not narrowed.

    Example:
        >>> ids, mask = torch.tensor([[5, 0, 0], [5, 6, 7]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
        >>> rows = Rows({"input_ids": ids, "attention_mask": mask}, ids, torch.tensor([0, 1]), 2)
        >>> narrowed(rows, [0])["input_ids"].tolist()
        [[5]]
    """
    end = int(rows.inputs["attention_mask"][group].sum(1).max())
    return {name: ids[group, :end] if name in _NARROWED else ids[group] for name, ids in rows.inputs.items()}


def run_in_groups(
    run: Callable[[dict[str, Tensor]], TrunkOutputs], rows: Rows, groups: Sequence[Sequence[int]]
) -> TrunkOutputs:
    """What `run` records of `rows`, in a pass for each group; what it records is padded with zeros to one length.

    In one pass where a block returns something that cannot be put together row by row.

    Args:
        run: records the trunk's outputs for model inputs.
        rows: padded on the right.
        groups: from `trunk_groups`.
    """
    if len(groups) == 1:
        return run(dict(rows.inputs))
    # The first at full width, so that whatever it returns is as long as the rows are.
    parts = [run({name: ids[groups[0]] for name, ids in rows.inputs.items()})]
    if not parts[0].stacks:
        return TrunkOutputs(len(rows))
    parts += [run(narrowed(rows, group)) for group in groups[1:]]
    try:
        return _joined(parts, groups, len(rows))
    except _Unjoinable:
        return run(dict(rows.inputs))


def _joined(parts: Sequence[TrunkOutputs], groups: Sequence[Sequence[int]], rows: int) -> TrunkOutputs:
    index = [torch.tensor(group) for group in groups]
    stacks = {
        name: StackOutput(stack.blocks, _join([part.stacks[name].output for part in parts], index, rows))
        for name, stack in parts[0].stacks.items()
    }
    return TrunkOutputs(rows, stacks)


def _join(values: Sequence[Any], groups: Sequence[Tensor], rows: int) -> Any:
    """One value of all rows out of one a group; the group with the longest rows is the first."""
    first = values[0]
    if isinstance(first, tuple):
        return tuple(_join(items, groups, rows) for items in zip(*values))
    if isinstance(first, Tensor):
        return _join_tensors(values, groups, rows)
    if first is None:
        return None
    raise _Unjoinable


def _join_tensors(values: Sequence[Tensor], groups: Sequence[Tensor], rows: int) -> Tensor:
    counts = [len(group) for group in groups]
    first = values[0]
    if all(value.dim() == 3 and value.shape[0] == count for value, count in zip(values, counts)):
        joined = first.new_zeros(rows, *first.shape[1:])
        for group, value in zip(groups, values):
            joined[group, : value.shape[1]] = value
        return joined
    if max(counts) > 1 and all(value.dim() == 4 and value.shape[0] == 1 for value in values):
        # T5's position bias, the same in all rows; that of the longest rows holds the others'.
        return first
    raise _Unjoinable


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
