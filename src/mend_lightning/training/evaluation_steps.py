"""What a batch of validation, test and prediction does: scores, answers and records of edited models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors.editor import Editor
from mend_lightning.errors import ConfigError, NonFiniteError
from mend_lightning.evaluation.doubts import Asked
from mend_lightning.evaluation.evaluate import BatchScores, evaluate_batch, hard_rows
from mend_lightning.evaluation.generated_answers import asked_by_format, edited_answers, judge_answers, task_records
from mend_lightning.evaluation.metric_collection import Scoreboard
from mend_lightning.models.forward.generation import generate_answers
from mend_lightning.models.inputs.encoder import Encoder, in_words


def validate_batch(
    model: nn.Module,
    editor: Editor,
    batch: EditBatch,
    metrics: Scoreboard | None,
    weight_norms: Mapping[str, Tensor],
    asked: Asked,
) -> None:
    """Scores a batch of edits; arguments as in `measure_batch`."""
    scores = evaluate_batch(model, editor, batch)
    if metrics is not None:
        _take_in(metrics, scores, batch, weight_norms, asked)


def _take_in(
    metrics: Scoreboard, scores: BatchScores, batch: EditBatch, weight_norms: Mapping[str, Tensor], asked: Asked
) -> None:
    metrics.update(scores, hard_rows(batch), asked.confidence, asked.has_stop)
    metrics.update_norms(scores.edited.deltas, weight_norms)


def validation_values(metrics: Scoreboard, c_edit: float) -> dict[str, float]:
    """name -> value of a whole validation, with `loss = c_edit L_edit + L_loc` where both are finite."""
    values = metrics.compute()
    if "edit_nll" not in values or "locality_kl" not in values:
        return values
    return {**values, "loss": c_edit * values["edit_nll"] + values["locality_kl"]}


def check_validation(values: Mapping[str, float], step: int) -> None:
    """Raises NonFiniteError if a loss of a validation is not finite."""
    if "loss" not in values:
        raise NonFiniteError(
            f"The validation losses are not finite after step {step}: training has diverged. Go back to an earlier "
            "checkpoint and lower the learning rates."
        )


def measure_batch(
    model: nn.Module,
    editor: Editor,
    encoder: Encoder | None,
    batch: EditBatch,
    metrics: Scoreboard | None,
    weight_norms: Mapping[str, Tensor],
    asked: Asked,
) -> list[dict[str, Any]]:
    """Scores a batch of edits and asks the edited model.

    Args:
        model: the base model.
        editor: the editor.
        encoder: of the data, for the questions; None: no answers are generated (a classifier's).
        batch: the edit tasks.
        metrics: takes everything in; None where another process has counted the batch already.
        weight_norms: layer name -> ‖W‖.
        asked: what the figures are judged by.

    Returns:
        One record a task for the report; none without `metrics`.
    """
    scores = evaluate_batch(model, editor, batch)
    # Generated even where it is not counted: processes that share the model run it equally often.
    answers = None if encoder is None else edited_answers(model, encoder, batch, scores)
    if metrics is None:
        return []
    _take_in(metrics, scores, batch, weight_norms, asked)
    if answers is not None:
        metrics.update_generated(*judge_answers(answers, batch))
    return task_records(batch, scores, answers, asked.confidence, asked.has_stop)


def predict_batch(
    model: nn.Module, editor: Editor, encoder: Encoder | None, batch: EditBatch, classifies: bool
) -> list[dict[str, Any]]:
    """One record a task: the question, the target, and the answers before and after the edit.

    Args:
        model: the base model.
        editor: the editor.
        encoder: of the data.
        batch: the edit tasks.
        classifies: whether the model's answers are names of classes, which are told in the words of the edit: "true"
            becomes "false", and not REFUTES.

    Raises:
        ConfigError: there is no encoder: the run has no EditDataModule.
    """
    if encoder is None:
        raise ConfigError("predict asks the questions of an EditDataModule. Pass one to Trainer.predict.")
    prompts, formats = [text.prompt for text in batch.texts], [text.format for text in batch.texts]
    edited = editor.edited(model, batch.z_edit, x_keep=batch.x_keep)

    def ask_base(asking: Encoder, some: Sequence[int]) -> list[str]:
        return generate_answers(model, asking, [prompts[i] for i in some])

    def ask_edited(asking: Encoder, some: Sequence[int]) -> list[str]:
        return edited.answers(model, asking, [prompts[i] for i in some], batch.z_edit.task[list(some)])

    found = [asked_by_format(model, encoder, formats, range(len(prompts)), ask) for ask in (ask_base, ask_edited)]
    before, after = ([answers[i] for i in range(len(prompts))] for answers in found)
    if classifies:
        before, after = (
            [in_words(name, text.target) for name, text in zip(names, batch.texts)] for names in (before, after)
        )
    return [
        {"prompt": text.prompt, "target": text.target, "before": old, "after": new}
        for text, old, new in zip(batch.texts, before, after)
    ]
