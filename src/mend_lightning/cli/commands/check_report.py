"""The verdict on an edit, in words."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape

from mend_lightning.evaluation.report import console
from mend_lightning.evaluation.safety import EditCheck

# Changed answers that are named; all of them are in the edit's file.
NAMED = 8


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
