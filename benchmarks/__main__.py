"""The command line: `python -m benchmarks COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import compared, evaluate, making, phases, plan, scaling, stack, width

# In a file there is room for every column.
console = Console(width=None if sys.stdout.isatty() else 140)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs one benchmark, prints its table, appends its line; returns the line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    return options.run(options, arguments, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="mend-lightning, measured.")
    commands = parser.add_subparsers(dest="command", required=True)
    compared.add_parsers(commands)
    for module in (evaluate, making, phases, stack, plan, scaling, width):
        module.add_parser(commands)
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON lines")
    return parser


if __name__ == "__main__":
    main()
