"""Answers before and after an edit, as a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
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
    table = _table("Before and after the edit")
    for (kind, question), old, new in zip(asked, before, after):
        table.add_row(
            _KINDS.get(kind, kind), *map(escape, (question, old, new)), verdict(kind, question, old, new, targets)
        )
    return table


def shift_table(shifts: Sequence[Shift], targets: Mapping[str, str] | None = None) -> Table:
    """The base's and the edited model's answer, and how the probability of each of the two moved.

    Args:
        shifts: of every question.
        targets: edited question -> wanted answer; None where nothing is wanted, but only looked at.
    """
    title = "Before and after the edit" if targets is not None else "Base and edited model"
    table = _table(title)
    table.caption = "Below an answer: its probability, base→edited model."
    for shift in shifts:
        old = f"{shift.old}\n{shift.p_old_before:.2f}→{shift.p_old_after:.2f}"
        new = f"{shift.new}\n{shift.p_new_before:.2f}→{shift.p_new_after:.2f}"
        said = verdict(shift.kind, shift.question, shift.old, shift.new, targets)
        table.add_row(_KINDS.get(shift.kind, shift.kind), *map(escape, (shift.question, old, new)), said)
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


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    # Narrow, and no column has a least width: rich would cut off at the right what a terminal of 80 columns has no room for.
    table.add_column("", max_width=len("neighbour"))
    for column in ("question", "old answer", "new answer"):
        table.add_column(column)
    table.add_column("", max_width=len("not what was"))
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
