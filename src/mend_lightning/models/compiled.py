"""Models under torch.compile: what was compiled before hooks came does not see them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what `torch.compile` returned; any other model as it is."""
    return getattr(model, "_orig_mod", model)


def was_compiled(model: nn.Module) -> bool:
    """Whether torch has compiled code of this model, or of another one of its classes, in this process.

    That is asked of Dynamo's cache and not of the model: `torch.compile(model)` leaves no mark on `model` itself.

    Example:
        >>> was_compiled(nn.Linear(2, 2))
        False
    """
    if "torch._dynamo" not in sys.modules:
        return False
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list as entries

    return any(
        entries(kind.forward.__code__) for kind in {type(module) for module in model.modules()} if _is_python(kind)
    )


def _is_python(kind: type[nn.Module]) -> bool:
    return hasattr(kind.forward, "__code__")


def forget_compiled(model: nn.Module) -> None:
    """Has torch compile anew at the next call, if it compiled `model`: Dynamo does not look again for new hooks.

    By default (`torch._dynamo.config.skip_nnmodule_hook_guards`) an edit would be ignored without a word.
    """
    if was_compiled(model):
        torch.compiler.reset()


@contextmanager
def changing_hooks(model: nn.Module) -> Iterator[None]:
    """Around a block that has other hooks on `model` than what is outside of it."""
    try:
        forget_compiled(model)
        yield
    finally:
        forget_compiled(model)
