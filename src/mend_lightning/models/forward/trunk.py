"""Trunk replay: blocks below the first edited layer give the same output before and after an edit.

So they run once. Every later pass over the same inputs gets what they returned, row by row. Rows that begin
alike (a few-shot example before every question) run their common beginning once as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mend_lightning.models.inputs.rows import Rows


class _TrunkDone(Exception):
    """Ends the trunk pass at the first edited layer; never leaves this file."""


@dataclass
class StackOutput:
    """The trunk blocks of one stack and what the last of them returned."""

    blocks: list[nn.Module] = field(default_factory=list)
    output: Any = None


@dataclass
class TrunkOutputs:
    """Outputs of the trunk for a fixed set of rows.

    Attributes:
        rows: their number.
        stacks: by the stack's name. Only the last trunk block's output is kept: on replay every block of the
            trunk returns it, and what an earlier one returns is read by a later one alone.
    """

    rows: int
    stacks: dict[str, StackOutput] = field(default_factory=dict)

    def part(self, rows: slice | Sequence[int], widths: Mapping[int, int]) -> TrunkOutputs:
        """Those of some of the rows, as if they alone had run; `widths`: see `cut`."""
        count = len(range(self.rows)[rows]) if isinstance(rows, slice) else len(rows)
        stacks = {
            name: StackOutput(stack.blocks, cut(take_rows(stack.output, self.rows, rows), widths))
            for name, stack in self.stacks.items()
        }
        return TrunkOutputs(count, stacks)


def cut(value: Any, widths: Mapping[int, int]) -> Any:
    """Takes the padding off that rows got beside longer ones, in whatever a block returned.

    Args:
        value: states `[rows, length, width]`, biases and masks `[rows, heads, queries, keys]`, others, or a tuple of those.
        widths: a length -> what remains of it.

    Example:
        >>> [each.shape for each in cut((torch.ones(2, 5, 9), torch.ones(2, 1, 5, 7)), {5: 4, 7: 6})]
        [torch.Size([2, 4, 9]), torch.Size([2, 1, 4, 6])]
    """
    if isinstance(value, Tensor):
        for dim in {3: (1,), 4: (2, 3)}.get(value.dim(), ()):
            value = value.narrow(dim, 0, widths.get(value.shape[dim], value.shape[dim]))
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(cut(item, widths) for item in value)
    return value


def record_trunk(
    run: Callable[[], Any], rows: int, stacks: Mapping[str, nn.ModuleList], layers: Mapping[str, nn.Module]
) -> TrunkOutputs:
    """Runs the model up to the first edited layer and remembers what the blocks below returned.

    What is trunk is observed, not derived from names: the blocks that had returned when the first
    edited layer was reached. In an encoder-decoder whose encoder is edited that is the lower
    encoder; where only the decoder is edited, the whole encoder and the lower decoder.

    Args:
        run: calls the model on all rows.
        rows: their number.
        stacks: the model's stacks of blocks, `find_stacks(model)`.
        layers: the edited layers.

    Returns:
        A store for `replayed`. It is empty where the first block is edited already.
    """
    trunk = TrunkOutputs(rows)
    handles = []
    try:
        for name, stack in stacks.items():
            for block in stack:
                handles.append(block.register_forward_hook(_remember(trunk, name)))
        for stop in _stops(stacks, layers):
            handles.append(stop.register_forward_pre_hook(_stop))
        with torch.no_grad():
            run()
    except _TrunkDone:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return trunk


@contextmanager
def ending_after_edits(stacks: Mapping[str, nn.ModuleList], layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Ends passes of the model, and with them the block, where the last of the edited blocks has returned.

    For passes that want to see the edited layers only. Where some layer lies in no block, the whole model runs.
    """
    holders = [_holders(stack, layers) for stack in stacks.values()]
    if {layer for held in holders for _, inside in held for layer in inside} != set(layers.values()):
        yield
        return
    last = [held for held in holders if held][-1][-1][0]
    handle = last.register_forward_hook(_stop)
    try:
        yield
    except _TrunkDone:
        pass
    finally:
        handle.remove()


def _holders(stack: nn.ModuleList, layers: Mapping[str, nn.Module]) -> list[tuple[nn.Module, set[nn.Module]]]:
    """The blocks with edited layers, each with those."""
    chosen = set(layers.values())
    return [(block, found) for block in stack if (found := chosen & set(block.modules()))]


