"""Edits of a base whose weights are quantised (quanto, int8 and int4 on the CPU)."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.edits import compute_deltas, hooks, logits, random_edit
from helpers.models import make_rows, relative_error, spread_parameters, tiny_model
from helpers.quantized import with_weights_of
from torch import nn

from mend_lightning import Edit, EditStack, MendEditor
from mend_lightning.errors import BaseModelMismatchError, UnverifiedBaseWarning
from mend_lightning.models.fingerprint import base_fingerprint, is_quantized, layer_fingerprints, readable_weight

pytest_plugins = ["helpers.quantized"]
quanto = pytest.importorskip("optimum.quanto", reason="pip install optimum-quanto: a base with quantised weights")
pytestmark = pytest.mark.usefixtures("python_unpacking")
NAME = "model.layers.2.mlp.down_proj"


def quantized(weights: str = "qint8", seed: int = 0) -> nn.Module:
    model = tiny_model("llama", torch.float32)
    if seed:
        spread_parameters(model, 0.3)
    quanto.quantize(model, weights=getattr(quanto, weights))
    quanto.freeze(model)
    return model


def dequantized(model: nn.Module, edit: Edit | None = None) -> nn.Module:
    """The same model in float32: what its quantised weights stand for, plus ΔW."""
    plain = with_weights_of(tiny_model("llama", torch.float32), model)
    with torch.no_grad():
        for name, delta in edit.deltas.items() if edit is not None else ():
            plain.get_submodule(name).weight += delta.dense()[0]
    return plain


@pytest.mark.parametrize("weights", ["qint8", "qint4"])
def test_an_edit_of_the_plain_base_fits_its_quantised_form(weights):
    model, rows = quantized(weights), make_rows("llama", [0, 0], 1)
    edit, before = random_edit(tiny_model("llama", torch.float32), 1), logits(model, rows)
    expected = logits(dequantized(model, edit), rows)
    assert relative_error(expected, before) > 0.1
    with EditStack(model) as stack:
        with pytest.warns(UnverifiedBaseWarning, match="cannot be verified: one of the two is quantised"):
            stack.add(edit)
        assert relative_error(logits(model, rows), expected) < 1e-4
    assert torch.equal(logits(model, rows), before) and hooks(model) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with edit.applied(model, force=True):
            assert relative_error(logits(model, rows), expected) < 1e-4


def test_edits_made_on_a_quantised_base():
    """An editor is used on it as on any other; gradients are those of the dequantised weights."""
    model, rows = quantized(), make_rows("llama", [0, 0], 1)
    editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=0.05), 0.02).eval()
    made, expected = (compute_deltas(each, editor, rows) for each in (model, dequantized(model)))
    for name, delta in expected.items():
        assert relative_error(made[name].dense(), delta.dense()) < 1e-3
    deltas = {name: delta.of_task(0) for name, delta in made.items()}
    edit = Edit(deltas, {"weights": layer_fingerprints({name: model.get_submodule(name) for name in deltas})})
    assert all(norm > 0 for norm in edit.relative_norm(model).values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit.layers_in(quantized())
        with pytest.raises(BaseModelMismatchError, match="other weights"):
            edit.layers_in(quantized(seed=1))


def test_fingerprints():
    plain, int8, int4 = tiny_model("llama", torch.float32), quantized(), quantized("qint4")
    marks = {name: base_fingerprint({NAME: model.get_submodule(NAME)}) for name, model in locals().items()}
    assert not marks["plain"].startswith("quantised:")
    assert marks["int8"].startswith("quantised:") and marks["int4"].startswith("quantised:")
    assert len(set(marks.values())) == 3
    assert base_fingerprint({NAME: quantized().get_submodule(NAME)}) == marks["int8"]


def test_what_counts_as_quantised():
    assert not is_quantized(nn.Linear(2, 2)) and not is_quantized(nn.Linear(2, 2).bfloat16())
    assert is_quantized(quantized().get_submodule(NAME))
    # As bitsandbytes and GPTQ store them: integers, or no weight at all.
    packed = nn.Linear(2, 2)
    packed.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    assert is_quantized(packed) and readable_weight(packed) is None
    assert base_fingerprint({"a": packed}).startswith("quantised:")
    bare = nn.Module()
    assert is_quantized(bare) and readable_weight(bare) is None
    assert is_quantized(nn.Linear(2, 2).to(torch.float8_e4m3fn))
