"""Edit tasks as text -> an EditBatch of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mend_lightning.data.tasks import EditTask
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import Rows


def collate_groups(groups: Sequence[Sequence[EditTask]], encoder: Encoder) -> EditBatch:
    """One batch of independent edit tasks, each of equally many edits that are made at once."""
    return collate_tasks([task for group in groups for task in group], encoder, len(groups[0]))


def collate_tasks(tasks: Sequence[EditTask], encoder: Encoder, edits_at_once: int = 1) -> EditBatch:
    """One batch of independent edit tasks.

    Args:
        tasks: the edits.
        encoder: text to ids.
        edits_at_once: so many of them, one after another, make one task of the batch.

    Returns:
        `z_edit` with one row an edit, `x_in` with one row a rephrase, `x_out` with one row an unrelated fact
        (its labels are the true answer), all in the order of the edits.
    """
    of_task = [tasks[start : start + edits_at_once] for start in range(0, len(tasks), edits_at_once)]
    formats = [edit.format for edit in tasks]
    of_locality = [key for edit in tasks for key in edit.locality_formats]
    of_rephrases = [key for edit in tasks for key in edit.rephrase_formats]
    x_in = [[(text, edit.target) for edit in edits for text in edit.rephrases] for edits in of_task]
    x_keep = [[(text, edit.target) for edit in edits for text in edit.keep] for edits in of_task]
    return EditBatch(
        z_edit=_rows([[(edit.prompt, edit.target) for edit in edits] for edits in of_task], encoder, formats),
        x_out=_rows([[pair for edit in edits for pair in edit.locality] for edits in of_task], encoder, of_locality),
        x_in=_rows(x_in, encoder, of_rephrases),
        texts=tuple(tasks),
        x_keep=_kept(x_keep, encoder, [edit.format for edit in tasks for _ in edit.keep]),
    )


def _kept(pairs: list[list[tuple[str, str]]], encoder: Encoder, formats: Sequence[str]) -> Rows | None:
    return _rows(pairs, encoder, formats) if any(pairs) else None


def _rows(pairs: list[list[tuple[str, str]]], encoder: Encoder, formats: Sequence[str] = ()) -> Rows:
    flat = [pair for of_task in pairs for pair in of_task]
    task = [index for index, of_task in enumerate(pairs) for _ in of_task]
    return encoder.rows(flat, task, len(pairs), formats)


@dataclass(frozen=True)
class EditBatch:
    """One meta-learning batch: several independent edit tasks.

    Attributes:
        z_edit: the edit examples `(x_e, y_e)`.
        x_out: unrelated inputs, with the labels that drawdown is measured on.
        x_in: rephrases of the edits (their `labels` are `y_in`).
        texts: the tasks as text (`EditTask`), for reports and error messages; may be empty.
        x_keep: questions that constrain the edits (their labels are the edit's, and mean nothing); None where no task has any.
    """

    z_edit: Rows
    x_out: Rows
    x_in: Rows
    texts: tuple[Any, ...] = ()
    x_keep: Rows | None = None

    @property
    def tasks(self) -> int:
        return self.z_edit.tasks

    def __len__(self) -> int:
        return self.tasks

    def to(self, *args: Any, **kwargs: Any) -> EditBatch:
        return replace(self.map_rows(lambda rows: rows.to(*args, **kwargs)), texts=self.texts)

    def pin_memory(self) -> EditBatch:
        return replace(self.map_rows(Rows.pin_memory), texts=self.texts)

    def map_rows(self, function: Callable[[Rows], Rows]) -> EditBatch:
        """A batch of what `function` makes of each set of rows, without texts."""
        x_keep = None if self.x_keep is None else function(self.x_keep)
        return EditBatch(function(self.z_edit), function(self.x_out), function(self.x_in), x_keep=x_keep)
