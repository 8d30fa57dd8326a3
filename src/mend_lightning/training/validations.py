"""The validations of a run: the one before its first step, those that follow, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L

from mend_lightning.evaluation.doubts import Asked, findings, warn_of_failure
from mend_lightning.evaluation.metric_collection import Scoreboard
from mend_lightning.training.evaluation_steps import check_validation, validation_values


@dataclass(frozen=True)
class Validation:
    """What one validation measured.

    Attributes:
        step: steps that the editor had been trained for.
        edits: that were evaluated.
        values: metric -> value.
    """

    step: int
    edits: int
    values: dict[str, float]


@dataclass
class Validations:
    """The validations of a run, earlier parts of it included; its checkpoints hold them.

    Attributes:
        first: the one before the first step; None: there was none.
        last: the last one after it; None: there was none.
        kept: that of the checkpoint whose editor the run leaves, where there is one; not in checkpoints.

    Example:
        >>> Validations.of({"first": {"step": 0, "edits": 2, "values": {"kept": 1.0}}, "last": None}).first.values
        {'kept': 1.0}
    """

    first: Validation | None = None
    last: Validation | None = None
    kept: Validation | None = None

    @classmethod
    def of(cls, saved: Mapping[str, Any] | None) -> Validations:
        """Those of a checkpoint's entry; earlier versions wrote none."""
        return cls(**{name: Validation(**each) if each else None for name, each in (saved or {}).items()})

    def saved(self) -> dict[str, Any]:
        """The entry of a checkpoint, builtins only."""
        return {name: asdict(each) if each else None for name, each in (("first", self.first), ("last", self.last))}

    def take(self, metrics: Scoreboard, c_edit: float, step: int, is_first: bool) -> Validation:
        """Notes what `metrics` hold, which are emptied. Every process must call it.

        Raises:
            NonFiniteError: a loss is not finite, and it is not the first look, which is a look only: training has diverged.
        """
        values = validation_values(metrics, c_edit)
        if not is_first:
            check_validation(values, step)
        found = Validation(step, metrics.edits(), values)
        metrics.reset()
        self.first, self.last, self.kept = (found, None, None) if is_first else (self.first, found, None)
        return found

    def warn_at_the_end(self, asked: Asked, at_start: Asked) -> None:
        """Warns (FailingRunWarning) where edits fail after the training and nobody could have said so before it.

        Args:
            asked: of the trained editor.
            at_start: of the editor at the first look.
        """
        judged = self.first is not None and at_start.judges_success
        end = self.kept or self.last
        if end is not None and not judged and "edit_success" in findings(end.values, asked):
            warn_of_failure(end.values, end.edits, asked, f"The validation after step {end.step}")


def validation_of(checkpoint: Mapping[str, Any]) -> Validation | None:
    """The validation of the very editor that a checkpoint holds; None where it was saved at another time."""
    last = Validations.of(checkpoint.get("validations")).last
    return last if last is not None and last.step == checkpoint["global_step"] else None


def log_first(trainer: L.Trainer, validation: Validation | None) -> None:
    """Writes the validation before the first step to the run's loggers: of Lightning's check before training nothing is."""
    if validation is None:
        return
    values = {f"val/{name}": value for name, value in validation.values.items()}
    for logger in trainer.loggers:
        logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=validation.step)
        logger.save()
