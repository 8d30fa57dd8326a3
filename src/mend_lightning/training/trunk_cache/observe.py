"""What a model's trunk is and returns, found out by running it on a few tokens; nothing is derived from names.

Blocks of some models (T5) return more than hidden states, and what that is depends on the rows' masks and lengths. The
first block makes it and all blocks hand it on, so it can be had by running the first block alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mend_lightning.errors import MendError
from mend_lightning.models.forward.trunk import StackOutput, TrunkOutputs, record_trunk, replayed
from mend_lightning.models.layers import find_stacks

# Two rows, the second one padded; ids that every vocabulary has.
_IDS, _MASK = [[0, 1, 0, 1, 1], [1, 0, 1, 0, 0]], [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
_DECODER_IDS, _DECODER_MASK = [[0, 1, 1], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]
_OTHER_DECODER_IDS = [[1, 0, 0], [0, 1, 0]]
_KNOWN_INPUTS = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
# What a row's neighbours and padding may change, in parts of its size: rounding, in any precision.
_ROUNDING = 0.1


class NotCacheable(MendError, ValueError):
    """The trunk's outputs of a row cannot be kept apart from its batch; says why."""


@dataclass(frozen=True)
class StackShape:
    """What the trunk of one stack returns.

    Attributes:
        blocks: number of blocks of the stack that are trunk.
        positions: name of the ids whose positions its hidden states have.
        width, dtype: of the hidden states.
        more: what its blocks return behind the hidden states, of the rows it was observed on; None: nothing.
    """

    blocks: int
    positions: str
    width: int
    dtype: torch.dtype
    more: tuple[Any, ...] | None = None

    @property
    def makes_tensors(self) -> bool:
        """Whether a block returns tensors beside the hidden states, which are those of the batch."""
        return any(isinstance(item, Tensor) for item in tree_flatten(self.more)[0])


@dataclass(frozen=True)
class TrunkShape:
    """What the trunk of a model returns.

    Attributes:
        stacks: stack name -> its shape, in the order in which they run; empty where nothing is trunk.
        inputs: names of the ids that it depends on.
    """

    stacks: Mapping[str, StackShape]
    inputs: tuple[str, ...]


def observe_trunk(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> TrunkShape:
    """Runs a model's trunk on a few tokens and says what it returns.

    Args:
        model: the base model.
        layers: the edited layers.
        inputs: the inputs of some rows, for their names and device.

    Raises:
        NotCacheable: what it returns for a row depends on more than the row's own tokens.
    """
    unknown = set(inputs) - _KNOWN_INPUTS
    if unknown:
        raise NotCacheable(f"it reads {', '.join(sorted(unknown))} beside token ids")
    pair = _pair(inputs)
    found = _record(model, layers, pair)
    shapes = {name: _stack_shape(name, stack, pair) for name, stack in found.stacks.items()}
    _check_own_tokens(found, _record(model, layers, _second_alone(pair)), shapes)
    done: dict[str, StackOutput] = {}
    for name, stack in found.stacks.items():
        if shapes[name].makes_tensors:
            _check_handed_on(name, shapes[name], first_block_more(model, pair, done, name))
        done[name] = stack
    return TrunkShape(shapes, _read_inputs(model, layers, pair, found))


def first_block_more(
    model: nn.Module, inputs: Mapping[str, Tensor], done: Mapping[str, StackOutput], name: str
) -> tuple[Any, ...]:
    """What the first block of the stack `name` returns behind the hidden states.

    Args:
        model: the base model.
        inputs: of all rows.
        done: the stacks below, which do not run again.
        name: of the stack.
    """
    rows, stacks = len(next(iter(inputs.values()))), find_stacks(model)
    with replayed(TrunkOutputs(rows, dict(done)), slice(None)):
        first = record_trunk(lambda: model(**inputs), rows, stacks, {"second block": stacks[name][1]})
    return tuple(first.stacks[name].output[1:])


def with_more(hidden: Tensor, more: tuple[Any, ...] | None) -> Any:
    """A block's output of its hidden states and of what it returns behind them."""
    return hidden if more is None else (hidden, *more)


def _pair(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = inputs["input_ids"].device
    values = {"input_ids": _IDS, "attention_mask": _MASK}
    if "decoder_input_ids" in inputs:
        values |= {"decoder_input_ids": _DECODER_IDS, "decoder_attention_mask": _DECODER_MASK}
    return {name: torch.tensor(value, device=device) for name, value in values.items()}


def _second_alone(pair: Mapping[str, Tensor]) -> dict[str, Tensor]:
    masks = {name: pair[name.replace("input_ids", "attention_mask")] for name in pair}
    return {name: value[1:, : int(masks[name][1].sum())] for name, value in pair.items()}


def _record(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> TrunkOutputs:
    rows = len(next(iter(inputs.values())))
    return record_trunk(lambda: model(**inputs), rows, find_stacks(model), layers)


def _stack_shape(name: str, stack: StackOutput, pair: Mapping[str, Tensor]) -> StackShape:
    hidden, more = _split(name, stack.output)
    ids = [key for key in pair if key.endswith("input_ids") and hidden.shape[:2] == pair[key].shape]
    if hidden.dim() != 3 or len(ids) != 1:
        raise NotCacheable(f"the blocks of {name} return {list(hidden.shape)}, which is not [rows, tokens, width]")
    return StackShape(len(stack.blocks), ids[0], hidden.shape[2], hidden.dtype, more)


def _split(name: str, output: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    if isinstance(output, Tensor):
        return output, None
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return output[0], output[1:]
    raise NotCacheable(f"the blocks of {name} return a {type(output).__name__}")


def _check_own_tokens(pair: TrunkOutputs, alone: TrunkOutputs, shapes: Mapping[str, StackShape]) -> None:
    """Neighbours and padding change nothing but rounding."""
    for name in shapes:
        own = _split(name, alone.stacks[name].output)[0][0].float()
        beside = _split(name, pair.stacks[name].output)[0][1, : len(own)].float()
        if not bool((own - beside).norm() <= _ROUNDING * own.norm()):
            raise NotCacheable(
                f"what the blocks of {name} return for a row depends on the rows beside it, or on padding"
            )


def _check_handed_on(name: str, shape: StackShape, first: tuple[Any, ...]) -> None:
    """What the first block returns behind its hidden states is what the last one does."""
    last, others = tree_flatten(shape.more)[0], tree_flatten(first)[0]
    same = len(last) == len(others) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(last, others)
    )
    if not same:
        raise NotCacheable(f"the blocks of {name} return tensors beside the hidden states, and each block others")


def _read_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], pair: dict[str, Tensor], found: TrunkOutputs
) -> tuple[str, ...]:
    """The decoder's ids count only where other ones give other outputs: not for an encoder's trunk."""
    if "decoder_input_ids" not in pair:
        return ("input_ids",)
    other = torch.tensor(_OTHER_DECODER_IDS, device=pair["input_ids"].device)
    again = _record(model, layers, {**pair, "decoder_input_ids": other})
    outputs = zip(found.stacks.values(), again.stacks.values())
    same = all(torch.equal(_split("", a.output)[0], _split("", b.output)[0]) for a, b in outputs)
    return ("input_ids",) if same else ("input_ids", "decoder_input_ids")
