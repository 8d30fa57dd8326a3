"""Prompts that begin alike: their common beginning (few-shot examples, say) runs once, on one row, and not in every row.

The rows continue from a copy each of its key-value cache: `[beginning][padding][rest]`. A row's tokens keep their
positions, for these are counted without the padding. The padding does stand between a row's tokens, however, so this is
for models that tell tokens apart by their positions and a mask alone, and not by their places in the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mend_lightning.models.forward.hooks import Delta
from mend_lightning.models.forward.run_trunk import empty_cache, leading_tokens, shares_prefixes
from mend_lightning.models.sharding.collectives import is_sharded

# Below this sharing gains next to nothing (20 of 36 tokens: 1.05 times faster on SmolLM2; 79 of 95: 1.5 times).
SHORTEST_BEGINNING = 48
# What configs call the number of tokens beyond which a model treats tokens by their places, or rotates them otherwise.
LIMITS = (
    "sliding_window", "window_size", "attention_window", "attention_window_size", "attention_chunk_size",
    "max_position_embeddings", "original_max_position_embeddings",
)  # fmt: skip


def one_task(deltas: Mapping[str, Delta] | None, task_of_row: Tensor | None) -> dict[str, Delta] | None:
    """The deltas of the only task that rows are of, to be applied to any number of rows; None where there are several.

    Example:
        >>> from types import SimpleNamespace
        >>> delta = SimpleNamespace(tasks=2, of_task=lambda task: f"task {task}")
        >>> one_task({"fc": delta}, None), one_task({"fc": delta}, torch.tensor([1, 1])), one_task(None, None)
        (None, {'fc': 'task 1'}, {})
    """
    deltas = dict(deltas or {})
    if all(delta.tasks == 1 for delta in deltas.values()):
        return deltas
    if task_of_row is None or bool((task_of_row != task_of_row[0]).any()):
        return None
    return {name: delta.of_task(int(task_of_row[0])) for name, delta in deltas.items()}


def shared_beginning(model: nn.Module, rows: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """How many leading tokens of `rows` of ids run once for all of them; 0: none."""
    if len(rows) < 2:
        return 0
    length = leading_tokens(*padded(rows, left=False))
    longest = max(len(row) for row in rows) + max_new_tokens
    return length if length >= SHORTEST_BEGINNING and can_share(model, longest) else 0


def padded(rows: Sequence[Sequence[int]], left: bool = True, beginning: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask `[rows, length]`, padded on the right, or on the left: behind the common beginning.

    Example:
        >>> padded([[5, 6], [5]])[0].tolist(), padded([[5, 6, 7], [5, 8]], beginning=1)[0].tolist()
        ([[5, 6], [0, 5]], [[5, 6, 7], [5, 0, 8]])
    """
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        places: slice | list[int] = slice(0, len(row))
        if left:
            places = [*range(beginning), *range(length - len(row) + beginning, length)]
        ids[i, places], mask[i, places] = torch.tensor(row), 1
    return ids, mask


def can_share(model: nn.Module, longest: int) -> bool:
    """Whether rows of up to `longest` tokens can continue from a common beginning, by what the model says about itself.

    That is a causal model with an ordinary key-value cache, which is told positions; no model with code of its own, none
    that is sharded (all processes must run it equally often), none with a window or a rotation that changes
    within `longest` tokens, and none that holds an edit for each of several tasks.
    """
    if not shares_prefixes(model) or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if getattr(model, "_auto_class", None) is not None or not _has_ordinary_cache(model, longest):
        return False
    return not is_sharded(model) and not any(getattr(hook, "tasks", 1) > 1 for hook in _hooks(model))


def beginning_cache(model: nn.Module, beginning: Tensor, rows: int) -> DynamicCache | None:
    """The model's key-value cache after `beginning` `[1, length]`, for `rows` rows; None if it filled none."""
    cache = empty_cache(model)
    length = beginning.shape[1]
    # No logits are needed here; where a model can, it computes those of one token alone.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    positions = torch.arange(length, device=beginning.device)[None]
    model(
        input_ids=beginning, attention_mask=torch.ones_like(beginning), position_ids=positions, past_key_values=cache,
        use_cache=True, **last,
    )  # fmt: skip
    if any(not isinstance(layer, DynamicLayer) or layer.get_seq_length() != length for layer in cache.layers):
        return None
    cache.batch_repeat_interleave(rows)
    return cache


def _has_ordinary_cache(model: nn.Module, longest: int) -> bool:
    """Whether `generate` would make a plain dynamic cache, all of whose layers keep `longest` tokens."""
    settings = getattr(model, "generation_config", None)
    if settings is None or settings.use_cache is False or settings.cache_implementation not in (None, "dynamic"):
        return False
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    # Checkpointing, in training, turns the cache off.
    if text.use_cache is False or getattr(text, "use_bidirectional_attention", False) or model.training:
        return False
    kinds = {type(layer) for layer in empty_cache(model).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and all(
        longest < limit for limit in _limits(text.to_dict())
    )


def _limits(config: Any) -> Iterator[int]:
    """Every number of tokens in a config, and in what it holds (rope parameters of each kind of layer), of `LIMITS`."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name in LIMITS and isinstance(value, int):
                yield value
            yield from _limits(value)


def _hooks(model: nn.Module) -> Iterator[Any]:
    return (hook for module in model.modules() for hook in module._forward_hooks.values())
