"""What a trunk cache belongs to.

Two runs share a cache only where the trunk would return the same: same weights below the edited blocks, same config,
same precision.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.models.layers import find_stacks
from mend_lightning.models.sharding.collectives import own_class
from mend_lightning.training.trunk_cache.observe import NotCacheable, TrunkShape

# Of a config: where it was read, and by what; the weights' dtype is in their hash.
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
_HASHING_THREADS = 8


def trunk_identity(model: nn.Module, shape: TrunkShape, tokenizer: Any = None) -> dict[str, Any]:
    """Everything that the trunk's outputs depend on beside the rows, as builtins.

    Args:
        model: the base model.
        shape: what its trunk is, `observe_trunk(...)`.
        tokenizer: the one that makes the rows; None leaves it out.
    """
    device = next(model.parameters()).device.type
    return {
        "format": 1,
        "model": own_class(model).__name__,
        "config": _config_hash(getattr(model, "config", None)),
        "weights": weights_hash(trunk_state(model, {name: stack.blocks for name, stack in shape.stacks.items()})),
        "tokenizer": tokenizer_hash(tokenizer),
        "device": device,
        "autocast": autocast_dtype(device),
        "inputs": list(shape.inputs),
        "stacks": {
            name: {"blocks": stack.blocks, "positions": stack.positions, "width": stack.width, "dtype": str(stack.dtype)}
            for name, stack in shape.stacks.items()
        },
    }  # fmt: skip


def autocast_dtype(device: str) -> str | None:
    """The dtype that autocast computes in on this kind of device now; None where it is off."""
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def trunk_state(model: nn.Module, blocks: Mapping[str, int]) -> dict[str, Any]:
    """The model's state without the blocks above the trunk: embeddings and the first `blocks[stack]` of each stack.

    Norms and heads behind the blocks are in it as well: they change nothing, and often are the embeddings.
    """
    above = tuple(
        f"{name}.{index}."
        for name, stack in find_stacks(model).items()
        for index in range(blocks.get(name, 0), len(stack))
    )
    return {name: value for name, value in model.state_dict().items() if not name.startswith(above)}


def weights_hash(state: Mapping[str, Any]) -> str:
    """A hash of every bit of every tensor, under its name.

    Raises:
        NotCacheable: something in the state is no tensor.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = weights_hash(layer.state_dict())
        >>> with torch.no_grad():
        ...     _ = layer.bias[1].add_(1e-6)
        >>> before == weights_hash(layer.state_dict())
        False
    """
    with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as pool:
        # hashlib works outside of Python's lock.
        parts = list(pool.map(lambda item: f"{item[0]}:{_value_hash(*item)}", sorted(state.items())))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _value_hash(name: str, value: Any) -> str:
    if not isinstance(value, Tensor):
        raise NotCacheable(f"{name} of its weights is stored as {type(value).__name__}, which cannot be compared")
    if hasattr(value, "__tensor_flatten__"):
        # A quantised weight of several tensors (torchao).
        names, context = value.__tensor_flatten__()
        return f"{context}({','.join(_value_hash(f'{name}.{inner}', getattr(value, inner)) for inner in names)})"
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{value.dtype}{list(value.shape)}{hashlib.sha256(data).hexdigest()}"


def _config_hash(config: Any) -> str:
    values = dict(config.to_dict()) if hasattr(config, "to_dict") else {}
    values["attention"] = getattr(config, "_attn_implementation", None)
    return _json_hash({name: value for name, value in values.items() if name not in _NOT_OF_THE_MODEL})


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary: which text an id stands for."""
    return "" if tokenizer is None else _json_hash(sorted(tokenizer.get_vocab().items()))


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def folder_name(identity: Mapping[str, Any]) -> str:
    """A short name for what an identity says.

    Example:
        >>> folder_name({"a": 1, "b": 2}) == folder_name({"b": 2, "a": 1})
        True
    """
    return _json_hash(identity)[:16]
