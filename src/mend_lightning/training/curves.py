"""Pictures of a training run."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mend_lightning.files import written


def read_curves(metrics_csv: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric name -> [(step, value)] of a CSVLogger file."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with metrics_csv.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name not in ("step", "epoch") and value:
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
    return curves


def smoothed(points: list[tuple[int, float]], window: int = 9) -> list[tuple[int, float]]:
    """Running mean over the last `window` points.

    Example:
        >>> smoothed([(0, 1.0), (1, 3.0)], window=2)
        [(0, 1.0), (1, 2.0)]
    """
    means = []
    for i, (step, _) in enumerate(points):
        part = [value for _, value in points[max(0, i - window + 1) : i + 1]]
        means.append((step, sum(part) / len(part)))
    return means


def plot_curves(metrics_csv: Path, target: Path) -> Path:
    """Draws losses, validation shares and edit rates of a run as one PNG."""
    # Not pyplot: that would choose a window system for whoever imports this package.
    from matplotlib.figure import Figure

    curves = read_curves(metrics_csv)
    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, shares, rates = figure.subplots(1, 3)
    _draw(losses, curves, {"train/edit": "edit loss", "train/locality": "locality loss (KL)"}, "training", smooth=True)
    losses.set_yscale("log")
    names = {
        "edit_success": "edit success",
        "generality": "generality",
        "kept": "known facts retained (locality)",
        "kept_hard": "retained, hard",
    }
    _draw(shares, curves, {f"val/{name}": label for name, label in names.items()}, "validation (held-out subjects)")
    shares.set_ylim(0, 1.02)
    _draw(rates, curves, {"train/edit_rate_min": "smallest", "train/edit_rate_max": "largest"}, "edit rates α")
    with written(target) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return target


def _draw(axes: Any, curves: Mapping[str, Any], labels: dict[str, str], title: str, smooth: bool = False) -> None:
    for name, label in labels.items():
        points = curves.get(name, [])
        if not points:
            continue
        # Single steps are noisy: eight tasks each.
        points = smoothed(points) if smooth else points
        axes.plot(*zip(*points), marker="" if len(points) > 30 else "o", markersize=4, label=label)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
