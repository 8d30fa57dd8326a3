"""Edits per second of training on one process and on several: `python -m benchmarks scaling --config quickstart`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from benchmarks.report import append, machine, when
from benchmarks.timing import Timing

ROOT = Path(__file__).parents[1]


class StepClock(L.Callback):
    """Writes the seconds of the steps behind the first `warm_up`, whose time does not count."""

    def __init__(self, path: str, warm_up: int, steps: int) -> None:
        self.path, self.warm_up, self.steps = Path(path), warm_up, steps
        self._started = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.global_step
        if done == self.warm_up:
            trainer.strategy.barrier()
            self._started = time.perf_counter()
        if done == self.warm_up + self.steps:
            # The slowest process says when a step is over.
            trainer.strategy.barrier()
            seconds = time.perf_counter() - self._started
            if trainer.is_global_zero:
                self.path.write_text(
                    json.dumps({"seconds": seconds, "edits": self.steps * len(batch) * trainer.world_size})
                )


def edits_per_second(config: str, processes: int, strategy: str, warm_up: int, steps: int) -> float:
    """Of a run of `mend-lightning fit`, one thread a process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clock.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m",
            "mend_lightning.cli", "fit", "--config", config, "--trainer.devices", str(processes), "--trainer.strategy",
            strategy if processes > 1 else "auto", "--trainer.max_steps", str(warm_up + steps),
            "--trainer.limit_val_batches", "0", "--trainer.default_root_dir", folder, "--trainer.logger", "false",
            "--trainer.enable_progress_bar", "false", "--trainer.callbacks+=benchmarks.scaling.StepClock",
            f"--trainer.callbacks.path={path}", f"--trainer.callbacks.warm_up={warm_up}",
            f"--trainer.callbacks.steps={steps}", "--model.calibration_batches", "1",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
        found = json.loads(path.read_text())
    return found["edits"] / found["seconds"]


def measure(config: str, processes: list[int], strategy: str, warm_up: int, steps: int, repeats: int) -> dict[str, Any]:
    """Edits per second of each number of processes, in turn, and how they compare with the first."""
    runs: dict[int, list[float]] = {count: [] for count in processes}
    for _ in range(repeats):
        for count, found in runs.items():
            found.append(edits_per_second(config, count, strategy, warm_up, steps))
    alone = Timing.of(runs[processes[0]]).median
    return {
        "edits_per_second": {str(count): vars(Timing.of(found)) for count, found in runs.items()},
        "times_the_first": {str(count): Timing.of(found).median / alone for count, found in runs.items()},
    }


def show(found: dict[str, Any], title: str, console: Console) -> None:
    """Prints a row for each number of processes."""
    table = Table(title=title)
    for column in ("processes", "edits per second (median)", "min", "max", "times one process"):
        table.add_column(column, justify="right")
    for count, each in found["edits_per_second"].items():
        figures = (f"{each[key]:.2f}" for key in ("median", "min", "max"))
        table.add_row(count, *figures, f"{found['times_the_first'][count]:.2f}")
    console.print(table)


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "scaling", help="edits per second of fit on one process and on several, one thread each",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", default="quickstart", help="what is trained; batch_size is that of a process")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="compared with the first")
    parser.add_argument("--strategy", default="ddp", help="of several processes")
    parser.add_argument("--warm-up", type=int, default=4, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=16, help="steps that count")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn")
    parser.set_defaults(run=command)


def command(options: argparse.Namespace, arguments: list[str], console: Console) -> dict[str, Any]:
    """Measures, prints a table, appends a line; returns the line."""
    names = ("config", "processes", "strategy", "warm_up", "steps", "repeats")
    settings = {name: getattr(options, name) for name in names}
    found = measure(**settings)
    line = {**when(arguments), "settings": settings, **found, **machine()}
    show(found, f"{options.config}, {options.strategy}, one thread a process", console)
    console.print(f"Appended to {append(options.out, 'scaling', line)}")
    return line
