"""Where compiling the base's blocks pays: `python -m benchmarks compile`."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.models import make_batch, make_editor, make_model
from benchmarks.report import append, machine, when
from benchmarks.timing import Timing, in_turn
from benchmarks.workloads import C_EDIT, Bench, workload
from mend_lightning.cli.config.overlays import read_config
from mend_lightning.cli.config.tree import plain
from mend_lightning.data.batch import EditBatch
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.editors import MendEditor
from mend_lightning.models.base import load_base
from mend_lightning.models.compile_blocks import compile_blocks, uncompile_blocks
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.inputs.rows import concatenate_rows
from mend_lightning.training.step import edit_step

QUICKSTART = "quickstart"
CASES = (f"{QUICKSTART}:bfloat16", "gpt2-small:float32", "gpt2-small:bfloat16", "t5-base:float32", "t5-base:bfloat16")


@dataclass
class Case:
    """A model, an editor, and batches that are taken in turn."""

    model: nn.Module
    editor: MendEditor
    batches: list[EditBatch]


def make_case(name: str, dtype: str, edits: int, tokens: int, rank: int, batches: int) -> Case:
    """The quickstart as its config says, whose batches differ in length; or shapes of `MODELS` with rows of `tokens`."""
    if name == QUICKSTART:
        return _quickstart(dtype, batches)
    model = make_model(name, dtype=dtype)
    return Case(model, make_editor(model, rank), [make_batch(model, edits, tokens, seed) for seed in range(batches)])


def _quickstart(dtype: str, batches: int) -> Case:
    settings = plain(read_config(QUICKSTART).tree)
    model, tokenizer = load_base(settings["model"]["base"]["name"], dtype)
    data = EditDataModule(**settings["data"], tokenizer=tokenizer)
    editor = MendEditor.for_model(model, settings["model"]["layers"], rank=settings["model"]["rank"])
    loader = iter(data.train_dataloader())
    return Case(model, editor, [next(loader) for _ in range(batches)])


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Seconds of the trunk's pass and of a step, as they are and compiled, in turn, and what compiling takes.

    Returns:
        `seconds`: name -> Timing; `first`, `again`: seconds that compiling takes, without and with torch's files of an earlier
        run; `blocks`: how many are compiled; `difference`: the largest of a loss, relative.
    """
    runs = {"trunk": _trunk(case), "step": _step(case)}
    with _new_files():
        blocks = compile_blocks(case.model)
        first = _compiling(runs["step"], len(case.batches))
        torch.compiler.reset()
        again = _compiling(runs["step"], len(case.batches))
    compiled = {module: module.__dict__["forward"] for module in case.model.modules() if "forward" in module.__dict__}
    losses = _losses(case)
    uncompile_blocks(case.model)
    difference = max(abs(after / before - 1) for before, after in zip(_losses(case), losses))
    variants = {name: run for name, run in runs.items()}
    variants |= {f"{name}, compiled": _with(compiled, run) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for name, taken in in_turn(variants, repeats):
        if taken is not None:
            seconds[name].append(taken)
    timings = {name: vars(Timing.of(each)) for name, each in seconds.items()}
    return {"seconds": timings, "first": first, "again": again, "blocks": blocks, "difference": difference}


def _trunk(case: Case) -> Callable[[], object]:
    layers = case.editor.modules_in(case.model)
    rows = cycle([concatenate_rows([each.z_edit, each.x_out, each.x_in]) for each in case.batches])
    return lambda: run_trunk(case.model, next(rows), layers)


def _step(case: Case) -> Callable[[], object]:
    steps = cycle([workload(Bench(case.model, case.editor, None, batch), "step", "ours") for batch in case.batches])
    return lambda: next(steps)()


@torch.no_grad()
def _losses(case: Case) -> list[float]:
    case.editor.eval()
    found = [float(edit_step(case.model, case.editor, batch).total(C_EDIT)) for batch in case.batches]
    case.editor.train()
    return found


def _compiling(step: Callable[[], object], batches: int) -> float:
    """Seconds that the first round over all batches takes beyond the second."""
    rounds = []
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(batches):
            step()
        rounds.append(time.perf_counter() - start)
    return max(0.0, rounds[0] - rounds[1])


def _with(forwards: dict[nn.Module, Any], run: Callable[[], object]) -> Callable[[], object]:
    def compiled() -> None:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        try:
            run()
        finally:
            for module in forwards:
                del module.__dict__["forward"]

    return compiled


@contextmanager
def _new_files() -> Iterator[None]:
    """torch keeps what it compiled in a folder: here an empty one."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def pays_after(found: dict[str, Any], compiling: str = "first") -> float:
    """Steps after which compiling has cost less than it saved; infinite where it saves nothing.

    Example:
        >>> seconds = {"step": {"median": 2.0}, "step, compiled": {"median": 1.5}}
        >>> pays_after({"seconds": seconds, "first": 30.0})
        60.0
    """
    saved = found["seconds"]["step"]["median"] - found["seconds"]["step, compiled"]["median"]
    return found[compiling] / saved if saved > 0 else math.inf


def show(found: dict[str, dict[str, Any]], console: Console) -> None:
    """A row for each case."""
    table = Table(title="Blocks compiled: medians in seconds")
    columns = (
        "case",
        "trunk",
        "compiled",
        "times",
        "step",
        "compiled",
        "times",
        "compiling",
        "again",
        "pays after",
        "again",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, each in found.items():
        cells = [name]
        for part in ("trunk", "step"):
            before, after = (each["seconds"][f"{part}{how}"]["median"] for how in ("", ", compiled"))
            cells += [f"{before:.3f}", f"{after:.3f}", f"{before / after:.2f}"]
        steps = [pays_after(each, compiling) for compiling in ("first", "again")]
        cells += [
            f"{each['first']:.1f}",
            f"{each['again']:.1f}",
            *("never" if math.isinf(n) else f"{n:.0f}" for n in steps),
        ]
        table.add_row(*cells)
    console.print(table)
    console.print("compiling: seconds; again: with the files that torch keeps of an earlier run; pays after: steps")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compile", help="the trunk's pass and a step with compiled blocks, and when compiling pays",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="model:dtype")
    parser.add_argument("--edits", type=int, default=8, help="of a step (not the quickstart's, which are its config's)")
    parser.add_argument("--tokens", type=int, default=24, help="of every row, likewise")
    parser.add_argument("--rank", type=int, default=1920, help="of the editor's matrices, likewise")
    parser.add_argument("--batches", type=int, default=4, help="that are taken in turn")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--repeats", type=int, default=9, help="rounds that are timed, after one that is not")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, arguments: list[str], console: Console) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    names = ("edits", "tokens", "rank", "batches")
    settings = {name: getattr(options, name) for name in names}
    found = {}
    for name in options.cases:
        console.print(f"{name} ...", highlight=False)
        model, _, dtype = name.partition(":")
        found[name] = measure(make_case(model, dtype or "float32", **settings), options.repeats)
    settings |= {"threads": options.threads, "repeats": options.repeats}
    line = {**when(arguments), "settings": settings, "cases": found, **machine()}
    show(found, console)
    console.print(f"Appended to {append(options.out, 'compile', line)}")
    return line
