"""Weight deltas, one per task: low-rank ones, and the hooks that add any to a running model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from mend_lightning.errors import BaseModelMismatchError
from mend_lightning.models.forward.device import no_autocast
from mend_lightning.models.inputs.positions import slots
from mend_lightning.models.inputs.rows import Factors


class Delta(Protocol):
    """`ΔW` of one layer, for each of several independent tasks: a `LowRankDelta`, or a `DenseDelta`.

    Attributes:
        tasks: their number.
        rank: the largest rank that ΔW can have.
        shape: (d_in, d_out).
    """

    tasks: int
    rank: int
    shape: tuple[int, int]

    def dense(self) -> Tensor: ...
    def norm(self) -> Tensor: ...
    def scaled(self, factor: Tensor | float) -> Delta: ...
    def of_task(self, task: int) -> Delta: ...
    def to(self, target: torch.device | torch.dtype | str) -> Delta: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def output(self, x: Tensor, task_of_row: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class LowRankDelta:
    """`ΔW = upᵀ down` of one layer, for each of several independent tasks.

    Attributes:
        down: `[tasks, rank, d_in]` float32; rank is the number of edited tokens, zero-padded.
        up: `[tasks, rank, d_out]` float32.
    """

    down: Tensor
    up: Tensor

    @property
    def tasks(self) -> int:
        return int(self.down.shape[0])

    @property
    def rank(self) -> int:
        return int(self.down.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        return int(self.down.shape[-1]), int(self.up.shape[-1])

    def dense(self) -> Tensor:
        """ΔW as `[tasks, d_out, d_in]`: for tests and small models only."""
        return self.up.transpose(1, 2) @ self.down

    def norm(self) -> Tensor:
        """Frobenius norm of ΔW per task `[tasks]`, from the rank × rank Gram matrices alone."""
        gram = (self.down @ self.down.mT) * (self.up @ self.up.mT)
        return gram.sum((1, 2)).clamp(min=0).sqrt()

    def scaled(self, factor: Tensor | float) -> LowRankDelta:
        """ΔW times a factor: a number, or one of each task `[tasks]`."""
        if isinstance(factor, Tensor):
            factor = factor[:, None, None]
        return LowRankDelta(self.down, self.up * factor)

    def of_task(self, task: int) -> LowRankDelta:
        """The delta of one task, its all-zero padding ranks dropped."""
        down, up = self.down[task].detach(), self.up[task].detach()
        used = (down != 0).any(-1) & (up != 0).any(-1)
        return LowRankDelta(down[used][None].clone(), up[used][None].clone())

    def to(self, target: torch.device | torch.dtype | str) -> LowRankDelta:
        """The same delta on a device, or in a dtype."""
        return LowRankDelta(self.down.to(target), self.up.to(target))

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of a single task's delta: `{"down": [rank, d_in], "up": [rank, d_out]}`."""
        return {"down": self.down[0], "up": self.up[0]}

    def output(self, x: Tensor, task_of_row: Tensor | None = None) -> Tensor:
        """`x ΔWᵀ` for every row with its own task's delta.

        Args:
            x: `[rows, ..., d_in]`, any dtype; computed in the delta's.
            task_of_row: `[rows]`, or None when rows are grouped by task in equal numbers (also a
                single task). Beam search multiplies rows; they stay next to each other.

        Returns:
            `[rows, ..., d_out]` in the delta's dtype.
        """
        down, up = rows_of_tasks((self.down, self.up), x, task_of_row)
        flat = x.to(down.dtype).reshape(down.shape[0], -1, x.shape[-1])
        product = torch.bmm(torch.bmm(flat, down.mT), up)
        return product.reshape(*x.shape[:-1], up.shape[-1])


# FSDP2 looks for tensors in what a module's forward returns: those that bring gradients to the editor's parameters.
register_dataclass(LowRankDelta)


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
    layers: Mapping[str, nn.Module], deltas: Mapping[str, Delta], task_of_row: Tensor | None = None
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


def _adder(delta: Delta, task_of_row: Tensor | None):
    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return added(output, args[0], delta, task_of_row)

    # Says whether rows differ in their edit: then no row can stand for the others (`shared_prompt`).
    add.tasks = delta.tasks
    return add


def added(output: Tensor, x: Tensor, delta: Delta, task_of_row: Tensor | None = None) -> Tensor:
    """A layer's `output` plus `x ΔWᵀ`, in the output's dtype; see `LowRankDelta.output`."""
    # Factors are tiny beside the weights: autocast would round them to nothing.
    with no_autocast(output.device):
        return output + delta.output(x, task_of_row).to(output.dtype)


def added_at_once(output: Tensor, x: Tensor, delta: Delta) -> Tensor:
    """`added` of a single task; where all have one dtype, the product is added as it is computed, and rounded once."""
    same = isinstance(delta, LowRankDelta) and delta.tasks == 1 and delta.up.dtype == x.dtype == output.dtype
    if not same:
        return added(output, x, delta)
    inner = torch.bmm(x.reshape(1, -1, x.shape[-1]), delta.down.mT)
    return torch.baddbmm(output.reshape(1, -1, output.shape[-1]), inner, delta.up).view_as(output)


def descent(u: Tensor, delta: Tensor, factors: Factors, rate: Tensor) -> LowRankDelta:
    """A step down the gradient that the factors make up: `ΔW = −rate Σ_t delta_t u_tᵀ` of every task.

    Args:
        u: `[tokens, d_in]`; delta: `[tokens, d_out]`: the factors' own, or what an editor made of them.
        factors: say which task each token is of.
        rate: scalar.

    Example:
        >>> factors = Factors(torch.ones(2, 1), torch.ones(2, 1), torch.tensor([0, 1]), tasks=2)
        >>> descent(factors.u, factors.delta, factors, torch.tensor(0.5)).dense().flatten().tolist()
        [-0.5, -0.5]
    """
    slot, rank = factors.place or task_slots(factors.task, factors.tasks)
    place = (factors.task, factors.tasks, rank, slot)
    rate = rate if factors.kept is None else (rate * factors.kept)[:, None]
    return LowRankDelta(down=pack_tasks(u, *place), up=pack_tasks(-rate * delta, *place))


def pack_tasks(rows: Tensor, task: Tensor, tasks: int, rank: int, slot: Tensor) -> Tensor:
    """Lays ragged `rows` `[tokens, width]` out as zero-padded `[tasks, rank, width]`."""
    return rows.new_zeros(tasks, rank, rows.shape[-1]).index_put((task, slot), rows)


def task_slots(task: Tensor, tasks: int) -> tuple[Tensor, int]:
    """Position of every token within its task `[tokens]`, and the largest task's token count, which waits for the device.

    Example:
        >>> task_slots(torch.tensor([0, 1, 0]), 2)
        (tensor([0, 0, 1]), 2)
    """
    slot = slots(task, tasks)
    return slot, int(slot.max()) + 1 if task.numel() else 0
