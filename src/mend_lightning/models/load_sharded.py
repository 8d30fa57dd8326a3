"""A base model for several processes: built on the meta device, filled block by block, and sharded so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn

from mend_lightning.errors import ModelLoadError
from mend_lightning.models.base import Architecture, BaseModel
from mend_lightning.models.sharding.fsdp import Fill
from mend_lightning.models.sharding.weights import FileWeights, SentWeights, WeightSource, places_of, safetensors_keys

# Shards a model in place, unit by unit; `fill` gives each its weights first.
Sharding = Callable[..., None]


@contextmanager
def known_to_all() -> Iterator[None]:
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


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without values; buffers (masks, rotary frequencies) are real.

    `torch.device("meta")` would take the values of the buffers as well, and no file holds those.

    Example:
        >>> with parameters_on_meta():
        ...     layer = nn.BatchNorm1d(2)
        >>> layer.weight.device.type, layer.running_var.tolist()
        ('meta', [1.0, 1.0])
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # One that is there already is being tied to a second name, and must stay itself.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def allocate(
    prefix: str, module: nn.Module, source: WeightSource, device: torch.device | str = "cpu"
) -> list[nn.Parameter]:
    """Gives the parameters of `module` that are on the meta device memory on `device`, and values from `source`.

    Returns:
        Those parameters.
    """
    # A tied weight has several names and is one parameter: all its owners get the same.
    made: dict[nn.Parameter, nn.Parameter] = {}
    names = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
                owner._parameters[name] = made[parameter]
    source.fill(prefix, module, names)
    return list(made.values())


def load_base_in_shards(base: BaseModel, shard: Sharding, device: torch.device | str) -> tuple[nn.Module, Any]:
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
    with known_to_all():
        architecture = base.architecture()
    model, fill = _units(base, architecture, device)
    shard(model.eval().requires_grad_(False), fill=fill)
    return model, architecture.tokenizer


def _units(base: BaseModel, architecture: Architecture, device: torch.device | str) -> tuple[nn.Module, Fill]:
    """The model without weights, and what gives a unit of it its own."""
    if base.random_weights:
        # Imported here: that file imports this one.
        from mend_lightning.models.random_weights import random_units

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
    with known_to_all():
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
