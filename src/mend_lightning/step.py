"""One meta-learning step: a pure function over a model and an editor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
        locality: `[tasks]` L_loc, KL(base ‖ edited) on `x_out`; of an editor with resting deltas KL(resting ‖ edited).
        inner: `[tasks]` the unedited model's NLL of the edit itself.
        skipped: share of the edit tokens that were dropped because u or delta is zero.
        drift: `[tasks]` L_base, KL(base ‖ resting) on `x_out`; None of an editor without resting deltas.
        c_base: weight of `drift`.
    """

    edit: Tensor
    locality: Tensor
    inner: Tensor
    skipped: Tensor
    drift: Tensor | None = None
    c_base: float = 0.0

    def total(self, c_edit: float) -> Tensor:
        """`c_edit L_edit + L_loc`, and `c_base L_base` where the editor has resting deltas: the mean over tasks."""
        loss = (c_edit * self.edit + self.locality).mean()
        return loss if self.drift is None else loss + self.c_base * self.drift.mean()

    def losses(self) -> dict[str, Tensor]:
        """name -> `[tasks]` of each part of the total."""
        parts = {"edit": self.edit, "locality": self.locality}
        return parts if self.drift is None else {**parts, "drift": self.drift}


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
    outer = _outer(model, layers, batch, locality_positions)
    resting, drift = editor.resting_deltas(), None
    if resting is not None:
        unedited, drift = _resting(model, layers, resting, outer)
        outer = replace(outer, unedited=unedited)
    edit, locality = _edited_losses(model, layers, made.deltas, outer)
    return StepOutput(edit, locality, made.inner, made.skipped, drift, editor.c_base)


def outer_losses(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: EditBatch,
    deltas: Mapping[str, Delta],
    locality_positions: LocalityPositions = "all",
) -> tuple[Tensor, Tensor]:
    """L_edit and L_loc of edits that are made already, each `[tasks]`; arguments as in `edit_step`."""
    return _edited_losses(model, layers, deltas, _outer(model, layers, batch, locality_positions))


@dataclass(frozen=True)
class _Outer:
    """What the outer losses are taken on.

    Attributes:
        rows: `x_out`, then `x_in`.
        trunk: the trunk's outputs for them.
        locality: `[x_out rows, length]` bool, where L_loc looks.
        unedited: `[n, vocabulary]` the logits there that L_loc compares with.
    """

    rows: Rows
    trunk: TrunkOutputs
    locality: Tensor
    unedited: Tensor


def _outer(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: EditBatch, locality_positions: LocalityPositions
) -> _Outer:
    rows = concatenate_rows([batch.x_out, batch.x_in])
    trunk = run_trunk(model, rows, layers)
    mask = _widened(locality_mask(batch.x_out, locality_positions), rows)
    x_out = slice(0, len(batch.x_out))
    with replayed(trunk, x_out), torch.no_grad():
        return _Outer(rows, trunk, mask, logits_at(model, rows.part(x_out), mask))


def _resting(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    deltas: Mapping[str, Delta],
    outer: _Outer,
) -> tuple[Tensor, Tensor]:
    """Logits of the resting model at the locality positions, for comparison only, and L_base per task."""
    rows, locality = outer.rows, outer.locality
    x_out = slice(0, locality.shape[0])
    with replayed(outer.trunk, x_out), applied(layers, deltas):
        logits = logits_at(model, rows.part(x_out), locality)
    task = rows.task[x_out, None].expand_as(locality)[locality]
    return logits.detach(), mean_by_task(token_kl(outer.unedited, logits), task, rows.tasks)


def _widened(mask: Tensor, rows: Rows) -> Tensor:
    return torch.nn.functional.pad(mask, (0, rows.labels.shape[1] - mask.shape[1]))


def _edited_losses(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    deltas: Mapping[str, Delta],
    outer: _Outer,
) -> tuple[Tensor, Tensor]:
    """L_edit and L_loc per task, from one pass of the edited model over `x_out` and `x_in`."""
    rows, locality = outer.rows, outer.locality
    count, seen = locality.shape[0], outer.unedited.shape[0]
    edit = label_mask(rows)[count:]
    with replayed(outer.trunk, slice(None)), applied(layers, deltas, rows.task_of_row):
        logits = logits_at(model, rows, torch.cat([locality, edit]))
    # split, not two slices: each slice's backward would allocate a padded matrix of full size.
    out_logits, in_logits = logits.split([seen, logits.shape[0] - seen])
    task = rows.task[:, None].expand_as(rows.labels)
    kl = mean_by_task(token_kl(outer.unedited, out_logits), task[:count][locality], rows.tasks)
    nll = mean_by_task(token_nll(in_logits, rows.labels[count:][edit]), task[count:][edit], rows.tasks)
    return nll, kl
