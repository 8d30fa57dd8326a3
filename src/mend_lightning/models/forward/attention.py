"""Which attention kernel the backward pass of short rows is quickest with, and masks that need no look at their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

from mend_lightning.models.forward.device import is_synchronous
from mend_lightning.models.inputs.rows import Rows

# From about here on the fused kernel's smaller memory traffic makes up for its slow gradient.
LONGEST = 128


def quick_backward(model: nn.Module, rows: Rows) -> AbstractContextManager:
    """For a forward pass whose gradient will be asked for.

    On CPUs the gradient of torch's fused attention is not vectorised in 16 bit: of 56 rows of 39 tokens with 9 heads it took
    46 ms where plain matrix products take 7. Elsewhere, and in float32, torch's own choice is right. On the meta device, where
    memory is planned, it is as on CPUs: plain products take more.
    """
    parameter = next(model.parameters())
    halves = parameter.device.type in ("cpu", "meta") and parameter.dtype in (torch.bfloat16, torch.float16)
    longest = max(tensor.shape[1] for tensor in rows.inputs.values())
    return sdpa_kernel(SDPBackend.MATH) if halves and longest <= LONGEST else nullcontext()


@contextmanager
def without_mask_inspection(device: torch.device) -> Iterator[None]:
    """Has transformers make its attention masks without a look whether they hide anything, while the block runs.

    It looks in every forward pass, for a quicker kernel where nothing is padding; on an accelerator the pass would begin when
    all before it has ended. Where there is padding, as in most batches, the mask is the same.
    """
    makers = {} if is_synchronous(device) else {name: MASKS[name] for name in ("sdpa", "eager")}
    try:
        for name, make in makers.items():
            MASKS.register(name, _without_a_look(make))
        yield
    finally:
        for name, make in makers.items():
            MASKS.register(name, make)


def _without_a_look(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def whole_mask(*args: Any, **kwargs: Any) -> Any:
        looks = [name for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip") if name in kwargs]
        return make(*args, **(kwargs | dict.fromkeys(looks, False)))

    return whole_mask
