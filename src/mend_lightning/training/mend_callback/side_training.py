"""The editor's training beside the host's: when it steps, on which edits, and at what cost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from mend_lightning.data.batch import EditBatch
from mend_lightning.data.order import ResumableLoader
from mend_lightning.errors import NoEffectWarning
from mend_lightning.training.mend_callback.attachment import HostAttachment
from mend_lightning.training.mend_callback.editor_training import EditorTraining, LearningSettings
from mend_lightning.training.mend_callback.schedule import Clock, Schedule
from mend_lightning.training.progress.console import counted


class SideTraining:
    """A training of the editor of `attachment`, from the start of the host's to its end.

    Args:
        attachment: the model and the editor.
        learning: how the editor learns.
        schedule: when.
        clock: counts the cost.
        calibration_batches: see `MendCallback`.
        kept: what `state_dict` gave, of a checkpoint or of an earlier `fit`.
        resumed: whether it is of a checkpoint of this training, which resumes, and not of another one.

    Attributes:
        losses: of the last step, name -> scalar.
    """

    def __init__(
        self,
        attachment: HostAttachment,
        learning: LearningSettings,
        schedule: Schedule,
        clock: Clock,
        calibration_batches: int,
        kept: dict[str, Any],
        resumed: bool,
    ) -> None:
        self.attachment, self.schedule, self.clock = attachment, schedule, clock
        self.losses: dict[str, Any] = {}
        with clock.ours(), attachment.isolated():
            # What the editor was bound to is about to move.
            editor = attachment.built_editor()
            editor.base_fingerprint = ""
            self.training = EditorTraining(editor, learning)
            if kept:
                self.training.load_state_dict(kept["training"])
            if resumed:
                schedule.load_state_dict(kept["schedule"])
            if not editor.calibrated:
                attachment.calibrate(calibration_batches)
            self._feed = Feed(attachment.given_edits().train_dataloader(), kept.get("place"))

    def on_host_step(self, global_step: int, seconds: float) -> None:
        """Takes in a batch of the host's (`Schedule.is_due`), and takes a step where one is due."""
        if not self.schedule.is_due(global_step, seconds):
            return
        with self.clock.ours(step=True), self.attachment.isolated(self.training.steps):
            batch = self._feed.next().to(self.attachment.device)
            self.losses = self.training.step(self.attachment.found_model(), batch, self.schedule.progress)
        self.attachment.ready = True
        self.schedule.stepped(self.attachment.device)

    def state_dict(self) -> dict[str, Any]:
        """As tensors and builtins."""
        parts: dict[str, Any] = {"training": self.training, "schedule": self.schedule, "place": self._feed}
        return {name: part.state_dict() for name, part in parts.items()}

    def summary(self) -> str:
        """What was done, and what it cost.

        Warns:
            NoEffectWarning: nothing was done.
        """
        training, clock = self.training, self.clock
        if training.steps == 0:
            warnings.warn(
                f"The editor took no step: the host's optimisers stepped {self.schedule.host_steps} time(s), and it waits for "
                f"{self.schedule.next_step}. Lower every_n_steps, or train longer.",
                NoEffectWarning,
                stacklevel=2,
            )
        skipped = f", {training.skipped} of them left out" if training.skipped else ""
        return (
            f"{counted(training.steps, 'editor step')}{skipped}; {clock.editor_seconds:.1f} s of {clock.total:.1f} s were the "
            f"callback's ({clock.share:.1%})"
        )


class Feed:
    """Epoch after epoch of a loader.

    Args:
        loader: of the training edits.
        place: where to resume, from `state_dict`.
    """

    def __init__(self, loader: ResumableLoader, place: dict[str, int] | None = None) -> None:
        self._loader = loader
        self._batches: Iterator[EditBatch] | None = None
        if place:
            loader.load_state_dict(place)

    def next(self) -> EditBatch:
        """The next batch, of the next epoch where this one is over."""
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = next(self._batches, None)
        if batch is None:
            order: Any = self._loader.sampler
            order.set_epoch(order.epoch + 1)
            self._batches = iter(self._loader)
            batch = next(self._batches)
        return batch

    def state_dict(self) -> dict[str, int]:
        """The place behind the last batch, as builtins."""
        return self._loader.state_dict()
