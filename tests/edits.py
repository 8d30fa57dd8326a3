"""Random edits, and what they must do: models whose weights are really changed."""

from __future__ import annotations

import copy
import random

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mend_lightning import Edit, LowRankDelta
from mend_lightning.dense_delta import DenseDelta
from mend_lightning.fingerprint import layer_fingerprints
from mend_lightning.layers import default_layers, layer_shape


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
