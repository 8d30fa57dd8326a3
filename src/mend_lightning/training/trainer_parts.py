"""What Lightning's Trainer is given by its connectors: attributes that its class does not declare."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning as L
import torch

from mend_lightning.data.batch import EditBatch
from mend_lightning.errors import ConfigError
from mend_lightning.training.progress.progress_line import followed


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """All callbacks of a run, Lightning's own included.

    Example:
        >>> [type(callback).__name__ for callback in callbacks_of(L.Trainer(enable_progress_bar=False, logger=False))][-1]
        'ModelCheckpoint'
    """
    whole: Any = trainer
    return whole.callbacks


def data_of(trainer: L.Trainer) -> Any:
    """The data module that a run was given; None where it got loaders."""
    whole: Any = trainer
    return whole.datamodule


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Whether the run only tries a few batches, and keeps nothing.

    Example:
        >>> is_fast_dev_run(L.Trainer(enable_progress_bar=False, logger=False, enable_checkpointing=False))
        False
    """
    whole: Any = trainer
    return bool(whole.fast_dev_run)


def first_batches(trainer: L.Trainer, count: int, device: torch.device) -> Iterator[EditBatch]:
    """The first `count` batches of a Trainer's training data (fewer where an epoch is shorter), with their progress shown.

    Raises:
        ConfigError: there is no data module.
    """
    data = data_of(trainer)
    if data is None:
        raise ConfigError(
            "precondition is estimated from the training data before the first step, and this fit has no data module. "
            "Pass an EditDataModule to fit, or start from an editor that is calibrated already."
        )
    loader = data.train_dataloader()
    total = min(count, len(loader))
    batches = (batch.to(device) for batch in islice(loader, total))
    if trainer.progress_bar_callback is None or not trainer.is_global_zero:
        return batches
    return followed(batches, "Estimating the preconditioning", total, trainer.world_size)
