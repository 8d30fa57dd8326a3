"""The trunk cache of `fit`: what it needs, and how many rows were found in it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mend_lightning.errors import ConfigError, NoEffectWarning
from mend_lightning.models.sharding.collectives import own_class
from mend_lightning.training.distributed.placement import SHARDING
from mend_lightning.training.progress.console import console
from mend_lightning.training.trunk_cache import CachedTrunk, check_folder
from mend_lightning.training.trunk_cache.cached import SHARDED


def check_trunk_cache(folder: str | Path, strategy: Any) -> None:
    """Checks before the base loads that a trunk cache can be used.

    Raises:
        ConfigError: the strategy shards the base.
        OutputPathError, TrunkCacheError: the folder cannot be used.
    """
    if isinstance(strategy, SHARDING):
        raise ConfigError(SHARDED)
    check_folder(folder)


class TrunkReport(L.Callback):
    """Says at the end of `fit` how many rows a trunk cache held, and at its start where a cache has no effect."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        editor: Any = module.editor
        if module.trunk_cache is not None and not editor.trainable:
            warnings.warn(
                f"trunk_cache has no effect: {own_class(editor).__name__} needs no training. Leave it out.",
                NoEffectWarning,
                stacklevel=2,
            )

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        cached = module.trunk_of
        if not isinstance(cached, CachedTrunk):
            return
        use = torch.tensor([cached.use.rows, cached.use.found], dtype=torch.float64)
        rows, found = trainer.strategy.reduce(use.to(module.device), reduce_op="sum").tolist()
        if trainer.is_global_zero and rows:
            console().print(
                f"Trunk cache: {found:,.0f} of {rows:,.0f} rows ({found / rows:.0%}) were found in {cached.folder}, which takes "
                f"{cached.size() / 1e6:,.0f} MB for this model.",
                highlight=False,
            )
