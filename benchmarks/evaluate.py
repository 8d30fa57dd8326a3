"""How long held-out edits take to evaluate, all metrics and generation included, and whether batches change a number."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from benchmarks.report import append, machine, when
from mend_lightning.data.batch import collate_tasks
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.tasks import EditTask, TaskSampler
from mend_lightning.editors.editor import Editor
from mend_lightning.editors.making import ready
from mend_lightning.errors import ConfigError
from mend_lightning.evaluation.evaluate import BatchScores, evaluate_batch, hard_rows
from mend_lightning.evaluation.generated_answers import edited_answers, judge_answers, task_records
from mend_lightning.evaluation.metric_collection import Scoreboard, weight_norms
from mend_lightning.models.base import load_base
from mend_lightning.models.inputs.encoder import Encoder

# Of each set, the scores that may differ by rounding, and those that are counted.
VALUES = {"edit": ("nll_after",), "rephrase": ("nll_after",), "locality": ("nll_before", "nll_after", "kl")}
COUNTS = {"edit": ("hits",), "rephrase": ("hits",), "locality": ("correct_before", "correct_after", "agreement")}


@dataclass(frozen=True)
class Example:
    """One edit's numbers, of all its rows, and its answers.

    Attributes:
        values: every NLL and KL, nats a label token.
        counts: every number of label tokens or rows.
    """

    values: Tensor
    counts: Tensor
    answers: tuple[str, ...]


def run(
    editor: Path, model: str | None, facts: str, dtypes: Sequence[str], edits: int, batch_size: int, alone: int,
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates the same edits with a base in each dtype.

    Args:
        editor: folder of a saved editor.
        model: name or folder of its base; None: what it was trained on.
        facts: data file or shipped set; where it has fewer facts than `edits`, they are gone through again with other draws.
        dtypes: of the base.
        edits: how many are evaluated; batch_size: at a time.
        alone: of these, how many are evaluated once more, one by one.
        console: shows how far it is.

    Raises:
        ConfigError: there is no editor.
    """
    if not (editor / "editor.json").is_file():
        raise ConfigError(
            f"{editor} holds no editor. Run `make quickstart`, which trains one, or give --editor FOLDER."
        )
    found = {}
    for dtype in dtypes:
        loaded = Editor.from_pretrained(editor)
        base, tokenizer = load_base(model or loaded.base_name, dtype)
        sampler = _sampler(facts)
        tasks = drawn(sampler, edits)
        with ready(loaded, base, tokenizer) as encoder:
            found[dtype] = measure(base, loaded, encoder, tasks, batch_size, alone, console)
    return {"facts": len(sampler), "epochs": -(-edits // len(sampler)), "dtypes": found}


def _sampler(facts: str) -> TaskSampler:
    # The counts of rephrases and unrelated facts are the quickstart's, which are the data module's own.
    return EditDataModule(test=facts).sampler("test")


def drawn(sampler: TaskSampler, edits: int) -> list[EditTask]:
    """The first edits; behind the last fact the first one again, in the next epoch: with another target and other rows."""
    return [sampler.task(*divmod(index, len(sampler))) for index in range(edits)]


def measure(
    model: nn.Module, editor: Editor, encoder: Encoder, tasks: Sequence[EditTask], batch_size: int, alone: int,
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of all edits, their metrics, and a sample of them beside one by one."""
    scoreboard, norms = Scoreboard(), weight_norms(editor.modules_in(model))
    # What a first pass sets up is not counted.
    list(examples(model, editor, encoder, tasks[:batch_size], batch_size, Scoreboard(), norms))
    start, together = time.perf_counter(), []
    with Progress(console=console, transient=True, refresh_per_second=1) as progress:
        bar = progress.add_task(f"{len(tasks)} edits, {batch_size} at a time", total=len(tasks))
        for example in examples(model, editor, encoder, tasks, batch_size, scoreboard, norms):
            together.append(example)
            progress.advance(bar)
    metrics, seconds = scoreboard.compute(), time.perf_counter() - start
    chosen = range(0, len(tasks), -(-len(tasks) // alone))
    start = time.perf_counter()
    single = list(examples(model, editor, encoder, [tasks[i] for i in chosen], 1, Scoreboard(), norms))
    each = (time.perf_counter() - start) / len(single)
    return {
        "seconds": seconds,
        "edits_per_second": len(tasks) / seconds,
        "one_by_one": {
            "edits": len(single),
            "seconds_per_edit": each,
            **compare([together[i] for i in chosen], single),
        },
        "metrics": metrics,
    }


def examples(
    model: nn.Module, editor: Editor, encoder: Encoder, tasks: Sequence[EditTask], batch_size: int, scoreboard: Scoreboard,
    norms: dict[str, Tensor],
) -> Iterator[Example]:  # fmt: skip
    """From text to records, as `mend-lightning test` does it."""
    device = next(model.parameters()).device
    for start in range(0, len(tasks), batch_size):
        batch = collate_tasks(tasks[start : start + batch_size], encoder).to(device)
        scores = evaluate_batch(model, editor, batch)
        answers = edited_answers(model, encoder, batch, scores)
        scoreboard.update(scores, hard_rows(batch))
        scoreboard.update_norms(scores.edited.deltas, norms)
        scoreboard.update_generated(*judge_answers(answers, batch))
        records = task_records(batch, scores, answers)
        yield from (example(scores, task, record["generated"]) for task, record in enumerate(records))


def example(scores: BatchScores, task: int, answers: Sequence[str]) -> Example:
    """The numbers of one task of a batch."""
    values, counts = [], []
    for part in VALUES:
        rows = getattr(scores, part)
        rows = rows.part(rows.task == task)
        values += [getattr(rows, field).double() / rows.tokens for field in VALUES[part]]
        counts += [getattr(rows, field).double() for field in COUNTS[part]]
    return Example(torch.cat(values), torch.cat(counts), tuple(answers))


def compare(together: Sequence[Example], single: Sequence[Example]) -> dict[str, float]:
    """The largest difference of an NLL or a KL, and how many examples differ otherwise.

    Differences are in nats a label token, and in parts of the value where that is more than 1.

    Example:
        >>> one, other = (Example(torch.tensor([value]), torch.tensor([1]), ("Rome",)) for value in (4.0, 5.0))
        >>> compare([other], [one])
        {'largest_difference': 0.25, 'other_counts': 0, 'other_answers': 0}
    """
    pairs = list(zip(together, single, strict=True))
    return {
        "largest_difference": max(float(((a.values - b.values) / b.values.clamp(min=1)).abs().max()) for a, b in pairs),
        "other_counts": sum(not torch.equal(a.counts, b.counts) for a, b in pairs),
        "other_answers": sum(a.answers != b.answers for a, b in pairs),
    }


def show(found: dict[str, Any], title: str, console: Console) -> None:
    """Prints a row for each dtype."""
    table = Table(title=title)
    columns = (
        "base",
        "seconds",
        "edits a second",
        "one by one, s an edit",
        "largest difference",
        "other hits",
        "other answers",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "base" else "right")
    for dtype, each in found["dtypes"].items():
        alone = each["one_by_one"]
        of = f"of {alone['edits']}"
        table.add_row(
            dtype, f"{each['seconds']:.1f}", f"{each['edits_per_second']:.2f}", f"{alone['seconds_per_edit']:.3f}",
            f"{alone['largest_difference']:.1e}", f"{alone['other_counts']} {of}", f"{alone['other_answers']} {of}",
        )  # fmt: skip
    console.print(table)
    if found["epochs"] > 1:
        console.print(
            f"The set has {found['facts']} facts: the edits beyond are the same facts with other targets and unrelated facts "
            f"(draws of epochs 0 to {found['epochs'] - 1})."
        )


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "evaluate", help="evaluating held-out edits: all metrics, generation included, in batches and one by one",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--editor", type=Path, default=Path("runs/quickstart/editor"), help="folder of a saved editor")
    parser.add_argument("--model", help="name or folder of the base; default: what the editor was trained on")
    parser.add_argument("--facts", default="world_facts/test", help="data file, or shipped set")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        nargs="+",
        default=["float32", "bfloat16"],
        dest="dtypes",
        help="of the base",
    )
    parser.add_argument("--edits", type=int, default=1000, help="that are evaluated")
    parser.add_argument("--batch-size", type=int, default=16, help="edits at a time")
    parser.add_argument("--alone", type=int, default=16, help="edits that are evaluated one by one as well")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.set_defaults(run=command)


def command(options: argparse.Namespace, arguments: list[str], console: Console) -> dict[str, Any]:
    """Measures, prints a table, appends a line; returns the line."""
    torch.set_num_threads(options.threads)
    names = ("model", "facts", "dtypes", "edits", "batch_size", "alone")
    settings = {name: getattr(options, name) for name in names}
    found = run(options.editor, **settings, console=console)
    settings |= {"editor": str(options.editor), "threads": options.threads}
    line = {**when(arguments), "settings": settings, **found, **machine()}
    show(found, f"{options.edits} edits of {options.facts}, {options.batch_size} at a time", console)
    console.print(f"Appended to {append(options.out, 'evaluate', line)}")
    return line
