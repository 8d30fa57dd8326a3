"""Random edits, and what they must do: models whose weights are really changed."""

from __future__ import annotations

import copy
import random

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mend_lightning import Edit, LowRankDelta
from mend_lightning.editors.editor import Editor
from mend_lightning.edits.deltas import DenseDelta
from mend_lightning.models.fingerprint import base_fingerprint, layer_fingerprints
from mend_lightning.models.forward.hooks import Delta
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.layers import default_layers, layer_shape, select_layers


def random_edit(model: nn.Module, seed: int, layers: int = 3, prompt: str = "", dense: bool = False, **about) -> Edit:
    """Rank 2 on some of the default layers, as large as the weights."""
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    names = random.Random(seed).sample(default_layers(model), layers)
    deltas = {}
    for name in names:
        down, up = (0.3 * torch.randn(1, 2, width, generator=generator) for width in layer_shape(modules[name]))
        deltas[name] = DenseDelta(up.mT @ down) if dense else LowRankDelta(down, up)
    weights = layer_fingerprints({name: modules[name] for name in names})
    facts = [{"prompt": prompt or f"question {seed}", "target": f"answer {seed}"}]
    return Edit(deltas, {"id": f"id{seed}", "edits": facts, "base": "tiny", "weights": weights, **about})


def ragged_edit(model: nn.Module, seed: int = 0, patterns: list[str] | None = None, size: float = 0.1) -> Edit:
    """An edit of the model's usual layers; the rank differs from layer to layer, and the first layer's is 0."""
    generator = torch.Generator().manual_seed(seed)
    layers, deltas = select_layers(model, patterns), {}
    for rank, (name, layer) in enumerate(layers.items()):
        factors = [size * torch.randn(1, rank, width, generator=generator) for width in layer_shape(layer)]
        deltas[name] = LowRankDelta(*factors)
    return Edit(deltas, {**_about(layers), "edits": [{"prompt": f"Where is {seed}?", "target": "Oceania"}]})


def dense_edit(model: nn.Module) -> Edit:
    """An edit as fine-tuning makes it."""
    layers = select_layers(model)
    shapes = {name: layer_shape(layer) for name, layer in layers.items()}
    deltas = {name: DenseDelta(0.1 * torch.randn(1, d_out, d_in)) for name, (d_in, d_out) in shapes.items()}
    return Edit(deltas, {**_about(layers), "editor": "FineTuning"})


def _about(layers: dict[str, nn.Module]) -> dict:
    ordered = {name: layers[name] for name in sorted(layers)}
    marks = {"base_fingerprint": base_fingerprint(ordered), "weights": layer_fingerprints(ordered)}
    return {"base": "some/base", "base_options": {"revision": "abc", "kind": None}, **marks}


def compute_deltas(model: nn.Module, editor: Editor, z_edit: Rows) -> dict[str, Delta]:
    """The weight deltas that `editor` makes of the edits: layer name -> Delta."""
    return dict(editor.make_deltas(model, z_edit).deltas)


def changed(model: nn.Module, *edits: Edit) -> nn.Module:
    """A copy with W + ΣΔW in its weights."""
    model = copy.deepcopy(model)
    for edit in edits:
        for name, delta in edit.deltas.items():
            module = model.get_submodule(name)
            update = delta.dense()[0].to(module.weight.dtype)
            with torch.no_grad():
                module.weight += update.T if isinstance(module, Conv1D) else update
    return model


def logits(model: nn.Module, rows) -> torch.Tensor:
    with torch.no_grad():
        return model(**rows.inputs).logits


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def assert_same_deltas(actual: Edit, expected: Edit) -> None:
    """Bit for bit, in the same order."""
    assert list(actual.deltas) == list(expected.deltas)
    for name, delta in expected.deltas.items():
        assert torch.equal(actual.deltas[name].down, delta.down) and torch.equal(actual.deltas[name].up, delta.up), name
