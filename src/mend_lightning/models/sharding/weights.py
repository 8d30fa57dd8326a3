"""Where the parameters of a model on the meta device get their values from, unit by unit.

Three sources: the safetensors files themselves, of which a process reads what it is about to shard; one process that
loaded the model in transformers' own way (old files, renamed weights) and sends it to the others; random numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import distributed, nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from mend_lightning.models.sharding.fsdp import blocks_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class WeightSource(Protocol):
    """Gives a module, whose parameters are allocated and hold anything, its values."""

    def fill(self, prefix: str, module: nn.Module, names: Iterable[str]) -> None:
        """Writes the parameters `names` (inside `module`, which the model knows as `prefix`) in place."""
        ...


class FileWeights:
    """Reads safetensors files; each tensor when it is wanted.

    Args:
        places: parameter name -> (file, name in the file).
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self.places = dict(places)

    @torch.no_grad()
    def fill(self, prefix: str, module: nn.Module, names: Iterable[str]) -> None:
        parameters = dict(module.named_parameters())
        for name in names:
            parameters[name].copy_(_read(*self.places[joined(prefix, name)]))


class SentWeights:
    """Process 0 has the model and sends it to the others, tensor by tensor; every process must fill the same.

    Args:
        model: the loaded model on process 0, None elsewhere.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.parameters = None if model is None else dict(model.named_parameters())

    @torch.no_grad()
    def fill(self, prefix: str, module: nn.Module, names: Iterable[str]) -> None:
        parameters = dict(module.named_parameters())
        for name in names:
            if self.parameters is not None:
                parameters[name].copy_(self.parameters[joined(prefix, name)])
            distributed.broadcast(parameters[name].data, src=0)


class RandomWeights:
    """The model's own initialisation; a unit's numbers depend on its name and the seed alone, on no layout.

    Args:
        model: the whole model.
        seed: of all of it.
    """

    def __init__(self, model: PreTrainedModel, seed: int = 0) -> None:
        self.model, self.seed, self.blocks = model, seed, tuple(blocks_of(model))

    @torch.no_grad()
    def fill(self, prefix: str, module: nn.Module, names: Iterable[str]) -> None:
        parameters = dict(module.named_parameters())
        for name in names:
            parameters[name].zero_()
        cuda = {parameter.device.index for parameter in parameters.values() if parameter.is_cuda}
        with torch.random.fork_rng(devices=sorted(cuda)):
            torch.manual_seed(_seed_of(f"{self.seed} {prefix}"))
            # Inner modules first, as transformers has it: some parents change what their children were given.
            for name, child in reversed(list(module.named_modules())):
                if prefix or not any(name == block or name.startswith(f"{block}.") for block in self.blocks):
                    self.model._init_weights(child)


def _seed_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def joined(prefix: str, name: str) -> str:
    """
    Example:
        >>> joined("layers.0", "fc.weight"), joined("", "norm.weight")
        ('layers.0.fc.weight', 'norm.weight')
    """
    return f"{prefix}.{name}" if prefix else name


def safetensors_keys(where: str, **options: Any) -> dict[str, Path] | None:
    """Name -> file of every tensor of a model folder or hub id; None where it has no safetensors.

    Args:
        where: a folder or a hub id.
        options: of `transformers.utils.cached_file` (revision).
    """
    found = _file(where, INDEX, **options)
    if found is not None:
        names = json.loads(found.read_text(encoding="utf-8"))["weight_map"]
        wanted = sorted(set(names.values()))
        files = {file: path for file in wanted if (path := _file(where, file, **options)) is not None}
        return {name: files[file] for name, file in names.items()} if len(files) == len(wanted) else None
    single = _file(where, SINGLE, **options)
    if single is None:
        return None
    with safe_open(single, "pt") as tensors:
        return {name: single for name in tensors.keys()}


def _file(where: str, name: str, **options: Any) -> Path | None:
    found = cached_file(
        where,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **options,
    )
    return None if found is None else Path(found)


def places_of(model: nn.Module, files: Mapping[str, Path]) -> dict[str, tuple[Path, str]] | None:
    """Parameter name -> (file, name there); None where the files name a parameter in another way: transformers must load.

    A tied weight that the files hold a second time, with other values, is untied in `model`, as transformers does.

    Args:
        model: the architecture, on any device.
        files: from `safetensors_keys`.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if _kept_in_float32(model):
        return None

    def place(name: str) -> tuple[Path, str] | None:
        key = next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in files), None)
        return None if key is None else (files[key], key)

    names = [name for name, _ in model.named_parameters()]
    places = {name: found for name in names if (found := place(name)) is not None}
    if len(places) < len(names):
        return None
    for name, tied_to in _tied_names(model).items():
        second = place(name)
        if second is not None and not torch.equal(_read(*second), _read(*places[tied_to])):
            _untie(model, name)
            places[name] = second
    return places


def _kept_in_float32(model: nn.Module) -> bool:
    """Whether transformers loads some of the weights in float32 though the rest is in half precision."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    strict = bool(getattr(model, "_keep_in_fp32_modules_strict", None)) and dtypes != {torch.float32}
    return strict or (bool(getattr(model, "_keep_in_fp32_modules", None)) and torch.float16 in dtypes)


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Every further name of a parameter -> its first."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[parameter] for name, parameter in every if first[parameter] != name}


def _untie(model: nn.Module, name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    own = nn.Parameter(torch.empty_like(model.get_parameter(name)), requires_grad=False)
    model.get_submodule(owner)._parameters[attribute] = own
    getattr(model, "all_tied_weights_keys", {}).pop(name, None)


def _read(file: Path, key: str) -> torch.Tensor:
    # Opening is reading a header; the system keeps the pages, so the processes of a node read a file once.
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(key)
