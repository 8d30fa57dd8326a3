"""What an edit did: every row of a batch scored under the unedited and under the edited model."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from mend_lightning.edited import Edited
from mend_lightning.editors.editor import Editor
from mend_lightning.forward import label_mask, logits_at, row_of
from mend_lightning.functional import rows_all_true, rows_sum
from mend_lightning.losses import is_correct, token_kl, token_nll
from mend_lightning.prefix import run_trunk
from mend_lightning.trunk import replayed
from mend_lightning.types import EditBatch, Rows, concatenate_rows


@dataclass(frozen=True)
class RowScores:
    """Teacher-forced scores of rows, each field `[rows]`.

    Attributes:
        task: the edit task of the row.
        correct_before, correct_after: every label token is the most probable one (whole-row match).
        nll_before, nll_after: summed over the row's label tokens, nats.
        tokens: number of label tokens, the stop included.
        hits: label tokens that are the most probable one after the edit.
        agreement: label positions whose most probable token the edit did not change.
        kl: KL(base ‖ edited) summed over the label positions, nats.
    """

    task: Tensor
    correct_before: Tensor
    correct_after: Tensor
    nll_before: Tensor
    nll_after: Tensor
    tokens: Tensor
    hits: Tensor
    agreement: Tensor
    kl: Tensor

    def part(self, rows: slice | Tensor) -> RowScores:
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True)
class BatchScores:
    """Scores of a batch's three sets, and the edits themselves.

    Attributes:
        edit: of `z_edit`; rephrase: of `x_in`; locality: of `x_out`.
        edited: the edited model.
    """

    edit: RowScores
    rephrase: RowScores
    locality: RowScores
    edited: Edited


@torch.no_grad()
def evaluate_batch(model: nn.Module, editor: Editor, batch: EditBatch) -> BatchScores:
    """Makes the edits of a batch and scores all its rows before and after, in batched passes.

    "Before" is the base model as it was given, also for an editor that trains it (ENN): what that training changed counts
    as the edit's doing. The original compares with the trained model.

    Args:
        model: the base model, in eval mode.
        editor: any editor, in eval mode (in training mode MEND's would update its statistics).
        batch: independent edit tasks.
    """
    edited = editor.edited(model, batch.z_edit)
    rows = concatenate_rows([batch.z_edit, batch.x_in, batch.x_out])
    scores = score_rows(model, edited, rows)
    ends = (0, len(batch.z_edit), len(batch.z_edit) + len(batch.x_in), len(rows))
    edit, rephrase, locality = (scores.part(slice(a, b)) for a, b in zip(ends, ends[1:]))
    return BatchScores(edit, rephrase, locality, edited)


@torch.no_grad()
def score_rows(model: nn.Module, edited: Edited, rows: Rows) -> RowScores:
    """Scores `rows` under the base model and under each row's own edit."""
    mask = label_mask(rows)
    trunk = run_trunk(model, rows, edited.layers)
    with replayed(trunk, slice(None)):
        before = logits_at(model, rows, mask)
    return _compare(before, edited.logits_at(model, rows, mask, trunk), rows, mask)


def hard_rows(batch: EditBatch) -> Tensor:
    """Which rows of `x_out` have their edit's relation: `[rows]` bool. Tasks list their hard ones first."""
    flags = [index < text.hard for text in batch.texts for index in range(len(text.locality))]
    device = batch.x_out.task.device
    return torch.tensor(flags or [False] * len(batch.x_out), dtype=torch.bool, device=device)


def _compare(before: Tensor, after: Tensor, rows: Rows, mask: Tensor) -> RowScores:
    targets = rows.labels[mask]
    index = (row_of(mask), len(rows))
    hit_before, hit_after = is_correct(before, targets), is_correct(after, targets)
    same = (before > 0) == (after > 0) if before.shape[-1] == 1 else before.argmax(-1) == after.argmax(-1)
    return RowScores(
        task=rows.task,
        correct_before=rows_all_true(hit_before, *index),
        correct_after=rows_all_true(hit_after, *index),
        nll_before=rows_sum(token_nll(before, targets), *index),
        nll_after=rows_sum(token_nll(after, targets), *index),
        tokens=mask.sum(1),
        hits=rows_sum(hit_after, *index),
        agreement=rows_sum(same.flatten(), *index),
        kl=rows_sum(token_kl(before, after), *index),
    )
