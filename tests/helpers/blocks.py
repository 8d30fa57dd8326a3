"""The blocks of tiny models, and their logits with and without replayed blocks."""

from __future__ import annotations

import torch
from torch import nn

from mend_lightning.edits.deltas import LowRankDelta
from mend_lightning.models.forward.hooks import applied
from mend_lightning.models.forward.logits import run_model
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import replayed
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.layers import find_stacks, layer_shape

# Edited layers, and the blocks that must not run again.
DECODER_ONLY = {
    "t5": ["decoder.block.2.layer.2.DenseReluDense.*"],
    "t5_gated": ["decoder.block.2.layer.2.DenseReluDense.wo"],
    "bart": ["model.decoder.layers.2.fc*"],
}
OUTSIDE = {"llama": ["lm_head"], "gpt2": ["lm_head"], "t5": ["lm_head"], "bert": ["bert.pooler.dense", "classifier"]}


def modules_named(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    return {name: modules[name] for name in names}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block for stack in find_stacks(model).values() for block in stack]


def logits_twice(model: nn.Module, rows: Rows, layers: dict[str, nn.Module], part: slice = slice(None)):
    """Edited logits of some rows with and without replay, and the number of blocks that ran in the replay."""
    deltas = {}
    for name, layer in layers.items():
        widths = layer_shape(layer)
        deltas[name] = LowRankDelta(*(0.3 * torch.randn(rows.tasks, 2, width, dtype=torch.float64) for width in widths))
    trunk, some, ran = run_trunk(model, rows, layers), rows.part(part), []
    with applied(layers, deltas, some.task_of_row):
        plain = run_model(model, some)
        handles = [inside.register_forward_hook(lambda *_: ran.append(1)) for inside in map(norm_of, blocks_of(model))]
        with replayed(trunk, part):
            again = run_model(model, some)
        for handle in handles:
            handle.remove()
    return again, plain, len(ran)


def norm_of(block: nn.Module) -> nn.Module:
    """A module inside the block: it runs only if the block's own forward does."""
    return next(module for module in block.modules() if "norm" in type(module).__name__.lower())
