"""The memory plan beside the measured peak of a training run: `python -m benchmarks.plan SETTINGS_AS_JSON`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, T5Config

from benchmarks.report import append, machine, when
from mend_lightning.cli.commands.plan import plan_run
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.evaluation.cost import MEGABYTE, RESET, release, resident
from mend_lightning.models.base import BaseModel
from mend_lightning.models.forward.phases import PHASES
from mend_lightning.training.module import MendModule

# Glibc keeps freed blocks below a size, which grows up to 32 MB, in its own hands, where they lie between others. With this
# the size stays small, and what is freed goes back to the system.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "262144"}
# Batches before the measured ones: Adam's moments and the gradient are there then.
BEFORE, MEASURED = 1, 2


# What the plan calls a strategy -> what the Trainer does.
STRATEGIES = {"one": "auto", "ddp": "ddp", "fsdp": "fsdp1", "fsdp2": "fsdp2"}


@dataclass(frozen=True)
class Run:
    """One training run; plain values, so that a fresh process can be given them.

    Attributes:
        gaps: with glibc's own settings.
        strategy, processes: `batch_size` is that of a process, and so is the memory: of the first one.
    """

    model: str
    dtype: str = "bfloat16"
    batch_size: int = 8
    rank: int = 1920
    locality: int = 1
    threads: int = 1
    gaps: bool = False
    strategy: str = "one"
    processes: int = 1


GPT2, T5, QWEN = "openai-community/gpt2", "google/t5-v1_1-base", "Qwen/Qwen2.5-0.5B"
SMOLLM2, LLAMA = "HuggingFaceTB/SmolLM2-360M-Instruct", "meta-llama/Llama-3.2-1B"
RUNS = (
    Run(GPT2, "float32"), Run(GPT2, "bfloat16"), Run(GPT2, "float32", 24, 256), Run(SMOLLM2, "bfloat16", 8, 256),
    Run(SMOLLM2, "float32", 2, 256), Run(T5, "float32", 8, 256), Run(T5, "bfloat16"), Run(QWEN, "bfloat16", 4, 256),
    Run(LLAMA, "bfloat16", 1, 512), *(
        Run(LLAMA, "bfloat16", 1, 512, strategy=strategy, processes=2) for strategy in ("ddp", "fsdp", "fsdp2")
    ),
)  # fmt: skip


class Peak(L.Callback):
    """Resident megabytes when a step begins, and the peak of the steps from there on."""

    def __init__(self) -> None:
        self.loaded = self.before = self.peak = 0.0

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.loaded = resident("VmHWM")

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == BEFORE:
            release()
            self.before = resident("VmRSS")
            RESET.write_text("5")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.peak = resident("VmHWM")


def measure(run: Run) -> dict[str, Any]:
    """Planned and measured megabytes of `run`, in this process."""
    torch.set_num_threads(run.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        # Code pages, thread pools and Lightning belong to no model: a tiny run brings them in.
        config = T5Config(
            d_model=32, d_ff=48, d_kv=16, num_heads=2, num_layers=3, vocab_size=8192, decoder_start_token_id=0
        )
        if "t5" not in run.model:
            config = GPT2Config(n_embd=32, n_head=2, n_layer=4, vocab_size=8192)
        config.save_pretrained(folder)
        fit(replace(run, model=folder, batch_size=2, rank=8))
    release()
    empty = resident("VmRSS")
    RESET.write_text("5")
    module, data, peak = fit(run)
    planned = plan_run(module, data, run.strategy, run.processes).plan
    sizes = {name: size / MEGABYTE for name, size in planned.parts().items()}
    activations = sum(sizes[f"step: {phase}"] for phase in PHASES)
    measured = {"total": peak.peak - empty, "kept": peak.before - empty, "activations": peak.peak - peak.before}
    expected = {
        "total": planned.step / MEGABYTE,
        "kept": planned.step / MEGABYTE - activations,
        "activations": activations,
    }
    off = {name: expected[name] / measured[name] - 1 for name in expected}
    found = {"planned_mb": expected, "measured_mb": measured, "off": off, "parts_mb": sizes, "process_mb": empty}
    return {**found, "loading_mb": peak.loaded - empty}


def fit(run: Run) -> tuple[MendModule, EditDataModule, Peak]:
    """Trains for a few steps on random weights, as `mend-lightning fit` does."""
    module = MendModule(BaseModel(run.model, run.dtype, random_weights=True), rank=run.rank)
    prompt = {} if "t5" in run.model else {"prompt": "Q: {input}\nA:", "stop": "\n"}
    data = EditDataModule(
        "world_facts/train", batch_size=run.batch_size, locality=run.locality, max_length=96, **prompt
    )
    peak = Peak()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=BEFORE + MEASURED, callbacks=[peak], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, inference_mode=False, num_sanity_val_steps=0,
        limit_val_batches=0, gradient_clip_val=100.0, devices=run.processes, strategy=STRATEGIES[run.strategy],
    )  # fmt: skip
    trainer.fit(module, data)
    return module, data, peak


def run_apart(run: Run) -> dict[str, Any]:
    """`measure` in a fresh process."""
    several = ["torch.distributed.run", "--standalone", f"--nproc_per_node={run.processes}", "-m"]
    launcher = several if run.processes > 1 else []
    command = [sys.executable, "-m", *launcher, "benchmarks.plan", json.dumps(asdict(run))]
    settings = {"OMP_NUM_THREADS": str(run.threads), **({} if run.gaps else ALLOCATOR)}
    root, variables = Path(__file__).parents[1], {**os.environ, **settings}
    result = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, env=variables)
    if result.returncode:
        raise RuntimeError(f"The measurement of {run} failed; its error is above.")
    return json.loads(result.stdout.splitlines()[-1])


def show(lines: list[dict[str, Any]], console: Console) -> None:
    """A row for each run: planned, measured, and how far the plan is off."""
    table = Table(title="Planned and measured peak of a training step, MB", title_justify="left")
    for column in ("model", "dtype", "strategy"):
        table.add_column(column)
    for column in ("edits", "rank", "planned", "measured", "off", "activations planned", "measured", "off", "loading"):
        table.add_column(column, justify="right")
    for line in lines:
        run, planned, measured, off = (line[key] for key in ("settings", "planned_mb", "measured_mb", "off"))
        strategy = run["strategy"] if run["processes"] == 1 else f"{run['strategy']} x{run['processes']}"
        cells = [run["model"].rpartition("/")[2], run["dtype"], strategy, str(run["batch_size"]), str(run["rank"])]
        for name in ("total", "activations"):
            cells += [f"{planned[name]:.0f}", f"{measured[name]:.0f}", f"{100 * off[name]:+.1f} %"]
        table.add_row(*cells, f"{line['loading_mb']:.0f}")
    console.print(table)


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "plan", help="the memory plan beside the measured peak of training steps, for several models",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--model", help="a model whose shape ships with the package, or a folder; default: a list of runs"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base")
    parser.add_argument("--edits", type=int, default=8, help="of a step")
    parser.add_argument("--rank", type=int, default=1920, help="rank of the editor's matrices")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--gaps", action="store_true", help="measure with glibc's own settings")
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="one", help="of several processes")
    parser.add_argument("--processes", type=int, default=1, help="of the run; edits and memory are those of one")
    parser.set_defaults(run=command)


def command(options: argparse.Namespace, arguments: list[str], console: Console) -> dict[str, Any]:
    """Measures, prints a table, appends a line; returns the line."""
    layout = {"strategy": options.strategy, "processes": options.processes}
    one = Run(options.model, options.dtype, options.edits, options.rank, **layout) if options.model else None
    lines = []
    for run in [one] if one else RUNS:
        run = replace(run, threads=options.threads, gaps=options.gaps)
        console.print(f"{run.model}, {run.dtype}, {run.batch_size} edit(s), rank {run.rank} ...", highlight=False)
        line = {**when(arguments), "settings": asdict(run), **run_apart(run), **machine()}
        path = append(options.out, "plan", line)
        lines.append(line)
    show(lines, console)
    console.print(f"Appended to {path}")
    return lines[-1]


if __name__ == "__main__":
    found = measure(Run(**json.loads(sys.argv[1])))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(found))
