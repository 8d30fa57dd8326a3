"""What an edit did: every row of a batch scored under the edited model, and unrelated ones under the unedited model too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors.edited_model import Edited
from mend_lightning.editors.editor import Editor
from mend_lightning.models.forward.head import HeadStates, states_at
from mend_lightning.models.forward.losses import rows_all_true, rows_sum
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import own_part, replayed
from mend_lightning.models.inputs.positions import Positions, joined
from mend_lightning.models.inputs.rows import Rows, concatenate_rows

# As many fit into a processor's cache beside what is made of them: 270 of 49,152 logits took 57 ms 4 at a time, 82 ms 16
# at a time and 99 ms 32 at a time, and 330 ms in one pass for each number.
POSITIONS = 4


@dataclass(frozen=True)
class RowScores:
    """Teacher-forced scores of rows under the edited model, each field `[rows]`.

    Attributes:
        task: the edit task of the row.
        tokens: number of label tokens, the stop included.
        correct_after: every label token is the most probable one (whole-row match).
        nll_after: summed over the row's label tokens, nats.
        hits: label tokens that are the most probable one.
    """

    task: Tensor
    tokens: Tensor
    correct_after: Tensor
    nll_after: Tensor
    hits: Tensor

    @property
    def probability_after(self) -> Tensor:
        """Of the row's whole answer under the edited model, `[rows]`."""
        return self.nll_after.neg().exp()

    def part(self, rows: slice | Tensor) -> Self:
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True)
class ComparedScores(RowScores):
    """The same, beside the base model's.

    Attributes:
        correct_before, nll_before: of the base model.
        agreement: label positions whose most probable token the edit did not change.
        kl: KL(base ‖ edited) summed over the label positions, nats.
        end_before: probability that the base gives to the row's last label token, behind the true ones before it: where
            answers have a stop, that of the stop.
    """

    correct_before: Tensor
    nll_before: Tensor
    agreement: Tensor
    kl: Tensor
    end_before: Tensor


@dataclass(frozen=True)
class BatchScores:
    """Scores of a batch's three sets, and the edits themselves.

    Attributes:
        edit: of `z_edit`; rephrase: of `x_in`. What the base model says to these, no metric asks.
        locality: of `x_out`.
        edited: the edited model.
    """

    edit: RowScores
    rephrase: RowScores
    locality: ComparedScores
    edited: Edited


@torch.no_grad()
def evaluate_batch(model: nn.Module, editor: Editor, batch: EditBatch) -> BatchScores:
    """Makes the edits of a batch and scores its rows, in batched passes; the trunk runs once, over all rows.

    "Before" is the base model as it was given, also for an editor that trains it (ENN): what that training changed counts
    as the edit's doing. The original compares with the trained model.

    Args:
        model: the base model, in eval mode.
        editor: any editor, in eval mode (in training mode MEND's would update its statistics).
        batch: independent edit tasks.
    """
    # The unrelated rows stand last.
    sets = [batch.z_edit, batch.x_in, batch.x_out]
    rows, edits = concatenate_rows(sets), len(batch.z_edit)
    trunk = run_trunk(model, rows, edited_layers(model, editor))
    edited = editor.edited(model, *own_part(rows, trunk, batch.z_edit, 0), batch.x_keep)
    inside = edits + len(batch.x_in)
    with replayed(trunk, slice(inside, len(rows))):
        before = states_at(model, rows.part(slice(inside, len(rows))), batch.x_out.label_positions)
    where = joined([each.label_positions.behind(start) for each, start in zip(sets, (0, edits, inside))])
    after = edited.states_at(model, rows, where, trunk)
    of_edits, of_others = after.split(len(after) - len(before))
    changed = _scored(of_edits, concatenate_rows(sets[:2]))
    return BatchScores(
        changed.part(slice(0, edits)),
        changed.part(slice(edits, inside)),
        _compared(before, of_others, batch.x_out),
        edited,
    )


def hard_rows(batch: EditBatch) -> Tensor:
    """Which rows of `x_out` have their edit's relation: `[rows]` bool. Tasks list their hard ones first."""
    flags = [index < text.hard for text in batch.texts for index in range(len(text.locality))]
    device = batch.x_out.task.device
    return torch.tensor(flags or [False] * len(batch.x_out), dtype=torch.bool, device=device)


def edited_layers(model: nn.Module, editor: Editor) -> Mapping[str, nn.Module]:
    """Of an edit that changes no weight, the whole model is trunk."""
    return editor.modules_in(model) if editor.changes_weights else {}


