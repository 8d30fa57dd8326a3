"""Pictures of a comparison of editors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mend_lightning.evaluation.sequential import BROKEN, Checkpoint
from mend_lightning.files import written

Row = Mapping[str, Any]


def draw_comparison(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws success against drawdown, success against the number of edits (where there are several), and the costs.

    Args:
        rows: from `comparison.rows_of`.
        folder: where the PNG files go.

    Returns:
        The files.
    """
    counts = sorted({row["edits_at_once"] for row in rows})
    fewest = [row for row in rows if row["edits_at_once"] == counts[0]]
    drawn = [
        _saved(folder / "success-drawdown.png", lambda axes: _success_drawdown(axes[0], fewest), (8, 5.5)),
        _saved(folder / "cost.png", lambda axes: _costs(axes, fewest), (11, 0.45 * len(fewest) + 1.8), panels=2),
    ]
    if len(counts) > 1:
        drawn.append(_saved(folder / "success-edits.png", lambda axes: _by_count(axes, rows), (12, 4.5), panels=2))
    return drawn


def _saved(path: Path, draw: Callable[[Any], None], size: tuple[float, float], panels: int = 1) -> Path:
    # Not pyplot: that would choose a window system for whoever imports this package.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots(1, panels, squeeze=False)[0])
    with written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def _success_drawdown(axes: Any, rows: Sequence[Row]) -> None:
    """Up and to the left is better."""
    points = [(row["metrics"]["drawdown"], row["metrics"]["edit_success"]) for row in rows]
    for index, (row, (x, y)) in enumerate(zip(rows, points)):
        low, high = row["intervals_95"].get("edit_success", (y, y))
        axes.errorbar(x, y, yerr=[[max(0, y - low)], [max(0, high - y)]], fmt="o", color=f"C{index % 10}", capsize=3)
        side = {"xytext": (-7, 4), "ha": "right"} if _crowded(x, y, points) else {"xytext": (7, 4)}
        axes.annotate(row["editor"], (x, y), textcoords="offset points", fontsize=9, **side)
    axes.margins(x=0.18)
    axes.set_ylim(-0.02, 1.05)
    axes.set_xlabel("drawdown: accuracy on unrelated facts lost by the edit (less is better)")
    axes.set_ylabel("edit success")
    axes.set_title("Edit success and what it costs elsewhere (95 % intervals)")
    axes.grid(alpha=0.3)


def _crowded(x: float, y: float, points: Sequence[tuple[float, float]]) -> bool:
    """Whether another point stands where this one's name would, on its right.

    Example:
        >>> _crowded(0.0, 0.5, [(0.0, 0.5), (0.05, 0.52), (1.0, 0.1)]), _crowded(0.0, 0.5, [(0.0, 0.5), (1.0, 0.1)])
        (True, False)
    """
    width = max(point[0] for point in points) - min(point[0] for point in points)
    return any(0 < other - x < 0.13 * width and abs(above - y) < 0.08 for other, above in points)


def _by_count(axes: Any, rows: Sequence[Row]) -> None:
    for name in dict.fromkeys(row["editor"] for row in rows):
        own = sorted((row for row in rows if row["editor"] == name), key=lambda row: row["edits_at_once"])
        for panel, metric in zip(axes, ("edit_success", "drawdown")):
            panel.plot([row["edits_at_once"] for row in own], [row["metrics"][metric] for row in own], "o-", label=name)
    for panel, title in zip(axes, ("edit success", "drawdown")):
        panel.set_xscale("log")
        counts = sorted({row["edits_at_once"] for row in rows})
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.minorticks_off()
        panel.set_xlabel("edits made at once (k)")
        panel.set_title(title)
        panel.grid(alpha=0.3)
    axes[0].set_ylim(-0.02, 1.05)
    axes[1].legend()


def _costs(axes: Any, rows: Sequence[Row]) -> None:
    names = [row["editor"] for row in rows][::-1]
    for panel, key, title in zip(
        axes, ("seconds", "megabytes"), ("seconds to make one edit", "MB beyond the model to make one")
    ):
        values = [row["cost_of_an_edit"][key] or 0 for row in rows][::-1]
        bars = panel.barh(names, values, color="C0")
        panel.bar_label(
            bars, labels=[f"{value:.2g}" if key == "seconds" else f"{value:.0f}" for value in values], padding=3
        )
        panel.set_title(title)
        panel.margins(x=0.15)
    axes[1].set_yticklabels([])


def draw_sequence(checkpoints: Sequence[Checkpoint], target: Path) -> Path:
    """Draws success, and perplexity on unrelated facts, over the number of edits as one PNG."""
    # Not pyplot: that would choose a window system for whoever imports this package.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    success, unrelated = figure.subplots(1, 2)
    edited = [each for each in checkpoints if each.edits]
    edits = [each.edits for each in edited]
    success.plot(edits, [each.immediate for each in edited], "o-", label="right just after the edit")
    success.plot(edits, [each.retained for each in edited], "o-", label="still right")
    success.plot(
        [each.edits for each in checkpoints], [each.accuracy for each in checkpoints], "o-", label="unrelated facts"
    )
    success.set_ylim(-0.02, 1.05)
    success.set_title("edit success (question and rephrases), and accuracy elsewhere")
    success.legend()
    unrelated.plot([each.edits for each in checkpoints], [each.perplexity for each in checkpoints], "o-", color="C2")
    unrelated.axhline(
        BROKEN * checkpoints[0].perplexity, color="C3", linestyle="--", label=f"{BROKEN:g} × base: broken"
    )
    unrelated.set_yscale("log")
    unrelated.set_title("perplexity on unrelated facts")
    unrelated.legend()
    for axes in (success, unrelated):
        axes.set_xlabel("edits made one after another")
        axes.grid(alpha=0.3)
    with written(target) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return target
