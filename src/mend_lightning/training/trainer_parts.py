"""What Lightning's Trainer is given by its connectors: attributes that its class does not declare."""

from __future__ import annotations

from typing import Any

import lightning as L


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
