"""Puts a batch's trunk outputs together: rows that come from the disk, and rows that were computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mend_lightning.models.forward.trunk import StackOutput, TrunkOutputs
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.layers import find_stacks
from mend_lightning.training.trunk_cache.observe import TrunkShape, first_block_more, with_more
from mend_lightning.training.trunk_cache.row_keys import MASK_OF


def trimmed(rows: Rows) -> Rows:
    """Without the padding behind the longest of the rows."""
    inputs = dict(rows.inputs)
    for ids, mask in MASK_OF.items():
        if mask in inputs:
            length = int(inputs[mask].bool().any(0).nonzero().max()) + 1
            inputs |= {name: inputs[name][:, :length] for name in (ids, mask)}
    return replace(rows, inputs=inputs)


def split_outputs(trunk: TrunkOutputs, shape: TrunkShape, rows: Rows) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stack -> its hidden states `[rows, length, width]`, 0 at padding; and stack -> what its blocks returned behind them."""
    states: dict[str, Tensor] = {}
    behind: dict[str, Any] = {}
    for name, stack in trunk.stacks.items():
        plain = isinstance(stack.output, Tensor)
        hidden, behind[name] = (stack.output, None) if plain else (stack.output[0], stack.output[1:])
        mask = rows.inputs.get(MASK_OF[shape.stacks[name].positions])
        states[name] = hidden if mask is None else hidden.masked_fill(~mask.bool()[..., None], 0)
    return states, behind


def from_disk(
    name: str, shape: TrunkShape, rows: Rows, keys: Sequence[bytes], found: Mapping[bytes, Mapping[str, np.ndarray]]
) -> Tensor:
    """The hidden states of a stack of rows that were found, on the rows' device: `[rows, length, width]`, elsewhere 0."""
    stack = shape.stacks[name]
    ids = rows.inputs[stack.positions]
    size = (*ids.shape, stack.width)
    if not found:
        return torch.zeros(size, dtype=stack.dtype, device=ids.device)
    hidden = torch.zeros(size, dtype=stack.dtype, pin_memory=ids.device.type == "cuda")
    raw = hidden.view(torch.uint8).numpy()
    for row, key in enumerate(keys):
        if key in found:
            data = found[key][name]
            raw[row, : len(data)] = data
    return hidden.to(ids.device, non_blocking=True)


def put_computed(hidden: Tensor, computed: Tensor, keys: Sequence[bytes], computed_keys: Sequence[bytes]) -> None:
    """Writes computed rows to all places where their keys are."""
    number = {key: i for i, key in enumerate(computed_keys)}
    pairs = [(row, number[key]) for row, key in enumerate(keys) if key in number]
    to, of = torch.tensor(pairs, device=hidden.device).unbind(1)
    hidden[to, : computed.shape[1]] = computed[of]


def joined_outputs(
    model: nn.Module, shape: TrunkShape, rows: Rows, hidden: Mapping[str, Tensor], more: Mapping[str, Any]
) -> TrunkOutputs:
    """What `run_trunk` returns for the rows, of their hidden states.

    Args:
        model: the base model.
        shape: of its trunk.
        rows: the batch.
        hidden: stack -> states of all rows.
        more: stack -> what its blocks return behind them for these rows, where it is known; else the first block runs.
    """
    stacks = find_stacks(model)
    done: dict[str, StackOutput] = {}
    for name, stack in shape.stacks.items():
        if name in more:
            behind = more[name]
        else:
            behind = first_block_more(model, rows.inputs, done, name) if stack.makes_tensors else stack.more
        done[name] = StackOutput(list(stacks[name][: stack.blocks]), with_more(hidden[name], behind))
    return TrunkOutputs(len(rows), done)
