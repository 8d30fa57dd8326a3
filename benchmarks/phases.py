"""Where a training step's time goes, phase by phase, as a table and a picture."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.models import MODELS, SHAPES, make_batch, make_editor, make_model
from benchmarks.report import append, machine, when
from benchmarks.workloads import C_EDIT, LEARNING_RATE
from mend_lightning.data.batch import EditBatch
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.editors import MendEditor
from mend_lightning.editors.editor import Editor
from mend_lightning.files import written
from mend_lightning.models.base import load_base
from mend_lightning.training.step import edit_step

TRUNK, FACTORS, HEAD, TRANSFORMS, CONFIDENCE, UNEDITED, EDITED = (
    "trunk", "edits, forward and backward", "head and losses, with gradients", "transforms, forward", "size of the edits",
    "unedited rows above the trunk", "edited rows above the trunk, forward",
)  # fmt: skip
EDITED_BACK, TRANSFORMS_BACK, ADAM = "edited rows, backward", "transforms, backward", "Adam"
PHASES = (TRUNK, FACTORS, TRANSFORMS, CONFIDENCE, UNEDITED, EDITED, HEAD, EDITED_BACK, TRANSFORMS_BACK, ADAM)
# Function -> the phase that its own time counts to, that of functions of this list inside it left out.
FUNCTIONS = {
    "mend_lightning.training.step._shared_trunk": TRUNK,
    "mend_lightning.editors.inner_steps.edit_factors": FACTORS,
    "mend_lightning.editors.mend.MendEditor.forward": TRANSFORMS,
    "mend_lightning.editors.inner_steps.confident_scales": CONFIDENCE,
    "mend_lightning.training.step._outer": UNEDITED,
    "mend_lightning.training.step._edited_losses": EDITED,
    "mend_lightning.training.step.head_kl": HEAD,
    "mend_lightning.training.step.head_nll": HEAD,
    "mend_lightning.editors.factors.head_nll": HEAD,
}


class Stopwatch:
    """Seconds of phases, those of inner phases left out.

    Example:
        >>> watch = Stopwatch()
        >>> with watch.phase("outer"), watch.phase("inner"):
        ...     time.sleep(0.01)
        >>> watch.seconds["inner"] > 0.009 > watch.seconds["outer"]
        True
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[name] += whole - self._inner.pop()
            self._inner[-1] += whole

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed


@contextmanager
def watched(watch: Stopwatch) -> Iterator[list[Tensor]]:
    """Times `FUNCTIONS` while the block runs; yields the tensors of the deltas that are made in it."""
    made: list[Tensor] = []
    make_deltas = Editor.make_deltas

    def keep(self: Editor, *args: Any) -> Any:
        found = make_deltas(self, *args)
        made[:] = [tensor for tensor in tree_leaves(dict(found.deltas)) if isinstance(tensor, Tensor)]
        return found

    with ExitStack() as stack:
        for path, phase in FUNCTIONS.items():
            stack.enter_context(patch(path, watch.around(phase, resolve_name(path))))
        stack.enter_context(patch.object(Editor, "make_deltas", keep))
        yield made


def profile(
    model: Any, editor: MendEditor, batches: list[EditBatch], positions: str, console: Console
) -> dict[str, Any]:
    """Phase -> median seconds of a step over `batches`, each once, after two that do not count."""
    optimizer = torch.optim.Adam(editor.parameters(), lr=LEARNING_RATE, fused=True)
    found: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for number, batch in enumerate(track([*batches[:2], *batches], "Profiling", console=console, transient=True)):
        watch = Stopwatch()
        with watched(watch) as made:
            loss = edit_step(model, editor, batch, positions).total(C_EDIT)
        # The step's backward pass in two halves, that meet at the deltas.
        with watch.phase(EDITED_BACK):
            gradients = torch.autograd.grad(loss, made)
        with watch.phase(TRANSFORMS_BACK):
            torch.autograd.backward(made, gradients)
        with watch.phase(ADAM):
            optimizer.step()
            optimizer.zero_grad()
        for phase in PHASES if number > 1 else ():
            found[phase].append(watch.seconds.get(phase, 0.0))
    return {phase: statistics.median(seconds) for phase, seconds in found.items()}


