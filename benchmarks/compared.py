"""`step`, `apply` and `memory`: the package beside the reference and the floor."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.memory import peak_memory
from benchmarks.models import MODELS, SHAPES
from benchmarks.report import append, line_of, show
from benchmarks.timing import in_turn
from benchmarks.workloads import (
    OTHERS,
    Bench,
    Settings,
    build,
    compare_logits,
    compare_losses,
    warm_up_statistics,
    workload,
)

ABOUT = {
    "step": "one meta-learning step: seconds and memory",
    "apply": "making one edit and one forward pass with it: seconds and memory",
    "memory": "the peak memory of a step alone",
}


def add_parsers(commands: Any) -> None:
    """The three commands' options."""
    for name, about in ABOUT.items():
        parser = commands.add_parser(name, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        _add_options(parser, "ignored: always 1" if name == "apply" else "edits of a step")
        parser.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser, edits: str) -> None:
    known = ", ".join([*MODELS, *SHAPES])
    parser.add_argument("--model", default="gpt2-small", help=f"{known} (random weights), or a model's name or folder")
    parser.add_argument("--edits", type=int, default=8, help=edits)
    parser.add_argument("--tokens", type=int, default=24, help="tokens of every row")
    parser.add_argument("--rank", type=int, default=1920, help="rank of the editor's matrices")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the base")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--compare", type=_variants, default=OTHERS, help="some of " + ",".join(OTHERS))
    parser.add_argument(
        "--reference-gradients", choices=("all", "edited"), default="all",
        help="weights whose gradients the reference's edit computes: all, as the original does, or the edited ones",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are timed, after one that is not")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")


def _variants(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    unknown = [name for name in names if name not in OTHERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not known; compare with {' or '.join(OTHERS)}, or both")
    return names


def run(options: argparse.Namespace, arguments: list[str], console: Console) -> dict[str, Any]:
    """Measures, prints a table, appends a line; returns the line."""
    names = ("model", "tokens", "rank", "threads", "reference_gradients", "dtype", "device")
    command = "apply" if options.command == "apply" else "step"
    given = {name: getattr(options, name) for name in names}
    settings = Settings(command, edits=1 if command == "apply" else options.edits, **given)
    variants = ("ours", *options.compare)
    torch.set_num_threads(settings.threads)
    # Before anything is built here: the fresh processes then have the machine to themselves.
    memory = _memory(settings, variants, console) if options.memory else {}
    seconds, agreement = {}, {}
    if options.command != "memory":
        bench = build(settings)
        agreement = _agreement(bench, command) if "reference" in variants else {}
        seconds = _seconds(bench, settings, variants, options.repeats, console)
    line = line_of(settings, options.repeats, arguments, seconds, agreement, memory)
    show(line, console)
    console.print(f"Appended to {append(options.out, options.command, line)}")
    return line


def _agreement(bench: Bench, command: str) -> dict[str, dict[str, float]]:
    warm_up_statistics(bench)
    return compare_losses(bench) if command == "step" else compare_logits(bench)


def _memory(settings: Settings, variants: tuple[str, ...], console: Console) -> dict[str, dict[str, float] | None]:
    """All edits of the batch at once, the reference with one: it never holds more than one."""
    found = {}
    for variant in variants:
        each = replace(settings, edits=1) if variant == "reference" else settings
        with console.status(f"Peak memory of {variant} ({each.edits} edits at once) ..."):
            found[variant] = peak_memory(each, variant)
    return found


def _seconds(
    bench: Bench, settings: Settings, variants: tuple[str, ...], repeats: int, console: Console
) -> dict[str, list[float]]:
    runs = {variant: workload(bench, settings.command, variant) for variant in variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    wait = torch.cuda.synchronize if settings.device.startswith("cuda") else lambda: None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task(f"Timing {settings.command}", total=len(runs) * (repeats + 1))
        for variant, measured in in_turn(runs, repeats, wait):
            progress.advance(task)
            if measured is not None:
                seconds[variant].append(measured)
    return seconds
