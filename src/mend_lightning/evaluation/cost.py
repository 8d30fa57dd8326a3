"""What one edit costs: seconds, and memory beyond what was there."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mend_lightning.editors.editor import Editor
from mend_lightning.models.inputs.rows import Rows

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEGABYTE = 1e6


@dataclass(frozen=True)
class EditCost:
    """Cost of single edits.

    Attributes:
        seconds: median of making one edit.
        megabytes: peak memory of making one beyond what was resident; None where it cannot be measured.
        edits: how many were made.
    """

    seconds: float
    megabytes: float | None
    edits: int


@torch.no_grad()
def measure_cost(model: nn.Module, editor: Editor, edits: Sequence[Rows]) -> EditCost:
    """Makes each of `edits` (rows of a single task) alone; the first, which warms up, does not count for the time."""
    seconds = []
    for rows in [edits[0], *edits]:
        _wait(model)
        start = time.perf_counter()
        editor.edited(model, rows)
        _wait(model)
        seconds.append(time.perf_counter() - start)
    beyond = peak_beyond(lambda: editor.edited(model, edits[0]), next(model.parameters()).device)
    return EditCost(statistics.median(seconds[1:]), beyond, len(edits))


def _wait(model: nn.Module) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def peak_beyond(run: Callable[[], object], device: torch.device) -> float | None:
    """Megabytes that the peak lies above what is there now while `run` runs; None where nobody tells."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE
    return resident_peak(run)["beyond"] if os.access(RESET, os.W_OK) else None


def resident_peak(run: Callable[[], object], rounds: int = 1) -> dict[str, float]:
    """Megabytes of the process that are resident now (`before`), and how far the peak lies above them (`beyond`).

    Reads Linux's /proc.
    """
    release()
    before = resident("VmRSS")
    # Sets the peak back to what is resident now.
    RESET.write_text("5")
    for _ in range(rounds):
        run()
    return {"before": before, "beyond": max(0.0, resident("VmHWM") - before)}


def release() -> None:
    """Hands freed memory back to the system, or the first run would use it and look cheaper than it is."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident(field: str) -> float:
    """Megabytes of the process: `VmRSS` is what is resident now, `VmHWM` the peak. Reads Linux's /proc."""
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / MEGABYTE
    raise RuntimeError(f"{STATUS} has no field {field}.")
