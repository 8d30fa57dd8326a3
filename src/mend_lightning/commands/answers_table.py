"""Answers before and after an edit, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from mend_lightning.functional import exact_match
from mend_lightning.safety import MUST_CHANGE
from mend_lightning.shifts import Shift

_KINDS = {"neighbour": "near neighbour"}


def before_after_table(
    asked: Sequence[tuple[str, str]], before: Sequence[str], after: Sequence[str], targets: Mapping[str, str]
) -> Table:
    """What the model answered before and after the edit.

    Args:
        asked: (kind, question) pairs; before, after: the answers; targets: question -> wanted answer.
    """
    table = _table("before", "after")
    for (kind, question), old, new in zip(asked, before, after):
        table.add_row(
            _KINDS.get(kind, kind), *map(escape, (question, old, new)), verdict(kind, question, old, new, targets)
        )
    return table


def shift_table(shifts: Sequence[Shift], targets: Mapping[str, str] | None = None) -> Table:
    """Answers before and after, and how their probabilities moved.

    Args:
        shifts: of every question.
        targets: edited question -> wanted answer; None where nothing is wanted, but only looked at.
    """
    table = _table("before", "after", "P(old answer)", "P(new answer)")
    for shift in shifts:
        old, new = (shift.p_old_before, shift.p_old_after), (shift.p_new_before, shift.p_new_after)
        moves = (f"{before:.2f} → {after:.2f}" for before, after in (old, new))
        said = verdict(shift.kind, shift.question, shift.old, shift.new, targets)
        table.add_row(
            _KINDS.get(shift.kind, shift.kind), *map(escape, (shift.question, shift.old, shift.new)), *moves, said
        )
    return table


def verdict(kind: str, question: str, old: str, new: str, targets: Mapping[str, str] | None) -> str:
    """What to think of one answer, coloured."""
    if targets is None:
        return "unchanged" if old == new else "changed"
    if kind not in MUST_CHANGE:
        return "[green]unchanged[/]" if old == new else "[red]changed[/]"
    # A rephrase does not say which of several edits it rephrases.
    wanted = [targets[question]] if kind == "edited" else list(targets.values())
    reached = any(exact_match(new, target) for target in wanted)
    return "[green]changed as asked[/]" if reached else "[red]not what was asked[/]"


def _table(*columns: str) -> Table:
    table = Table(title="Before and after the edit", title_justify="left")
    for column in ("", "question", *columns, ""):
        table.add_column(column)
    return table
