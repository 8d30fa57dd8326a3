"""Peak memory of a training step above the loaded base, as the base gets wider: `python -m benchmarks width`.

Run as a module of its own it measures one size: `python -m benchmarks.width SIZE_AS_JSON`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.models import make_batch, make_editor
from benchmarks.reference import ReferenceMend
from benchmarks.report import append, machine, when
from mend_lightning.evaluation.cost import resident_peak
from mend_lightning.training.step import edit_step

C_EDIT = 0.1


@dataclass(frozen=True)
class Size:
    """One measurement; plain values, so that a fresh process can be given them."""

    width: int
    edits: int = 8
    tokens: int = 32
    rank: int = 64
    blocks: int = 4
    variant: str = "ours"


def measure(size: Size) -> float:
    """Megabytes that base, editor, gradients, Adam and activations of two steps take at most, less the base; in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _run(_model(replace(size, width=64)), size)
    model = _model(size)
    return resident_peak(lambda: _run(model, size))["beyond"]


def _model(size: Size) -> torch.nn.Module:
    config = GPT2Config(
        n_embd=size.width, n_layer=size.blocks, n_head=size.width // 64, vocab_size=2048, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def _run(model: torch.nn.Module, size: Size) -> None:
    editor, batch = make_editor(model, size.rank), make_batch(model, size.edits, size.tokens)
    optimizer = torch.optim.Adam(editor.parameters(), lr=1e-6, fused=size.variant == "ours")
    reference = ReferenceMend(model, editor, C_EDIT, False)
    for _ in range(2):
        if size.variant == "ours":
            edit_step(model, editor, batch).total(C_EDIT).backward()
        else:
            reference.step(batch)
        optimizer.step()
        optimizer.zero_grad()


def peak(size: Size) -> float:
    """The same, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.width", json.dumps(asdict(size))]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"The memory measurement of {size} failed; its error is above.")
    return json.loads(done.stdout.splitlines()[-1])


def compare(widths: list[int], tokens: list[int]) -> list[dict[str, Any]]:
    """Every width and number of tokens, ours (all edits at once) and the reference (one edit); twice the width, how many times."""
    rows = []
    for variant in ("ours", "reference"):
        for count in tokens:
            sizes = [Size(width, tokens=count, variant=variant) for width in widths]
            if variant == "reference":
                sizes = [replace(size, edits=1) for size in sizes]
            found = [peak(size) for size in sizes]
            grown = [None, *(b / a for a, b in zip(found, found[1:]))]
            rows += [{**asdict(s), "beyond_mb": mb, "times": times} for s, mb, times in zip(sizes, found, grown)]
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints a row for each measurement."""
    table = Table(title="Peak memory of a training step above the loaded base")
    for column in ("variant", "edits", "tokens a row", "width", "MB", "times the row above"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        cells = (row["variant"], str(row["edits"]), str(row["tokens"]), str(row["width"]), f"{row['beyond_mb']:.0f}")
        table.add_row(*cells, "" if row["times"] is None else f"{row['times']:.2f}")
    console.print(table)


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "width", help="peak memory of a step above the loaded base, as the base gets wider",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048], help="multiples of 64")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64], help="of every row")
    parser.set_defaults(run=command)


def command(options: argparse.Namespace, arguments: list[str], console: Console) -> dict[str, Any]:
    """Measures, prints a table, appends a line; returns the line."""
    rows = compare(options.widths, options.tokens)
    line = {
        **when(arguments),
        "settings": {"widths": options.widths, "tokens": options.tokens},
        "rows": rows,
        **machine(),
    }
    show(rows, console)
    console.print(f"Appended to {append(options.out, 'width', line)}")
    return line


if __name__ == "__main__":
    print(json.dumps(measure(Size(**json.loads(sys.argv[1])))))
