"""Weights that several layers share."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def tied_layers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of the named layers those whose weight is reached under another name too -> that name.

    Example:
        >>> model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3), "fc": nn.Linear(2, 2)})
        >>> model["head"].weight = model["embedding"].weight
        >>> tied_layers(model, ["head", "fc"])
        {'head': 'embedding'}
    """
    owners: dict[int, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    others = {name: [o for o in owners.get(id(modules[name].weight), []) if o != name] for name in names}
    return {name: found[0] for name, found in others.items() if found}
