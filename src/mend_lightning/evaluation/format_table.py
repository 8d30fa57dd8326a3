"""Edits made in each format and asked in each: how often they hold, and how often other facts are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import nn

from mend_lightning.data.tasks import EditTask
from mend_lightning.editors.edited_model import Edited
from mend_lightning.editors.editor import Editor
from mend_lightning.evaluation.evaluate import edited_layers, score_positions
from mend_lightning.evaluation.statistics import holds_words
from mend_lightning.models.forward.generation import generate_answers
from mend_lightning.models.forward.head import HeadStates, states_at
from mend_lightning.models.forward.losses import rows_all_true
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import TrunkOutputs, own_part, replayed
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import Rows, concatenate_rows

# Format that an edit was made in -> format that it was asked in -> what came of each question, for each of `SHARES`.
Held = dict[str, dict[str, dict[str, list[bool]]]]
Matrix = list[list[float | None]]
# What is said of an edit -> how it is measured. The first two are shown in the table.
SHARES = {
    "success": "question and rephrases, teacher-forced, whole row, the end of the answer included",
    "kept": "of unrelated facts that the base answers right when it is asked in that format, share right after",
    "named": "question alone, greedy: the answer holds the target, whatever sentence it stands in",
    "unchanged": "unrelated facts whose own greedy answer, its first tokens, is the greedy answer after",
}
SHOWN = ("success", "kept")
# Of the base's own answers to unrelated questions: a chat model's are sentences, which need not be asked to their end.
OWN_TOKENS = 12


@torch.no_grad()
def measure_formats(
    model: nn.Module, editor: Editor, encoder: Encoder, edits: Sequence[Mapping[str, EditTask]]
) -> list[Held]:
    """Makes each edit in every format and asks everything in every format; `SHARES` says how it is measured.

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
        edited = editor.edited(model, *own_part(own.facts.rows, own.facts.trunk, own.z_edit, 0), own.x_keep)
        for name, each in asked.items():
            for of_edit, cell in zip(found, each.cells(model, edited)):
                of_edit[made][name] = cell
    return found


@dataclass(frozen=True)
class _Scored:
    """Rows, the trunk's outputs for them, and which of them the base model has right."""

    rows: Rows
    trunk: TrunkOutputs
    before: list[bool]

    @classmethod
    def of(cls, model: nn.Module, editor: Editor, sets: Sequence[Rows]) -> _Scored:
        rows = concatenate_rows([each.to(next(model.parameters()).device) for each in sets])
        scored = cls(rows, run_trunk(model, rows, edited_layers(model, editor)), [])
        with replayed(scored.trunk, slice(None)):
            return replace(scored, before=scored._right(states_at(model, rows, rows.label_positions)))

    def after(self, model: nn.Module, edited: Edited) -> Iterator[tuple[int, bool, bool]]:
        """Of each row, its edit, and whether it was right before the edit and is after."""
        right = self._right(edited.states_at(model, self.rows, self.rows.label_positions, self.trunk))
        return zip(self.rows.host.task.tolist(), self.before, right)

    def _right(self, states: HeadStates) -> list[bool]:
        """Whether every label of a row is the most probable token; `states`: at all labels."""
        where = self.rows.label_positions
        hit = score_positions(states, where.take(self.rows.labels)).hit
        return rows_all_true(hit, where.row, len(self.rows)).tolist()


