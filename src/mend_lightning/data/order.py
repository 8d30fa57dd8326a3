"""The order of training tasks, the same for any number of processes, and resumable in mid-epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from mend_lightning.data.buckets import Lengths, length_batches
from mend_lightning.data.tasks import EditTask, TaskSampler


class TaskDataset(Dataset):
    """Groups of edits that are made at once, by (epoch, index): what a draw gives depends on nothing else.

    Args:
        sampler: draws the edits.
        edits_at_once: edits a group; records that fill no group are left out.
        limit: only the first so many records are edited; None: all.
    """

    def __init__(self, sampler: TaskSampler, edits_at_once: int = 1, limit: int | None = None) -> None:
        self.sampler, self.edits_at_once, self.limit = sampler, edits_at_once, limit

    def __len__(self) -> int:
        return (self.limit or len(self.sampler)) // self.edits_at_once

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[EditTask, ...]:
        # Trainer(overfit_batches=...) puts a sampler of its own in place of TaskOrder, whose keys are bare indices.
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.sampler.group(epoch, index, self.edits_at_once, self.limit)


class TaskOrder(DistributedSampler):
    """Yields the (epoch, index) keys of one process.

    A DistributedSampler by class, so that Lightning leaves it in place and tells it the epoch. Unlike torch's
    it repeats no example to even out the processes: training drops an incomplete last batch, evaluation gives
    the first processes one more, and a process may have none. A global batch holds the same tasks for any
    number of processes.

    Args:
        size: number of tasks.
        batch_size: of one process.
        shuffle: a new order each epoch and only whole batches (training); False: every task once, in order,
            always of epoch 0 (evaluation).
        seed: of the order.
        rank, world_size: this process among all.
        even: evaluation gives all processes equally many batches (they share a sharded model, which all must run equally
            often): a process that would have one less gets a task again, in a batch of its own that `repeats` tells.
        lengths: training batches are of tasks that are alike in these, see `length_batches`; None: of any tasks.

    Example:
        >>> list(TaskOrder(5, batch_size=2, shuffle=False, rank=1, world_size=2))
        [(0, 1), (0, 3)]
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        even: bool = False,
        lengths: Lengths | None = None,
    ) -> None:
        # Of a dataset the sampler reads the length alone.
        counted: Any = range(size)
        super().__init__(counted, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.size, self.local_batch, self.lengths = size, batch_size, lengths
        self.first_batch = 0
        self.mine = range(rank, size, world_size)
        # The first process has at most one task more, so what a process lacks is a batch of one task.
        batches, most = (math.ceil(len(tasks) / batch_size) for tasks in (self.mine, range(0, size, world_size)))
        self.repeated = most - batches if even else 0

    def repeats(self, batch_idx: int) -> bool:
        """Whether a batch holds nothing but a task that was given out before, and must not count."""
        return not self.shuffle and batch_idx * self.local_batch >= len(self.mine)

    def __len__(self) -> int:
        if not self.shuffle:
            return len(self.mine) + self.repeated
        return self.size // (self.local_batch * self.num_replicas) * self.local_batch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if not self.shuffle:
            return iter([(0, index) for index in [*self.mine, *self.mine[: self.repeated]]])
        mine = slice(self.rank * self.local_batch, (self.rank + 1) * self.local_batch)
        return (key for batch in self._batches(self.first_batch) for key in batch[mine])

    def _batches(self, first: int) -> Iterator[list[tuple[int, int]]]:
        """The global batches of an epoch behind the first so many."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        whole = self.local_batch * self.num_replicas
        order = torch.randperm(self.size, generator=generator)[: self.size // whole * whole]
        keys = [(self.epoch, index) for index in order.tolist()]
        if self.lengths is not None:
            return length_batches(keys, whole, self.lengths, generator, first)
        return (keys[start : start + whole] for start in range(first * whole, len(keys), whole))


def repeated(loader: Any, batch_idx: int) -> bool:
    """Whether an evaluation batch of `loader` must not count; see `TaskOrder.repeats`."""
    order = getattr(loader, "sampler", None)
    return isinstance(order, TaskOrder) and order.repeats(batch_idx)


class ResumableLoader(DataLoader):
    """A DataLoader whose place in the epoch is part of the checkpoint (Lightning's stateful protocol).

    With another sampler than `TaskOrder` (`Trainer(overfit_batches=...)`) it is an ordinary one, which a resumed run
    starts from its beginning.
    """

    _given = 0

    # torch says that it returns an iterator of its own private class.
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        order: Any = self.sampler
        self._given = getattr(order, "first_batch", 0)
        for batch in super().__iter__():
            # The order was read when the first batch was asked for. Not after the last one: an epoch may be left early.
            order.first_batch = 0
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues behind the batches that were given out; behind the last one, at the next epoch."""
        if not isinstance(self.sampler, TaskOrder):
            return
        finished = state["batches"] >= len(self)
        self.sampler.first_batch = 0 if finished else state["batches"]
        self.sampler.set_epoch(state["epoch"] + int(finished))
