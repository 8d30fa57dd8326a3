"""What a person reads: tables on the screen, results.json and examples.jsonl on disk."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

from mend_lightning import __version__
from mend_lightning.evaluation.metric_collection import PROTOCOL
from mend_lightning.evaluation.statistics import bootstrap_interval, exact_match
from mend_lightning.files import write_json, write_jsonl


def intervals(records: Sequence[Mapping[str, Any]], edits_at_once: int = 1) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of the main shares, resampling whole tasks: edits made at once are not independent.

    Args:
        records: from `task_records`, all processes' together, in the order of the data.
        edits_at_once: so many of them, one after another, are one task.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for start in range(0, len(records), edits_at_once):
        together = [shares(record) for record in records[start : start + edits_at_once]]
        for name in together[0]:
            values = [value for each in together for value in each[name]]
            if values:
                series.setdefault(name, []).append((sum(values) / len(values), len(values)))
    return {
        name: bootstrap_interval([mean for mean, _ in pairs], [count for _, count in pairs])
        for name, pairs in series.items()
    }


def shares(record: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Metric name -> what it is the mean of, for one edit's record."""
    known = [after for before, after in zip(record["known_before"], record["known_after"]) if before]
    hard = zip(record["known_before"][: record["hard"]], record["known_after"][: record["hard"]])
    values = {
        "edit_success": [record["reliable"], *record["general"]],
        "reliability": [record["reliable"]],
        "generality": record["general"],
        "base_accuracy": record["known_before"],
        "kept": known,
        "kept_hard": [after for before, after in hard if before],
    }
    if "confident" in record:
        values["confident"] = [record["confident"]]
    if "generated" in record:
        values["generated_exact_match"] = [exact_match(answer, record["target"]) for answer in record["generated"]]
    return values


def results_table(title: str, values: Mapping[str, float], bounds: Mapping[str, tuple[float, float]]) -> Table:
    """Metric, value, interval and protocol, in the order of `PROTOCOL`."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("how it is measured")
    for name, (label, protocol) in PROTOCOL.items():
        if name in values:
            low_high = bounds.get(name)
            interval = f"{low_high[0]:.3f} – {low_high[1]:.3f}" if low_high else ""
            table.add_row(label, f"{values[name]:.4f}", interval, protocol)
    return table


def write_results(
    folder: Path, values: Mapping[str, float], records: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes `results.json` and `examples.jsonl`; returns what `results.json` holds."""
    bounds = intervals(records, about["edits_at_a_time"])
    results = {
        "metrics": {name: round(value, 6) for name, value in values.items()},
        "intervals_95": {name: [round(value, 6) for value in pair] for name, pair in bounds.items()},
        "protocol": {name: protocol for name, (_, protocol) in PROTOCOL.items() if name in values},
        "edits": len(records),
        **about,
        "versions": versions(),
    }
    write_jsonl(folder / "examples.jsonl", list(records))
    write_json(folder / "results.json", results)
    return results


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "mend_lightning": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lightning": version("lightning"),
        "python": platform.python_version(),
    }
