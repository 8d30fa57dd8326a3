"""Edits with random factors, and the model that has them in its weights: the truth they are compared with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mend_lightning import Edit, LowRankDelta
from mend_lightning.dense_delta import DenseDelta
from mend_lightning.fingerprint import base_fingerprint, layer_fingerprints
from mend_lightning.layers import layer_shape, select_layers


def random_edit(model: nn.Module, seed: int = 0, patterns: list[str] | None = None, size: float = 0.1) -> Edit:
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


def with_dense_weights(model: nn.Module, edits: list[Edit]) -> nn.Module:
    """A copy of the model with W + ΣΔW in place of W, entry by entry of the outer products."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for edit in edits:
        for name, delta in edit.deltas.items():
            weight = modules[name].weight
            if isinstance(delta, DenseDelta):
                weight.add_(_oriented(delta.weight[0], modules[name]))
                continue
            for u, v in zip(delta.down[0], delta.up[0]):
                weight.add_(_oriented(torch.outer(v, u), modules[name]))
    return model


def _oriented(change: Tensor, module: nn.Module) -> Tensor:
    return change.T if isinstance(module, Conv1D) else change


def logits(model: nn.Module, rows) -> Tensor:
    with torch.no_grad():
        return model(**rows.inputs).logits
