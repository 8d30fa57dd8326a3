"""The command line: `python -m benchmarks step|apply|stack|plan|scaling|width`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import plan, scaling, stack, width
from benchmarks.memory import peak_memory
from benchmarks.models import MODELS
from benchmarks.report import append, line_of, machine, show, when
from benchmarks.timing import in_turn
from benchmarks.workloads import (
    VARIANTS,
    Bench,
    Settings,
    build,
    compare_logits,
    compare_losses,
    warm_up_statistics,
    workload,
)

# In a file there is room for every column.
console = Console(width=None if sys.stdout.isatty() else 140)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs one benchmark, prints its table, appends its line; returns the line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    others = {"stack": _stack, "plan": _plan, "scaling": _scaling, "width": _width}
    if options.command in others:
        return others[options.command](options, arguments)
    names = ("command", "model", "tokens", "rank", "threads", "reference_gradients")
    edits = options.edits if options.command == "step" else 1
    settings = Settings(edits=edits, **{name: getattr(options, name) for name in names})
    torch.set_num_threads(settings.threads)
    # Before anything is built here: the fresh processes then have the machine to themselves.
    memory = _memory(settings) if options.memory else dict.fromkeys(VARIANTS)
    bench = build(settings)
    warm_up_statistics(bench)
    agreement = compare_losses(bench) if settings.command == "step" else compare_logits(bench)
    seconds = _seconds(bench, settings, options.repeats)
    line = line_of(settings, options.repeats, arguments, seconds, agreement, memory)
    show(line, console)
    path = append(options.out, settings.command, line)
    console.print(f"Appended to {path}")
    return line


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shared.add_argument("--model", choices=list(MODELS), default="gpt2-small", help="shapes; the weights are random")
    shared.add_argument("--tokens", type=int, default=24, help="tokens of every row")
    shared.add_argument("--rank", type=int, default=1920, help="rank of the editor's matrices")
    shared.add_argument("--threads", type=int, default=2, help="torch's threads")
    shared.add_argument(
        "--reference-gradients", choices=("all", "edited"), default="all",
        help="weights whose gradients the reference's edit computes: all, as the original does, or the edited ones",
    )  # fmt: skip
    shared.add_argument("--repeats", type=int, default=5, help="rounds that are timed, after one that is not")
    shared.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON lines")
    shared.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="mend-lightning beside the original.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("step", "one meta-learning step"), ("apply", "making one edit and one forward with it")):
        command = commands.add_parser(
            name, parents=[shared], help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        note = "edits of a step" if name == "step" else "ignored: always 1"
        command.add_argument("--edits", type=int, default=8, help=note)
    _add_stack(commands)
    _add_plan(commands)
    _add_scaling(commands)
    _add_width(commands)
    return parser


def _add_stack(commands: Any) -> None:
    parser = commands.add_parser(
        "stack", help="edits on a model: adding, removing, and what a forward pass costs",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a model's name or folder, or random shapes")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base")
    parser.add_argument("--layers", nargs="*", help="edited layers; default: the paper's")
    parser.add_argument("--rank", type=int, default=34, help="of an edit: its tokens")
    parser.add_argument("--tokens", type=int, default=128, help="of the forward pass")
    parser.add_argument("--changes", type=int, default=1000, help="edits that are added and removed")
    parser.add_argument("--stacked", type=int, nargs="+", default=[1, 100], help="edits of the forward passes")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--repeats", type=int, default=50, help="paired forward passes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON lines")


def _stack(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    names = ("model", "dtype", "layers", "rank", "tokens", "changes", "stacked", "repeats")
    settings = {name: getattr(options, name) for name in names}
    found = stack.run(**settings)
    line = {**when(arguments), "settings": {**settings, "threads": options.threads}, **found, **machine()}
    stack.show(found, f"{options.model}, {options.dtype}", console)
    console.print(f"Appended to {append(options.out, 'stack', line)}")
    return line


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan", help="the memory plan beside the measured peak of training steps, for several models",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", help="a model whose shape ships with the package, or a folder; default: a list of runs")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base")
    parser.add_argument("--edits", type=int, default=8, help="of a step")
    parser.add_argument("--rank", type=int, default=1920, help="rank of the editor's matrices")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--gaps", action="store_true", help="measure with glibc's own settings")
    parser.add_argument("--strategy", choices=list(plan.STRATEGIES), default="one", help="of several processes")
    parser.add_argument("--processes", type=int, default=1, help="of the run; edits and memory are those of one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON lines")


def _plan(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    layout = {"strategy": options.strategy, "processes": options.processes}
    one = plan.Run(options.model, options.dtype, options.edits, options.rank, **layout) if options.model else None
    lines = []
    for run in [one] if one else plan.RUNS:
        run = replace(run, threads=options.threads, gaps=options.gaps)
        console.print(f"{run.model}, {run.dtype}, {run.batch_size} edit(s), rank {run.rank} ...", highlight=False)
        line = {**when(arguments), "settings": asdict(run), **plan.run_apart(run), **machine()}
        path = append(options.out, "plan", line)
        lines.append(line)
    plan.show(lines, console)
    console.print(f"Appended to {path}")
    return lines[-1]


def _add_scaling(commands: Any) -> None:
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
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON lines")


def _scaling(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    names = ("config", "processes", "strategy", "warm_up", "steps", "repeats")
    settings = {name: getattr(options, name) for name in names}
    found = scaling.measure(**settings)
    line = {**when(arguments), "settings": settings, **found, **machine()}
    scaling.show(found, f"{options.config}, {options.strategy}, one thread a process", console)
    console.print(f"Appended to {append(options.out, 'scaling', line)}")
    return line


def _add_width(commands: Any) -> None:
    parser = commands.add_parser(
        "width", help="peak memory of a step above the loaded base, as the base gets wider",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048], help="multiples of 64")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64], help="of every row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON lines")


def _width(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    rows = width.compare(options.widths, options.tokens)
    line = {**when(arguments), "settings": {"widths": options.widths, "tokens": options.tokens}, "rows": rows, **machine()}
    width.show(rows, console)
    console.print(f"Appended to {append(options.out, 'width', line)}")
    return line


def _memory(settings: Settings) -> dict[str, dict[str, float] | None]:
    """Ours with all edits of the batch at once, the reference with one: it never holds more than one."""
    each = {"ours": settings, "reference": replace(settings, edits=1)}
    found = {}
    for variant in VARIANTS:
        with console.status(f"Peak memory of {variant} ({each[variant].edits} edits at once) ..."):
            found[variant] = peak_memory(each[variant], variant)
    return found


def _seconds(bench: Bench, settings: Settings, repeats: int) -> dict[str, list[float]]:
    runs = {variant: workload(bench, settings.command, variant) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task(f"Timing {settings.command}", total=len(runs) * (repeats + 1))
        for variant, measured in in_turn(runs, repeats):
            progress.advance(task)
            if measured is not None:
                seconds[variant].append(measured)
    return seconds


if __name__ == "__main__":
    main()
