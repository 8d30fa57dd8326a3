"""One meta-learning step: a pure function over a model and an editor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mend_lightning.delta import Delta, applied
from mend_lightning.editors.editor import Editor
from mend_lightning.forward import attended_mask, label_mask, logits_at
from mend_lightning.losses import mean_by_task, token_kl, token_nll
from mend_lightning.prefix import run_trunk
from mend_lightning.trunk import TrunkOutputs, replayed
from mend_lightning.types import EditBatch, Rows, concatenate_rows

LocalityPositions = Literal["all", "answer"]


@dataclass(frozen=True)
class StepOutput:
    """Losses of one meta-learning step.

    Attributes:
        edit: `[tasks]` L_edit, the NLL of `y_in` given `x_in` after the edit.
        locality: `[tasks]` L_loc, KL(base ‖ edited) on `x_out`.
        inner: `[tasks]` the unedited model's NLL of the edit itself.
        skipped: share of the edit tokens that were dropped because u or delta is zero.
    """

    edit: Tensor
    locality: Tensor
    inner: Tensor
    skipped: Tensor

    def total(self, c_edit: float) -> Tensor:
        """`c_edit L_edit + L_loc`, the mean over tasks."""
        return (c_edit * self.edit + self.locality).mean()


def compute_deltas(model: nn.Module, editor: Editor, z_edit: Rows) -> dict[str, Delta]:
    """The weight deltas that `editor` makes of the edits: layer name -> Delta."""
    return dict(editor.make_deltas(model, z_edit).deltas)


def locality_mask(x_out: Rows, positions: LocalityPositions) -> Tensor:
    """Where the locality loss looks: every real position (the original's) or the answer's."""
    return attended_mask(x_out) if positions == "all" else label_mask(x_out)


def edit_step(
    model: nn.Module, editor: Editor, batch: EditBatch, locality_positions: LocalityPositions = "all"
) -> StepOutput:
    """Edits with every `z_edit` of the batch at once and measures what came of it.

    The trunk below the edited layers runs once over every row; the blocks above it run forward and
    backward for `z_edit`, forward for the unedited `x_out`, and once more, edited, for `x_in` and `x_out`.

    Args:
        model: the frozen base model, in eval mode.
        editor: a trainable editor.
        batch: the edit tasks.
        locality_positions: see `locality_mask`.
    """
    layers = editor.modules_in(model)
    # The edits have a pass of their own: what an edit is must not depend, not even in its rounding, on the
    # rows that happen to share its batch.
    made = editor.make_deltas(model, batch.z_edit)
    rows = concatenate_rows([batch.x_out, batch.x_in])
    trunk = run_trunk(model, rows, layers)
    mask = locality_mask(batch.x_out, locality_positions)
    x_out = slice(0, len(batch.x_out))
    with replayed(trunk, x_out), torch.no_grad():
        base_logits = logits_at(model, rows.part(x_out), _widened(mask, rows))
    edit, locality = _edited_losses(model, layers, made.deltas, trunk, rows, _widened(mask, rows), base_logits)
    return StepOutput(edit, locality, made.inner, made.skipped)


def _widened(mask: Tensor, rows: Rows) -> Tensor:
    return torch.nn.functional.pad(mask, (0, rows.labels.shape[1] - mask.shape[1]))


def _edited_losses(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    deltas: Mapping[str, Delta],
    trunk: TrunkOutputs,
    rows: Rows,
    locality: Tensor,
    base_logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """L_edit and L_loc per task, from one pass of the edited model over `x_out` and `x_in`."""
    count, seen = locality.shape[0], base_logits.shape[0]
    edit = label_mask(rows)[count:]
    with replayed(trunk, slice(None)), applied(layers, deltas, rows.task_of_row):
        logits = logits_at(model, rows, torch.cat([locality, edit]))
    # split, not two slices: each slice's backward would allocate a padded matrix of full size.
    out_logits, in_logits = logits.split([seen, logits.shape[0] - seen])
    task = rows.task[:, None].expand_as(rows.labels)
    kl = mean_by_task(token_kl(base_logits, out_logits), task[:count][locality], rows.tasks)
    nll = mean_by_task(token_nll(in_logits, rows.labels[count:][edit]), task[count:][edit], rows.tasks)
    return nll, kl
