"""The picture of how far edits hold from one format to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mend_lightning.evaluation.format_table import SHARES
from mend_lightning.files import written

TITLES = {
    "success": "edit success", "kept": "known facts retained (locality)", "named": "answers that name the target",
    "unchanged": "the base's own answers that stay",
}  # fmt: skip


def plot_formats(table: Mapping[str, Any], path: str | Path) -> Path:
    """Draws what holds of edits made in each format and asked in each (`SHARES`), as one PNG.

    Args:
        table: from `shares_of`.
        path: the file.

    Raises:
        OutputPathError: the file cannot be written.
    """
    # Not pyplot: that would choose a window system for whoever imports this package.
    from matplotlib.figure import Figure

    size = 2.2 + 0.8 * len(table["formats"])
    figure = Figure(figsize=(2 * size, 2 * size), layout="constrained")
    for axes, share in zip(figure.subplots(2, 2).flat, SHARES):
        _draw(axes, table["formats"], table[share])
        axes.set_title(TITLES[share])
    with written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return Path(path)


def _draw(axes: Any, names: list[str], matrix: list[list[float | None]]) -> None:
    shown = [[float("nan") if value is None else value for value in row] for row in matrix]
    axes.imshow(shown, vmin=0, vmax=1, cmap="viridis")
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            # Light letters on dark cells.
            color = "black" if value is None or value > 0.6 else "white"
            axes.text(j, i, "–" if value is None else f"{value:.2f}", ha="center", va="center", color=color, size=9)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("asked in")
    axes.set_ylabel("made in")
