"""The trunk cache of `fit`: what it needs, what it was good for, and, where there is none, whether it would pay."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mend_lightning.data.batch import EditBatch
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.errors import ConfigError, NoEffectWarning
from mend_lightning.models.sharding.collectives import is_sharded, own_class
from mend_lightning.training.distributed.placement import SHARDING
from mend_lightning.training.progress.console import console
from mend_lightning.training.trunk_cache import CachedTrunk, check_folder
from mend_lightning.training.trunk_cache.cached import SHARDED
from mend_lightning.training.trunk_cache.estimate import Worth, run_rows, worth_of
from mend_lightning.training.trunk_cache.observe import NotCacheable, observe_trunk


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
    """Says at the start of `fit` where a trunk cache would pay, and at the end what one was good for."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if module.trunk_cache is not None and not module.editor.trainable:
            warnings.warn(
                f"trunk_cache has no effect: {own_class(module.editor).__name__} needs no training. Leave it out.",
                NoEffectWarning,
                stacklevel=2,
            )

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if getattr(self, "_looked", False) or not trainer.is_global_zero or module.trunk_cache is not None:
            return
        self._looked = True
        free = shutil.disk_usage(trainer.default_root_dir).free
        worth = worth_in(trainer, module, batch)
        if worth is not None and worth.pays(free):
            console().print(worth.line(free), highlight=False, markup=False)

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


def worth_in(trainer: L.Trainer, module: L.LightningModule, batch: EditBatch) -> Worth | None:
    """What a trunk cache would be worth to a run; None: it could not be used, or how long the run is cannot be told."""
    data, model = trainer.datamodule, module.base_model
    steps = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
    if not isinstance(data, EditDataModule) or is_sharded(model) or steps == float("inf"):
        return None
    layers = module.editor.modules_in(model)
    try:
        shape = observe_trunk(model, layers, batch.z_edit.inputs)
    except NotCacheable:
        return None
    if not shape.stacks:
        return None
    epoch = len(trainer.train_dataloader)
    calibration = min(module.calibration_batches, epoch) if module.editor.settings.get("precondition") else 0
    reads_answers = module.base_kind == "causal" or "decoder_input_ids" in shape.inputs
    rows = run_rows(data.sampler("train"), steps / epoch, calibration / epoch, reads_answers)
    return worth_of(model, module.editor, shape, batch, rows, module.locality_positions)
