"""A run's result: one JSON line and one table."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Iterator
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
    line = {
        **when(arguments),
        "settings": {**asdict(settings), "repeats": repeats},
        "seconds_per_edit": {variant: asdict(timing) for variant, timing in timings.items()},
        "memory_mb": memory,
        **machine(settings.device),
    }
    ours = timings.get("ours")
    if ours and "reference" in timings:
        line["times_faster"] = timings["reference"].median / ours.median
    if ours and "floor" in timings:
        line["of_floor"] = ours.median / timings["floor"].median
    if memory.get("ours") and memory.get("floor"):
        line["memory_of_floor"] = memory["ours"]["beyond"] / memory["floor"]["beyond"]
    if agreement:
        line["agreement"] = agreement
        line["largest_difference"] = max(each["difference"] for each in agreement.values())
    return line


def when(arguments: list[str]) -> dict[str, str]:
    """Date and command line."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command_line": shlex.join(["python", "-m", "benchmarks", *arguments]),
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, device and versions: what every line says."""
    return {
        "cpu": _cpu_name(),
        **({} if device == "cpu" else {"device": torch.cuda.get_device_name(device)}),
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
    table = Table(title="{command}, {model}, {dtype}, {edits} edit(s), {device}".format(**settings))
    for column in ("variant", "s per edit (median)", "min", "max", "edits/s", "memory beyond, MB"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for variant in dict.fromkeys([*line["seconds_per_edit"], *line["memory_mb"]]):
        timing, memory = line["seconds_per_edit"].get(variant), line["memory_mb"].get(variant)
        times = [f"{timing[key]:.4f}" for key in ("median", "min", "max")] if timing else ["-"] * 3
        rate = f"{1 / timing['median']:.2f}" if timing else "-"
        table.add_row(variant, *times, rate, f"{memory['beyond']:.0f}" if memory else "-")
    console.print(table)
    for sentence in _sentences(line):
        console.print(sentence, highlight=False)


def _sentences(line: dict[str, Any]) -> Iterator[str]:
    settings = line["settings"]
    if "times_faster" in line:
        yield f"{line['times_faster']:.2f} times faster than the reference"
    if "of_floor" in line:
        yield f"{line['of_floor']:.2f} times the floor's time"
    if "memory_of_floor" in line:
        yield f"{line['memory_of_floor']:.2f} times the floor's memory"
    if "largest_difference" in line:
        what = "loss" if settings["command"] == "step" else "logit"
        yield f"Largest {what} difference to the reference: {line['largest_difference']:.1e}"
    if settings["command"] == "step" and settings["edits"] > 1 and line["memory_mb"].get("reference"):
        yield f"Memory: the reference with 1 edit, the others with {settings['edits']} at once."


def append(folder: Path, command: str, line: dict[str, Any]) -> Path:
    """Appends the line to the command's file in `folder`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{command}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return path