def _scored(after: HeadStates, rows: Rows) -> RowScores:
    where = rows.label_positions
    return RowScores(**_after(score_positions(after, where.take(rows.labels)), rows, where))


def _compared(before: HeadStates, after: HeadStates, rows: Rows) -> ComparedScores:
    where = rows.label_positions
    old, new, kl = compare_positions(before, after, where.take(rows.labels))
    of_rows = (where.row, len(rows))
    return ComparedScores(
        **_after(new, rows, where),
        correct_before=rows_all_true(old.hit, *of_rows),
        nll_before=rows_sum(old.nll, *of_rows),
        agreement=rows_sum(old.best == new.best, *of_rows),
        kl=rows_sum(kl, *of_rows),
        end_before=rows_sum(torch.where(where.ends, old.nll.neg().exp(), 0.0), *of_rows),
    )


def _after(scores: PositionScores, rows: Rows, where: Positions) -> dict[str, Tensor]:
    of_rows = (where.row, len(rows))
    return {
        "task": rows.task,
        "tokens": rows_sum(torch.ones_like(scores.hit), *of_rows).long(),
        "correct_after": rows_all_true(scores.hit, *of_rows),
        "nll_after": rows_sum(scores.nll, *of_rows),
        "hits": rows_sum(scores.hit, *of_rows),
    }


@dataclass(frozen=True)
class PositionScores:
    """Scores of n positions.

    Attributes:
        nll: `[n]` float32, negative log-likelihood of the target.
        best: `[n]` int64, the most probable id.
        hit: `[n]` bool, whether that is the target.
    """

    nll: Tensor
    best: Tensor
    hit: Tensor


def score_positions(states: HeadStates, targets: Tensor) -> PositionScores:
    """Scores of a model at n positions.

    Args:
        states: at the positions.
        targets: `[n]` ids, or 0 and 1 for a binary classifier.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        >>> score_positions(HeadStates(logits, lambda hidden: hidden, at_once=2), torch.tensor([1, 1])).hit.tolist()
        [True, False]
    """
    found = [_scores(logits, targets[rows]) for rows, (logits,) in _few_at_a_time(states)]
    return _joined([scores for scores, _ in found], targets)


def compare_positions(
    before: HeadStates, after: HeadStates, targets: Tensor
) -> tuple[PositionScores, PositionScores, Tensor]:
    """Scores of two models at the same positions, and KL(before ‖ after) of each position, `[n]` float32 in nats."""
    befores, afters, kls = [], [], []
    for rows, (old, new) in _few_at_a_time(before, after):
        (old_scores, log_p), (new_scores, log_q) = _scores(old, targets[rows]), _scores(new, targets[rows])
        befores.append(old_scores)
        afters.append(new_scores)
        kls.append((log_p.exp() * log_p.sub_(log_q)).sum(-1))
    return (
        _joined(befores, targets),
        _joined(afters, targets),
        torch.cat([targets.new_zeros(0, dtype=torch.float32), *kls]),
    )


def _few_at_a_time(*states: HeadStates) -> Iterator[tuple[slice, list[Tensor]]]:
    """Which positions, and the float32 logits of each of `states` there: `[positions, vocabulary]`."""
    # The head's matrix is read for each part of `hidden`: that part may be larger.
    step = min(each.at_once for each in states)
    for start in range(0, len(states[0]), step):
        logits = [each.logits_of(each.hidden[start : start + step]) for each in states]
        for i in range(0, len(logits[0]), POSITIONS):
            few = [_of_classes(each[i : i + POSITIONS].float()) for each in logits]
            yield slice(start + i, start + i + len(few[0])), few


def _of_classes(logits: Tensor) -> Tensor:
    """A binary classifier's logit `[n, 1]` as the logits of both classes; others as they are."""
    return F.pad(logits, (1, 0)) if logits.shape[-1] == 1 else logits


def _scores(logits: Tensor, targets: Tensor) -> tuple[PositionScores, Tensor]:
    """Scores, and the log-probabilities. Not argmax: it takes twice the time of max on CPUs."""
    log_p, best, targets = logits.log_softmax(-1), logits.max(-1).indices, targets.long()
    return PositionScores(-log_p.gather(1, targets[:, None])[:, 0], best, best == targets), log_p


def _joined(parts: list[PositionScores], targets: Tensor) -> PositionScores:
    none = targets[:0]
    return PositionScores(
        torch.cat([none.float(), *(each.nll for each in parts)]),
        torch.cat([none.long(), *(each.best for each in parts)]),
        torch.cat([none.bool(), *(each.hit for each in parts)]),
    )
