"""Tensors that lie on several processes, made whole again."""

from __future__ import annotations

from torch import Tensor, nn


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of the module lies on several processes.

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, any other as it is. Every process must call it.

    Example:
        >>> import torch
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The module's state dict with whole tensors on the CPU. Every process must call it, and each gets all of it.

    Example:
        >>> list(whole_state(nn.Linear(2, 2), "fc."))
        ['fc.weight', 'fc.bias']
    """
    return {prefix + name: whole(value.detach()).cpu() for name, value in module.state_dict().items()}
