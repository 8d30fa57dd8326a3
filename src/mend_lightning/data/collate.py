"""Edit tasks as text -> an EditBatch of tensors."""

from __future__ import annotations

from collections.abc import Sequence

from mend_lightning.data.encode import Encoder
from mend_lightning.data.tasks import EditTask
from mend_lightning.types import EditBatch, Rows


def collate_tasks(tasks: Sequence[EditTask], encoder: Encoder) -> EditBatch:
    """One batch of independent edit tasks.

    Args:
        tasks: each becomes one task of the batch.
        encoder: text to ids.

    Returns:
        `z_edit` with one row a task, `x_in` with one row a rephrase, `x_out` with one row an unrelated fact
        (its labels are the true answer).
    """
    return EditBatch(
        z_edit=_rows([[(task.prompt, task.target)] for task in tasks], encoder),
        x_out=_rows([list(task.locality) for task in tasks], encoder),
        x_in=_rows([[(rephrase, task.target) for rephrase in task.rephrases] for task in tasks], encoder),
        texts=tuple(tasks),
    )


def _rows(pairs: list[list[tuple[str, str]]], encoder: Encoder) -> Rows:
    flat = [pair for of_task in pairs for pair in of_task]
    task = [index for index, of_task in enumerate(pairs) for _ in of_task]
    return encoder.rows(flat, task, len(pairs))
