"""The validation before a run's first step: what the editor does before it has learned anything."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import lightning as L
from torch import nn

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.editors.editor import Editor
from mend_lightning.training.start_statistics import (
    Statistics,
    start_statistics,
    training_edits,
    with_statistics,
    without_statistics,
)
from mend_lightning.training.trainer_parts import data_of


class FirstLook:
    """Has Lightning's check before training be a whole validation, and gives a new editor the statistics that it needs there.

    Lightning runs that check after `on_fit_start`, where an editor is calibrated, and before the first batch. It keeps the
    random generators, and callbacks know it (`Trainer.sanity_checking`): no checkpoint is saved, early stopping does not
    count it, and nothing is logged but by us. A resumed run has none, and so has one that trains nothing.

    Args:
        wanted: whether there shall be such a validation.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._checks: int | float | None = None
        self._statistics: Statistics = {}

    def ask(self, trainer: L.Trainer, editor: Editor) -> None:
        """Asks for the validation, at the start of `fit`, where there can be one.

        A new editor that normalises needs training edits for it (`start_statistics`), which an EditDataModule alone has.
        """
        loop = trainer.fit_loop
        trains = editor.trainable and 0 not in (loop.max_epochs, trainer.max_steps, trainer.limit_train_batches)
        resumed = trainer.ckpt_path is not None or trainer.global_step > 0
        has_edits = isinstance(data_of(trainer), EditDataModule) or not without_statistics(editor)
        if self.wanted and trains and not resumed and has_edits:
            self._checks, trainer.num_sanity_val_steps = trainer.num_sanity_val_steps, math.inf

    def under_way(self, trainer: L.Trainer) -> bool:
        """Whether the validation that runs is this one."""
        return self._checks is not None and trainer.sanity_checking

    def begin(self, trainer: L.Trainer, model: nn.Module, editor: Editor) -> None:
        """Finds the statistics that the editor lacks."""
        if without_statistics(editor):
            device = next(model.parameters()).device
            edits = training_edits(data_of(trainer), trainer.global_rank, trainer.world_size)
            self._statistics = start_statistics(model, editor, (rows.to(device) for rows in edits))

    def prepared(self) -> AbstractContextManager[None]:
        """Inside, the editor is as it is measured; outside of this validation that is as it is."""
        return with_statistics(self._statistics)

    def end(self, trainer: L.Trainer) -> None:
        """Leaves the Trainer as it was."""
        if self._checks is not None:
            trainer.num_sanity_val_steps, self._checks = self._checks, None
        self._statistics = {}
