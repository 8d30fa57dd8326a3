"""Edits one after another on the same model: what comes of each, what is left of it at the end, and when the model breaks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.data.tasks import EditTask
from mend_lightning.editors.editor import Editor
from mend_lightning.edits.deltas import DenseDelta, sum_of
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.hooks import Delta, applied
from mend_lightning.models.forward.logits import label_mask, logits_at, row_of
from mend_lightning.models.forward.losses import is_correct, rows_all_true, rows_sum, token_nll
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import Rows

# The model counts as broken where its perplexity on unrelated facts is so many times the base's.
BROKEN = 2.0


@dataclass(frozen=True)
class Checkpoint:
    """The model after some of the edits.

    Attributes:
        edits: how many were made.
        immediate: share of rows (x_e and rephrases) that were right just after their own edit; None before the first.
        retained: the same rows of all edits so far, asked now.
        perplexity: of the answers of unrelated facts.
        accuracy: on unrelated facts, whole row.
    """

    edits: int
    immediate: float | None
    retained: float | None
    perplexity: float
    accuracy: float


@dataclass
class EditSequence:
    """A sequence of edits.

    Attributes:
        checkpoints: the first one is the base model, without any edit.
        immediate: `[edits]` lists of whether each row was right just after the edit.
        final: the same rows under the final model.
    """

    checkpoints: list[Checkpoint] = field(default_factory=list)
    immediate: list[list[bool]] = field(default_factory=list)
    final: list[list[bool]] = field(default_factory=list)

    @property
    def forgetting(self) -> float | None:
        """Of the rows that were right just after their edit, the share that the final model gets wrong; None: there are none."""
        pairs = [pair for each in zip(self.immediate, self.final) for pair in zip(*each)]
        learned = [after for before, after in pairs if before]
        return sum(not after for after in learned) / len(learned) if learned else None

    @property
    def broken_after(self) -> int | None:
        """Edits at the first checkpoint whose perplexity is `BROKEN` times the base's; None: never."""
        limit = BROKEN * self.checkpoints[0].perplexity
        # `not <=`: a perplexity that is NaN is broken as well.
        return next((each.edits for each in self.checkpoints if not each.perplexity <= limit), None)

    def summary(self) -> dict[str, Any]:
        """Everything but the single rows, as builtins."""
        last = self.checkpoints[-1]
        return {
            "edits": last.edits,
            "immediate_success": _share(self.immediate),
            "retained_success": _share(self.final),
            "forgetting": self.forgetting,
            "broken_after": self.broken_after,
            "checkpoints": [asdict(each) for each in self.checkpoints],
        }


@torch.no_grad()
def edit_in_sequence(
    model: nn.Module, editor: Editor, encoder: Encoder, tasks: Iterable[EditTask], probes: Rows, every: int = 10
) -> EditSequence:
    """Makes the edits one after another, each on the model that the ones before it left.

    Args:
        model: the base model, in eval mode; its weights stay as they are.
        editor: a trained editor, in eval mode.
        encoder: text to ids.
        tasks: the edits; their rephrases are asked as well.
        probes: unrelated facts, with one task.
        every: edits between two checkpoints.

    Raises:
        ConfigError: the editor changes no weight.
    """
    check_builds_on(editor)
    layers, found, stack = editor.modules_in(model), EditSequence(), dict[str, Delta]()
    asked: list[Rows] = []
    found.checkpoints.append(_checkpoint(model, layers, stack, found, asked, probes))
    for number, task in enumerate(tasks, start=1):
        pairs = [(prompt, task.target) for prompt in (task.prompt, *task.rephrases)]
        rows = encoder.rows(pairs, [0] * len(pairs), 1).to(probes.labels.device)
        with applied(layers, stack):
            made = editor.make_deltas(model, encoder.rows(pairs[:1], [0], 1).to(probes.labels.device)).deltas
        stack = stacked(stack, made, editor.base_deltas())
        asked.append(rows)
        found.immediate.append(_correct(model, layers, _complete(stack, editor), rows))
        if number % every == 0:
            found.checkpoints.append(_checkpoint(model, layers, _complete(stack, editor), found, asked, probes))
    if found.checkpoints[-1].edits < len(asked):
        found.checkpoints.append(_checkpoint(model, layers, _complete(stack, editor), found, asked, probes))
    return found


def check_builds_on(editor: Editor) -> None:
    """Raises ConfigError if one edit of this editor cannot be made on the model that another one left."""
    if not editor.changes_weights:
        raise ConfigError(f"{type(editor).__name__} changes no weight: its edits do not build on each other.")


def stacked(
    stack: Mapping[str, Delta], made: Mapping[str, Delta], base_deltas: Mapping[str, Delta] | None = None
) -> dict[str, Delta]:
    """The sum of earlier edits and a new one, each of a single task.

    Args:
        stack: of the earlier ones; empty before the first.
        made: of the new one, what it brings beside `base_deltas` included.
        base_deltas: what every edit of this editor brings (ENN's ΔW⁰); it is left out of the sum.

    Example:
        >>> from mend_lightning.edits.deltas import LowRankDelta
        >>> one = {"fc": LowRankDelta(torch.ones(1, 1, 2), torch.ones(1, 1, 9))}
        >>> stacked(stacked({}, one), one)["fc"].dense()[0, 0].tolist()
        [2.0, 2.0]
    """
    total: dict[str, Delta] = {}
    for name, delta in made.items():
        if base_deltas is not None:
            delta = DenseDelta(delta.dense() - base_deltas[name].dense())
        total[name] = sum_of([stack[name], delta]) if name in stack else delta
    return total


def _complete(stack: Mapping[str, Delta], editor: Editor) -> Mapping[str, Delta]:
    base_deltas = editor.base_deltas()
    return stack if base_deltas is None else {name: sum_of([base_deltas[name], delta]) for name, delta in stack.items()}


def _checkpoint(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    stack: Mapping[str, Delta],
    found: EditSequence,
    asked: Sequence[Rows],
    probes: Rows,
) -> Checkpoint:
    found.final = [_correct(model, layers, stack, rows) for rows in asked]
    nll, correct = _scores(model, layers, stack, probes)
    perplexity = math.exp(min(700.0, float(nll.sum() / label_mask(probes).sum())))
    return Checkpoint(
        len(asked), _share(found.immediate), _share(found.final), perplexity, float(correct.float().mean())
    )


def _correct(model: nn.Module, layers: Mapping[str, nn.Module], stack: Mapping[str, Delta], rows: Rows) -> list[bool]:
    return _scores(model, layers, stack, rows)[1].tolist()


def _scores(
    model: nn.Module, layers: Mapping[str, nn.Module], stack: Mapping[str, Delta], rows: Rows
) -> tuple[Tensor, Tensor]:
    """Summed NLL and whole-row match of each row under the stacked edits, both `[rows]`."""
    mask = label_mask(rows)
    with applied(layers, stack):
        logits = logits_at(model, rows, mask)
    targets, index = rows.labels[mask], (row_of(mask), len(rows))
    return rows_sum(token_nll(logits, targets), *index), rows_all_true(is_correct(logits, targets), *index)


def _share(rows: Sequence[Sequence[bool]]) -> float | None:
    flat = [value for each in rows for value in each]
    return sum(flat) / len(flat) if flat else None
