"""Edits that are kept off questions: against a constrained least-squares problem in float64, and plain forward passes."""

from __future__ import annotations

import pytest
import torch
from helpers.models import KINDS, make_batch, make_rows, relative_error, spread_parameters, tiny_model
from torch import Tensor

from mend_lightning import MendEditor
from mend_lightning.editors.constraints import constrained, kept_inputs, without_effect_on
from mend_lightning.editors.precondition import InputMoments
from mend_lightning.edits.deltas import DenseDelta, LowRankDelta
from mend_lightning.models.forward.hooks import applied
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows
from mend_lightning.models.layers import select_layers


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(width: int) -> Tensor:
    inputs = numbers(40, width, seed=7) * torch.linspace(0.2, 3, width, dtype=torch.float64)
    return inputs.T @ inputs / len(inputs)


def nearest(row: Tensor, kept: Tensor, second: Tensor) -> Tensor:
    """argmin of `(r − row)ᵀ A (r − row)` where `kept r = 0`: its KKT equations, solved whole."""
    width, count = len(row), len(kept)
    system = torch.zeros(width + count, width + count, dtype=torch.float64)
    system[:width, :width], system[:width, width:], system[width:, :width] = second, kept.T, kept
    return torch.linalg.solve(system, torch.cat([second @ row, torch.zeros(count, dtype=torch.float64)]))[:width]


@pytest.mark.parametrize("has_metric", [True, False])
def test_down_goes_to_the_nearest_vector_that_answers_nothing(has_metric):
    down, kept = numbers(2, 3, 12), numbers(2, 4, 12, seed=1)
    second = second_moment(12) if has_metric else torch.eye(12, dtype=torch.float64)
    inverse = 5 * torch.linalg.inv(second) if has_metric else None
    found = without_effect_on(down, kept, inverse, ridge=0.0)
    for task in range(2):
        for row, moved in zip(down[task], found[task]):
            torch.testing.assert_close(moved, nearest(row, kept[task], second), rtol=1e-8, atol=1e-10)
    assert float((found @ kept.mT).abs().max()) < 1e-10


def test_a_ridge_is_a_large_weight_in_the_second_moment():
    """down A⁻¹ with K's inputs in A as well, each with the weight 1/ε."""
    second, kept, wanted = second_moment(12), numbers(1, 4, 12, seed=1), numbers(1, 3, 12)
    inverse = torch.linalg.inv(second)
    gram = (kept @ inverse @ kept.mT)[0]
    epsilon = 0.1 * float(gram.diagonal().mean())
    larger = second + kept[0].T @ kept[0] / epsilon
    found = without_effect_on(wanted @ inverse, kept, inverse, ridge=0.1)
    torch.testing.assert_close(found[0], wanted[0] @ torch.linalg.inv(larger), rtol=1e-8, atol=1e-10)


def test_padding_constrains_nothing():
    down, kept = numbers(2, 3, 12), numbers(2, 4, 12, seed=1)
    padded = torch.cat([kept, torch.zeros(2, 3, 12, dtype=torch.float64)], 1)
    torch.testing.assert_close(without_effect_on(down, padded, None), without_effect_on(down, kept, None))
    assert torch.equal(without_effect_on(down, 0 * kept, None), down)


def test_two_questions_that_are_the_same_count_once():
    down, kept = numbers(1, 3, 12).float(), numbers(1, 1, 12, seed=1).float()
    found = without_effect_on(down, kept.repeat(1, 2, 1), None)
    assert bool(found.isfinite().all())
    assert float((found @ kept.mT).abs().max()) < 0.02 * float((down @ kept.mT).abs().max())


def slow_inputs(model, layer, row: dict, position: int) -> Tensor:
    """The layer's input at one token of one row that runs alone, without padding."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(**row)
    finally:
        handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])[position]


def alone(rows: Rows, index: int) -> tuple[dict, int]:
    """One row without its padding, and the token that decides its answer: its first label; a classifier's first token."""
    row = {}
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if ids in rows.inputs:
            length = int(rows.inputs[mask][index].sum())
            row |= {
                ids: rows.inputs[ids][index : index + 1, :length],
                mask: rows.inputs[mask][index : index + 1, :length],
            }
    return row, int((rows.labels[index] != IGNORED_LABEL).nonzero()[0])


