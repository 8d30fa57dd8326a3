"""FSDP: a base model sharded by its blocks, an editor by its transforms.

Weights are never touched by an edit, so nothing else of the method has to know: each block is gathered when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from mend_lightning.models.layers import find_stacks
from mend_lightning.models.sharding.collectives import is_sharded, remember_unit

# Gives a unit (its name, and the module) its weights.
Fill = Callable[[str, nn.Module], object]


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """name -> block of every stack of the model: what is gathered, run and freed as one.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> list(blocks_of(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=32))))
        ['transformer.h.0', 'transformer.h.1']
    """
    stacks = find_stacks(model).items()
    return {f"{name}.{index}": block for name, stack in stacks for index, block in enumerate(stack)}


def keep_whole(model: nn.Module, fill: Fill) -> None:
    """Shards nothing: a process gets the whole model, unit by unit on its own device, and never a second copy of it."""
    for name, module in [*blocks_of(model).items(), ("", model)]:
        fill(name, module)


def wrap_blocks(model: nn.Module, device: torch.device, fill: Fill) -> None:
    """Shards a model's blocks in place with torch's older FullyShardedDataParallel (FSDP1); what is in no block stays whole.

    Args:
        model: as in `shard_model`.
        device: of this process.
        fill: as in `shard_model`.
    """
    for name, block in blocks_of(model).items():
        fill(name, block)

        # The layers keep weights of their own, which is what some of them ask for the dtype.
        wrapper = FullyShardedDataParallel(block, device_id=device, use_orig_params=True)
        # The outermost one would keep what it gathered, for a backward pass at once: so it is one without weights of its own.
        wrapper = FullyShardedDataParallel(wrapper, device_id=device, use_orig_params=True)
        model.set_submodule(name, wrapper)
        for module in block.modules():
            remember_unit(module, wrapper)
    fill("", model)


def shard_model(model: nn.Module, mesh: DeviceMesh, fill: Fill) -> None:
    """Shards a model in place: one unit a block, and one of all that is in no block (embeddings, norms, head).

    Args:
        model: a base model; its parameters may be on the meta device.
        mesh: the processes that share it, one dimension.
        fill: called with (name, module) of each unit right before it is sharded, "" and the model for the last one: where
            parameters that are on the meta device get their values. A process so never holds more than its shards and one unit.
    """
    for name, module in [*blocks_of(model).items(), ("", model)]:
        fill(name, module)
        fully_shard(module, mesh=mesh)
    # It runs an encoder by itself, before the model, whose embeddings are to be gathered by then.
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


@torch.no_grad()
def load_whole_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads a state dict of whole tensors into a module that may be sharded; each process takes its part.

    Raises:
        RuntimeError: as `nn.Module.load_state_dict`, where names or shapes differ.
    """
    if not is_sharded(module):
        module.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    for unit in module.modules():
        # A forward pass without a backward one, as in validation, leaves what is in no unit gathered; torch takes it for whole.
        if isinstance(unit, FSDPModule):
            unit.reshard()
    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True, strict=True))


def sharded_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """A whole optimizer's state dict as one of this process's shards; unchanged where the parameters are not sharded.

    Args:
        optimizer: of the parameters that it is for, in the same order.
        state: what `Optimizer.state_dict()` gives on one device.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = {
        index: {name: _placed_like(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": values}


def _placed_like(value: Any, parameter: Tensor) -> Any:
    # Adam's number of steps is one for the whole parameter.
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    # None: every process has the whole value, so none is sent.
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
