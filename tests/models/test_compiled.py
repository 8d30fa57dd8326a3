"""Edits of models that torch.compile has compiled: seen, and seen to be gone."""

from __future__ import annotations

import pytest
import torch
from helpers.edits import changed, logits, random_edit
from helpers.models import ROUNDING, make_rows, relative_error, tiny_model
from torch import nn

from mend_lightning import EditStack
from mend_lightning.models.compiled import unwrapped, was_compiled

# What torch itself says while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, how: str) -> nn.Module:
    if how == "in place":
        model.compile(backend="eager")
        return model
    return torch.compile(model, backend="eager", fullgraph=how == "full graph")


@pytest.mark.parametrize(
    "family, how", [("llama", "whole"), ("llama", "full graph"), ("gpt2", "in place"), ("t5", "whole")]
)
def test_compiled_before_the_edit(family, how):
    plain, rows = tiny_model(family, blocks=2), make_rows(family, [0, 0], 1)
    first, second = random_edit(plain, 1), random_edit(plain, 2)
    one, both = (logits(changed(plain, *edits), rows) for edits in ([first], [first, second]))
    model = compiled(tiny_model(family, blocks=2), how)
    before = logits(model, rows)
    assert relative_error(one, before) > 0.1
    with first.applied(model) as edited:
        assert relative_error(logits(edited, rows), one) < ROUNDING
    assert torch.equal(logits(model, rows), before)
    stack = EditStack(model)
    stack.add(first, "first")
    assert relative_error(logits(model, rows), one) < ROUNDING
    stack.add(second, "second")
    assert relative_error(logits(model, rows), both) < ROUNDING
    stack.disable("second")
    assert relative_error(logits(model, rows), one) < ROUNDING
    stack.clear()
    assert torch.equal(logits(model, rows), before)


def test_the_model_inside_is_edited():
    """Edits go to the module that was compiled, not to what torch.compile returned."""
    model, rows = tiny_model("llama", blocks=2), make_rows("llama", [0], 1)
    edit, wrapped = random_edit(model, 1), torch.compile(model, backend="eager")
    expected, before = logits(changed(model, edit), rows), logits(wrapped, rows)
    assert unwrapped(wrapped) is model and was_compiled(model)
    with EditStack(model) as stack:
        stack.add(edit)
        assert relative_error(logits(wrapped, rows), expected) < ROUNDING
    assert torch.equal(logits(wrapped, rows), before)
    assert EditStack(wrapped).names == EditStack(model).names == []


def test_more_changes_than_torch_compiles_again(monkeypatch):
    """Dynamo gives a function up after eight recompilations; here after three, which is seen sooner."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 3)
    model, rows = tiny_model("llama", blocks=2), make_rows("llama", [0], 1)
    wrapped = torch.compile(model, backend="eager", fullgraph=True)
    before = logits(wrapped, rows)
    edits = [random_edit(model, seed) for seed in range(5)]
    with EditStack(wrapped) as stack:
        for count, edit in enumerate(edits, start=1):
            stack.add(edit)
            assert (
                relative_error(
                    logits(wrapped, rows), logits(changed(tiny_model("llama", blocks=2), *edits[:count]), rows)
                )
                < ROUNDING
            )
    assert torch.equal(logits(wrapped, rows), before)


def test_a_model_that_was_not_compiled():
    assert not was_compiled(tiny_model("llama", blocks=2))
