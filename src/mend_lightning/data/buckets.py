"""Batches of tasks whose rows are about equally long, so that little of a batch is padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from mend_lightning.data.tasks import EditTask, TaskSampler
from mend_lightning.models.inputs.encoder import Encoder

Key = tuple[int, int]
Lengths = Callable[[Sequence[Key]], Sequence[tuple[int, int]]]
# So many batches are put together out of tasks drawn at random: with more, batches of an epoch have less padding, and
# resemble those of the next epoch more.
BATCHES_AT_ONCE = 50
# Of generation data every draw has texts of its own: what was counted is forgotten at some time.
MOST_COUNTED = 1_000_000


class TaskLengths:
    """How long the rows of tasks are, in tokens: (the longest of all, the longest `z_edit`) of each (epoch, index).

    Counted by question and answer, which is enough to compare rows by: what stands around them is the same in all, or is
    counted as well where rows are asked in several formats.
    Each text is tokenized once and its length remembered.

    Args:
        sampler: draws the tasks.
        encoder: of the rows.
        edits_at_once: edits a task.
    """

    def __init__(self, sampler: TaskSampler, encoder: Encoder, edits_at_once: int = 1) -> None:
        self._sampler, self._encoder, self._edits_at_once = sampler, encoder, edits_at_once
        self._counts: dict[str, int] = {}

    def __call__(self, keys: Sequence[Key]) -> list[tuple[int, int]]:
        groups = [self._sampler.group(epoch, index, self._edits_at_once) for epoch, index in keys]
        rows = [[[self._texts(*pair) for pair in _rows(edit)] for edit in group] for group in groups]
        self._count({text for group in rows for edit in group for texts in edit for text in texts})
        return [self._lengths(group) for group in rows]

    def _texts(self, prompt: str, target: str, key: str = "") -> tuple[str, ...]:
        """What a row's input is made of; elsewhere the target is none of it, but a decoder's, or a class."""
        format = self._encoder.format_of(key)
        texts = (prompt, format.answer(target)) if self._encoder.kind == "causal" else (prompt,)
        return (*texts, format.prompt) if key else texts

    def _count(self, texts: set[str]) -> None:
        if len(self._counts) > MOST_COUNTED:
            self._counts.clear()
        new = [text for text in texts if text not in self._counts]
        self._counts.update(zip(new, self._encoder.token_counts(new)))

    def _lengths(self, edits: list[list[tuple[str, ...]]]) -> tuple[int, int]:
        lengths = [[sum(self._counts[text] for text in texts) for texts in rows] for rows in edits]
        # The first of an edit's rows is its z_edit.
        return max(map(max, lengths)), max(rows[0] for rows in lengths)


def _rows(edit: EditTask) -> list[tuple[str, ...]]:
    """(question, answer) of all rows of an edit, its z_edit first; with formats, (question, answer, format)."""
    rows = [(edit.prompt, edit.target), *((text, edit.target) for text in edit.rephrases), *edit.locality]
    if not edit.format:
        return [*rows]
    return [(*row, key) for row, key in zip(rows, (edit.format, *edit.rephrase_formats, *edit.locality_formats))]


def length_batches(
    order: Sequence[Key], size: int, lengths: Lengths, generator: torch.Generator, first: int = 0
) -> Iterator[list[Key]]:
    """Batches of tasks of like lengths, in random order.

    The tasks are taken in equal stretches of up to `BATCHES_AT_ONCE` batches; each is sorted into batches, and these are
    shuffled. Only the lengths of a stretch that is reached are asked for.

    Args:
        order: the tasks in random order, a whole number of batches.
        size: tasks a batch.
        lengths: two lengths of each task, see `bucketed`.
        generator: of the order of the batches.
        first: so many batches are left out.
    """
    batches = len(order) // size
    stretches = math.ceil(batches / BATCHES_AT_ONCE)
    bounds = list(pairwise(batches * i // stretches for i in range(stretches + 1))) if stretches else []
    # Drawn before any is left out: a resumed epoch has the order of a whole one.
    shuffles = [torch.randperm(end - start, generator=generator).tolist() for start, end in bounds]
    for (start, end), shuffle in zip(bounds, shuffles):
        if end > first:
            tasks = order[start * size : end * size]
            found = bucketed(tasks, lengths(tasks), size)
            yield from (found[i] for i in shuffle[max(0, first - start) :])


def bucketed(tasks: Sequence[Key], lengths: Sequence[tuple[int, int]], size: int) -> list[list[Key]]:
    """Batches of `size` tasks: alike in their first length, and of those alike in their second.

    Args:
        tasks: a whole number of batches.
        lengths: of each task.
        size: tasks a batch.

    Example:
        >>> tasks = [(0, i) for i in range(4)]
        >>> bucketed(tasks, [(9, 2), (5, 4), (8, 3), (5, 5)], size=2)
        [[(0, 1), (0, 3)], [(0, 0), (0, 2)]]
    """
    order = sorted(range(len(tasks)), key=lambda i: lengths[i][0])
    # About as many parts by the first length as each part has batches by the second.
    part = size * max(1, math.isqrt(len(tasks) // size))
    parts = (sorted(order[i : i + part], key=lambda i: lengths[i][1]) for i in range(0, len(order), part))
    whole = [tasks[i] for indices in parts for i in indices]
    return [whole[i : i + size] for i in range(0, len(whole), size)]
