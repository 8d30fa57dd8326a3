"""Results of several editors on the same edits, side by side: paired differences, tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mend_lightning.errors import ConfigError, StateDictError
from mend_lightning.evaluation.report import shares
from mend_lightning.evaluation.statistics import paired_interval

# Metrics whose difference to the reference editor is given, with whether larger is better.
PAIRED = {"edit_success": True, "drawdown": False}
# column -> heading; a column that no editor has (a classifier generates nothing) is left out.
METRICS = {
    "edit_success": "success", "generality": "general", "generated_exact_match": "generated",
    "drawdown": "drawdown", "perplexity_drawdown": "ppl rise", "kept": "retained", "locality_kl": "KL",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one editor reached with one number of edits at once.

    Attributes:
        name: of the editor in the comparison.
        edits_at_once: edits made together.
        results: the contents of `results.json`.
        records: the lines of `examples.jsonl`.
        fit_seconds: of training; 0 where nothing was trained here.
    """

    name: str
    edits_at_once: int
    results: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    fit_seconds: float = 0.0

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.results["metrics"]

    @property
    def cost(self) -> Mapping[str, Any]:
        return self.results["cost_of_an_edit"]


def read_outcome(name: str, folder: Path, fit_seconds: float = 0.0) -> Outcome:
    """Reads what `test` wrote.

    Raises:
        StateDictError: a file is missing or broken.
    """
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        lines = (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()
        return Outcome(name, results["edits_at_a_time"], results, [json.loads(line) for line in lines], fit_seconds)
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise StateDictError(
            f"{folder} does not hold the results of `test` ({error}). Remove it and compare again."
        ) from error


def check_same_edits(outcomes: Sequence[Outcome]) -> None:
    """Raises ConfigError unless all have the same edits, rephrases and unrelated facts, in the same order."""
    keys = ("prompt", "target", "rephrases", "locality")
    first = outcomes[0]
    for other in outcomes[1:]:
        pairs = zip(first.records, other.records)
        same = len(first.records) == len(other.records) and all(a[key] == b[key] for a, b in pairs for key in keys)
        if not same:
            raise ConfigError(
                f"{other.name} was tested on other edits than {first.name}, so their difference says nothing. Leave test, seed "
                "and the eval_ settings of data to the part of the config that all editors share."
            )


def per_task(outcome: Outcome, metric: str) -> list[tuple[float, int]]:
    """(mean, number of rows) of a metric in every task: what is resampled together."""
    groups = range(0, len(outcome.records), outcome.edits_at_once)
    found = []
    for start in groups:
        values = [
            v for record in outcome.records[start : start + outcome.edits_at_once] for v in _values(record, metric)
        ]
        found.append((sum(values) / len(values) if values else 0.0, len(values)))
    return found


def _values(record: Mapping[str, Any], metric: str) -> list[float]:
    if metric == "drawdown":
        return [float(before) - float(after) for before, after in zip(record["known_before"], record["known_after"])]
    return [float(value) for value in shares(record)[metric]]


def difference(outcome: Outcome, reference: Outcome, metric: str) -> tuple[float, float, float]:
    """Metric of `outcome` minus that of `reference` on the same edits, and its 95 % interval (paired bootstrap)."""
    return paired_interval(per_task(outcome, metric), per_task(reference, metric))


def rows_of(outcomes: Sequence[Outcome], reference: str) -> list[dict[str, Any]]:
    """One JSON-able row an outcome; differences are taken to `reference` with the same number of edits at once."""
    of_reference = {outcome.edits_at_once: outcome for outcome in outcomes if outcome.name == reference}
    rows = []
    for outcome in outcomes:
        base = of_reference[outcome.edits_at_once]
        row = {"editor": outcome.name, "edits_at_once": outcome.edits_at_once, "edits": len(outcome.records)}
        row["metrics"] = {name: outcome.metrics[name] for name in METRICS if name in outcome.metrics}
        row["intervals_95"] = {name: pair for name, pair in outcome.results["intervals_95"].items() if name in METRICS}
        if outcome is not base:
            found = {metric: difference(outcome, base, metric) for metric in PAIRED}
            row[f"minus_{reference}"] = {name: [round(value, 6) for value in three] for name, three in found.items()}
        rows.append({**row, "cost_of_an_edit": outcome.cost, "fit_seconds": round(outcome.fit_seconds, 1)})
    return rows


def tables_of(rows: Sequence[Mapping[str, Any]], reference: str) -> list[list[list[str]]]:
    """Two tables of texts, headings first: what the editors reach; their differences to `reference`, and their costs."""
    columns = [name for name in METRICS if any(name in row["metrics"] for row in rows)]
    paired = [name for name in PAIRED if any(f"minus_{reference}" in row for row in rows)]
    differences = [f"{METRICS[name]} − {reference}" for name in paired]
    reached = [["editor", "k", *(METRICS[name] for name in columns)]]
    costs = [["editor", "k", *differences, "s/edit", "MB/edit", "fit s"]]
    for row in rows:
        head = [row["editor"], str(row["edits_at_once"])]
        reached.append([*head, *(f"{row['metrics'][name]:.3f}" if name in row["metrics"] else "" for name in columns)])
        minus = row.get(f"minus_{reference}", {})
        costs.append([*head, *(_signed(minus[name]) if name in minus else "" for name in paired), *_costs(row)])
    return [reached, costs]


def _costs(row: Mapping[str, Any]) -> list[str]:
    cost = row["cost_of_an_edit"]
    memory = "" if cost["megabytes"] is None else f"{cost['megabytes']:.0f}"
    return [f"{cost['seconds']:.2g}", memory, f"{row['fit_seconds']:.0f}"]


def _signed(value: Sequence[float]) -> str:
    middle, low, high = value
    return f"{middle:+.3f} ({low:+.3f} to {high:+.3f})"


def comparison_tables(title: str, rows: Sequence[Mapping[str, Any]], reference: str) -> list[Table]:
    """The comparison for a terminal."""
    tables = []
    for heading, (names, *lines) in zip(
        (title, "Differences (95 % interval, paired) and costs"), tables_of(rows, reference)
    ):
        table = Table(title=heading, title_justify="left")
        for index, name in enumerate(names):
            table.add_column(name, justify="right" if index else "left")
        for line in lines:
            table.add_row(*line)
        tables.append(table)
    return tables


def comparison_markdown(title: str, rows: Sequence[Mapping[str, Any]], reference: str, notes: Sequence[str]) -> str:
    """The comparison as a Markdown page."""
    lines = [f"# {title}", "", *notes]
    for names, *rest in tables_of(rows, reference):
        lines += ["", f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
        lines += [f"| {' | '.join(line)} |" for line in rest]
    return "\n".join(lines) + "\n"
