"""One meta-learning step: a pure function over a model and an editor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors.editor import Editor
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.attention import without_mask_inspection
from mend_lightning.models.forward.head import HeadStates, head_kl, head_nll
from mend_lightning.models.forward.hooks import Delta
from mend_lightning.models.forward.length_groups import states_above
from mend_lightning.models.forward.phases import EDITED, phase
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import TrunkOutputs, own_part
from mend_lightning.models.inputs.positions import Positions, joined
from mend_lightning.models.inputs.rows import Rows, concatenate_rows

LocalityPositions = Literal["all", "answer"]

# What gives the trunk's outputs of rows: `run_trunk`, or something that knows them already.
Trunk = Callable[[nn.Module, Rows, Mapping[str, nn.Module]], TrunkOutputs]


@dataclass(frozen=True)
class StepOutput:
    """Losses of one meta-learning step.

    Attributes:
        edit: `[tasks]` L_edit, the NLL of `y_in` given `x_in` after the edit.
        locality: `[tasks]` L_loc, KL(base ‖ edited) on `x_out`; of an editor with base deltas KL(pre-edit ‖ edited).
        inner: `[tasks]` the unedited model's NLL of the edit itself.
        skipped: share of the edit tokens that were dropped because u or delta is zero.
        drift: `[tasks]` L_base, KL(base ‖ pre-edit) on `x_out`; None of an editor without base deltas.
        c_base: weight of `drift`.
    """

    edit: Tensor
    locality: Tensor
    inner: Tensor
    skipped: Tensor
    drift: Tensor | None = None
    c_base: float = 0.0

    def total(self, c_edit: float) -> Tensor:
        """`c_edit L_edit + L_loc`, and `c_base L_base` where the editor has base deltas: the mean over tasks."""
        loss = (c_edit * self.edit + self.locality).mean()
        return loss if self.drift is None else loss + self.c_base * self.drift.mean()

    def means(self, loss: Tensor) -> Tensor:
        """Means over tasks of `losses()`, `loss`, and the share of skipped tokens, detached: what a step logs."""
        values = [value.mean() for value in self.losses().values()]
        return torch.stack([*values, loss, self.skipped.to(loss)]).detach()

    def losses(self) -> dict[str, Tensor]:
        """name -> `[tasks]` of each part of the total."""
        parts = {"edit": self.edit, "locality": self.locality}
        return parts if self.drift is None else {**parts, "drift": self.drift}


def locality_positions_of(x_out: Rows, positions: LocalityPositions) -> Positions:
    """Where the locality loss looks: every real position (the original's) or the answer's."""
    return x_out.attended_positions if positions == "all" else x_out.label_positions


def edit_step(
    model: nn.Module,
    editor: Editor,
    batch: EditBatch,
    locality_positions: LocalityPositions = "all",
    trunk_of: Trunk | None = None,
) -> StepOutput:
    """Edits with every `z_edit` of the batch at once and measures what came of it.

    The trunk below the edited layers runs once, over all rows; the blocks above it run forward and
    backward for `z_edit`, forward for the unedited `x_out`, and once more, edited, for `x_in` and `x_out`.
    (One pass of them for `z_edit` and the unedited `x_out` would run backward through `x_out` in vain.)

    Args:
        model: the frozen base model, in eval mode.
        editor: a trainable editor.
        batch: the edit tasks.
        locality_positions: see `locality_positions_of`.
        trunk_of: what runs the trunk; None: `run_trunk`.
    """
    layers, pre_edit, drift = editor.modules_in(model), editor.base_deltas(), None
    with without_mask_inspection(batch.z_edit.task.device):
        z_edit, trunk, rows, rest = _shared_trunk(model, layers, batch, trunk_of)
        made = editor.make_deltas(model, z_edit, trunk, batch.x_keep)
        outer = _outer(model, batch, rows, rest, locality_positions)
        if pre_edit is not None:
            unedited, drift = _pre_edit(model, layers, pre_edit, outer)
            outer = replace(outer, unedited=unedited)
        edit, locality = _edited_losses(model, layers, made.deltas, outer)
    return StepOutput(edit, locality, made.inner, made.skipped, drift, editor.c_base)


def _shared_trunk(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: EditBatch, trunk_of: Trunk | None
) -> tuple[Rows, TrunkOutputs, Rows, TrunkOutputs]:
    """`z_edit` and its trunk outputs, and those of `x_out` and `x_in` together, from one pass over all."""
    parts = batch.z_edit, concatenate_rows([batch.x_out, batch.x_in])
    rows = concatenate_rows(parts)
    trunk = (trunk_of or run_trunk)(model, rows, layers)
    return *own_part(rows, trunk, parts[0], 0), *own_part(rows, trunk, parts[1], len(batch.z_edit))


def outer_losses(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: EditBatch,
    deltas: Mapping[str, Delta],
    locality_positions: LocalityPositions = "all",
    trunk_of: Trunk | None = None,
) -> tuple[Tensor, Tensor]:
    """L_edit and L_loc of edits that are made already, each `[tasks]`; arguments as in `edit_step`."""
    rows = concatenate_rows([batch.x_out, batch.x_in])
    trunk = (trunk_of or run_trunk)(model, rows, layers)
    return _edited_losses(model, layers, deltas, _outer(model, batch, rows, trunk, locality_positions))


@dataclass(frozen=True)
class _Outer:
    """What the outer losses are taken on.

    Attributes:
        rows: `x_out`, then `x_in`.
        trunk: the trunk's outputs for them.
        x_out: rows of them that are `x_out`.
        locality: positions where L_loc looks, all in `x_out`.
        edit: label positions of `x_in`.
        unedited: the states there that L_loc compares with.
    """

    rows: Rows
    trunk: TrunkOutputs
    x_out: slice
    locality: Positions
    edit: Positions
    unedited: HeadStates

    def task(self, where: Positions) -> Tensor:
        """The task of each position: `[n]`."""
        return self.rows.task.index_select(0, where.row)


@phase(EDITED)
def _outer(
    model: nn.Module, batch: EditBatch, rows: Rows, trunk: TrunkOutputs, locality_positions: LocalityPositions
) -> _Outer:
    locality = locality_positions_of(batch.x_out, locality_positions)
    edit = batch.x_in.label_positions.behind(len(batch.x_out))
    x_out = slice(0, len(batch.x_out))
    with torch.no_grad():
        unedited = states_above(model, rows.part(x_out), locality, trunk.part(x_out, {}), {})
    return _Outer(rows, trunk, x_out, locality, edit, unedited)


@phase(EDITED)
def _pre_edit(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    deltas: Mapping[str, Delta],
    outer: _Outer,
) -> tuple[HeadStates, Tensor]:
    """States of the pre-edit model at the locality positions, for comparison only, and L_base per task."""
    # One task for all rows.
    x_out = replace(outer.rows.part(outer.x_out), grouped=True)
    pre_edit = states_above(model, x_out, outer.locality, outer.trunk.part(outer.x_out, {}), layers, deltas)
    drift = head_kl(outer.unedited, pre_edit, outer.task(outer.locality), outer.rows.tasks)
    return pre_edit.detach(), drift


@phase(EDITED)
def _edited_losses(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    deltas: Mapping[str, Delta],
    outer: _Outer,
) -> tuple[Tensor, Tensor]:
    """L_edit and L_loc per task, from one pass of the edited model over `x_out` and `x_in`."""
    rows = outer.rows
    edited = states_above(model, rows, joined([outer.locality, outer.edit]), outer.trunk, layers, deltas)
    at_locality, at_edit = edited.split(len(outer.locality))
    kl = head_kl(outer.unedited, at_locality, outer.task(outer.locality), rows.tasks)
    return head_nll(at_edit, outer.edit.take(rows.labels), outer.task(outer.edit), rows.tasks), kl


class _Known(torch.autograd.Function):
    """A loss whose gradients by `tensors` were computed already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, None, *(gradient * grad for gradient in ctx.saved_tensors)


def edit_step_in_chunks(
    model: nn.Module,
    editor: Editor,
    batch: EditBatch,
    c_edit: float,
    tasks_at_once: int,
    locality_positions: LocalityPositions = "all",
    trunk_of: Trunk | None = None,
) -> tuple[Tensor, StepOutput]:
    """`edit_step(...).total(c_edit)`, with the outer pass of `tasks_at_once` tasks in memory at a time.

    Args:
        model, editor, batch, locality_positions, trunk_of: see `edit_step`.
        c_edit: weight of the edit loss.
        tasks_at_once: tasks of a part.

    Returns:
        The loss, whose `backward` gives the editor's parameters their gradients, and the losses of all tasks, detached.

    Raises:
        ConfigError: the editor trains the base as well (ENN), so that its edits are not all that the losses depend on.
    """
    check_chunks(editor, tasks_at_once)
    layers = editor.modules_in(model)
    trunk = (trunk_of or run_trunk)(model, batch.z_edit, layers)
    made = editor.make_deltas(model, batch.z_edit, trunk, batch.x_keep)
    tensors, shape = tree_flatten(dict(made.deltas))
    gradients = [torch.empty_like(tensor) for tensor in tensors]
    losses: list[StepOutput] = []
    for start in range(0, batch.tasks, tasks_at_once):
        tasks = slice(start, min(start + tasks_at_once, batch.tasks))
        leaves = [tensor[tasks].detach().requires_grad_() for tensor in tensors]
        edit, locality = outer_losses(
            model, layers, _of(batch, tasks), tree_unflatten(leaves, shape), locality_positions, trunk_of
        )
        losses.append(StepOutput(edit.detach(), locality.detach(), made.inner[tasks], made.skipped))
        total = (c_edit * edit + locality).sum() / batch.tasks
        for gradient, part in zip(gradients, torch.autograd.grad(total, leaves)):
            gradient[tasks] = part
    names = ("edit", "locality", "inner")
    edit, locality, inner = (torch.cat([getattr(each, name) for each in losses]) for name in names)
    joined = StepOutput(edit, locality, inner, made.skipped)
    return known_loss(joined.total(c_edit), gradients, tensors), joined


def check_chunks(editor: Editor, tasks_at_once: int) -> None:
    """Raises ConfigError if the editor trains the base as well."""
    if editor.base_deltas() is not None:
        raise ConfigError(
            f"tasks_at_once={tasks_at_once}: {type(editor).__name__} trains the base as well, which takes the whole batch. Leave "
            "tasks_at_once out, and lower data.batch_size."
        )


def step_loss(
    model: nn.Module,
    editor: Editor,
    batch: EditBatch,
    c_edit: float,
    tasks_at_once: int | None = None,
    locality_positions: LocalityPositions = "all",
    trunk_of: Trunk | None = None,
) -> tuple[Tensor, StepOutput]:
    """The loss of a training step, and its parts: of the whole batch, or where `tasks_at_once` are fewer, in parts."""
    if tasks_at_once is not None and tasks_at_once < batch.tasks:
        with without_mask_inspection(batch.z_edit.task.device):
            return edit_step_in_chunks(model, editor, batch, c_edit, tasks_at_once, locality_positions, trunk_of)
    out = edit_step(model, editor, batch, locality_positions, trunk_of)
    return out.total(c_edit), out


def known_loss(loss: Tensor, gradients: list[Tensor], tensors: list[Tensor]) -> Tensor:
    """`loss`, whose gradients by `tensors` are known already.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> known_loss(torch.tensor(9.0), [torch.tensor(6.0)], [x]).backward()
        >>> x.grad
        tensor(6.)
    """
    return _Known.apply(loss, gradients, *tensors)


def _of(batch: EditBatch, tasks: slice) -> EditBatch:
    return batch.map_rows(lambda rows: rows.of_task_range(tasks))
