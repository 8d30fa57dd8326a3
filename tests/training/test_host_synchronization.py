"""No training step makes the host wait for the device: nothing in it reads a number, or sizes a tensor by what is in another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.models import KINDS, make_batch, make_rows, spread_parameters, tiny_model
from helpers.waiting import Waiting
from torch import nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors import EnnEditor, KnowledgeEditor, MendEditor, knowledge_editor
from mend_lightning.models.forward import device
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.training.step import step_loss


def waits(monkeypatch, model: nn.Module, editor: nn.Module, batches: list[EditBatch], **settings) -> list[str]:
    """What waited in a training step on each batch but the first, which finds out about the model."""
    monkeypatch.setattr(device, "SYNCHRONOUS_DEVICES", frozenset())
    # A copy that shares no memory, as on a device.
    batches = [batch.to("cpu", copy=True) for batch in batches]
    optimizer = torch.optim.Adam(editor.train().parameters(), fused=True)
    _step(model, editor, batches[0], optimizer, settings)
    rows = [rows for batch in batches for rows in (batch.z_edit, batch.x_out, batch.x_in)]
    given = [tensor for each in rows for tensor in (*each.inputs.values(), each.labels, each.task)]
    states = [tensor for module in (model, editor) for tensor in (*module.parameters(), *module.buffers())]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    watch = Waiting([*given, *states, *moments])
    with watch.watching(monkeypatch):
        for batch in batches[1:]:
            _step(model, editor, batch, optimizer, settings)
    return watch.found


def _step(
    model: nn.Module, editor: nn.Module, batch: EditBatch, optimizer: torch.optim.Optimizer, settings: dict
) -> None:
    optimizer.zero_grad()
    loss, _ = step_loss(model, editor, batch, 0.1, **settings)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("family", KINDS)
def test_a_training_step_does_not_wait(family, monkeypatch):
    model = tiny_model(family, torch.float32)
    editor = spread_parameters(MendEditor.for_model(model, rank=4), 0.01)
    batches = [make_batch(family, edits=2, seed=seed) for seed in range(2)]
    assert waits(monkeypatch, model, editor, batches) == []


@pytest.mark.parametrize(
    "kind", ["ridge", "preconditioned", "ENN", "ENN first order", "parts", "answer", "float16", "confidence"]
)
def test_other_kinds_of_steps(kind, monkeypatch):
    model = tiny_model("llama", torch.float16 if kind == "float16" else torch.float32)
    editor, settings = MendEditor.for_model(model, rank=4), {}
    if kind == "ridge":
        editor = MendEditor.for_model(model, rank=4, ridge=0.5)
    elif kind == "preconditioned":
        editor = MendEditor.for_model(model, rank=4, precondition=0.1)
        editor.load_state_dict(
            {**editor.state_dict(), **{name: torch.ones((), dtype=torch.bool) for name in _flags(editor)}}
        )
    elif kind.startswith("ENN"):
        editor = EnnEditor.for_model(model, first_order="first order" in kind)
    elif kind == "parts":
        settings = {"tasks_at_once": 2}
    elif kind == "confidence":
        editor = MendEditor.for_model(model, rank=4, confidence=0.9)
    elif kind == "answer":
        settings = {"locality_positions": "answer"}
    # Tasks are not in equal numbers, so that each row's own task must be looked up.
    batches = [EditBatch(*(make_rows("llama", task, 3, seed) for task in TASKS)) for seed in range(2)]
    assert waits(monkeypatch, model, editor, batches, **settings) == []


TASKS = ([0, 1, 1, 2], [0, 1, 2, 2], [0, 0, 1, 2, 2])


def _flags(editor: nn.Module) -> list[str]:
    return [name for name in editor.state_dict() if name.endswith("calibrated")]


def test_input_and_output_of_one_length(monkeypatch):
    """The trunk's outputs cannot then be cut to a set's own length, and the set stays as long as the others."""
    model = tiny_model("t5", torch.float32)
    batches = [make_batch("t5", seed=seed) for seed in range(2)]
    batches = [replace(batch, x_in=_square(batch.x_in), z_edit=_square(batch.z_edit)) for batch in batches]
    assert waits(monkeypatch, model, MendEditor.for_model(model, rank=4), batches) == []


def _square(rows: Rows) -> Rows:
    width = rows.labels.shape[1]
    return replace(rows, inputs={name: value[:, :width] for name, value in rows.inputs.items()})


def test_gates_of_a_text(monkeypatch):
    """KnowledgeEditor waits for the base's answers, which it reads as text, and packs them; for nothing else."""
    model = tiny_model("llama", torch.float32)
    lengths = torch.tensor([7, 5, 6, 6])
    monkeypatch.setattr(
        knowledge_editor, "edit_conditions", lambda model, rows, *_: (rows.inputs["input_ids"], lengths)
    )
    editor = KnowledgeEditor.for_model(model, hidden=4, condition=8, embedding=16)
    editor.encoder = "what reads the text"
    batches = [EditBatch(*(make_rows("llama", task, 3, seed) for task in TASKS)) for seed in range(2)]
    found = waits(monkeypatch, model, editor, batches)
    assert [each for each in found if "packed" not in each.rpartition(" > ")[2]] == []
