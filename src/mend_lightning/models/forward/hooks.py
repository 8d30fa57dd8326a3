"""Deltas added to the outputs of layers of a running model; weights are never touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mend_lightning.errors import BaseModelMismatchError
from mend_lightning.models.forward.device import no_autocast


class AppliedDelta(Protocol):
    """What a layer's hook has to know of a `Delta`.

    Attributes:
        tasks: how many independent tasks it has a `ΔW` for.
    """

    @property
    def tasks(self) -> int: ...
    def output(self, x: Tensor, task_of_row: Tensor | None = None) -> Tensor: ...


class Delta(AppliedDelta, Protocol):
    """`ΔW` of one layer, for each of several independent tasks: a `LowRankDelta`, or a `DenseDelta`.

    Attributes:
        tasks: their number.
        rank: the largest rank that ΔW can have.
        shape: (d_in, d_out).
    """

    @property
    def rank(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    def dense(self) -> Tensor: ...
    def norm(self) -> Tensor: ...
    def scaled(self, factor: Tensor | float) -> Delta: ...
    def of_task(self, task: int) -> Delta: ...
    def to(self, target: torch.device | torch.dtype | str) -> Delta: ...
    def tensors(self) -> dict[str, Tensor]: ...


def spread(task_of_row: Tensor, rows: int) -> Tensor:
    """The task of each of `rows` rows: beam search multiplies them, and they stay next to each other.

    Example:
        >>> spread(torch.tensor([1, 0]), 4).tolist()
        [1, 1, 0, 0]
    """
    each = rows // task_of_row.shape[0]
    return task_of_row.repeat_interleave(each) if each > 1 else task_of_row


def rows_of_tasks(factors: Sequence[Tensor], x: Tensor, task_of_row: Tensor | None) -> Sequence[Tensor]:
    """Each row's own part of `factors` `[tasks, ...]`: `[rows, ...]`, or as they are where rows are grouped."""
    if task_of_row is None:
        return factors
    index = spread(task_of_row, x.shape[0])
    # index_select: its backward is twice as fast as indexing's.
    return [factor.index_select(0, index) for factor in factors]


@contextmanager
def applied(
    layers: Mapping[str, nn.Module], deltas: Mapping[str, AppliedDelta], task_of_row: Tensor | None = None
) -> Iterator[None]:
    """Adds `deltas` to the layers' outputs while the block runs; weights are never touched.

    Gradients flow to the deltas. Whatever happens inside, the hooks are gone afterwards.

    Args:
        layers: name -> module, at least those named in `deltas`.
        deltas: name -> Delta.
        task_of_row: see `LowRankDelta.output`.

    Raises:
        BaseModelMismatchError: a delta names a layer that is not there.

    Example:
        >>> from mend_lightning import LowRankDelta
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> delta = LowRankDelta(torch.ones(1, 1, 2), torch.ones(1, 1, 1))
        >>> before = layer(torch.ones(1, 2))
        >>> with applied({"fc": layer}, {"fc": delta}):
        ...     after = layer(torch.ones(1, 2))
        >>> round((after - before).item(), 5)
        2.0
    """
    missing = [name for name in deltas if name not in layers]
    if missing:
        raise BaseModelMismatchError(
            f"The model has no layer {missing[0]!r}, which the edit changes. Is this the base model that "
            "the edit was made for?"
        )
    handles = []
    try:
        for name, delta in deltas.items():
            handles.append(layers[name].register_forward_hook(_adder(delta, task_of_row)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(delta: AppliedDelta, task_of_row: Tensor | None) -> Callable[..., Tensor]:
    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return added(output, args[0], delta, task_of_row)

    # Says whether rows differ in their edit: then no row can stand for the others (`shared_prompt`).
    hook: Any = add
    hook.tasks = delta.tasks
    return hook


def added(output: Tensor, x: Tensor, delta: AppliedDelta, task_of_row: Tensor | None = None) -> Tensor:
    """A layer's `output` plus `x ΔWᵀ`, in the output's dtype; see `LowRankDelta.output`."""
    # Factors are tiny beside the weights: autocast would round them to nothing.
    with no_autocast(output.device):
        return output + delta.output(x, task_of_row).to(output.dtype)
