"""What a quantised model stands for, in plain weights: the slow truth of the tests of quantised bases.

A pytest plugin (`pytest_plugins = ["helpers.quantized"]`) with a function that tests import, which is why pytest must not
want to rewrite it: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers of `bits` bits in bytes, as quanto's own function in Python has them: the lowest bits of all bytes first."""
    return torch.cat([(packed >> bits * i) & (2**bits - 1) for i in range(8 // bits)])


@pytest.fixture(scope="module")
def python_unpacking():
    """4 bit unpacked in Python: quanto does it in C++, which it compiles for a minute when it is first asked."""
    cpp = pytest.importorskip("optimum.quanto.library.extensions.cpp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))
        yield


def with_weights_of(plain: nn.Module, quantized: nn.Module) -> nn.Module:
    """`plain`, a model of the same kind, with the weights that those of `quantized` (by quanto) stand for."""
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                # Of a layer that was left as it is `dequantize` is not there to be called.
                weight = quantized.get_submodule(name).weight
                module.weight.copy_(weight.dequantize() if type(weight.data) is not torch.Tensor else weight)
    return plain
