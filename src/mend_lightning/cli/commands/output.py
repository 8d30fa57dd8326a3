"""Answers before and after an edit, as a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from mend_lightning.evaluation.safety import MUST_CHANGE, EditCheck
from mend_lightning.evaluation.shifts import Shift
from mend_lightning.evaluation.statistics import exact_match
from mend_lightning.training.progress.console import console

_KINDS = {"neighbour": "near neighbour"}

# Changed answers that are named; all of them are in the edit's file.
NAMED = 8


def before_after_table(
    asked: Sequence[tuple[str, str]], before: Sequence[str], after: Sequence[str], targets: Mapping[str, str]
) -> Table:
    """What the model answered before and after the edit.

    Args:
        asked: (kind, question) pairs; before, after: the answers; targets: question -> wanted answer.
    """
    table = _table("Before and after the edit", (question for _, question in asked), "before", "after")
    for (kind, question), old, new in zip(asked, before, after):
        table.add_row(
            _KINDS.get(kind, kind), *map(escape, (question, old, new)), verdict(kind, question, old, new, targets)
        )
    return table


def shift_table(shifts: Sequence[Shift], targets: Mapping[str, str] | None = None) -> Table:
    """Answers before and after, and how the probability of each of the two moved.

    Args:
        shifts: of every question.
        targets: edited question -> wanted answer; None where nothing is wanted, but only looked at.
    """
    columns = (
        ("before", "after", "P(before)", "P(after)")
        if targets is not None
        else ("base", "edited", "P(base)", "P(edited)")
    )
    title = "Before and after the edit" if targets is not None else "Base and edited model"
    table = _table(title, (shift.question for shift in shifts), *columns)
    for shift in shifts:
        old, new = (shift.p_old_before, shift.p_old_after), (shift.p_new_before, shift.p_new_after)
        moves = (f"{before:.2f}→{after:.2f}" for before, after in (old, new))
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
    if reached and old == new:
        # Nothing wrong with it, and nothing gained.
        return "[yellow]as asked, as before[/]"
    return "[green]changed as asked[/]" if reached else "[red]not what was asked[/]"


def _table(title: str, questions: Iterable[str], *columns: str) -> Table:
    width = max((len(question) for question in questions), default=0)
    table = Table(title=title, title_justify="left")
    table.add_column("")
    # What was asked shall be read at a glance; the answers give way.
    table.add_column("question", min_width=min(width, 34))
    for column in columns:
        table.add_column(column, no_wrap=column.startswith("P("))
    table.add_column("", min_width=9)
    return table


def print_check(check: EditCheck) -> None:
    """Prints what the check found."""
    for line in check_lines(check):
        console().print(line, highlight=False)


def check_lines(check: EditCheck) -> Iterator[str]:
    """The verdict first, then why, what the numbers are, and which other answers changed."""
    yield "[green]Safe to keep.[/]" if check.safe else "[red]Not safe to keep.[/]"
    yield from (f"  {escape(reason)}" for reason in check.reasons)
    others = "shipped neutral questions" if check.others == "neutral" else "other questions"
    yield (
        f"Success {check.success:.2f} on what must change (limit {check.limits.min_success:g}). Of {check.sure} {others} "
        f"that the base answers with probability {check.limits.sure:g} or more, {check.kept:.3f} keep it, or it is nearly as "
        f"probable as before (limit {check.limits.min_kept:g}). KL {check.kl_mean:.3g} nats on average (limit "
        f"{check.limits.max_kl:g}), {check.kl_max:.3g} at most."
    )
    yield from (escape(remark) for remark in check.remarks)
    moved = check.moved
    for shift in moved[:NAMED]:
        yield (
            f"  changed: {escape(shift.question)} {escape(shift.old)} ({shift.p_old_before:.2f}, now "
            f"{shift.p_old_after:.2f}) → {escape(shift.new)} ({shift.p_new_after:.2f})"
        )
    if len(moved) > NAMED:
        yield f"  and {len(moved) - NAMED} more (mend-lightning show EDIT --json names all)."


def print_json(*values: Any) -> None:
    """One JSON value a line, not wrapped at any width."""
    for value in values:
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()
