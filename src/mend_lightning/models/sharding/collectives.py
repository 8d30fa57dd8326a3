"""Tensors that lie on several processes, made whole again."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from mend_lightning.models.layers import layer_weight

# On a layer inside a block that FSDP1 shards: the block, which alone can gather it.
_UNIT = "_mend_lightning_unit"


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of the module lies on several processes.

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    # FSDP2's parameters know it, FSDP1's do not.
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters()) or any(
        isinstance(each, FullyShardedDataParallel) for each in module.modules()
    )


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class; FSDP2 puts sharded modules into one that it makes of theirs (`FSDPMendEditor`).

    Example:
        >>> own_class(nn.Linear(2, 2)).__name__
        'Linear'
    """
    classes = (cls for cls in type(module).__mro__ if issubclass(cls, nn.Module))
    return next(cls for cls in classes if not issubclass(cls, FSDPModule))


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 shards, any other as it is. Every process must call it.

    Example:
        >>> import torch
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def remember_unit(module: nn.Module, unit: FullyShardedDataParallel) -> None:
    """Notes which FSDP1 unit gathers the module's weights."""
    module.__dict__[_UNIT] = weakref.ref(unit)


def whole_weight(layer: nn.Module) -> Tensor:
    """A layer's weight, gathered where it is sharded. Every process must call it.

    Example:
        >>> whole_weight(nn.Linear(2, 3)).shape
        torch.Size([3, 2])
    """
    unit = layer.__dict__.get(_UNIT, lambda: None)()
    if unit is None:
        return whole(layer_weight(layer).detach())
    with FullyShardedDataParallel.summon_full_params(unit, writeback=False):
        return layer_weight(layer).detach().clone()


def whole_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The module's state dict with whole tensors on the CPU. Every process must call it, and each gets all of it.

    Example:
        >>> list(whole_state(nn.Linear(2, 2), "fc."))
        ['fc.weight', 'fc.bias']
    """
    return {prefix + name: whole(value.detach()).cpu() for name, value in module.state_dict().items()}


def all_reduce_min(value: int, model: nn.Module) -> int:
    """The smallest `value` of all processes that share `model`; itself where the model is not sharded.

    Example:
        >>> all_reduce_min(3, nn.Linear(2, 2))
        3
    """
    if not is_sharded(model):
        return value
    shared = torch.tensor(value, device=next(model.parameters()).device)
    distributed.all_reduce(shared, distributed.ReduceOp.MIN)
    return int(shared)


def any_rank(flag: bool, model: nn.Module) -> bool:
    """Whether `flag` is true on any of the processes that share `model`; itself where the model is not sharded.

    Example:
        >>> any_rank(False, nn.Linear(2, 2))
        False
    """
    return not all_reduce_min(int(not flag), model)
