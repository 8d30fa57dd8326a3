"""Edits made in several gradient steps: against a plain loop over single editors on dense weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.edits import compute_deltas
from helpers.models import make_batch, make_rows, relative_error, spread_parameters, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from mend_lightning import FineTuning, MendEditor
from mend_lightning.editors.confidence import WITHIN, target_scores
from mend_lightning.edits.deltas import LowRankDelta
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.hooks import applied
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.training.step import edit_step, outer_losses

CONFIDENCE = 0.9


def make_editor(model, **settings) -> MendEditor:
    torch.manual_seed(0)
    editor = MendEditor.for_model(model, rank=4, edit_rate=0.02, **settings)
    return spread_parameters(editor, 1e-3).eval()


def with_weights(model: nn.Module, deltas, task: int) -> nn.Module:
    """A copy of the model whose weights hold the deltas of one task."""
    changed = copy.deepcopy(model)
    for name, delta in deltas.items():
        layer, change = changed.get_submodule(name), delta.dense()[task].to(torch.float64)
        layer.weight.data += change.T if isinstance(layer, Conv1D) else change
    return changed


def probability(model: nn.Module, rows: Rows) -> float:
    return math.exp(-float(target_scores(model, rows).worst_of_task(rows).nll))


@pytest.mark.parametrize("steps", [2, 3])
def test_steps_are_those_of_an_editor_of_the_changed_model(family, steps):
    """Each step is a one-step edit of the model with the steps before in its weights; a confident edit gets no more."""
    model, rows = tiny_model(family), make_rows(family, [0, 1, 2], 3)
    editor = make_editor(model, confidence=CONFIDENCE, inner_steps=steps)
    single = make_editor(model, confidence=CONFIDENCE)
    single.load_state_dict(editor.state_dict())
    with torch.no_grad():
        together = compute_deltas(model, editor, rows)
    for task in range(3):
        own, _ = rows.of_tasks(torch.tensor([task]))
        changed = model
        for step in range(steps):
            if step and probability(changed, own) >= 0.95 * CONFIDENCE:
                break
            with torch.no_grad():
                changed = with_weights(changed, compute_deltas(changed, single, own), 0)
        for name in editor.layers:
            expected = changed.get_submodule(name).weight - model.get_submodule(name).weight
            expected = expected.T if isinstance(model.get_submodule(name), Conv1D) else expected
            assert relative_error(together[name].dense()[task].double(), expected) < 1e-3, (task, name)


def test_more_steps_reach_what_one_does_not():
    model, rows = tiny_model("llama"), make_rows("llama", list(range(6)), 6)
    found, editors = [], [make_editor(model, confidence=CONFIDENCE, inner_steps=steps) for steps in (1, 4)]
    editors[1].load_state_dict(editors[0].state_dict())
    for editor in editors:
        with torch.no_grad():
            deltas = compute_deltas(model, editor, rows)
            with applied(editor.modules_in(model), deltas, rows.task_of_row):
                found.append((-target_scores(model, rows).worst_of_task(rows).nll).exp())
    assert bool((found[0] < 0.9 * CONFIDENCE).any()), "the case must occur"
    assert bool((found[1] >= found[0] ** WITHIN - 1e-3).all()), "a size is given up for so much of nll, once"
    # Random models do not become confident, but what was improbable becomes several times likelier.
    assert int((found[1] > 2 * found[0]).sum()) >= 4


def test_a_confident_edit_is_the_same_with_any_number_of_steps():
    model, rows = tiny_model("llama"), make_rows("llama", [0], 1)
    one, many = (make_editor(model, confidence=0.02, inner_steps=steps) for steps in (1, 5))
    many.load_state_dict(one.state_dict())
    with torch.no_grad():
        first = compute_deltas(model, one, rows)
        assert probability(with_weights(model, first, 0), rows) >= 0.95 * 0.02, "it must be confident"
        for name, delta in compute_deltas(model, many, rows).items():
            assert torch.equal(delta.of_task(0).dense(), first[name].of_task(0).dense())
            assert delta.of_task(0).rank == first[name].of_task(0).rank


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_further_steps_leave_the_statistics_alone(family):
    model, batch = tiny_model(family), make_batch(family)
    states = []
    for steps in (1, 3):
        editor = make_editor(model, confidence=CONFIDENCE, inner_steps=steps).train()
        edit_step(model, editor, batch)
        assert editor.training and all(module.training for module in editor.modules())
        states.append({name: value for name, value in editor.state_dict().items() if "_stats." in name})
    assert states[0] and all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_gets_gradients_through_every_step(family):
    """The edit rate's gradient: the sum over steps of what each step's delta brings, for sizes are constants to it."""
    model, batch = tiny_model(family), make_batch(family, tasks=1)
    editor = make_editor(model, confidence=CONFIDENCE, inner_steps=3)
    edit_step(model, editor, batch).total(0.1).backward()
    made = editor.make_deltas(model, batch.z_edit).deltas
    leaves = {name: LowRankDelta(each.down.detach(), each.up.detach().requires_grad_()) for name, each in made.items()}
    edit, locality = outer_losses(model, editor.modules_in(model), batch, leaves)
    (0.1 * edit + locality).sum().backward()
    for rate, (_, gradient), leaf in zip(editor.edit_rates, zip(leaves, editor.edit_rates.grad), leaves.values()):
        expected = (leaf.up.grad * leaf.up.detach()).sum() / rate.detach()
        assert float(gradient) == pytest.approx(float(expected), rel=1e-3)
    assert max(each.rank for each in made.values()) > max(each.rank for each in one_step(model, editor, batch).values())


def one_step(model, editor, batch):
    first = make_editor(model, confidence=CONFIDENCE)
    first.load_state_dict(editor.state_dict())
    return first.make_deltas(model, batch.z_edit).deltas


def test_what_is_refused():
    with pytest.raises(ConfigError, match="inner_steps is a number of gradient steps; it must be 1 or more, not 0"):
        MendEditor({"fc": (2, 3)}, rank=2, confidence=0.5, inner_steps=0)
    with pytest.raises(ConfigError, match="set confidence as well"):
        MendEditor({"fc": (2, 3)}, rank=2, inner_steps=2)
    editor = MendEditor({"fc": (2, 3)}, rank=2, confidence=0.5, inner_steps=2)
    editor.set_confidence(None)
    assert editor.inner_steps == 1, "nothing to go on for"


def test_steps_and_wordings_of_an_editor_that_is_there():
    """They are saved with it, and None leaves one as it is; another kind of editor has none."""
    editor = MendEditor({"fc": (2, 3)}, rank=2, confidence=0.5)
    editor.set_steps()
    assert (editor.inner_steps, editor.wordings) == (1, 0)
    editor.set_steps(inner_steps=3)
    editor.set_steps(wordings=2)
    assert (editor.inner_steps, editor.wordings) == (3, 2)
    assert editor.description()["settings"]["inner_steps"] == 3
    for settings, text in (
        ({"inner_steps": 0}, "inner_steps is a number of gradient steps; it must be 1 or more, not 0"),
        ({"wordings": 9}, "it must be 0 to 8, not 9"),
    ):
        with pytest.raises(ConfigError, match=text):
            editor.set_steps(**settings)
    assert (editor.inner_steps, editor.wordings) == (3, 2), "what is refused changes nothing"
    editor.set_confidence(None)
    with pytest.raises(ConfigError, match="set confidence as well"):
        editor.set_steps(inner_steps=2)
    with pytest.raises(ConfigError, match="FineTuning has no wordings: it makes its edits in another way"):
        FineTuning({"fc": (2, 3)}).set_steps(wordings=1)
