"""The data that flows through the package: small frozen dataclasses, shapes written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mend_lightning.models.inputs.positions import Positions, Reach, Tokens

IGNORED_LABEL = -100
_MASK_OF = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


@dataclass(frozen=True)
class Rows:
    """Model inputs of several rows, each belonging to one edit task.

    Attributes:
        inputs: keyword arguments of the base model's forward, each `[rows, length]`, padded on the right.
        labels: `[rows, length]` int64. `labels[b, t]` is the id that `logits[b, t]` must predict, or
            -100 where no loss looks; alignment (the shift of causal models) was done when the rows
            were made, so no loss shifts. Classifiers: `[rows, 1]`.
        task: `[rows]` int64, the task each row belongs to.
        tasks: number of independent edit tasks.
        grouped: rows are in task order and every task has equally many.
        pad_id: the id that pads `input_ids`.
        texts: (prompt, target) of each row, for editors that read text; empty where rows were not made of text.
        formats: the format of each row (`Encoder.asking`); empty: all are in the encoder's own.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    task: Tensor
    tasks: int
    grouped: bool = True
    pad_id: int = 0
    texts: tuple[tuple[str, str], ...] = ()
    formats: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.task.shape[0])

    def to(self, *args: Any, **kwargs: Any) -> Rows:
        """Moves every tensor; called by Lightning's batch transfer. Rows that come from the CPU are remembered (`host`)."""
        if not self._on_cpu:
            return self._map(lambda tensor: tensor.to(*args, **kwargs))
        kwargs = {"non_blocking": True, **kwargs} if len(args) < 2 else kwargs
        return self._map(lambda tensor: tensor.to(*args, **kwargs))._with_host(lambda: self.host)

    def pin_memory(self) -> Rows:
        return self._map(Tensor.pin_memory)

    @property
    def _on_cpu(self) -> bool:
        return self.labels.device.type == "cpu"

    @cached_property
    def host(self) -> Rows:
        """The same rows on the CPU: what asks for their values must not wait for a device.

        Known of rows that were moved from there, and of what is made of such rows; of others a copy is made.
        """
        if self._knows_host:
            return self.__dict__["_make_host"]()
        return self if self._on_cpu else self._map(Tensor.cpu)

    @property
    def _knows_host(self) -> bool:
        return "_make_host" in self.__dict__

    def _with_host(self, make: Callable[[], Rows]) -> Rows:
        self.__dict__["_make_host"] = make
        return self

    def _placed(self, places: Any) -> Any:
        """Positions or tokens that were counted on the CPU, where these rows are."""
        return places.to(self.task.device, non_blocking=self.task.device.type == "cuda")

    @cached_property
    def label_positions(self) -> Positions:
        """Where there is a label, in the order of `labels[labels != -100]`."""
        return self._placed(Positions.of(self.host.labels != IGNORED_LABEL))

    @cached_property
    def answer_starts(self) -> Positions:
        """The first label of every row that has any: the position that predicts the answer's first token."""
        labelled = self.host.labels != IGNORED_LABEL
        return self._placed(Positions.of(labelled & (labelled.cumsum(1) == 1)))

    @cached_property
    def labels_of_task(self) -> tuple[int, ...]:
        """How many labels each task has."""
        labelled = (self.host.labels != IGNORED_LABEL).sum(1)
        counts = torch.zeros(self.tasks, dtype=torch.long).index_add(0, self.host.task, labelled)
        return tuple(counts.tolist())

    @cached_property
    def attended_positions(self) -> Positions:
        """Real (not padding) positions of the sequence that the logits belong to: where the original measures its KL."""
        return self._placed(Positions.of(self.host.attended_mask))

    @cached_property
    def rows_of_task(self) -> int:
        """Rows of the task that has most."""
        return max(torch.bincount(self.host.task, minlength=1).tolist())

    @property
    def unlabelled_task(self) -> int | None:
        """The first task without any label; None: there is none."""
        return next((task for task, count in enumerate(self.labels_of_task) if not count), None)

    def tokens(self, reach: Reach) -> Tokens:
        """The tokens that a loss at the labels can give a gradient, where it reaches that far."""
        known = self.__dict__.setdefault("_tokens", {})
        if reach not in known:
            known[reach] = self._placed(Tokens.of(self.host._reached(reach), self.host.task, self.tasks))
        return known[reach]

    def _reached(self, reach: Reach) -> Tensor:
        if reach in ("labels", "until"):
            labelled = self.labels != IGNORED_LABEL
            # From the end: whether a label is here or further on.
            return labelled if reach == "labels" else labelled.flip(1).cumsum(1).flip(1) > 0
        ids = self.inputs["input_ids"]
        if reach == "first":
            return torch.arange(ids.shape[1], device=ids.device).expand_as(ids) == 0
        return self.inputs.get("attention_mask", torch.ones_like(ids)).bool()

    @property
    def attended_mask(self) -> Tensor:
        """The decoder's mask if there is one, else the attention mask: `[rows, length]` bool."""
        for name in ("decoder_attention_mask", "attention_mask"):
            if name in self.inputs and self.inputs[name].shape == self.labels.shape:
                return self.inputs[name].bool()
        return torch.ones_like(self.labels, dtype=torch.bool)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Rows:
        inputs = {name: function(tensor) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, labels=function(self.labels), task=function(self.task))

    def part(self, rows: slice | Tensor) -> Rows:
        """Some of the rows, which may be fewer than one for each task."""
        numbers = self._numbers(rows) if self.texts or self.formats else ()
        texts = tuple(self.texts[i] for i in numbers) if self.texts else ()
        formats = tuple(self.formats[i] for i in numbers) if self.formats else ()
        part = replace(self._map(lambda tensor: tensor[rows]), grouped=False, texts=texts, formats=formats)
        return part._with_host(lambda: self.host.part(rows)) if self._knows_host and isinstance(rows, slice) else part

    def _numbers(self, rows: slice | Tensor) -> Sequence[int]:
        # Of a slice this is known without a host-device synchronization.
        if isinstance(rows, slice):
            return range(len(self))[rows]
        return torch.arange(len(self), device=rows.device)[rows].tolist()

    def of_tasks(self, chosen: Tensor) -> tuple[Rows, Tensor]:
        """The rows of the tasks `chosen` `[n]` (ascending), numbered anew from 0; and where those rows are in this set.

        Example:
            >>> rows = Rows({}, torch.tensor([[5], [6], [7]]), torch.tensor([0, 1, 2]), 3)
            >>> part, index = rows.of_tasks(torch.tensor([0, 2]))
            >>> part.labels.tolist(), part.task.tolist(), part.tasks, index.tolist()
            ([[5], [7]], [0, 1], 2, [0, 2])
        """
        number = torch.full((self.tasks,), -1, device=self.task.device)
        number[chosen] = torch.arange(len(chosen), device=self.task.device)
        index = (number[self.task] >= 0).nonzero().flatten()
        part = self.part(index)
        return replace(part, task=number[part.task], tasks=len(chosen), grouped=self.grouped), index

    def padded_as(self, rows: Rows, places: slice) -> Rows:
        """These rows as long as they are at `places` of `rows`; what says which row is whose stays."""
        padded = replace(self, inputs=rows.part(places).inputs, labels=rows.labels[places])
        known = self._knows_host and rows._knows_host
        return padded._with_host(lambda: self.host.padded_as(rows.host, places)) if known else padded

    def of_task_range(self, tasks: slice) -> Rows:
        """The rows of the tasks from `tasks.start` up to `tasks.stop`, numbered anew from 0; asks no device.

        Example:
            >>> rows = Rows({}, torch.tensor([[5], [6], [7]]), torch.tensor([0, 1, 2]), 3)
            >>> part = rows.of_task_range(slice(1, 3))
            >>> part.labels.tolist(), part.task.tolist(), part.tasks
            ([[6], [7]], [0, 1], 2)
        """
        mine = ((self.host.task >= tasks.start) & (self.host.task < tasks.stop)).nonzero().flatten()
        together = len(mine) and int(mine[-1] - mine[0]) + 1 == len(mine)
        part = self.part(slice(int(mine[0]), int(mine[-1]) + 1) if together else self._placed(mine))
        part = replace(part, task=part.task - tasks.start, tasks=tasks.stop - tasks.start, grouped=self.grouped)
        return part._with_host(lambda: self.host.of_task_range(tasks)) if self._knows_host else part

    @property
    def task_of_row(self) -> Tensor | None:
        """None when rows are grouped: the cheap case, where a reshape replaces an index."""
        return None if self.grouped else self.task


