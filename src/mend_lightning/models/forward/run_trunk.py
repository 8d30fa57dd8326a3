"""The trunk pass: what rows have in common at their beginning runs once, and short rows are not padded to the longest."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mend_lightning.models.forward.length_groups import run_in_groups, trunk_groups
from mend_lightning.models.forward.logits import output_head, without_cache
from mend_lightning.models.forward.phases import TRUNK, phase
from mend_lightning.models.forward.trunk import StackOutput, TrunkOutputs, record_trunk
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.layers import find_stacks
from mend_lightning.models.sharding.collectives import all_reduce_min

# Below this the second forward call costs more than it saves.
SHORTEST_PREFIX = 4


@phase(TRUNK)
def run_trunk(model: nn.Module, rows: Rows, layers: Mapping[str, nn.Module]) -> TrunkOutputs:
    """The trunk's outputs for `rows`, for `replayed`.

    A causal model's states on the tokens that all rows share are the same in all rows, so they are computed
    once and the rest attends to them through the key-value cache. Rows of very different length go in groups
    (`trunk_groups`). Equal to the plain pass up to rounding, but for what is padding.
    """
    stacks = find_stacks(model)
    length = all_reduce_min(common_prefix(rows), model) if shares_prefixes(model) and len(stacks) == 1 else 0
    if length < SHORTEST_PREFIX:
        uncached = without_cache(model)
        return run_in_groups(
            lambda inputs: record_trunk(lambda: model(**inputs, **uncached), len(inputs["input_ids"]), stacks, layers),
            rows, trunk_groups(model, rows),
        )  # fmt: skip
    cache = empty_cache(model)
    prefix = record_trunk(
        lambda: model(input_ids=rows.inputs["input_ids"][:1, :length], past_key_values=cache, use_cache=True),
        1, stacks, layers,
    )  # fmt: skip
    if not prefix.stacks:
        return TrunkOutputs(len(rows))

    def run_rest(inputs: Mapping[str, Tensor]) -> TrunkOutputs:
        ids, mask = inputs["input_ids"][:, length:], inputs["attention_mask"]
        own = deepcopy(cache)
        own.batch_repeat_interleave(len(ids))
        run = partial(model, input_ids=ids, attention_mask=mask, past_key_values=own, use_cache=True)
        return record_trunk(run, len(ids), stacks, layers)

    return _joined(prefix, run_in_groups(run_rest, rows, trunk_groups(model, rows, length)))


def empty_cache(model: nn.Module) -> DynamicCache:
    """A key-value cache with a layer for each of the model's, by its config."""
    config: Any = model.config
    return DynamicCache(config=config)


def shares_prefixes(model: nn.Module) -> bool:
    """Whether the model is a causal language model with an ordinary key-value cache."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or output_head(model) is None:
        return False
    # Recurrent models (Mamba, RWKV) keep another kind of state; static and quantised caches are not made here.
    stateful = getattr(model, "_is_stateful", False)
    return not stateful and "past_key_values" in inspect.signature(model.forward).parameters


def common_prefix(rows: Rows) -> int:
    """How many leading tokens all rows share; at least one token is left to every row.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
        >>> common_prefix(Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, ids[:, 0] * 0, 1))
        2
    """
    if set(rows.inputs) != {"input_ids", "attention_mask"}:
        return 0
    return leading_tokens(rows.host.inputs["input_ids"], rows.host.inputs["attention_mask"])


def leading_tokens(ids: Tensor, mask: Tensor) -> int:
    """The same of ids and mask `[rows, length]`, padded on the right."""
    same = ((ids == ids[:1]) & mask.bool()).all(0).long().cumprod(0)
    return min(int(same.sum()), int(mask.sum(1).min()) - 1)


def _joined(prefix: TrunkOutputs, rest: TrunkOutputs) -> TrunkOutputs:
    stacks = {
        name: StackOutput(stack.blocks, _join(prefix.stacks[name].output, stack.output, rest.rows))
        for name, stack in rest.stacks.items()
    }
    return TrunkOutputs(rest.rows, stacks)


def _join(prefix: Any, rest: Any, rows: int) -> Any:
    if isinstance(rest, Tensor):
        return torch.cat([prefix.expand(rows, *prefix.shape[1:]), rest], dim=1)
    # Blocks that return a tuple have the hidden states first; nothing else in it is read by the stack.
    return (_join(prefix[0], rest[0], rows), *rest[1:])
