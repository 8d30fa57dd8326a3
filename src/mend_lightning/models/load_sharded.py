"""A base model for several processes: built on the meta device, filled block by block, and sharded so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from transformers import PreTrainedModel

from mend_lightning.errors import ModelLoadError
from mend_lightning.models.architecture import Architecture
from mend_lightning.models.base import BaseModel
from mend_lightning.models.random_weights import random_units
from mend_lightning.models.sharding.fsdp import Fill
from mend_lightning.models.sharding.meta import allocate, parameters_on_meta
from mend_lightning.models.sharding.weights import FileWeights, SentWeights, WeightSource, places_of, safetensors_keys

# Shards a model in place, unit by unit; `fill` gives each its weights first.
Sharding = Callable[..., None]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """What fails on one process fails on every: the others would wait for it.

    Raises:
        ModelLoadError: another process could not.
    """
    failed: BaseException | None = None
    try:
        yield
    except Exception as error:
        failed = error
    told: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, None if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    first = next((text for text in told if text is not None), None)
    if first is not None:
        raise ModelLoadError(f"Process {told.index(first)} could not load the base model: {first}")


def load_base_in_shards(base: BaseModel, shard: Sharding, device: torch.device | str) -> tuple[PreTrainedModel, Any]:
    """What `base.load()` gives, the model sharded. Every process must call it; one process of a node downloads.

    Where the safetensors files name every parameter as the architecture does, each process reads them block by block.
    Otherwise process 0 loads the model whole in the CPU's memory and sends it to the others.

    Args:
        base: which model.
        shard: `shard_model` or `wrap_blocks`, given its processes, or `keep_whole`.
        device: of this process.

    Raises:
        ModelLoadError: as `load_base`, on every process.
    """
    with raise_on_all_ranks():
        architecture = base.architecture()
    model, fill = _units(base, architecture, device)
    shard(model.eval().requires_grad_(False), fill=fill)
    return model, architecture.tokenizer


def _units(base: BaseModel, architecture: Architecture, device: torch.device | str) -> tuple[PreTrainedModel, Fill]:
    """The model without weights, and what gives a unit of it its own."""
    if base.random_weights:
        return random_units(architecture, device)
    with parameters_on_meta():
        model = architecture.build().requires_grad_(False)
    source = _source(base, architecture, model)
    return model, lambda prefix, module: allocate(prefix, module, source, device)


def _source(base: BaseModel, architecture: Architecture, model: nn.Module) -> WeightSource:
    files = safetensors_keys(architecture.where, revision=base.revision)
    places = None if files is None else places_of(model, files)
    if places is not None:
        return FileWeights(places)
    with raise_on_all_ranks():
        whole = base.load()[0] if distributed.get_rank() == 0 else None
    _as_on_process_0(model, whole)
    return SentWeights(whole)


def _as_on_process_0(model: nn.Module, whole: nn.Module | None) -> None:
    """Unties weights of `model` that process 0 found to differ, and gives all the dtypes that they have there."""
    told: list[Any] = [None if whole is None else {n: (p.shape, p.dtype) for n, p in whole.named_parameters()}]
    distributed.broadcast_object_list(told, src=0)
    mine = dict(model.named_parameters())
    for name, (shape, dtype) in told[0].items():
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        if name not in mine:
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._parameters[attribute] = parameter
        elif mine[name].dtype != dtype:
            for module in model.modules():
                tied = [key for key, value in module._parameters.items() if value is mine[name]]
                module._parameters.update(dict.fromkeys(tied, parameter))
