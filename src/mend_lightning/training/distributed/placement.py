"""Where a base model is put: whole on one device, whole on each, or in shards, as the Trainer's strategy says."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import nn

from mend_lightning.models.base import BaseModel
from mend_lightning.models.load_sharded import load_base_in_shards
from mend_lightning.models.quantisation import check_whole
from mend_lightning.models.sharding.fsdp import keep_whole
from mend_lightning.training.checks import check_strategy
from mend_lightning.training.distributed.checkpoint_file import BASE_PREFIX
from mend_lightning.training.distributed.strategies import ShardedBaseStrategy, ShardedStrategy

# The strategies under which a process has a part of the base.
SHARDING = (ShardedStrategy, ShardedBaseStrategy)


def load_for(strategy: Strategy | None, base: BaseModel) -> tuple[nn.Module, Any]:
    """The frozen base in eval mode, laid out for `strategy` (None: no Trainer), and its tokenizer.

    Raises:
        ConfigError: the strategy cannot shard this model, or the base is quantised and would be sharded.
        ModelLoadError: as `load_base`.
    """
    check_strategy(strategy)
    if isinstance(strategy, SHARDING):
        check_whole(base.quantize)
        return load_base_in_shards(base, strategy.shard_base, strategy.root_device)
    # What quantises the base does it while transformers loads it.
    if isinstance(strategy, ParallelStrategy) and strategy.world_size > 1 and not base.quantize:
        return load_base_in_shards(base, keep_whole, strategy.root_device)
    return base.load()


def ddp_leaves_out(module: nn.Module) -> list[str]:
    """Names that DDP must not send from rank 0 before every forward pass, waiting for ranks that have no batch left to validate.

    The base is the same everywhere, and the statistics are reduced by the normaliser.
    """
    frozen = [name for name, _ in module.named_parameters() if name.startswith(BASE_PREFIX)]
    return frozen + [name for name, _ in module.named_buffers()]
