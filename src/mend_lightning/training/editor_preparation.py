"""What an editor takes from the training facts before its first step."""

from __future__ import annotations

import lightning as L
from torch import nn

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.neighbors import few_of_each, names_of
from mend_lightning.editors.editor import Editor
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.training.calibration import calibrate
from mend_lightning.training.step import Trunk
from mend_lightning.training.trainer_parts import data_of, first_batches


def take_in_facts(
    trainer: L.Trainer, model: nn.Module, editor: Editor, count: int, trunk_of: Trunk = run_trunk
) -> None:
    """Gives an editor its names and its preconditioning, where it has not got them yet.

    Args:
        trainer: of the fit.
        model: the base model.
        editor: gets the names that neighbors are made with, if it makes any, and its preconditioning.
        count: training batches that the preconditioning is estimated from.
        trunk_of: see `collect_moments`.
    """
    data = data_of(trainer)
    if editor.settings.get("contrasts") and not editor.names and isinstance(data, EditDataModule):
        editor.names = few_of_each(names_of(data.sampler("train").records))
    if not editor.calibrated:
        device = next(model.parameters()).device
        calibrate(model, editor, first_batches(trainer, count, device), trunk_of)