def test_kept_inputs_are_those_of_the_deciding_token(family):
    model, rows = tiny_model(family), make_rows(family, [0, 0, 1, 2, 2], 3)
    layers = select_layers(model)
    found = kept_inputs(model, layers, rows)
    expected = [name for name in layers if KINDS[family] != "encoder_decoder" or "decoder" in name]
    assert list(found) == expected
    for name in found:
        assert found[name].shape[:2] == (3, 2)
        assert not found[name][1, 1].any(), "a place that no question has"
        for index, (task, slot) in enumerate([(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]):
            slow = slow_inputs(model, layers[name], *alone(rows, index))
            torch.testing.assert_close(found[name][task, slot].double(), slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_layer_answers_kept_questions_as_without_the_edit(family):
    """One edited layer: its inputs do not depend on the edit, so this is exact up to ε."""
    model, batch = tiny_model(family), make_batch(family, tasks=2)
    name = list(select_layers(model, last_blocks=2))[-1]
    editor = spread_parameters(MendEditor.for_model(model, layers=[name], rank=4, edit_rate=0.1), 0.02).eval()
    x_keep = make_rows(family, [0, 0, 1], 2, seed=9)
    with torch.no_grad():
        free = editor.make_deltas(model, batch.z_edit).deltas[name]
        bound = editor.make_deltas(model, batch.z_edit, x_keep=x_keep).deltas[name]
    kept = kept_inputs(model, editor.modules_in(model), x_keep)[name]
    answers = [(delta.down @ kept.mT).mT @ delta.up for delta in (free, bound)]
    assert float(answers[0].norm()) > 0.01, "the edit must say something there"
    assert float(answers[1].norm()) < 0.03 * float(answers[0].norm())
    assert float(bound.norm().min()) > 0, "and something elsewhere"


def test_an_editor_keeps_off_a_batch_s_questions_in_training(family):
    """Each task has its own; gradients reach the transforms through the constraint."""
    model, batch = tiny_model(family), make_batch(family, tasks=2)
    editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=0.1), 0.02).eval()
    x_keep = make_rows(family, [0, 1], 2, seed=9)
    together = editor.make_deltas(model, batch.z_edit, x_keep=x_keep).deltas
    for task in range(2):
        (single,) = (batch.z_edit.of_tasks(torch.tensor([task]))[0],)
        own = editor.make_deltas(model, single, x_keep=x_keep.of_tasks(torch.tensor([task]))[0]).deltas
        for name in own:
            assert relative_error(together[name].dense()[task], own[name].dense()[0]) < 1e-4, name
    sum(delta.dense().square().sum() for delta in together.values()).backward()
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in editor.parameters())


def test_what_is_not_low_rank_stays():
    dense = DenseDelta(numbers(1, 2, 3))
    low = LowRankDelta(numbers(1, 2, 3), numbers(1, 2, 2))
    found = constrained({"a": dense, "b": low, "c": low}, {"a": numbers(1, 1, 3), "b": numbers(1, 1, 3)}, {})
    assert found["a"] is dense and found["c"] is low and found["b"] is not low


def test_the_base_is_as_before():
    model, batch = tiny_model("llama"), make_batch("llama", tasks=1)
    editor = MendEditor.for_model(model, rank=4, edit_rate=0.1).eval()
    before = model(**batch.x_out.inputs).logits
    with torch.no_grad():
        deltas = editor.make_deltas(model, batch.z_edit, x_keep=batch.x_out).deltas
        with applied(editor.modules_in(model), deltas):
            model(**batch.x_out.inputs)
    assert torch.equal(model(**batch.x_out.inputs).logits, before)


def test_a_preconditioned_editor_constrains_in_the_metric_of_its_inputs():
    """A⁻¹ of the calibration, whatever the regression on rephrases makes of the preconditioning."""
    moments = InputMoments.empty(12)
    moments.add(numbers(60, 12, seed=3).float() * torch.linspace(0.2, 3, 12))
    moments.add_pairs(numbers(60, 12, seed=4).float(), numbers(60, 12, seed=5).float())
    editor = MendEditor({"fc": (12, 5)}, rank=2, precondition=0.01, rephrase_ridge=0.1, contrasts=1).eval()
    editor.calibrate({"fc": moments})
    second = moments.second()
    damped = second + 0.01 * second.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    metric = editor.input_metrics()["fc"].double()
    expected = torch.linalg.inv(damped)
    assert relative_error(metric / metric.trace(), expected / expected.trace()) < 1e-4
    down, kept = numbers(1, 3, 12), numbers(1, 2, 12, seed=1)
    (delta,) = constrained({"fc": LowRankDelta(down, numbers(1, 3, 5))}, {"fc": kept}, {"fc": metric}).values()
    for row, moved in zip(down[0], delta.down[0]):
        assert relative_error(moved, nearest(row, kept[0], damped)) < 0.05, "up to the ridge of the questions"
    assert MendEditor({"fc": (12, 5)}, rank=2, precondition=0.01).input_metrics() == {}, "kept for contrasts alone"


def test_an_editor_makes_its_edits_in_that_metric():
    model, batch = tiny_model("llama"), make_batch("llama", tasks=1)
    (name,) = list(select_layers(model, last_blocks=1))[-1:]
    width = model.get_submodule(name).in_features
    settings = {"layers": [name], "rank": 4, "edit_rate": 0.1, "precondition": 0.01}
    editor = MendEditor.for_model(model, contrasts=1, **settings).eval()
    moments = InputMoments.empty(width)
    moments.add(numbers(200, width, seed=3).float() * torch.linspace(0.2, 3, width))
    editor.calibrate({name: moments})
    x_keep = make_rows("llama", [0], 1, seed=9)
    with torch.no_grad():
        free, bound = (editor.make_deltas(model, batch.z_edit, x_keep=rows).deltas[name] for rows in (None, x_keep))
    kept = kept_inputs(model, editor.modules_in(model), x_keep)[name]
    expected = without_effect_on(free.down, kept, editor.input_metrics()[name])
    torch.testing.assert_close(bound.down, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(expected, without_effect_on(free.down, kept, None), rtol=1e-2)