def _stops(stacks: Mapping[str, nn.ModuleList], layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Blocks that hold an edited layer, and the layers themselves (some may be in no block)."""
    return [block for stack in stacks.values() for block, _ in _holders(stack, layers)] + list(layers.values())


def _stop(module: nn.Module, *args: Any) -> None:
    raise _TrunkDone


def _remember(trunk: TrunkOutputs, name: str) -> Callable[[nn.Module, tuple, Any], None]:
    def remember(block: nn.Module, args: tuple, output: Any) -> None:
        stack = trunk.stacks.setdefault(name, StackOutput())
        if block not in stack.blocks:
            stack.blocks.append(block)
        stack.output = output

    return remember


@contextmanager
def replayed(trunk: TrunkOutputs, rows: Tensor | slice) -> Iterator[None]:
    """Makes the trunk blocks return what the trunk returned for `rows`, instead of running.

    Args:
        trunk: from `record_trunk` or `run_trunk`.
        rows: which of the recorded rows the forward passes inside will hold, in order.
    """
    outputs: dict[nn.Module, Any] = {}
    for stack in trunk.stacks.values():
        output = take_rows(stack.output, trunk.rows, rows)
        outputs |= dict.fromkeys(stack.blocks, output)
    with returning(outputs):
        yield


@contextmanager
def returning(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Makes modules return `outputs` without running, while the block runs.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with returning({layer: "known"}):
        ...     layer(torch.ones(2))
        'known'
    """
    saved: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, output in outputs.items():
            # An instance attribute shadows the class's; one that was there comes back.
            name = _shadowed(module)
            saved.append((module, name, module.__dict__.get(name)))
            module.__dict__[name] = _Returns(output)
        yield
    finally:
        for module, name, before in saved:
            if before is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before


def _shadowed(block: nn.Module) -> str:
    """What stands in for a block: its forward, or of a sharded one the whole call, whose hooks would gather weights in vain."""
    return "_call_impl" if isinstance(block, FSDPModule) else "forward"


@dataclass
class _Returns:
    """Stands in for a block's forward."""

    output: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


def take_rows(value: Any, total: int, rows: Tensor | slice | Sequence[int]) -> Any:
    """Picks rows out of whatever a block returned: tensors `[total, ...]` are indexed, others kept.

    Example:
        >>> take_rows((torch.arange(3), torch.ones(1, 2)), 3, slice(1, 2))
        (tensor([1]), tensor([[1., 1.]]))
    """
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == total else value
    if isinstance(value, tuple):
        return tuple(take_rows(item, total, rows) for item in value)
    if isinstance(value, list):
        return [take_rows(item, total, rows) for item in value]
    return value


def own_part(rows: Rows, trunk: TrunkOutputs, part: Rows, first: int) -> tuple[Rows, TrunkOutputs]:
    """A set of rows as it was before it was padded to stand among others, with the trunk's outputs for it alone.

    Args:
        rows: several sets (`concatenate_rows`).
        trunk: the trunk's outputs for them.
        part: one of the sets.
        first: where it begins in `rows`.

    Returns:
        The set, and the trunk's outputs. Where a length of `rows` cannot be told from another (an encoder's and a decoder's,
        say), the set is as long as all rows are.

    Example:
        >>> import torch
        >>> ids = torch.ones(2, 5, dtype=torch.long)
        >>> rows = Rows({"input_ids": ids}, ids, torch.tensor([0, 0]), 1)
        >>> short = Rows({"input_ids": ids[:1, :3]}, ids[:1, :3], torch.tensor([0]), 1)
        >>> part, trunk = own_part(rows, TrunkOutputs(2), short, 1)
        >>> part is short, trunk.rows
        (True, 1)
    """
    places = slice(first, first + len(part))
    widths = _widths(rows, part)
    if widths is None:
        part = part.padded_as(rows, places)
    return part, trunk.part(places, widths or {})


def _widths(rows: Rows, part: Rows) -> dict[int, int] | None:
    """A length of `rows` -> that of `part`; None where one length stands for two: input and output of equal length."""
    pairs = {(rows.inputs[name].shape[1], tensor.shape[1]) for name, tensor in part.inputs.items()}
    widths = dict(pairs)
    return widths if len(widths) == len(pairs) else None
