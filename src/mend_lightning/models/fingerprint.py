"""Tells base models apart by their weights, not by their names."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mend_lightning.errors import UnverifiedBaseWarning
from mend_lightning.models.sharding.collectives import whole_weight

# Values a layer contributes; enough to tell any two trained models apart, and read in no time.
SAMPLE = 4096
QUANTISED = "quantised:"


def base_fingerprint(layers: Mapping[str, nn.Module]) -> str:
    """A short hash of the edited layers' weights.

    The weights are rounded to bfloat16 first, so a base loaded in float32 and in bfloat16 gives the same. That of a
    quantised base begins with "quantised:" and the form of its weights, for it can be compared neither with that of the
    weights it was made of nor with that of another form of them.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> base_fingerprint({"fc": layer}) == base_fingerprint({"fc": layer.bfloat16()})
        True
    """
    digest = hashlib.sha256()
    for name, layer in layers.items():
        sample = _sample(layer)
        if sample is not None:
            digest.update(name.encode())
            digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    form = next((_form(layer) for layer in layers.values() if is_quantized(layer)), None)
    return (f"{QUANTISED}{form}:" if form else "") + digest.hexdigest()[:16]


def layer_fingerprints(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer name -> `base_fingerprint` of that layer alone: edits of different layers can be told to be of one base."""
    return {name: base_fingerprint({name: layer}) for name, layer in layers.items()}


def same_base(wanted: str | Mapping[str, str], found: str | Mapping[str, str], maker: str) -> bool:
    """Whether two fingerprints are of the same base; that cannot be told of a quantised base and one in another form.

    Args:
        wanted: of the base that an edit or editor was made for; "" says nothing about it. One of each layer, or of all.
        found: of the model at hand, in the same form.
        maker: "edit" or "editor", for the warning.

    Warns:
        UnverifiedBaseWarning: it cannot be told; True is returned.
    """
    marks, known = _by_layer(found), _by_layer(wanted)
    pairs = [(known[name], marks[name]) for name in marks if name in known]
    differing = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if differing is None or not differing[0]:
        return True
    forms = [mark.rpartition(":")[0] for mark in differing]
    if forms[0] == forms[1]:
        return False
    which = "they are quantised in different ways" if all(forms) else "one of the two is quantised"
    warnings.warn(
        f"Whether this model is the base that the {maker} was made for cannot be verified: {which}, so "
        f"their weights differ in any case ({', '.join(differing)}). Layers and shapes are the same.",
        UnverifiedBaseWarning,
        stacklevel=4,
    )
    return True


def _by_layer(fingerprint: str | Mapping[str, str]) -> Mapping[str, str]:
    return {"": fingerprint} if isinstance(fingerprint, str) else fingerprint


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is stored in another form than a matrix of numbers (bitsandbytes, quanto, torchao, …).

    Example:
        >>> is_quantized(nn.Linear(2, 2))
        False
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        # torch's own dynamically quantised layers have a method of that name; GPTQ layers have none.
        return True
    if hasattr(weight, "full_tensor"):
        return False
    return type(weight.data) is not Tensor or not weight.is_floating_point() or weight.element_size() < 2


def readable_weight(layer: nn.Module) -> Tensor | None:
    """The layer's weight as a matrix of numbers, dequantised where its library offers that; None: it cannot be read.

    Of a sharded layer it is the whole weight, and every process must ask for it.

    Returns:
        In the layer's own orientation, detached.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    weight = whole_weight(layer)
    if type(weight.data) is not Tensor and hasattr(weight, "dequantize"):
        weight = weight.dequantize()
    return weight if weight.is_floating_point() and weight.element_size() > 1 else None


def _form(layer: nn.Module) -> str:
    """How a quantised weight is stored: the library's class and the dtype it stands for (of bitsandbytes' the stored one)."""
    weight = getattr(layer, "weight", None)
    return (
        f"{type(weight).__name__}.{str(weight.dtype).removeprefix('torch.')}"
        if isinstance(weight, Tensor)
        else type(layer).__name__
    )


def _sample(layer: nn.Module) -> Tensor | None:
    """The first values of a weight, as bfloat16 or the raw integers of a quantised one; None: they cannot be read."""
    weight = readable_weight(layer)
    if weight is not None:
        return weight.flatten()[:SAMPLE].to(torch.bfloat16)
    raw = getattr(layer, "weight", None)
    return raw.detach().flatten()[:SAMPLE] if isinstance(raw, Tensor) else None
