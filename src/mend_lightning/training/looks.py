"""What `MendModule` does to look at its edits: validations, the one before the first step among them, and the test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mend_lightning.data.batch import EditBatch
from mend_lightning.evaluation.doubts import Asked, warn_of_failure
from mend_lightning.evaluation.metric_collection import Scoreboard, weight_norms
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.training.evaluation_steps import measure_batch, validate_batch
from mend_lightning.training.first_look import FirstLook
from mend_lightning.training.validations import Validations, log_first


class Looks:
    """The looks of a run at its edits. The methods are called by the module's hooks, on every process, with the module itself.

    Args:
        validate_first: whether `fit` validates before its first step.
        trained: whether the editor was trained before.

    Attributes:
        first: the validation before the first step, while it is asked for and runs.
        validations: what was measured.
    """

    def __init__(self, validate_first: bool, trained: bool) -> None:
        self.first, self.validations = FirstLook(validate_first), Validations()
        self._trained = trained
        self._weight_norms: Mapping[str, Tensor] | None = None

    @property
    def began_with(self) -> str:
        """Names the editor before the first step."""
        return "the editor that it began with" if self._trained else "the untrained editor"

    def asked(self, module: Any, at_start: bool = False) -> Asked:
        """What an evaluation is judged by; `at_start`: before the first step."""
        editor, classifies = module.editor, module.base_kind == "classifier"
        return Asked(editor.prompt_format, editor.confidence, classifies, self._trained or not at_start)

    def begin_fit(self, module: Any) -> None:
        """Asks for the validation before the first step."""
        self._weight_norms = None
        if module.trainer.ckpt_path is None and module.global_step == 0:
            self.validations = Validations()
        self.first.ask(module.trainer, module.editor)

    def begin_training(self, module: Any) -> None:
        """Writes down what that validation measured."""
        self.first.end(module.trainer)
        if module.global_step == 0:
            log_first(module.trainer, self.validations.first)

    def begin(self, module: Any) -> None:
        """Measures what the validation or test that begins needs of the model."""
        if self.first.under_way(module.trainer):
            self.first.begin(module.trainer, module.base_model, module.editor)
        if self._weight_norms is None or module.trainer.state.fn != "fit":
            # Once a fit: the base is frozen.
            self._weight_norms = weight_norms(module.editor.modules_in(module.base_model))

    def validate(self, module: Any, batch: EditBatch, metrics: Scoreboard | None) -> None:
        """Scores a batch; see `measure_batch`."""
        with self.first.prepared():
            validate_batch(
                module.base_model, module.editor, batch, metrics, self._weight_norms or {}, self.asked(module)
            )

    def end_validation(self, module: Any) -> dict[str, float]:
        """name -> value of the validation that is over. Warns where it is the run's first look, and says that the run fails."""
        is_first, trainer = self.first.under_way(module.trainer), module.trainer
        # A check of some batches, which a Trainer may be asked for instead, is no validation of the run's, nor is `validate`.
        of_run = trainer.state.fn == "fit" and (is_first or not trainer.sanity_checking)
        takes = self.validations if of_run else Validations()
        found = takes.take(module.scoreboard, module.c_edit, module.global_step, is_first)
        if trainer.is_global_zero and (is_first or trainer.state.fn == "validate"):
            what = "The validation before the first step" if is_first else "The validation"
            warn_of_failure(found.values, found.edits, self.asked(module, is_first), what)
        return found.values

    def measure(
        self, module: Any, encoder: Encoder | None, batch: EditBatch, metrics: Scoreboard | None
    ) -> list[dict[str, Any]]:
        """Records of a test's batch; see `measure_batch`. A classifier is asked for no text."""
        asked = self.asked(module)
        encoder = None if asked.classifies else encoder
        return measure_batch(module.base_model, module.editor, encoder, batch, metrics, self._weight_norms or {}, asked)

    def end_test(self, module: Any) -> dict[str, float]:
        """name -> value of the test that is over. Warns where it says that the run fails."""
        values, edits = module.scoreboard.compute(), module.scoreboard.edits()
        module.scoreboard.reset()
        if module.trainer.is_global_zero:
            warn_of_failure(values, edits, self.asked(module), "The test")
        return values

    def end_fit(self, module: Any) -> None:
        """Warns where edits fail after the training and nobody could have said so before it."""
        self.first.end(module.trainer)
        if module.trainer.is_global_zero:
            self.validations.warn_at_the_end(self.asked(module), self.asked(module, at_start=True))
