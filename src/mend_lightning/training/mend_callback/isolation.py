"""Isolates the host from the editor: its random numbers, modes, flags, buffers, precision and gradient modes stay as they were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy
import torch
from torch import nn

from mend_lightning.errors import MendError
from mend_lightning.training.random_states import kept_random_states

# Integer buffers up to this many entries are taken for counters and positions, larger ones for packed weights.
LARGEST_COUNTER = 2**18


@contextmanager
def isolated(model: nn.Module, seed: int, autocast: torch.dtype | None = None) -> Iterator[None]:
    """The host's model for use in editing: frozen, in eval mode, uncompiled, outside of inference mode, with own random numbers.

    Afterwards, whatever happens, all of that is what it was before. Hooks that others put on the model stay, and run.

    Args:
        model: the host's.
        seed: of the random numbers inside.
        autocast: what the host computes in where it mixes precisions; None: the weights' own dtype.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
        >>> with isolated(model, seed=0):
        ...     inside = model.training, model[0].weight.requires_grad
        >>> inside, model.training, model[0].weight.requires_grad
        ((False, False), True, True)
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    types = {device.type for device in devices} - {"meta"} or {"cpu"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(own_random_numbers(seed, devices))
        stack.enter_context(kept_buffers(model))
        stack.enter_context(eval_mode(model))
        stack.enter_context(eager(model))
        stack.enter_context(frozen(model))
        for kind in sorted(types):
            stack.enter_context(torch.autocast(kind, dtype=autocast, enabled=autocast is not None))
        yield


@contextmanager
def own_random_numbers(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Random numbers that depend on `seed` alone; afterwards those of Python, numpy and torch continue where they were.

    Args:
        seed: of all of them.
        devices: accelerators whose random numbers are kept as well; the CPU's always are.

    Example:
        >>> before = torch.get_rng_state()
        >>> with own_random_numbers(0):
        ...     number = torch.rand(())
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    accelerators = [device for device in devices if device.type in ("cuda", "mps")]
    with kept_random_states(accelerators):
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        # Not torch.manual_seed: it seeds accelerators that are not ours.
        torch.default_generator.manual_seed(seed)
        for device in accelerators:
            _seed_accelerator(device, seed)
        yield


def _seed_accelerator(device: torch.device, seed: int) -> None:
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    else:
        torch.mps.manual_seed(seed)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each in the mode that it had."""
    # The flag itself, not `train()`: some models merge adapters or freeze parts there.
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """What `module.compile()` compiled runs uncompiled: hooks that come and go would have it compiled anew each time."""
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, implementation in compiled:
            module._compiled_call_impl = implementation


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires grad; afterwards those do that did."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers that gradients can pass; afterwards the same tensors with the same values.

    Raises:
        MendError: a buffer that holds packed weights, which are not copied, was changed.
    """
    before = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    values = [None if _is_packed(buffer) else buffer.clone() for _, _, buffer in before]
    versions = [None if buffer.is_inference() else buffer._version for _, _, buffer in before]
    try:
        for (module, name, buffer), value in zip(before, values):
            # What came about in a validation under inference mode cannot be part of a graph; its clone can.
            if buffer.is_inference() and value is not None:
                module._buffers[name] = value.clone()
        yield
    finally:
        for (module, name, buffer), value, version in zip(before, values, versions):
            module._buffers[name] = buffer
            if version is not None and buffer._version != version:
                _put_back(module, name, buffer, value)


def _is_packed(buffer: torch.Tensor) -> bool:
    """Whether this is a quantised weight: far too large to be copied each time, and changed by no forward pass."""
    return not buffer.is_floating_point() and buffer.numel() > LARGEST_COUNTER


def _put_back(module: nn.Module, name: str, buffer: torch.Tensor, value: torch.Tensor | None) -> None:
    if value is None:
        raise MendError(
            f"The forward of {type(module).__name__} changed its buffer {name!r}, {buffer.numel()} integers, which were taken for "
            "packed weights and not copied. A MendCallback cannot leave this model as it was."
        )
    buffer.copy_(value)
