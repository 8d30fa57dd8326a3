"""Makes an `Edit` of facts with a trained editor: the editor's deltas, and what the edit's file says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import nn

from mend_lightning.editors.confidence import least_probability
from mend_lightning.editors.contrasts import neighbors_of
from mend_lightning.editors.edited_model import Made
from mend_lightning.edits.edit import Edit
from mend_lightning.edits.provenance import provenance, warn_of_contradictions, warn_of_doubts
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.hooks import Delta, applied
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.formats import FormatSpec, in_format, named_format
from mend_lightning.models.inputs.prompts import PromptFormat
from mend_lightning.models.inputs.rows import Rows


class WeightEditor(Protocol):
    """What edits are made with, and all that is asked of it here: every `Editor` has it."""

    changes_weights: bool
    confidence: float | None
    prompt_format: dict[str, str]
    encoder: Encoder | None
    training: bool
    constrains: bool
    settings: dict[str, Any]
    names: dict[str, tuple[str, ...]]

    def check_base(self, model: nn.Module) -> None: ...
    def description(self) -> dict[str, Any]: ...
    def make_deltas(self, model: nn.Module, z_edit: Rows, *, x_keep: Rows | None = None) -> Made: ...
    def modules_in(self, model: nn.Module) -> dict[str, nn.Module]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def base_deltas(self) -> Mapping[str, Delta] | None: ...
    def to(self, device: torch.device) -> Any: ...
    def train(self, mode: bool) -> Any: ...


def editor_encoder(
    editor: WeightEditor, model: nn.Module, tokenizer: Any, max_length: int = 200, format: FormatSpec | None = None
) -> Encoder:
    """The encoder with the prompt format that `editor` was trained with, or with another one; see `make_edit`."""
    own = Encoder.for_model(model, tokenizer, PromptFormat(**editor.prompt_format), max_length)
    return in_format(own, format)


def make_edit(
    editor: WeightEditor,
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[tuple[str, str]] | tuple[str, str],
    keep: Sequence[str] = (),
    contrasts: int | None = None,
    subjects: Sequence[str] = (),
    format: FormatSpec | None = None,
) -> Edit:
    """Edits `model` so that it answers each prompt with its target; the model itself stays as it is.

    Args:
        editor: a trained editor of this model.
        model: the base model, in eval mode.
        tokenizer: its tokenizer.
        facts: (prompt, target) pairs that make one edit together; or a single pair.
        keep: questions whose answers the edit must not touch; they constrain it (`constraints`).
        contrasts: neighbors of each fact (`data.neighbors`) that constrain it as well; None: as many as the editor was
            trained with.
        subjects: what each fact is about, as it stands in its prompt; empty: found by the names that are known.
        format: the format that the facts are asked in (docs/data.md, "Formats to ask in"), such as "chat"; None: the one that
            the editor was trained with. The edit's `about` says which.

    Raises:
        BaseModelMismatchError: the editor is for another base.
        ConfigError: there is no fact, the model is in training mode, the editor changes no weight, or cannot be
            constrained; a subject is not in its prompt; the model cannot be asked in that format.

    Warns:
        CollidingEditWarning: two of the facts give the same question different answers.
    """
    pairs: list[Any] = [tuple(facts)] if facts and isinstance(facts[0], str) else list(facts)
    if not pairs:
        raise ConfigError("An edit needs at least one (prompt, target) pair.")
    if model.training:
        raise ConfigError(
            "The model is in training mode, where dropout would change the edit. Call model.eval() first."
        )
    if not editor.changes_weights:
        raise ConfigError(
            f"{type(editor).__name__} changes no weight, so it makes no Edit that could be saved or merged. "
            "`mend-lightning edit` shows what it does; in Python use editor.edited(model, rows)."
        )
    warn_of_contradictions(pairs)
    near = neighbors_of(editor, pairs, keep, contrasts, subjects)
    with ready(editor, model, tokenizer, format) as encoder, torch.no_grad():
        layers = editor.modules_in(model)
        rows = encoder.rows(pairs, [0] * len(pairs), 1).to(next(model.parameters()).device)
        before = least_probability(model, rows)
        kept = [(question, pairs[0][1]) for question in (*keep, *near)]
        x_keep = encoder.rows(kept, [0] * len(kept), 1).to(rows.task.device) if kept else None
        made = editor.make_deltas(model, rows, x_keep=x_keep)
        with applied(layers, made.deltas):
            probability = least_probability(model, rows)
    deltas = {name: delta.of_task(0) for name, delta in made.deltas.items()}
    reached = made.reached is None or bool(made.reached.all())
    warn_of_doubts(type(editor).__name__, editor.confidence, pairs, deltas, probability, reached)
    holds_resting = editor.base_deltas() is not None
    about = provenance(editor.description(), model, layers, pairs, deltas, (before, probability), holds_resting)
    kept_off = {name: questions for name, questions in (("keep", list(keep)), ("contrasts", near)) if questions}
    return Edit(deltas, {**about, **kept_off, **format_notes(editor, encoder, format)})


def format_notes(editor: WeightEditor, encoder: Encoder, format: FormatSpec | None) -> dict[str, Any]:
    """What an edit says of the format that it was made in, where that is another one than the editor's own."""
    if format is None:
        return {}
    notes = {"format": named_format(format).name, "prompt_format": asdict(encoder.format)}
    # Other formats are made of it when the edit is asked in them.
    return {**notes, "own_format": asdict(PromptFormat(**editor.prompt_format))}


@contextmanager
def ready(
    editor: WeightEditor, model: nn.Module, tokenizer: Any, format: FormatSpec | None = None
) -> Iterator[Encoder]:
    """The editor in eval mode on the model's device, checked, with an encoder; afterwards where it was."""
    editor.check_base(model)
    encoder = editor_encoder(editor, model, tokenizer, format=format)
    training, before = editor.training, editor.encoder
    home = next((parameter.device for parameter in editor.parameters()), None)
    editor.train(False).to(next(model.parameters()).device)
    editor.encoder = encoder
    try:
        yield encoder
    finally:
        editor.encoder = before
        editor.train(training)
        if home is not None:
            editor.to(home)
