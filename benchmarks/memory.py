"""Peak memory of one variant, in a process of its own: `python -m benchmarks.memory SETTINGS_AS_JSON VARIANT`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.models import tiny_variant
from benchmarks.workloads import Settings, build, workload
from mend_lightning.evaluation.cost import MEGABYTE, RESET, peak_beyond, resident_peak

ROUNDS = 2


def peak_memory(settings: Settings, variant: str) -> dict[str, float] | None:
    """Megabytes beyond base, editor, gradients and optimiser state; None on a CPU where Linux's /proc is missing.

    Args:
        settings: what to run.
        variant: "ours", "reference" or "floor".

    Returns:
        `before`: resident when all of that exists; `beyond`: how far the peak of two runs lies above it.
    """
    if settings.device == "cpu" and not RESET.exists():
        return None
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(settings)), variant]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise RuntimeError(f"The memory measurement of {variant} failed; its error is above.")
    return json.loads(result.stdout.splitlines()[-1])


def measure(settings: Settings, variant: str) -> dict[str, float]:
    """What `peak_memory` returns, measured in this process."""
    torch.set_num_threads(settings.threads)
    # Code pages and thread pools belong to no algorithm: a tiny run brings them in.
    _run_tiny(settings, variant)
    bench = build(settings)
    run = workload(bench, settings.command, variant)
    if settings.device == "cpu":
        return resident_peak(run, ROUNDS)
    before = torch.cuda.memory_allocated(settings.device) / MEGABYTE
    return {"before": before, "beyond": peak_beyond(run, torch.device(settings.device))}


def _run_tiny(settings: Settings, variant: str) -> None:
    tiny = replace(settings, model=tiny_variant(settings.model), edits=2, tokens=8, rank=8, dtype="float32")
    run = workload(build(tiny), tiny.command, variant)
    for _ in range(ROUNDS):
        run()


if __name__ == "__main__":
    print(json.dumps(measure(Settings(**json.loads(sys.argv[1])), sys.argv[2])))
