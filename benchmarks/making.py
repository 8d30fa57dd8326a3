"""What making an edit takes with what can be asked of it: contrasts, further steps, other wordings."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import append, machine, when
from benchmarks.timing import Timing, in_turn
from mend_lightning import Edit, load_base, make_edit, read_records
from mend_lightning.editors import Editor

# Name -> (contrasts, inner steps, wordings).
VARIANTS = {
    "one step": (0, 1, 0), "8 contrasts": (8, 1, 0), "three steps": (0, 3, 0), "three wordings": (0, 1, 3),
    "all of it": (8, 3, 3),
}  # fmt: skip
REFERENCE = "one step"


def variants(folder: str, facts: str, count: int) -> dict[str, Callable[[], list[Edit]]]:
    """Name -> a function that makes an edit of each of `count` facts, one after another."""
    editor = Editor.from_pretrained(folder)
    model, tokenizer = load_base(editor.base_name, **editor.base_options)
    records = [record for record in read_records(facts) if record.subject and record.alternatives][:count]

    def make(contrasts: int, inner_steps: int, wordings: int) -> list[Edit]:
        editor.set_steps(inner_steps, wordings)
        pairs = [((record.prompt, record.alternatives[0]), [record.subject] if contrasts else []) for record in records]
        return [make_edit(editor, model, tokenizer, fact, (), contrasts, subjects) for fact, subjects in pairs]

    return {name: partial(make, *settings) for name, settings in VARIANTS.items()}


def run(editor: str, facts: str, count: int, repeats: int) -> dict[str, Any]:
    """Seconds of one edit by variant, and how many times the reference's that is."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with warnings.catch_warnings():
        # What an edit reaches is measured elsewhere.
        warnings.simplefilter("ignore", UserWarning)
        for name, value in in_turn(variants(editor, facts, count), repeats):
            if value is not None:
                seconds[name].append(value)
    timings = {name: Timing.of(each, count) for name, each in seconds.items()}
    return {
        name: {
            "seconds": each.median,
            "min": each.min,
            "max": each.max,
            "ratio": each.median / timings[REFERENCE].median,
        }
        for name, each in timings.items()
    }


def show(found: dict[str, Any], title: str, console: Console) -> None:
    """Prints the table."""
    table = Table(title=title)
    for column in ("", "seconds, median", "min", "max", f"times {REFERENCE}"):
        table.add_column(column, justify="right" if column else "left")
    for name, each in found.items():
        values = (f"{each[key]:.3f}" for key in ("seconds", "min", "max"))
        table.add_row(name, *values, f"{each['ratio']:.2f}")
    console.print(table)


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "make", help="making one edit, with contrasts, further steps and other wordings",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--editor", default="runs/quickstart/editor", help="folder of a trained editor")
    parser.add_argument("--facts", default="world_facts/validation", help="what is edited")
    parser.add_argument("--count", type=int, default=8, help="facts, each an edit of its own")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.set_defaults(run=command)


def command(options: argparse.Namespace, arguments: Sequence[str], console: Console) -> dict[str, Any]:
    """Measures, prints a table, appends a line; returns the line."""
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("facts", "count", "repeats")}
    found = run(options.editor, **settings)
    given = {**settings, "threads": options.threads}
    line = {**when(list(arguments)), "settings": given, "making": found, **machine()}
    show(found, f"One edit of {options.facts}", console)
    console.print(f"Appended to {append(options.out, 'make', line)}")
    return line
