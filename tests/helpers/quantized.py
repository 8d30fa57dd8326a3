"""What a quantised model stands for, in plain weights: the slow truth of `test_quantised*.py`."""

from __future__ import annotations

import torch
from torch import nn


def with_weights_of(plain: nn.Module, quantized: nn.Module) -> nn.Module:
    """`plain`, a model of the same kind, with the weights that those of `quantized` (by quanto) stand for."""
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                # Of a layer that was left as it is `dequantize` is not there to be called.
                weight = quantized.get_submodule(name).weight
                module.weight.copy_(weight.dequantize() if type(weight.data) is not torch.Tensor else weight)
    return plain
