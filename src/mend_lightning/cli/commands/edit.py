"""`mend-lightning edit`: one fact or several, before and after, and the edit as a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import nn

from mend_lightning.cli.commands.inputs import given_facts, load_editor_and_base
from mend_lightning.cli.commands.output import before_after_table, print_check, shift_table
from mend_lightning.editors.editor import Editor
from mend_lightning.editors.making import editor_encoder, make_edit, ready
from mend_lightning.edits.edit import Edit
from mend_lightning.edits.stack import numbered, slug
from mend_lightning.errors import ConfigError
from mend_lightning.evaluation.neutral import neutral_questions
from mend_lightning.evaluation.safety import EditCheck, check_edit
from mend_lightning.evaluation.shifts import Shift, answer_shifts
from mend_lightning.files import check_writable_file
from mend_lightning.models.architecture import Dtype
from mend_lightning.models.forward.generation import generate_answers
from mend_lightning.models.inputs.encoder import Encoder, in_words
from mend_lightning.training.progress.console import console, counted

# The exit code of `--check` where the edit is not safe to keep.
NOT_SAFE = 3
_Asked = Sequence[tuple[str, str]]


def edit_command(
    editor: Path = Path("runs/quickstart/editor"),
    prompt: str | None = None,
    target: str | None = None,
    edits: Path | None = None,
    base: str | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    confidence: float | None = None,
    inner_steps: int | None = None,
    wordings: int | None = None,
    rephrase: list[str] = [],
    unrelated: list[str] = [],
    neighbour: list[str] = [],
    keep: list[str] = [],
    subject: str | None = None,
    contrasts: int | None = None,
    out: Path | None = None,
    separate: bool = False,
    check: bool = False,
    interactive: bool = False,
    format: str | None = None,
) -> int:
    """Changes what the base model answers; prints answers before and after, saves the edit as a file.

    The model's weights stay as they are: the edit is an adapter beside them (low-rank, but for fine-tuning and ENN), and
    removing it undoes it exactly. Without prompt, target and edits, on a terminal, it is a conversation: type questions and
    new answers, and see what they do. The exit code is 3 where `check` finds that an edit is not safe to keep.

    Args:
        editor: folder of a trained editor.
        prompt: the question whose answer changes, without the prompt format's text around it.
        target: the new answer.
        edits: JSONL file of several facts, {"prompt": …, "target": …} a line, edited together; instead of prompt
            and target.
        base: base model (id, folder); default: the one the editor was trained on.
        dtype: of the base model.
        trust_remote_code: run code that comes with the base model. Only for models you trust.
        confidence: probability that the edited model shall give the new answer; default: the editor's own.
        inner_steps: the most gradient steps that the edit is made in, until it reaches its confidence; default: the editor's own.
        wordings: other wordings of its question that the edit is made in as well, 0 to 8; default: the editor's own.
        rephrase: other phrasings of the question, to be asked before and after.
        unrelated: questions whose answers must not change.
        neighbour: questions near the edited fact whose answers must not change.
        keep: questions whose answers the edit must not touch: it is made so that it does not (unrelated and neighbour only watch).
        subject: what the fact is about, as it stands in the prompt; default: found by known names. Contrasts are made with it.
        contrasts: questions of the same wording about other subjects that the edit must not touch either; default: as many as
            the editor was trained with, 0: none.
        out: where the edit is saved (edit.safetensors); with separate the folder (edits).
        separate: each fact of the file becomes an edit and a file of its own, made on the base model.
        check: say whether the edit is safe to keep: the rephrases must get the new answer, and the answers to the unrelated
            and neighbouring questions, or to the shipped neutral ones where none are given, must stay.
        interactive: a conversation also where the input is no terminal: a line is a question, or QUESTION => NEW ANSWER.
        format: how the edit is made and all questions are asked: own, bare, statement, chat (through the model's chat template),
            chat_system, chat_turns or passage (docs/data.md); default: as the editor was trained. The edit's file says it.
    """
    nothing = prompt is None and target is None and edits is None
    if interactive and not nothing:
        raise ConfigError("--interactive asks for the facts itself. Give it without --prompt, --target and --edits.")
    if separate and edits is None:
        raise ConfigError("--separate makes an edit of each fact of a file. Give --edits FILE.")
    loading = (base, dtype, trust_remote_code, confidence, inner_steps, wordings)
    if interactive or (nothing and sys.stdin.isatty()):
        from mend_lightning.cli.commands.session import repl

        if check:
            raise ConfigError("--check is for an edit that is given. In a conversation, type :check.")
        out = out or Path("edit.safetensors")
        check_writable_file(out)
        return repl(*load_editor_and_base(editor, *loading), out, format=format)
    facts = given_facts(prompt, target, edits)
    paths = list(_paths_of(facts, out or Path("edits"))) if separate else [out or Path("edit.safetensors")]
    for path in paths:
        check_writable_file(path)
    trained, model, tokenizer = load_editor_and_base(editor, *loading)
    asked = [
        *(("rephrase", q) for q in rephrase),
        *(("unrelated", q) for q in unrelated),
        *(("neighbour", q) for q in neighbour),
        *(("keep", q) for q in keep),
    ]
    if subject is not None and edits is not None:
        raise ConfigError("--subject is of a single fact. Leave it out beside --edits.")
    constraints = _Constraints(keep, contrasts, [subject] if subject else [])
    if not trained.changes_weights:
        if check or separate or keep or contrasts:
            raise ConfigError(
                f"{type(trained).__name__} changes no weight: there is no edit to check, to constrain or to save."
            )
        _show_only(trained, model, tokenizer, facts, asked, format)
        return 0
    parts = [[fact] for fact in facts] if separate else [facts]
    making = (trained, model, tokenizer, format, constraints)
    safe = [_edit_and_save(*making, part, asked, check, path) for part, path in zip(parts, paths)]
    return 0 if all(safe) else NOT_SAFE


@dataclass(frozen=True)
class _Constraints:
    """What an edit must leave alone; see `make_edit`."""

    keep: Sequence[str]
    contrasts: int | None
    subjects: Sequence[str]


def _edit_and_save(
    editor: Editor,
    model: nn.Module,
    tokenizer: Any,
    format: str | None,
    constraints: _Constraints,
    facts: _Asked,
    asked: _Asked,
    check: bool,
    path: Path,
) -> bool:
    """Makes an edit, shows what it does, saves it; returns whether nothing speaks against keeping it."""
    edit = make_edit(
        editor, model, tokenizer, facts, constraints.keep, constraints.contrasts, constraints.subjects, format
    )
    _print_contrasts(edit)
    encoder = editor_encoder(editor, model, tokenizer, format=format)
    found = _checked(model, encoder, edit, asked) if check else None
    shifts = found.shifts if found else _shifts(model, encoder, edit, asked)
    # The neutral questions are many; those whose answer changed are named below.
    console().print(shift_table([shift for shift in shifts if shift.kind != "neutral"], dict(facts)))
    if found:
        edit = replace(edit, about={**edit.about, "check": found.as_dict()})
        print_check(found)
    if path.exists():
        console().print(f"{escape(str(path))} was there and is replaced.", highlight=False)
    _print_saved(edit, edit.save(path), model)
    return found is None or found.safe


def _checked(model: nn.Module, encoder: Encoder, edit: Edit, asked: _Asked) -> EditCheck:
    if all(kind == "rephrase" for kind, _ in asked):
        console().print(
            f"Asking {len(neutral_questions())} neutral questions before and after the edit, which takes a while. Where "
            "--unrelated or --neighbour is given, those are asked instead.",
            highlight=False,
        )
    rephrases, unrelated, neighbours, kept = (
        [question for each, question in asked if each == kind]
        for kind in ("rephrase", "unrelated", "neighbour", "keep")
    )
    return check_edit(model, encoder, edit, rephrases, unrelated, [*neighbours, *kept])


def _print_contrasts(edit: Edit) -> None:
    contrasts = edit.about.get("contrasts", [])
    if contrasts:
        count = counted(len(contrasts), "question")
        console().print(
            f"The edit is kept off {count} of the same wording, such as {contrasts[0]!r}.",
            highlight=False,
            markup=False,
        )


def _shifts(model: nn.Module, encoder: Encoder, edit: Edit, asked: _Asked) -> list[Shift]:
    kinds, questions = zip(*(("edited", prompt) for prompt, _ in edit.facts), *asked)
    return answer_shifts(model, encoder, questions, edit, kinds, like=edit.facts[0][1])


def _paths_of(facts: _Asked, folder: Path) -> Iterator[Path]:
    """A file for each fact, named by its words; a number where two have the same."""
    taken: set[str] = set()
    for fact in facts:
        stem = slug(" ".join(fact))
        name = next(name for name in numbered(stem) if name not in taken)
        taken.add(name)
        yield folder / f"{name}.safetensors"


@torch.no_grad()
def _show_only(
    editor: Editor, model: nn.Module, tokenizer: Any, facts: _Asked, asked: _Asked, format: str | None
) -> None:
    """Answers before and after, of an editor that changes no weight and so leaves nothing to save."""
    asked = [*(("edited", question) for question, _ in facts), *asked]
    questions = [question for _, question in asked]
    with ready(editor, model, tokenizer, format) as encoder:
        before = generate_answers(model, encoder, questions)
        rows = encoder.rows(facts, [0] * len(facts), 1).to(model.device)
        after = editor.edited(model, rows).answers(model, encoder, questions)
    if encoder.kind == "classifier":
        # In the words of the edit: "true" becomes "false", and not REFUTES.
        before, after = ([in_words(name, facts[0][1]) for name in names] for names in (before, after))
    console().print(before_after_table(asked, before, after, dict(facts)))
    console().print(f"{type(editor).__name__} changes no weight, so there is no edit to save.", highlight=False)


def _print_saved(edit: Edit, path: Path, model: nn.Module) -> None:
    norms = edit.relative_norm(model)
    ranks = sorted({delta.rank for delta in edit.deltas.values()})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    layers = counted(len(edit.deltas), "layer")
    # Weights that cannot be read have no norm.
    largest = f", largest ‖ΔW‖/‖W‖ {max(norms.values()):.4f}" if norms else ""
    console().print(
        f"Edit saved to {escape(str(path))}: {path.stat().st_size / 1024:.0f} KB, {layers}, rank {rank}{largest}. The model now "
        f"gives the new answer with probability {edit.about['probability']:.2f}. The base model's weights are untouched.",
        highlight=False,
    )
