"""Edits made in each format and asked in each: how often they hold, and how often other facts are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import nn

from mend_lightning.data.tasks import EditTask
from mend_lightning.editors.editor import Editor
from mend_lightning.evaluation.evaluate import edited_layers, score_positions
from mend_lightning.models.forward.head import HeadStates, states_at
from mend_lightning.models.forward.losses import rows_all_true
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import TrunkOutputs, own_part, replayed
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import Rows, concatenate_rows

# Format that an edit was made in -> format that it was asked in -> what came of each row: "success" of the question and its
# rephrases, "kept" of the unrelated facts that the base knew when it was asked in that format.
Held = dict[str, dict[str, dict[str, list[bool]]]]
Matrix = list[list[float | None]]
# The two numbers of a cell, in the order in which they are shown.
SHARES = ("success", "kept")


@torch.no_grad()
def measure_formats(
    model: nn.Module, editor: Editor, encoder: Encoder, edits: Sequence[Mapping[str, EditTask]]
) -> list[Held]:
    """Makes each edit in every format and asks everything in every format, teacher-forced, whole row.

    The trunk runs once for each format: an edit's own row in a format is among those that are asked in it.

    Args:
        model: the base model, in eval mode.
        editor: any editor, in eval mode.
        encoder: with the formats.
        edits: of each edit, name of a format -> the task with all its rows in that format; the names are the same of all.

    Returns:
        What held of each edit.
    """
    asked = {name: _Asked.of(model, editor, encoder, [edit[name] for edit in edits]) for name in edits[0]}
    found: list[Held] = [{name: {} for name in asked} for _ in edits]
    for made, own in asked.items():
        edited = editor.edited(model, *own_part(own.rows, own.trunk, own.z_edit, 0), own.x_keep)
        for name, each in asked.items():
            states = edited.states_at(model, each.rows, each.rows.label_positions, each.trunk)
            for of_edit, cell in zip(found, each.cells(each.right(states))):
                of_edit[made][name] = cell
    return found


@dataclass(frozen=True)
class _Asked:
    """All rows of some edits in one format.

    Attributes:
        z_edit: the edited questions.
        rows: those, the rephrases, and from row `unrelated` on what the edits must not change.
        trunk: its outputs for `rows`.
        before: which of the rows the base model has right.
        x_keep: questions that constrain the edits; None: no edit has any.
    """

    z_edit: Rows
    rows: Rows
    unrelated: int
    trunk: TrunkOutputs
    before: list[bool]
    x_keep: Rows | None = None

    @classmethod
    def of(cls, model: nn.Module, editor: Editor, encoder: Encoder, tasks: Sequence[EditTask]) -> _Asked:
        """The rows of tasks, and what the base makes of them."""
        edited = [(i, (task.prompt, task.target)) for i, task in enumerate(tasks)]
        rephrased = [(i, (text, task.target)) for i, task in enumerate(tasks) for text in task.rephrases]
        others = [(i, pair) for i, task in enumerate(tasks) for pair in task.locality]
        kept = [(i, (text, task.target)) for i, task in enumerate(tasks) for text in task.keep]
        device, key = next(model.parameters()).device, tasks[0].format

        def rows_of(some: Sequence[tuple[int, tuple[str, str]]]) -> Rows:
            pairs, numbers = [pair for _, pair in some], [i for i, _ in some]
            return encoder.rows(pairs, numbers, len(tasks), [key] * len(some)).to(device)

        edits, x_keep = rows_of(edited), rows_of(kept) if kept else None
        rows = concatenate_rows([edits, *(rows_of(some) for some in (rephrased, others) if some)])
        trunk = run_trunk(model, rows, edited_layers(model, editor))
        asked = cls(edits, rows, len(edited) + len(rephrased), trunk, [], x_keep)
        with replayed(trunk, slice(None)):
            return replace(asked, before=asked.right(states_at(model, rows, rows.label_positions)))

    def right(self, states: HeadStates) -> list[bool]:
        """Of each row, whether every label is the most probable token; `states`: at all labels."""
        where = self.rows.label_positions
        hit = score_positions(states, where.take(self.rows.labels)).hit
        return rows_all_true(hit, where.row, len(self.rows)).tolist()

    def cells(self, after: Sequence[bool]) -> list[dict[str, list[bool]]]:
        """Of each edit, what of its own rows held."""
        cells: list[dict[str, list[bool]]] = [{share: [] for share in SHARES} for _ in range(self.rows.tasks)]
        for i, (task, known, holds) in enumerate(zip(self.rows.host.task.tolist(), self.before, after)):
            if i < self.unrelated:
                cells[task]["success"].append(holds)
            elif known:
                cells[task]["kept"].append(holds)
        return cells


def shares_of(held: Sequence[Held]) -> dict[str, Any]:
    """The table as builtins: `formats`, and of each of `SHARES` a matrix (made in, asked in) with None where nothing was asked.

    Example:
        >>> one = {"own": {"own": {"success": [True, False], "kept": [True]}}}
        >>> shares_of([one])
        {'formats': ['own'], 'edits': 1, 'success': [[0.5]], 'kept': [[1.0]], 'known': [1]}
    """
    names = list(held[0])
    matrices = {
        share: [[_mean([each[made][asked][share] for each in held]) for asked in names] for made in names]
        for share in SHARES
    }
    known = [sum(len(each[asked][asked]["kept"]) for each in held) for asked in names]
    return {"formats": names, "edits": len(held), **matrices, "known": known}


def _mean(values: Sequence[Sequence[bool]]) -> float | None:
    flat = [value for each in values for value in each]
    return round(sum(flat) / len(flat), 6) if flat else None


def means(matrix: Matrix) -> tuple[float | None, float | None]:
    """The mean of the diagonal, and of all other cells.

    Example:
        >>> means([[1.0, 0.5], [None, 0.5]])
        (0.75, 0.5)
    """
    cells = [(i == j, value) for i, row in enumerate(matrix) for j, value in enumerate(row) if value is not None]
    parts = ([value for same, value in cells if same is diagonal] for diagonal in (True, False))
    same, other = (sum(part) / len(part) if part else None for part in parts)
    return same, other


def formats_table(table: Mapping[str, Any]) -> Table:
    """What `shares_of` gives, as a table: success above, known facts kept below."""
    shown = Table(title=f"{table['edits']} edits made in each format, asked in each", title_justify="left")
    shown.caption = "Of a cell: success, and below it the known facts retained (–: the base knows none so asked)."
    shown.caption_justify = "left"
    shown.add_column("made in")
    for name in table["formats"]:
        shown.add_column(name, justify="right")
    for name, *rows in zip(table["formats"], *(table[share] for share in SHARES)):
        shown.add_row(name, *("\n".join(map(_number, cell)) for cell in zip(*rows)))
    return shown


def means_line(table: Mapping[str, Any]) -> str:
    """The means of the table in a sentence."""
    (same, other), (kept, others_kept) = (means(table[share]) for share in SHARES)
    return (
        f"Asked in the format that they were made in, edits have a success of {_number(same)} and {_number(kept)} of the known "
        f"facts are retained; asked in the others {_number(other)} and {_number(others_kept)}."
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