def _quickstart(folder: Path, steps: int) -> tuple[Any, MendEditor, list[EditBatch], str]:
    """The quickstart's model, editor and training batches; its base is in bfloat16."""
    editor = Editor.from_pretrained(folder).train()
    model, tokenizer = load_base(editor.base_name, "bfloat16")
    settings = {"rephrases": 3, "locality": 4, "hard_locality": 3, "max_length": 96}
    data = EditDataModule("world_facts/train", tokenizer=tokenizer, **settings, **editor.prompt_format)
    return model, editor, list(islice(data.train_dataloader(), steps)), "answer"


def _random(options: argparse.Namespace) -> tuple[Any, MendEditor, list[EditBatch], str]:
    model = make_model(options.model, dtype=options.dtype)
    editor = make_editor(model, options.rank).train()
    return (
        model,
        editor,
        [make_batch(model, options.edits, options.tokens, seed=i) for i in range(options.repeats)],
        "all",
    )


def show(seconds: dict[str, float], title: str, console: Console) -> None:
    """Prints a row for each phase, the longest first."""
    table = Table(title=title)
    for column in ("phase", "ms a step", "share"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    total = sum(seconds.values())
    for phase, value in sorted(seconds.items(), key=lambda item: -item[1]):
        if value:
            table.add_row(phase, f"{1000 * value:.0f}", f"{value / total:.0%}")
    console.print(table)


def plot(lines: list[dict[str, Any]], target: Path) -> Path:
    """Draws the phases of several runs as bars of shares, in the order of a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.6 + 0.9 * len(lines)), layout="constrained")
    axes = figure.subplots()
    names = [f"{line['title']}\n{1000 * sum(line['seconds'].values()):.0f} ms a step" for line in lines]
    left = [0.0] * len(lines)
    for number, phase in enumerate(PHASES):
        shares = [line["seconds"][phase] / sum(line["seconds"].values()) for line in lines]
        bars = axes.barh(names, shares, left=left, label=phase, color=f"C{number}", edgecolor="white")
        axes.bar_label(
            bars, [f"{share:.0%}" if share > 0.03 else "" for share in shares], label_type="center", fontsize=8
        )
        left = [a + b for a, b in zip(left, shares)]
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=8, frameon=False)
    with written(target) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return target


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "profile", help="where a training step's time goes, as a table and a picture",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--model", default="gpt2-small", help=f"{', '.join([*MODELS, *SHAPES])} (random weights), or a name"
    )
    parser.add_argument(
        "--editor", type=Path, help="folder of the quickstart's editor: its model, data and bfloat16 instead"
    )
    parser.add_argument("--edits", type=int, default=8, help="of a step")
    parser.add_argument("--tokens", type=int, default=24, help="of every row")
    parser.add_argument("--rank", type=int, default=1920, help="rank of the editor's matrices")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--repeats", type=int, default=6, help="steps that count")
    parser.set_defaults(run=command)


def command(options: argparse.Namespace, arguments: list[str], console: Console) -> dict[str, Any]:
    """Measures, prints a table, appends a line, draws the latest line of each model; returns the line."""
    torch.set_num_threads(options.threads)
    of_editor = options.editor is not None
    prepared = _quickstart(options.editor, options.repeats) if of_editor else _random(options)
    title = "SmolLM2 quickstart, bfloat16" if of_editor else f"{options.model}, {options.dtype}, {options.edits} edits"
    seconds = profile(*prepared, console)
    show(seconds, title, console)
    settings = {name: getattr(options, name) for name in ("edits", "tokens", "rank", "threads", "repeats")}
    line = {**when(arguments), "title": title, "settings": settings, "seconds": seconds, **machine()}
    path = append(options.out, "profile", line)
    latest = {each["title"]: each for each in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    console.print(f"Appended to {path}; drawn to {plot(list(latest.values()), options.out / 'profile.png')}")
    return line
