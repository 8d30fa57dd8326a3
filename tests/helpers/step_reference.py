"""A training step against the paper's loop in `reference.py`."""

from __future__ import annotations

import pytest
import torch

from helpers.models import relative_error, spread_parameters
from helpers.reference import ReferenceMend
from mend_lightning.data.batch import EditBatch
from mend_lightning.editors import MendEditor
from mend_lightning.training.step import edit_step

C_EDIT = 0.1

# The base is float64, the editor float32: what differs is the rounding of its factors, at most 2e-7 of a loss and 8e-6 of a
# gradient. A KL is a difference of almost equal numbers of about 5, of which float32's last bit is 5e-7.
LOSS, KL, GRADIENT = 2e-6, 1e-6, 1e-4


def check_against_reference(model, editor: MendEditor, batches: list[EditBatch], positions: str = "all") -> None:
    """All batches but the last update the statistics; the last is an evaluation without update."""
    reference = ReferenceMend(editor)
    for index, batch in enumerate(batches):
        training = index < len(batches) - 1 or len(batches) == 1
        editor.train(training).zero_grad()
        expected = reference.step(model, batch, training, positions)
        actual = edit_step(model, editor, batch, positions)
        for name in ("edit", "locality", "inner"):
            values = getattr(actual, name).tolist()
            assert values == pytest.approx(torch.stack(getattr(expected, name)).tolist(), rel=LOSS, abs=KL), name
        assert expected.tokens > 0
        check_gradients(editor, actual.total(C_EDIT), reference, expected.total(C_EDIT))


def check_gradients(editor: MendEditor, actual, reference: ReferenceMend, expected) -> None:
    actual.backward()
    gradients = torch.autograd.grad(expected, list(reference.parameters.values()))
    for name, gradient in zip(reference.parameters, gradients):
        error = relative_error(dict(editor.named_parameters())[name].grad, gradient)
        assert error < GRADIENT, f"gradient of {name} differs by {error:.1e}"


def spread_editor(model, layers=None, **settings) -> MendEditor:
    settings = {"rank": 5, "edit_rate": 0.01, **settings}
    editor = MendEditor.for_model(model, layers, **settings)
    rates = editor.edit_rates.detach().clone()
    spread_parameters(editor)
    # Edits must be large enough to be seen and small enough for a KL that is no explosion.
    editor.edit_rates.data.copy_(rates * torch.linspace(0.5, 1.5, len(rates)))
    return editor
