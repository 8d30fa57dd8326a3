"""What layers of a model are given: their inputs in one forward pass, without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mend_lightning.models.forward.logits import without_cache
from mend_lightning.models.forward.trunk import TrunkOutputs, ending_after_edits, replayed
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.layers import find_stacks


def record_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], rows: Rows, trunk: TrunkOutputs
) -> dict[str, list[Tensor]]:
    """name -> the layer's inputs, one `[rows, tokens, d_in]` for every call of it, in one forward pass.

    Args:
        model: the base model.
        layers: name -> module.
        rows: what the model is given.
        trunk: the trunk's outputs for `rows`.
    """
    with replayed(trunk, slice(None)), _watched(layers) as seen, ending_after_edits(find_stacks(model), layers):
        model(**rows.inputs, **without_cache(model))
    return seen


@contextmanager
def _watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].detach()))
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def encoder_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of an encoder-decoder's encoder; of another model none.

    Example:
        >>> encoder_modules(nn.Linear(2, 2))
        set()
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    whole: Any = model
    return set(whole.get_encoder().modules())
