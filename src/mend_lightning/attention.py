"""Which attention kernel the backward pass of short rows is quickest with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mend_lightning.types import Rows

# From about here on the fused kernel's smaller memory traffic makes up for its slow gradient.
LONGEST = 128


def quick_backward(model: nn.Module, rows: Rows) -> AbstractContextManager:
    """For a forward pass whose gradient will be asked for.

    On CPUs the gradient of torch's fused attention is not vectorised in 16 bit: of 56 rows of 39 tokens with 9 heads it took
    46 ms where plain matrix products take 7. Elsewhere, and in float32, torch's own choice is right.
    """
    parameter = next(model.parameters())
    halves = parameter.device.type == "cpu" and parameter.dtype in (torch.bfloat16, torch.float16)
    longest = max(tensor.shape[1] for tensor in rows.inputs.values())
    return sdpa_kernel(SDPBackend.MATH) if halves and longest <= LONGEST else nullcontext()
