"""A run's result: one JSON line and one table."""

from __future__ import annotations

import json
import platform
import shlex
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import mend_lightning
from benchmarks.timing import Timing
from benchmarks.workloads import Settings


def line_of(
    settings: Settings,
    repeats: int,
    arguments: list[str],
    seconds: dict[str, list[float]],
    agreement: dict[str, dict[str, float]],
    memory: dict[str, dict[str, float] | None],
) -> dict[str, Any]:
    """Everything about a run as builtins: what is appended to the results."""
    timings = {variant: Timing.of(each, settings.edits) for variant, each in seconds.items()}
    return {
        **when(arguments),
        "settings": {**asdict(settings), "repeats": repeats},
        "seconds_per_edit": {variant: asdict(timing) for variant, timing in timings.items()},
        "times_faster": timings["reference"].median / timings["ours"].median,
        "agreement": agreement,
        "largest_difference": max(each["difference"] for each in agreement.values()),
        "memory_mb": memory,
        **machine(),
    }


def when(arguments: list[str]) -> dict[str, str]:
    """Date and command line."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command_line": shlex.join(["python", "-m", "benchmarks", *arguments]),
    }


def machine() -> dict[str, Any]:
    """Processor and versions: what every line says."""
    return {
        "cpu": _cpu_name(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "mend_lightning": mend_lightning.__version__,
        },
    }  # fmt: skip


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def show(line: dict[str, Any], console: Console) -> None:
    """Prints a row for each variant, and how they compare."""
    settings = line["settings"]
    table = Table(title=f"{settings['command']}, {settings['model']}, {settings['edits']} edit(s)")
    for column in ("variant", "s per edit (median)", "min", "max", "memory beyond, MB"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for variant, timing in line["seconds_per_edit"].items():
        memory = line["memory_mb"][variant]
        megabytes = f"{memory['beyond']:.0f}" if memory else "-"
        table.add_row(variant, *(f"{timing[key]:.4f}" for key in ("median", "min", "max")), megabytes)
    console.print(table)
    what = "loss" if settings["command"] == "step" else "logit"
    faster, difference = line["times_faster"], line["largest_difference"]
    console.print(f"{faster:.2f} times faster; largest {what} difference {difference:.1e}")
    if settings["command"] == "step" and settings["edits"] > 1:
        console.print(f"Memory: ours with {settings['edits']} edits at once, the reference with 1.")


def append(folder: Path, command: str, line: dict[str, Any]) -> Path:
    """Appends the line to the command's file in `folder`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{command}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return path
