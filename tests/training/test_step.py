"""`edit_step` on several tasks at once against the paper's loop in `reference.py`: losses and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.edits import compute_deltas
from helpers.models import make_batch, make_rows, relative_error, tiny_model
from helpers.reference import ReferenceMend
from helpers.step_reference import C_EDIT, check_against_reference, spread_editor

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors import MendEditor
from mend_lightning.editors.factors import edit_factors
from mend_lightning.errors import EmptyEditError
from mend_lightning.models.forward.logits import attended_mask
from mend_lightning.training.step import edit_step, edit_step_in_chunks, locality_positions_of, outer_losses


def test_every_family(family):
    model = tiny_model(family)
    check_against_reference(model, spread_editor(model), [make_batch(family, seed=seed) for seed in range(3)])


@pytest.mark.parametrize(
    "settings",
    [
        {"shared": False},
        {"init": "xavier"},
        {"normalize": False, "edit_rate": 0.1},
        {"inputs": "separate"},
        {"inputs": "u"},
        {"inputs": "delta"},
        {"inputs": "smaller"},
        {"n_hidden": 0},
        {"n_hidden": 2, "edit_rate": 0.002},
        {"shared": False, "init": "xavier", "inputs": "separate", "n_hidden": 2},
    ],
    ids=lambda settings: "-".join(f"{key}_{value}" for key, value in settings.items()),
)
def test_every_kind_of_editor(settings):
    model = tiny_model("llama")
    editor = spread_editor(model, **settings)
    check_against_reference(model, editor, [make_batch("llama", seed=seed) for seed in range(2)])


def test_identity_start_has_gradients():
    """At U = 0 the clamp sits exactly at its kink, and training must leave it."""
    model = tiny_model("gpt2")
    editor = MendEditor.for_model(model, rank=5, edit_rate=0.01)
    check_against_reference(model, editor, [make_batch("gpt2")])
    assert all(layer.u.grad.abs().max() > 0 for layer in editor.transforms[0].nets["combined"].layers)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_several_edit_rows_a_task(family):
    model = tiny_model(family)
    check_against_reference(model, spread_editor(model), [make_batch(family, edits=2, seed=seed) for seed in (3, 4)])


def test_tasks_of_unequal_size():
    model = tiny_model("gpt2")
    rows = [make_rows("gpt2", task, 3, seed) for seed, task in enumerate(([0, 1, 1, 2], [2, 0, 1, 0], [1, 2, 0, 2, 2]))]
    check_against_reference(model, spread_editor(model), [EditBatch(*rows)])


def test_common_beginnings():
    """The trunk runs the common tokens once; nothing else may change."""
    model = tiny_model("llama")
    check_against_reference(model, spread_editor(model), [make_batch("llama", seed=s, prefix=4) for s in (0, 1)])


def test_square_layers():
    """A shape cannot tell which way round a square Conv1D's weight is."""
    model = tiny_model("gpt2")
    editor = spread_editor(model, ["transformer.h.[123].attn.c_proj"])
    assert editor.groups == [[f"transformer.h.{block}.attn.c_proj" for block in (1, 2, 3)]]
    check_against_reference(model, editor, [make_batch("gpt2", seed=seed) for seed in range(2)])


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
@pytest.mark.parametrize("positions", ["all", "answer"])
def test_locality_positions(family, positions):
    model = tiny_model(family)
    check_against_reference(model, spread_editor(model), [make_batch(family)], positions)


def test_locality_positions_by_hand():
    def mask(rows, positions: str) -> torch.Tensor:
        found = torch.zeros_like(rows.labels, dtype=torch.bool)
        where = locality_positions_of(rows, positions)
        found[where.row, where.column] = True
        return found

    x_out = make_rows("llama", [0, 1], 2)
    assert torch.equal(mask(x_out, "all"), x_out.inputs["attention_mask"].bool())
    assert torch.equal(mask(x_out, "answer"), x_out.labels != -100)
    x_out = make_rows("t5", [0, 1], 2)
    assert torch.equal(attended_mask(x_out), x_out.inputs["decoder_attention_mask"].bool())
    assert mask(make_rows("bert", [0, 1], 2), "all").tolist() == [[True], [True]]


def test_share_of_skipped_tokens():
    model, batch = tiny_model("gpt2"), make_batch("gpt2")
    editor = spread_editor(model)
    expected = ReferenceMend(editor).step(model, batch, training=True)
    positions = len(editor.layers) * batch.z_edit.labels.numel()
    assert float(edit_step(model, editor, batch).skipped) == pytest.approx(1 - expected.tokens / positions)


def test_step_leaves_the_model_alone(family):
    model, batch = tiny_model(family), make_batch(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    edit_step(model, spread_editor(model), batch).total(C_EDIT).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_compute_deltas_is_the_loop_over_tokens(family):
    model, batch = tiny_model(family), make_batch(family)
    editor = spread_editor(model, normalize=False).eval()
    reference, deltas = ReferenceMend(editor), compute_deltas(model, editor, batch.z_edit)
    factors = edit_factors(model, editor.modules_in(model), batch.z_edit)[0]
    for rate, (name, each) in zip(editor.edit_rates.tolist(), factors.items()):
        expected = torch.zeros(deltas[name].dense().shape, dtype=torch.float64)
        for u, delta, task in zip(each.u.double(), each.delta.double(), each.task):
            u, delta = reference.edit_factors(name, u, delta)
            expected[task] -= (rate * torch.outer(delta, u)).detach()
        assert relative_error(deltas[name].dense(), expected) < 1e-5, name


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_edit_without_labels(family):
    model, batch = tiny_model(family), make_batch(family)
    batch.z_edit.labels[1] = -100
    with pytest.raises(EmptyEditError, match=r"The edit of task 1 has no label token: every label is -100\."):
        edit_step(model, spread_editor(model), batch)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_a_step_is_taken_with_edits_that_are_kept_off_questions(family):
    """Whole or in parts: the losses of the deltas that the questions of each task constrain."""
    model = tiny_model(family)
    batch = replace(make_batch(family), x_keep=make_rows(family, [0, 1, 1, 2], 3, seed=9))
    editor = spread_editor(model).eval()
    with torch.no_grad():
        kept = editor.make_deltas(model, batch.z_edit, x_keep=batch.x_keep).deltas
        free = compute_deltas(model, editor, batch.z_edit)
        layers = editor.modules_in(model)
        (edit, locality), (_, other) = (outer_losses(model, layers, batch, each) for each in (kept, free))
    assert relative_error(other, locality) > 1e-2, "it must matter"
    whole, (_, parts) = edit_step(model, editor, batch), edit_step_in_chunks(model, editor, batch, C_EDIT, 1)
    for out in (whole, parts):
        torch.testing.assert_close(out.edit.detach(), edit, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(out.locality.detach(), locality, rtol=1e-4, atol=1e-6)
