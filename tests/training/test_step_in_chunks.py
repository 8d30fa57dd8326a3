"""A step over a few tasks at a time is the step over all of them."""

from __future__ import annotations

import pytest
import torch
from helpers.bases import REMARKS, first_batches, given
from helpers.models import make_batch, relative_error, spread_parameters, tiny_model
from helpers.training import assert_same_training

from mend_lightning import MendEditor
from mend_lightning.editors import EnnEditor
from mend_lightning.errors import ConfigError
from mend_lightning.training.step import edit_step, edit_step_in_chunks

pytest_plugins = ["helpers.bases"]


def editor_of(model, **settings) -> MendEditor:
    torch.manual_seed(0)
    editor = MendEditor.for_model(model, rank=4, edit_rate=0.05, **settings).double()
    return spread_parameters(editor, 0.02)


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_losses_gradients_and_statistics(family, at_once):
    model, batch = tiny_model(family), make_batch(family, tasks=3)
    whole, parts = editor_of(model), editor_of(model)
    expected = edit_step(model, whole, batch)
    expected.total(0.1).backward()
    loss, found = edit_step_in_chunks(model, parts, batch, 0.1, at_once)
    # As a loss scaler does.
    (8 * loss).backward()
    assert loss.item() == pytest.approx(expected.total(0.1).item(), rel=1e-10)
    for name in ("edit", "locality", "inner"):
        assert getattr(found, name).shape == (3,) and not getattr(found, name).requires_grad
        assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-10, name
    for (name, parameter), theirs in zip(whole.named_parameters(), parts.parameters()):
        assert float(parameter.grad.abs().max()) > 0, name
        assert relative_error(theirs.grad / 8, parameter.grad) < 1e-8, name
    for (name, buffer), theirs in zip(whole.named_buffers(), parts.buffers()):
        assert relative_error(theirs, buffer) < 1e-10, name


@pytest.mark.parametrize("settings", [{"confidence": 0.5}, {"ridge": 0.1}], ids=str)
def test_other_ways_to_make_deltas(settings):
    model, batch = tiny_model("llama"), make_batch("llama", tasks=3)
    whole, parts = editor_of(model, **settings), editor_of(model, **settings)
    edit_step(model, whole, batch).total(0.1).backward()
    edit_step_in_chunks(model, parts, batch, 0.1, 2)[0].backward()
    for (name, parameter), theirs in zip(whole.named_parameters(), parts.parameters()):
        assert relative_error(theirs.grad, parameter.grad) < 1e-8, name


def test_only_a_part_is_in_memory(monkeypatch):
    """The outer pass sees the rows of `tasks_at_once` tasks."""
    from mend_lightning.training import step as parts

    seen = []
    outer = parts.outer_losses
    monkeypatch.setattr(
        parts, "outer_losses", lambda *args: (seen.append(args[2].x_out.task.tolist()), outer(*args))[1]
    )
    model, batch = tiny_model("llama"), make_batch("llama", tasks=3)
    edit_step_in_chunks(model, editor_of(model), batch, 0.1, 2)
    assert seen == [[0, 0, 1, 1], [0, 0]]


def test_an_editor_that_trains_the_base():
    model = tiny_model("llama", torch.float32)
    editor = EnnEditor.for_model(model)
    editor.bind(model)
    with pytest.raises(ConfigError, match="tasks_at_once=1: EnnEditor trains the base as well"):
        edit_step_in_chunks(model, editor, make_batch("llama"), 0.1, 1)


@pytest.mark.filterwarnings(*REMARKS)
def test_a_run(mend, edit_data, trainer):
    """Through the Trainer: the editor that training leaves is the same."""
    editors = []
    for at_once in (None, 1):
        torch.manual_seed(0)
        module = mend("llama", tasks_at_once=at_once, lr=1e-4, edit_rate_lr=1e-4)
        trainer(max_steps=3).fit(module, given(first_batches(module, edit_data(), 3)))
        editors.append(module.editor.state_dict())
    assert_same_training(editors[1], editors[0], rate=1e-4, steps=3)


def test_a_size_that_is_none(mend):
    with pytest.raises(ConfigError, match="tasks_at_once must be at least 1, not 0"):
        mend("llama", tasks_at_once=0)
