"""What edits on a model cost: adding, removing, and a forward pass with none, one and many of them."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.models import MODELS, make_model
from benchmarks.report import append, machine, when
from benchmarks.timing import Timing
from mend_lightning import Edit, EditStack, LowRankDelta, load_base
from mend_lightning.models.fingerprint import layer_fingerprints
from mend_lightning.models.layers import layer_shape, select_layers


def load(name: str, dtype: str) -> nn.Module:
    """A model of the benchmark's with random weights, or a real one by name or folder."""
    return make_model(name).to(getattr(torch, dtype)) if name in MODELS else load_base(name, dtype)[0]


def random_edits(model: nn.Module, layers: Sequence[str] | None, rank: int, count: int) -> list[Edit]:
    """Edits of the size of real ones, each of another question. What they say makes no difference to time."""
    chosen = select_layers(model, layers)
    generator, weights = torch.Generator().manual_seed(0), layer_fingerprints(chosen)

    def one(number: int) -> Edit:
        deltas = {}
        for name, layer in chosen.items():
            down, up = (0.01 * torch.randn(1, rank, width, generator=generator) for width in layer_shape(layer))
            deltas[name] = LowRankDelta(down, up)
        return Edit(
            deltas, {"id": str(number), "edits": [{"prompt": f"q {number}", "target": "a"}], "weights": weights}
        )

    return [one(number) for number in range(count)]


def time_changes(model: nn.Module, edits: Sequence[Edit], ids: Tensor) -> dict[str, Any]:
    """Seconds of adding all edits and removing them in random order, and whether the base is what it was."""
    with torch.inference_mode():
        before = model(ids).logits
    stack, order = EditStack(model), random.Random(0)
    names, added, removed = [], [], []
    for edit in edits:
        start = time.perf_counter()
        names.append(stack.add(edit))
        added.append(time.perf_counter() - start)
    order.shuffle(names)
    for name in names:
        start = time.perf_counter()
        stack.remove(name)
        removed.append(time.perf_counter() - start)
    with torch.inference_mode():
        equal = torch.equal(model(ids).logits, before)
    # Removing goes from the longest stack to the shortest.
    seconds = {"add": added, "remove": removed[::-1]}
    return {
        "edits": len(edits),
        "bit_equal": equal,
        "ms": {name: _milliseconds(each) for name, each in seconds.items()},
        "ms_first_hundred": {name: _milliseconds(each[:100]) for name, each in seconds.items()},
        "ms_last_hundred": {name: _milliseconds(each[-100:]) for name, each in seconds.items()},
    }


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    timing = Timing.of([1e3 * each for each in seconds])
    return {"median": timing.median, "max": timing.max}


@torch.inference_mode()
def time_forwards(
    model: nn.Module, edits: Sequence[Edit], counts: Sequence[int], ids: Tensor, repeats: int
) -> dict[str, dict[str, float]]:
    """A forward pass with so many edits, in turn with one of the base: median seconds, and median of the paired ratios."""
    stack = EditStack(model)
    names = [stack.add(edit) for edit in edits[: max(counts)]]
    stack.disable(*names)
    seconds: dict[int, list[float]] = {count: [] for count in (0, *counts)}
    for _ in range(repeats):
        for count, each in seconds.items():
            stack.enable(*names[:count])
            # The first pass after a change adds the edits up, once.
            model(ids)
            start = time.perf_counter()
            model(ids)
            each.append(time.perf_counter() - start)
            stack.disable(*names[:count])
    stack.clear()
    return {
        str(count): {
            "seconds": statistics.median(each),
            "ratio": statistics.median(edited / base for edited, base in zip(each, seconds[0])),
        }
        for count, each in seconds.items()
    }


def run(
    model: str,
    dtype: str,
    layers: Sequence[str] | None,
    rank: int,
    tokens: int,
    changes: int,
    stacked: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """All of it, as builtins."""
    base = load(model, dtype)
    ids = torch.randint(2, base.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    edits = random_edits(base, layers, rank, max(changes, *stacked))
    found = {"changes": time_changes(base, edits[:changes], ids)}
    return {**found, "forward": time_forwards(base, edits, stacked, ids, repeats), "layers": list(edits[0].deltas)}


def show(found: dict[str, Any], title: str, console: Console) -> None:
    """Prints both measurements."""
    changes = found["changes"]
    table = Table(title=f"{title}: {changes['edits']} edits added, then removed in random order")
    for column in ("", "ms, median", "ms, first 100", "ms, last 100", "ms, largest"):
        table.add_column(column, justify="right" if column else "left")
    for name, each in changes["ms"].items():
        parts = (changes[key][name]["median"] for key in ("ms_first_hundred", "ms_last_hundred"))
        table.add_row(name, *(f"{value:.3f}" for value in (each["median"], *parts, each["max"])))
    console.print(table)
    console.print(f"The base is {'bit-equal' if changes['bit_equal'] else 'NOT bit-equal'} afterwards.")
    table = Table(title=f"{title}: a forward pass")
    for column in ("edits on it", "ms, median", "of the base's time (median of pairs)"):
        table.add_column(column, justify="right")
    for count, each in found["forward"].items():
        table.add_row(count, f"{1e3 * each['seconds']:.2f}", f"{each['ratio']:.3f}")
    console.print(table)


def add_parser(commands: Any) -> None:
    """The command's options."""
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
    parser.set_defaults(run=command)


def command(options: argparse.Namespace, arguments: list[str], console: Console) -> dict[str, Any]:
    """Measures, prints a table, appends a line; returns the line."""
    torch.set_num_threads(options.threads)
    names = ("model", "dtype", "layers", "rank", "tokens", "changes", "stacked", "repeats")
    settings = {name: getattr(options, name) for name in names}
    found = run(**settings)
    line = {**when(arguments), "settings": {**settings, "threads": options.threads}, **found, **machine()}
    show(found, f"{options.model}, {options.dtype}", console)
    console.print(f"Appended to {append(options.out, 'stack', line)}")
    return line
