"""`mend-lightning edit`: one fact or several, before and after, and the edit as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from mend_lightning.base import Dtype, load_base
from mend_lightning.data.encode import in_words
from mend_lightning.edit import Edit
from mend_lightning.editors.editor import Editor
from mend_lightning.errors import ConfigError, DataFileError, RecordError
from mend_lightning.functional import exact_match
from mend_lightning.generate import generate_answers
from mend_lightning.making import make_edit, ready
from mend_lightning.report import console


def edit_command(
    editor: Path = Path("runs/quickstart/editor"),
    prompt: str | None = None,
    target: str | None = None,
    edits: Path | None = None,
    base: str | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    confidence: float | None = None,
    rephrase: list[str] = [],
    unrelated: list[str] = [],
    neighbour: list[str] = [],
    out: Path = Path("edit.safetensors"),
) -> None:
    """Changes what the base model answers; prints answers before and after, saves the edit as a file.

    The model's weights stay as they are: the edit is an adapter beside them (low-rank, but for fine-tuning and ENN), and
    removing it undoes it exactly.

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
        rephrase: other phrasings of the question, to be asked before and after.
        unrelated: questions whose answers must not change.
        neighbour: questions near the edited fact whose answers must not change.
        out: where the edit is saved.
    """
    facts = _facts(prompt, target, edits)
    trained = Editor.from_pretrained(editor)
    if not (base or trained.base_name):
        raise ConfigError(f"{editor} does not say which base model it is for. Give --base (a model id or folder).")
    if confidence is not None:
        trained.set_confidence(confidence)
    # Another base is loaded as it asks to be; the editor's own as it was for training.
    options = {} if base else trained.base_options
    model, tokenizer = load_base(base or trained.base_name, dtype, trust_remote_code=trust_remote_code, **options)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    asked = [("edited", question) for question, _ in facts]
    for kind, questions in (("rephrase", rephrase), ("unrelated", unrelated), ("near neighbour", neighbour)):
        asked += [(kind, question) for question in questions]
    questions = [question for _, question in asked]
    with ready(trained, model, tokenizer) as encoder, torch.no_grad():
        before = generate_answers(model, encoder, questions)
        if trained.changes_weights:
            edit = make_edit(trained, model, tokenizer, facts)
            with edit.applied(model):
                after = generate_answers(model, encoder, questions)
        else:
            rows = encoder.rows(facts, [0] * len(facts), 1).to(model.device)
            after = trained.edited(model, rows).answers(model, encoder, questions)
    if encoder.kind == "classifier":
        # In the words of the edit: "true" becomes "false", and not REFUTES.
        before, after = ([in_words(name, facts[0][1]) for name in names] for names in (before, after))
    console().print(before_after_table(asked, before, after, dict(facts)))
    if trained.changes_weights:
        _print_saved(edit, edit.save(out), model)
    else:
        console().print(f"{type(trained).__name__} changes no weight, so there is no edit to save.", highlight=False)


def _facts(prompt: str | None, target: str | None, edits: Path | None) -> list[tuple[str, str]]:
    if edits is not None:
        if prompt is not None or target is not None:
            raise ConfigError("Give either --edits FILE, or --prompt and --target, not both.")
        return read_facts(edits)
    if prompt is None or target is None:
        raise ConfigError("An edit needs --prompt and --target (or --edits FILE with several of them).")
    return [(prompt, target)]


def read_facts(path: Path) -> list[tuple[str, str]]:
    """(prompt, target) pairs of a JSONL file.

    Raises:
        DataFileError: the file cannot be read.
        RecordError: a line is not an object with text under `prompt` and `target`, or there is no line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"The edits file {path} cannot be read: {error}") from error
    facts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            fact = data["prompt"], data["target"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RecordError(
                f'{path}, line {number}: expected {{"prompt": "…", "target": "…"}}, got {line[:80]!r} ({error}).'
            ) from error
        if not all(isinstance(text, str) and text.strip() for text in fact):
            raise RecordError(f"{path}, line {number}: prompt and target must be non-empty texts, got {fact!r}.")
        facts.append(fact)
    if not facts:
        raise RecordError(f'{path} holds no edit. Expected lines like {{"prompt": "…", "target": "…"}}.')
    return facts


def before_after_table(
    asked: list[tuple[str, str]], before: list[str], after: list[str], targets: dict[str, str]
) -> Table:
    """What the model answered before and after the edit.

    Args:
        asked: (kind, question) pairs; before, after: the answers; targets: question -> wanted answer.
    """
    table = Table(title="Before and after the edit", title_justify="left")
    for column in ("", "question", "before", "after", ""):
        table.add_column(column)
    for (kind, question), old, new in zip(asked, before, after):
        if kind in ("edited", "rephrase"):
            # A rephrase does not say which of several edits it rephrases.
            wanted = [targets[question]] if kind == "edited" else list(targets.values())
            reached = any(exact_match(new, target) for target in wanted)
            verdict = "[green]changed as asked[/]" if reached else "[red]not what was asked[/]"
        else:
            verdict = "[green]unchanged[/]" if new == old else "[red]changed[/]"
        table.add_row(kind, escape(question), escape(old), escape(new), verdict)
    return table


def _print_saved(edit: Edit, path: Path, model: Any) -> None:
    norms = edit.relative_norm(model)
    largest = max(norms.values())
    ranks = sorted({delta.rank for delta in edit.deltas.values()})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    layers = f"{len(norms)} layer" if len(norms) == 1 else f"{len(norms)} layers"
    console().print(
        f"Edit saved to {path}: {path.stat().st_size / 1024:.0f} KB, {layers}, rank {rank}, largest ‖ΔW‖/‖W‖ {largest:.4f}. "
        f"The model now gives the new answer with probability {edit.about['probability']:.2f}. The base model's weights are "
        "untouched.",
        highlight=False,
    )
