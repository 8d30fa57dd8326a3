"""`mend-lightning apply`: questions to the edited model, each answer beside the base's."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.markup import escape

from mend_lightning.cli.commands.inputs import load_asked_base, read_edits, read_questions
from mend_lightning.cli.commands.output import print_json, shift_table
from mend_lightning.edits.applying import without
from mend_lightning.edits.stack import EditStack
from mend_lightning.errors import ConfigError
from mend_lightning.evaluation.shift_plot import plot_shifts
from mend_lightning.evaluation.shifts import Shift, answer_shifts
from mend_lightning.files import check_writable_file
from mend_lightning.models.architecture import Dtype
from mend_lightning.training.progress.console import console

PROMPT = "question> "


def apply_command(
    edits: list[str] = [],
    ask: list[str] = [],
    questions: Path | None = None,
    base: str | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    json: bool = False,
    plot: Path | None = None,
    format: str | None = None,
) -> None:
    """Asks the edited model: `mend-lightning apply EDIT [EDIT ...] --ask "QUESTION"`; shows the base's answer beside it.

    Without ask and questions, they are read from the input: typed at a terminal, or one a line from a pipe.

    Args:
        edits: edit files, put on top of each other in this order; may simply come first on the line.
        ask: a question; may be given again and again.
        questions: file of questions: one a line, as text or as {"prompt": …}.
        base: base model (id, folder); default: the one the edits were made for.
        dtype: of the base model.
        trust_remote_code: run code that comes with the base model. Only for models you trust.
        force: also on other weights than the edits were made for, as long as layers and shapes are the same.
        json: print a JSON object for each question instead of a table.
        plot: file of a picture (PNG) of how the probabilities moved.
        format: how the questions are asked: own, bare, statement, chat, chat_system, chat_turns or passage (docs/data.md);
            default: as the edits were made.
    """
    loaded = read_edits(edits)
    given = [*ask, *(read_questions(questions) if questions is not None else [])]
    if any(not question.strip() for question in given):
        raise ConfigError("A question is empty. Give some text with --ask.")
    if plot is not None:
        check_writable_file(plot)
    model, encoder = load_asked_base(loaded, base, dtype, trust_remote_code, format)
    shifts: list[Shift] = []
    with EditStack(model) as stack:
        for path, edit in zip(edits, loaded):
            stack.add(edit, _name(path, stack), force)
        like = next((target for edit in loaded for _, target in edit.facts), None)
        for some in [given] if given else _typed():
            with without(stack) as applied:
                found = answer_shifts(model, encoder, some, applied, like=like)
            if json:
                print_json(*(shift.as_dict() for shift in found))
            else:
                console().print(shift_table(found))
            shifts += found
    if not shifts:
        raise ConfigError("No question was asked. Give --ask or --questions, or type some.")
    if plot is not None:
        plot_shifts(shifts, plot)
        if not json:
            console().print(f"Written: {escape(str(plot))}", highlight=False)


def _name(path: str, stack: EditStack) -> str:
    """The file's name, or the whole path where another file has the same."""
    name = Path(path).name.removesuffix(".safetensors")
    return str(path) if name in stack else name


def _typed() -> Iterator[Sequence[str]]:
    """Questions from the input: one at a time from a terminal, all at once from a pipe."""
    if not sys.stdin.isatty():
        lines = [line.strip() for line in sys.stdin if line.strip()]
        yield from [lines] if lines else []
        return
    console().print("Type questions; Ctrl-D ends.", highlight=False)
    while True:
        try:
            line = input(PROMPT).strip()
        except EOFError:
            return
        if line:
            yield [line]
