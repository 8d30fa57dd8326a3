"""Linear layers quantised by optimum-quanto, computed with the weights that their few bits stand for."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class _Linear(torch.autograd.Function):
    """`x Wᵀ + b` with a quantised W, which is dequantised once for each product and kept in its few bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight.dequantize().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight.dequantize().to(grad.dtype), None, None


def compute_dequantised(model: nn.Module) -> None:
    """Has every quanto layer of `model` compute what a plain layer with the dequantised weight computes, bit for bit.

    Quanto's own product of bfloat16 and 8-bit weights on a CPU is made for single tokens: on whole rows it took four times
    as long, for layers 24 wide it ended the process, and no product of its works under autocast.
    """
    kind, dequantising = _classes()
    for module in model.modules():
        if type(module) is kind:
            # Not an instance's own `forward`: that would be a cycle, and the base would outlive its last use.
            module.__class__ = dequantising


@cache
def _classes() -> tuple[type[nn.Module], type[nn.Module]]:
    from optimum.quanto import QLinear

    class DequantisingLinear(QLinear):
        def forward(self, x: Tensor) -> Tensor:
            return _Linear.apply(x, self.weight, self.bias)

    return QLinear, DequantisingLinear
