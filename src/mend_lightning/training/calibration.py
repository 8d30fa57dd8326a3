"""Collects what preconditioning is estimated from: the edited layers' inputs over training batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors.editor import Editor
from mend_lightning.editors.precondition import InputMoments
from mend_lightning.models.forward.layer_inputs import encoder_modules, record_inputs
from mend_lightning.models.forward.logits import attended_mask, label_mask
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows, concatenate_rows
from mend_lightning.training.step import Trunk


@torch.no_grad()
def collect_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: EditBatch,
    moments: dict[str, InputMoments],
    pairs: bool = True,
    trunk_of: Trunk = run_trunk,
) -> None:
    """Adds the layers' inputs on all rows of a batch to `moments` (name -> InputMoments).

    Args:
        model: the base model.
        layers: name -> module of the edited layers.
        batch: edit tasks.
        moments: filled where a layer is missing.
        pairs: whether edits are paired with their rephrases, which only `rephrase_ridge` needs.
        trunk_of: runs the trunk, or finds its outputs: a `CachedTrunk`.
    """
    rows = concatenate_rows([batch.z_edit, batch.x_in, batch.x_out])
    paired = _paired_rows(batch) if pairs else None
    answers, attended, encoder = label_mask(rows), attended_mask(rows), encoder_modules(model)
    for name, calls in record_inputs(model, layers, rows, trunk_of(model, rows, layers)).items():
        for u in calls:
            u = u.reshape(len(rows), -1, u.shape[-1]).float()
            if name not in moments:
                moments[name] = InputMoments.empty(u.shape[-1], u.device, pairs)
            decoding = layers[name] not in encoder and u.shape[1] == answers.shape[1]
            moments[name].add(u[attended if decoding else _input_mask(rows, u.shape[1])])
            if decoding:
                _add_answers(moments[name], u, answers, paired)


def calibrate(model: nn.Module, editor: Editor, batches: Iterable[EditBatch], trunk_of: Trunk = run_trunk) -> None:
    """Fixes the preconditioning of `editor` by what its layers see in `batches`, of all processes together."""
    moments: dict[str, InputMoments] = {}
    layers = editor.modules_in(model)
    for batch in batches:
        collect_moments(model, layers, batch, moments, editor.follows_rephrases, trunk_of)
    editor.calibrate(moments)


def _add_answers(moments: InputMoments, u: Tensor, answers: Tensor, paired: tuple[Tensor, Tensor] | None) -> None:
    moments.answers.add(u[answers])
    if paired is not None:
        # Both rows of a pair have the same labels, so their label positions correspond one by one.
        moments.add_pairs(*(u[rows][answers[rows]] for rows in paired))


def _paired_rows(batch: EditBatch) -> tuple[Tensor, Tensor]:
    """`rephrase_pairs` as indices into the rows of `z_edit` and then `x_in`."""
    edits, rephrases = rephrase_pairs(batch.z_edit, batch.x_in)
    return edits, rephrases + len(batch.z_edit)


def rephrase_pairs(z_edit: Rows, x_in: Rows) -> tuple[Tensor, Tensor]:
    """Indices of edits and of rephrases that belong together: of one task, with the same answer.

    Example:
        >>> labels = torch.tensor([[-100, 7], [-100, 8]])
        >>> edits = Rows({}, labels, torch.tensor([0, 0]), 1)
        >>> rephrases = Rows({}, torch.tensor([[8, -100, -100]]), torch.tensor([0]), 1)
        >>> rephrase_pairs(edits, rephrases)
        (tensor([1]), tensor([0]))
    """
    left, right = _answers(z_edit), _answers(x_in)
    found = [(i, j) for i, edit in enumerate(left) for j, rephrase in enumerate(right) if edit == rephrase]
    edits, rephrases = torch.tensor(found, device=z_edit.task.device, dtype=torch.long).reshape(-1, 2).unbind(1)
    return edits, rephrases


def _answers(rows: Rows) -> list[tuple[int, ...]]:
    """The task and the label ids of every row."""
    labels = rows.labels.tolist()
    return [(task, *(i for i in row if i != IGNORED_LABEL)) for task, row in zip(rows.task.tolist(), labels)]


def _input_mask(rows: Rows, tokens: int) -> Tensor:
    """Where tokens of the encoder's (or a classifier's) input are real, `[rows, tokens]`."""
    mask = rows.inputs.get("attention_mask")
    if mask is None or mask.shape[1] != tokens:
        return torch.ones(len(rows), tokens, dtype=torch.bool, device=rows.task.device)
    return mask.bool()