def concatenate_rows(parts: Sequence[Rows]) -> Rows:
    """Stacks rows of several sets, padding them on the right to one length.

    Example:
        >>> a = Rows({"input_ids": torch.ones(1, 2)}, torch.ones(1, 2), torch.tensor([0]), 1)
        >>> b = Rows({"input_ids": torch.ones(1, 3)}, torch.ones(1, 3), torch.tensor([0]), 1)
        >>> both = concatenate_rows([a, b])
        >>> both.inputs["input_ids"].tolist(), both.inputs["attention_mask"].tolist()
        ([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], [[1, 1, 0], [1, 1, 1]])
    """
    completed = [_with_masks(dict(part.inputs)) for part in parts]
    names = list(dict.fromkeys(name for inputs in completed for name in inputs))
    pads = {"input_ids": parts[0].pad_id}
    inputs = {name: _stack([inputs[name] for inputs in completed], pads.get(name, 0)) for name in names}
    labels = _stack([part.labels for part in parts], IGNORED_LABEL)
    task = torch.cat([part.task for part in parts])
    # All or none: a text must stand for its own row.
    texts = sum((part.texts for part in parts), ()) if all(len(part.texts) == len(part) for part in parts) else ()
    formats = sum((part.formats or ("",) * len(part) for part in parts), ())
    formats = formats if any(formats) else ()
    rows = Rows(inputs, labels, task, parts[0].tasks, False, parts[0].pad_id, texts, formats)
    known = all(part._knows_host for part in parts)
    return rows._with_host(lambda: concatenate_rows([part.host for part in parts])) if known else rows


def _with_masks(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds all-ones masks where a model would assume them, so that padding stays unattended."""
    for ids, mask in _MASK_OF.items():
        if ids in inputs and mask not in inputs:
            inputs[mask] = torch.ones_like(inputs[ids], dtype=torch.long)
    return inputs


def _stack(tensors: Sequence[Tensor], value: int = 0) -> Tensor:
    length = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=value) for tensor in tensors])


def is_grouped(task: Sequence[int], tasks: int) -> bool:
    """Whether rows of these tasks are in task order, and of every task equally many."""
    each = len(task) // tasks
    return each * tasks == len(task) and list(task) == [i // each for i in range(len(task))]


def padded(rows: list[list[int]], value: int) -> Tensor:
    """Lists of numbers as one matrix, the shorter ones with `value` behind them."""
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
