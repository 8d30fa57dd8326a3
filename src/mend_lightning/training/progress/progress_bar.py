"""The command line's progress bar: steps of the whole training, edits per second, and the estimated end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar, Timer
from tqdm import tqdm

from mend_lightning.data.batch import EditBatch
from mend_lightning.training.progress.console import counted
from mend_lightning.training.progress.pace import ending
from mend_lightning.training.progress.progress_line import ProgressLine
from mend_lightning.training.trainer_parts import callbacks_of

# Validation metrics that a log says after each validation.
VALIDATED = {"loss": "loss", "edit_success": "edit success", "kept": "retained"}


class EditProgressBar(ProgressBar):
    """Progress of fit, validate, test and predict in edits.

    In a terminal a bar. In a log a line now and then. No metric is read but to be shown, so no step waits for the device.
    (Lightning's bars count iterations of an epoch, and draw themselves anew in a log many times a second.)

    Example:
        >>> trainer = L.Trainer(callbacks=[EditProgressBar()], logger=False, accelerator="cpu")
        >>> type(trainer.progress_bar_callback).__name__
        'EditProgressBar'
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._training: ProgressLine | None = None
        self._evaluation: ProgressLine | None = None
        # What is known of the validations within this training: seconds that one takes, and batches before the last one.
        self._validation_seconds: float | None = None
        self._validated_after = 0

    @property
    def is_enabled(self) -> bool:
        return self._enabled

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """What the module logs for the bar, by short names, and the last validation's loss."""
        values = {name.removeprefix("train/"): value for name, value in trainer.progress_bar_metrics.items()}
        norm = {"grad norm": values.pop("grad_norm")} if "grad_norm" in values else {}
        if "val/loss" in trainer.callback_metrics:
            values["val_loss"] = trainer.callback_metrics["val/loss"].item()
        # What a narrow screen cuts off comes last.
        return {**{name.replace("_", " "): value for name, value in values.items()}, **norm}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._training = self._validation_seconds = None
        self._validated_after = batches_done(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        # Not before, for what other callbacks say at the start would be written into the bar.
        if self._enabled and self._training is None:
            total = _known(trainer.estimated_stepping_batches)
            line = self._training = ProgressLine("Training", total, "steps", trainer.global_step)
            line.ending = lambda: self._ending(trainer, line.pace.seconds_per_turn)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._training is not None:
            edits = edits_of(batch) * trainer.world_size
            self._training.turn(edits, trainer.global_step, lambda: self.get_metrics(trainer, module))

    def _ending(self, trainer: L.Trainer, batch_seconds: float | None) -> str:
        return training_end(trainer, batch_seconds, self._validated_after, self._validation_seconds)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._close_training()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._training is not None:
            self._training.pace.leave()
        if is_first_look(trainer, module):
            self._open("Validation before the first step", trainer.num_val_batches, keep=False)
        elif trainer.sanity_checking:
            self._open("Sanity check", trainer.num_sanity_val_batches, keep=False)
        elif trainer.state.fn == "fit":
            self._open(f"Validation after step {trainer.global_step:,}", trainer.num_val_batches, keep=False)
        else:
            self._open("Validation", trainer.num_val_batches)

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._open("Test", trainer.num_test_batches)

    def on_predict_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._open("Prediction", trainer.num_predict_batches)

    def _open(self, name: str, batches: list[int | float], keep: bool = True) -> None:
        if self._enabled:
            below = 0 if self._training is None else 1
            self._evaluation = ProgressLine(name, _known(sum(batches)), keep=keep, below=below)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if self._evaluation is not None:
            self._evaluation.turn(edits_of(batch) * trainer.world_size)

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        line = self._evaluation
        checks = trainer.sanity_checking and not is_first_look(trainer, module)
        self._close_evaluation(None if checks else validated(trainer))
        if self._training is not None and line is not None:
            self._validation_seconds, self._validated_after = line.pace.elapsed, batches_done(trainer)
            self._training.pace.come_back()
            self._training.redraw()

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._close_evaluation()

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._close_evaluation()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        # What a failed device holds cannot be read.
        self._close_evaluation(read=False)
        self._close_training(read=False)

    def _close_evaluation(self, note: Mapping[str, float] | None = None, read: bool = True) -> None:
        if self._evaluation is not None:
            self._evaluation.close(note, read)
            self._evaluation = None

    def _close_training(self, read: bool = True) -> None:
        if self._training is not None:
            self._training.close(read=read)
            self._training = None

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Writes above the bars what `module.print` is given."""
        tqdm.write(sep.join(map(str, args)), **kwargs)


def is_first_look(trainer: L.Trainer, module: Any) -> bool:
    """Whether the validation that runs is that of a MendModule before its first step."""
    return hasattr(module, "looks") and module.looks.first.under_way(trainer)


def edits_of(batch: Any) -> int:
    """Edits in a batch; 0 in one of another kind, whose speed is then not told."""
    return len(batch.z_edit) if isinstance(batch, EditBatch) else 0


def validated(trainer: L.Trainer) -> dict[str, float]:
    """What to say of a validation that is over."""
    found = {label: trainer.callback_metrics.get(f"val/{name}") for name, label in VALIDATED.items()}
    return {label: value.item() for label, value in found.items() if value is not None}


def training_end(
    trainer: L.Trainer, batch_seconds: float | None, validated_after: int, validation_seconds: float | None
) -> str:
    """How long the training still takes, with the validations to come.

    Args:
        trainer: in the middle of `fit`.
        batch_seconds: that a batch takes; None while nobody knows, and then nothing is said.
        validated_after: training batches that were over at the last validation.
        validation_seconds: that a validation takes; None before the first, and then they are counted beside the time.
    """
    callbacks = callbacks_of(trainer)
    limits = [timer.time_remaining() for timer in callbacks if isinstance(timer, Timer)]
    at_most = any(isinstance(callback, EarlyStopping) for callback in callbacks)
    beside = ""
    if batch_seconds is not None and trainer.estimated_stepping_batches != math.inf:
        batches = (trainer.estimated_stepping_batches - trainer.global_step) * trainer.accumulate_grad_batches
        validations = validations_between(trainer, validated_after, batches_done(trainer) + batches)
        limits.append(batches * batch_seconds + validations * (validation_seconds or 0.0))
        if validations and validation_seconds is None:
            beside = f" + {counted(validations, 'validation')}"
    known = [seconds for seconds in limits if seconds is not None]
    return ending(max(0.0, min(known)), datetime.now(), at_most) + beside if known else ""


def validations_between(trainer: L.Trainer, first: int, last: float) -> int:
    """Validations that come after more than `first` and at most `last` training batches."""
    every = trainer.val_check_batch
    if not sum(trainer.num_val_batches or [0]) or every is None or every == math.inf:
        return 0
    # Where epochs are counted, their last batches may bring none: then it is one too many.
    every *= trainer.check_val_every_n_epoch or 1
    return int(last // every - first // every)


def batches_done(trainer: L.Trainer) -> int:
    """Training batches that are over, in earlier processes as well."""
    return trainer.fit_loop.total_batch_idx + 1


def _known(total: int | float) -> int | None:
    return None if math.isinf(total) or total < 0 else int(total)