@dataclass(frozen=True)
class _Asked:
    """Everything that some edits are asked in one format.

    Attributes:
        tasks: the edits.
        encoder: of the format.
        z_edit: the edited questions.
        facts: those, the rephrases, and from row `unrelated` on what the edits must not change, with the true answers.
        x_keep: questions that constrain the edits; None: no edit has any.
        own: unrelated questions with the base's own answers; None: the edits change no weight, or it answers nothing.
    """

    tasks: Sequence[EditTask]
    encoder: Encoder
    z_edit: Rows
    facts: _Scored
    unrelated: int
    own: _Scored | None
    x_keep: Rows | None = None

    @classmethod
    def of(cls, model: nn.Module, editor: Editor, encoder: Encoder, tasks: Sequence[EditTask]) -> _Asked:
        """The rows of tasks, and what the base makes of them."""
        edited = [(i, (task.prompt, task.target)) for i, task in enumerate(tasks)]
        rephrased = [(i, (text, task.target)) for i, task in enumerate(tasks) for text in task.rephrases]
        others = [(i, pair) for i, task in enumerate(tasks) for pair in task.locality]
        key, asking = tasks[0].format, encoder.asking(tasks[0].format)
        kept = [(i, (text, task.target)) for i, task in enumerate(tasks) for text in task.keep]

        def rows_of(some: Sequence[tuple[int, tuple[str, str]]]) -> Rows:
            pairs, numbers = [pair for _, pair in some], [i for i, _ in some]
            return encoder.rows(pairs, numbers, len(tasks), [key] * len(some))

        sets = [rows_of(some) for some in (edited, rephrased, others) if some]
        device = next(model.parameters()).device
        facts, own = _Scored.of(model, editor, sets), _own_answers(model, asking, others, len(tasks))
        scored = _Scored.of(model, editor, [own]) if own is not None and editor.changes_weights else None
        x_keep = rows_of(kept).to(device) if kept else None
        return cls(tasks, asking, sets[0].to(device), facts, len(edited) + len(rephrased), scored, x_keep)

    def cells(self, model: nn.Module, edited: Edited) -> list[dict[str, list[bool]]]:
        """Of each edit, what of its own questions held."""
        cells: list[dict[str, list[bool]]] = [{share: [] for share in SHARES} for _ in self.tasks]
        for i, (number, known, holds) in enumerate(self.facts.after(model, edited)):
            if i < self.unrelated:
                cells[number]["success"].append(holds)
            elif known:
                cells[number]["kept"].append(holds)
        for number, said, holds in self.own.after(model, edited) if self.own is not None else ():
            # What is read back from text may have other tokens than the model said.
            if said:
                cells[number]["unchanged"].append(holds)
        # Where the whole target is right it is what greedy decoding says.
        self._note_named(model, edited, cells, [i for i, cell in enumerate(cells) if not cell["success"][0]])
        return cells

    def _note_named(
        self, model: nn.Module, edited: Edited, cells: Sequence[dict[str, list[bool]]], asked: Sequence[int]
    ) -> None:
        """Notes whether the answers name the targets, by asking those edits' models whose number is in `asked`."""
        pairs = [(self.tasks[i].prompt, self.tasks[i].target) for i in asked]
        running = self.encoder.format.stop is None
        lengths = [len(self.encoder.target_ids(*pair)) for pair in pairs] if running else None
        numbers = torch.tensor(asked, device=self.z_edit.task.device)
        prompts = [prompt for prompt, _ in pairs]
        answers = edited.answers(model, self.encoder, prompts, numbers, lengths) if asked else []
        named = {i: holds_words(answer, target) for i, answer, (_, target) in zip(asked, answers, pairs)}
        for i, cell in enumerate(cells):
            cell["named"].append(named.get(i, True))


def _own_answers(
    model: nn.Module, asking: Encoder, others: Sequence[tuple[int, tuple[str, str]]], tasks: int
) -> Rows | None:
    """Rows of (edit, (question, …)) with the first tokens that the base answers by itself; None: it answers nothing."""
    if not others:
        return None
    answers = generate_answers(model, asking, [text for _, (text, _) in others], max_new_tokens=OWN_TOKENS)
    said = [(i, (text, answer)) for (i, (text, _)), answer in zip(others, answers) if answer]
    # An answer that was cut off has no end.
    both = replace(asking, formats={"cut": replace(asking.format, stop=None)})
    cut = ["cut" if len(both.asking("cut").target_ids(*pair)) >= OWN_TOKENS else "" for _, pair in said]
    return both.rows([pair for _, pair in said], [i for i, _ in said], tasks, cut) if said else None


def shares_of(held: Sequence[Held]) -> dict[str, Any]:
    """The table as builtins: `formats`, and of each of `SHARES` a matrix (made in, asked in) with None where nothing was asked.

    Example:
        >>> cell = {"success": [True, False], "kept": [True], "named": [True], "unchanged": []}
        >>> table = shares_of([{"own": {"own": cell}}])
        >>> table["success"], table["kept"], table["unchanged"], table["known"]
        ([[0.5]], [[1.0]], [[None]], [1])
    """
    names = list(held[0])
    matrices = {
        share: [[_mean([each[made][asked][share] for each in held]) for asked in names] for made in names]
        for share in SHARES
    }
    known = [sum(len(each[asked][asked]["kept"]) for each in held) for asked in names]
    return {"formats": names, "edits": len(held), "protocol": SHARES, **matrices, "known": known}


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
    for name, *rows in zip(table["formats"], *(table[share] for share in SHOWN)):
        shown.add_row(name, *("\n".join(map(_number, cell)) for cell in zip(*rows)))
    return shown


def means_lines(table: Mapping[str, Any]) -> Iterator[str]:
    """The means of the table in sentences: of what is asked as it was made, and of all else."""
    for number, where in enumerate(("in the format that they were made in", "in the other formats")):
        success, kept, named, unchanged = (_number(means(table[share])[number]) for share in SHARES)
        yield (
            f"Asked {where}, edits have a success of {success} and {kept} of the known facts are retained; {named} of the answers "
            f"name the target, and {unchanged} of the base's own answers to unrelated questions stay."
        )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
