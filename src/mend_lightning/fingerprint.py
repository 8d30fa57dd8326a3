"""Tells base models apart by their weights, not by their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

# Values a layer contributes; enough to tell any two trained models apart, and read in no time.
SAMPLE = 4096


def base_fingerprint(layers: Mapping[str, nn.Module]) -> str:
    """A short hash of the edited layers' weights.

    The weights are rounded to bfloat16 first, so a base loaded in float32 and in bfloat16 gives the same.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> base_fingerprint({"fc": layer}) == base_fingerprint({"fc": layer.bfloat16()})
        True
    """
    digest = hashlib.sha256()
    for name, weight in _weights(layers):
        digest.update(name.encode())
        digest.update(weight.flatten()[:SAMPLE].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _weights(layers: Mapping[str, nn.Module]) -> Iterable[tuple[str, torch.Tensor]]:
    for name, layer in layers.items():
        weight = layer.weight.detach()
        # A sharded weight shows its local part alone; the hash would differ from rank to rank.
        if weight.is_floating_point() and not hasattr(weight, "full_tensor"):
            yield name, weight
