"""A meta-learning step over a few tasks at a time: the same losses and gradients, in the memory of those few.

Accumulating gradients over small batches is not the same: each would be normalised with the statistics of the tokens seen so
far, fewer than the whole batch has. Here the edits of the whole batch are made first. What takes memory, the edited
pass over rephrases and unrelated rows, then runs for some tasks at a time, and only its gradient by the deltas is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mend_lightning.editors.editor import Editor
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.attention import unasked_masks
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.inputs.rows import EditBatch
from mend_lightning.training.step import LocalityPositions, StepOutput, Trunk, edit_step, outer_losses


class _Known(torch.autograd.Function):
    """A loss whose gradients by `tensors` were computed already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, None, *(gradient * grad for gradient in ctx.saved_tensors)


def edit_step_in_parts(
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
    check_in_parts(editor, tasks_at_once)
    layers = editor.modules_in(model)
    made = editor.make_deltas(model, batch.z_edit, (trunk_of or run_trunk)(model, batch.z_edit, layers))
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
    joined = StepOutput(*(torch.cat([getattr(each, name) for each in losses]) for name in names), made.skipped)
    return known_loss(joined.total(c_edit), gradients, tensors), joined


def check_in_parts(editor: Editor, tasks_at_once: int) -> None:
    """Raises ConfigError if the editor trains the base as well."""
    if editor.resting_deltas() is not None:
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
        with unasked_masks(batch.z_edit.task.device):
            return edit_step_in_parts(model, editor, batch, c_edit, tasks_at_once, locality_positions, trunk_of)
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
    return EditBatch(*(rows.of_task_range(tasks) for rows in (batch.z_edit, batch.x_out, batch.x_in)))
