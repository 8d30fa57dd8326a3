"""The picture of what an edit did to each question."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mend_lightning.errors import ConfigError
from mend_lightning.evaluation.shifts import Shift
from mend_lightning.files import written

# What must change, in this order, before what must not; any other kind comes last.
ORDER = ("edited", "rephrase", "neighbour", "unrelated", "neutral")
HEADINGS = {
    "edited": "Edited", "rephrase": "Rephrases", "neighbour": "Near neighbours (must stay)", "unrelated": "Unrelated (must stay)",
    "neutral": "Neutral (must stay)", "": "Questions",
}  # fmt: skip
OLD, NEW, LINE = "#8c564b", "#1f77b4", 0.42
WIDTH, INCHES_A_LINE = 52, 0.19


def plot_shifts(shifts: Sequence[Shift], path: str | Path, most: int = 24, title: str = "What the edit did") -> Path:
    """Draws the probability of the old and of the new answer, before and after, for every question, as one PNG.

    Questions are grouped by kind, in each group those that moved farthest come first.

    Args:
        shifts: what `answer_shifts` found.
        path: the file.
        most: of each group, draw that many questions; the heading says of how many.
        title: of the picture.

    Raises:
        ConfigError: there is nothing to draw.
        OutputPathError: the file cannot be written.
    """
    # Not pyplot: that would choose a window system for whoever imports this package.
    from matplotlib.figure import Figure

    if not shifts or most < 1:
        raise ConfigError(f"There is nothing to draw: {len(shifts)} questions, at most {most} of each kind.")
    rows, height = laid_out(shifts, most)
    figure = Figure(figsize=(11.5, 1.5 + INCHES_A_LINE / LINE * height), layout="constrained")
    axes = figure.subplots()
    for position, row in rows:
        if isinstance(row, str):
            axes.text(
                -0.02, position, row, ha="right", va="center", weight="bold", transform=axes.get_yaxis_transform()
            )
        else:
            _draw(axes, position, row)
    _finish(axes, height, title)
    with written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return Path(path)


def laid_out(shifts: Sequence[Shift], most: int) -> tuple[list[tuple[float, str | Shift]], float]:
    """Headings and questions with the height at which each is drawn, from 0 downwards; and how much room they take."""
    rows: list[tuple[float, str | Shift]] = []
    top = 0.0
    for heading, group in _groups(shifts, most):
        rows.append((top + 0.5, heading))
        top += 1.0
        for shift in group:
            room = max(_lines_of(shift), 2 if shift.changed else 1) * LINE + 0.25
            rows.append((top + room / 2, shift))
            top += room
        top += 0.2
    return rows, top


def _groups(shifts: Sequence[Shift], most: int) -> Iterator[tuple[str, list[Shift]]]:
    kinds = sorted(
        {shift.kind for shift in shifts}, key=lambda kind: (ORDER.index(kind) if kind in ORDER else len(ORDER), kind)
    )
    for kind in kinds:
        group = sorted((shift for shift in shifts if shift.kind == kind), key=lambda shift: -shift.size)
        name = HEADINGS.get(kind, kind)
        shown = group[:most]
        yield name if len(shown) == len(group) else f"{name}, {most} of {len(group)}", shown


def _lines_of(shift: Shift) -> int:
    return len(_wrapped(shift.question).splitlines()) or 1


def _wrapped(text: str, width: int = WIDTH) -> str:
    """Text as lines of a width, with what matplotlib would take for mathematics as it stands."""
    lines = textwrap.wrap(text, width, max_lines=3, placeholder=" …")
    return "\n".join(lines).replace("$", r"\$")


def _draw(axes: Any, position: float, shift: Shift) -> None:
    axes.text(
        -0.02, position, _wrapped(shift.question), ha="right", va="center", size=9, transform=axes.get_yaxis_transform()
    )
    offset = LINE / 2 if shift.changed else 0.0
    _dumbbell(axes, position - offset, shift.p_old_before, shift.p_old_after, OLD, shift.old)
    if shift.changed:
        _dumbbell(axes, position + offset, shift.p_new_before, shift.p_new_after, NEW, shift.new)


def _dumbbell(axes: Any, position: float, before: float, after: float, color: str, answer: str) -> None:
    axes.plot(
        [before, after], [position, position], color=color, linewidth=2, alpha=0.5, solid_capstyle="round", zorder=2
    )
    axes.plot(
        before, position, "o", markersize=6, markerfacecolor="white", markeredgecolor=color, zorder=3, clip_on=False
    )
    axes.plot(after, position, "o", markersize=6, color=color, zorder=4, clip_on=False)
    axes.text(
        1.02, position, _wrapped(answer or "(no answer)", 40).split("\n")[0], color=color, size=9, va="center",
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip


def _finish(axes: Any, height: float, title: str) -> None:
    from matplotlib.lines import Line2D

    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("probability of the whole answer")
    axes.set_title(title, loc="left", pad=26)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    grey: dict[str, Any] = {"color": "grey", "linestyle": "", "marker": "o", "markersize": 6}
    handles = [
        Line2D([], [], **grey, markerfacecolor="white", label="before"),
        Line2D([], [], **grey, label="after"),
        Line2D([], [], color=OLD, linewidth=3, label="the base's answer"),
        Line2D([], [], color=NEW, linewidth=3, label="the edited model's answer, where it is another"),
    ]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=9, borderaxespad=0.2
    )
