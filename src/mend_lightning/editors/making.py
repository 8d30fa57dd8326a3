"""Makes edits: from facts and a trained editor to an `Edit`."""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from mend_lightning.editors.confidence import target_nll, worst_of_task
from mend_lightning.editors.editor import Editor, Made
from mend_lightning.edits.deltas import Delta, applied
from mend_lightning.edits.edit import Edit, relative_norms
from mend_lightning.edits.stack_state import active_ids, question_key
from mend_lightning.errors import CollidingEditWarning, ConfigError, LowConfidenceWarning, NoEffectWarning
from mend_lightning.models.fingerprint import base_fingerprint, layer_fingerprints
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.prompts import PromptFormat
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.sharding.collectives import own_class


def editor_encoder(editor: Editor, model: nn.Module, tokenizer: Any, max_length: int = 200) -> Encoder:
    """The encoder with the prompt format that `editor` was trained with."""
    return Encoder.for_model(model, tokenizer, PromptFormat(**editor.prompt_format), max_length)


def make_edit(
    editor: Editor, model: nn.Module, tokenizer: Any, facts: Sequence[tuple[str, str]] | tuple[str, str]
) -> Edit:
    """Edits `model` so that it answers each prompt with its target; the model itself stays as it is.

    Args:
        editor: a trained editor of this model.
        model: the base model, in eval mode.
        tokenizer: its tokenizer.
        facts: (prompt, target) pairs that make one edit together; or a single pair.

    Raises:
        BaseModelMismatchError: the editor is for another base.
        ConfigError: there is no fact, the model is in training mode, or the editor changes no weight.

    Warns:
        CollidingEditWarning: two of the facts give the same question different answers.
    """
    facts = [tuple(facts)] if facts and isinstance(facts[0], str) else list(facts)
    if not facts:
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
    _warn_of_contradictions(facts)
    made, before, probability = _made(model, editor, tokenizer, facts)
    parts = {name: delta.of_task(0) for name, delta in made.deltas.items()}
    _warn_of_doubts(editor, facts, parts, made, probability)
    measured = {"probability_before": _rounded(before), "probability": _rounded(probability)}
    return Edit(parts, {**_about(editor, model, facts, parts), **measured})


def _warn_of_contradictions(facts: Sequence[tuple[str, str]]) -> None:
    first: dict[str, tuple[str, str]] = {}
    for fact in facts:
        other = first.setdefault(question_key(fact[0]), fact)
        if other[1].strip() != fact[1].strip():
            warnings.warn(
                f"Two facts of one edit give the same question different answers: {other[0]!r} -> {other[1]!r} and "
                f"{fact[0]!r} -> {fact[1]!r}. Keep one of them.",
                CollidingEditWarning,
                stacklevel=3,
            )


def _warn_of_doubts(
    editor: Editor, facts: Sequence[tuple[str, str]], parts: Mapping[str, Delta], made: Made, probability: float
) -> None:
    """Says what speaks against an edit: it does nothing, or does not make the model as sure as was asked."""
    if not any(bool(delta.norm() > 0) for delta in parts.values()):
        warnings.warn(f"The edit {facts} changes nothing: every delta is zero.", NoEffectWarning, stacklevel=3)
    if editor.confidence is not None and probability < 0.9 * editor.confidence:
        warnings.warn(
            f"After the edit {facts} the model gives the new answer with probability {probability:.2f}; the editor aims at "
            f"{editor.confidence}. Look at its answers before you keep it.",
            LowConfidenceWarning,
            stacklevel=3,
        )
    if made.reached is not None and not bool(made.reached.all()):
        warnings.warn(
            f"{type(editor).__name__} came to its end before the model gave the new answer of {facts} (probability "
            f"{probability:.2f}). Give it more steps or a higher learning rate, or look at its answers before you keep it.",
            LowConfidenceWarning,
            stacklevel=3,
        )


def _made(
    model: nn.Module, editor: Editor, tokenizer: Any, facts: Sequence[tuple[str, str]]
) -> tuple[Made, float, float]:
    """What the editor made, and the probability of the least probable fact without and with it."""
    with ready(editor, model, tokenizer) as encoder, torch.no_grad():
        rows = encoder.rows(facts, [0] * len(facts), 1).to(next(model.parameters()).device)
        before = _least_probable(model, rows)
        made = editor.make_deltas(model, rows)
        with applied(editor.modules_in(model), made.deltas):
            return made, before, _least_probable(model, rows)


def _least_probable(model: nn.Module, rows: Rows) -> float:
    return math.exp(-float(worst_of_task(target_nll(model, rows), rows)))


def _rounded(probability: float) -> float:
    """Four significant digits: a base gives a new answer with probability 1e-7, not with 0."""
    return float(f"{probability:.4g}")


@contextmanager
def ready(editor: Editor, model: nn.Module, tokenizer: Any) -> Iterator[Encoder]:
    """The editor in eval mode on the model's device, checked, with an encoder; afterwards where it was."""
    editor.check_base(model)
    encoder = editor_encoder(editor, model, tokenizer)
    training, before = editor.training, editor.encoder
    home = next((parameter.device for parameter in editor.parameters()), None)
    editor.eval().to(next(model.parameters()).device)
    editor.encoder = encoder
    try:
        yield encoder
    finally:
        editor.encoder = before
        editor.train(training)
        if home is not None:
            editor.to(home)


def _about(
    editor: Editor, model: nn.Module, facts: Sequence[tuple[str, str]], deltas: Mapping[str, Delta]
) -> dict[str, Any]:
    import transformers

    from mend_lightning import __version__

    layers = editor.modules_in(model)
    norms = relative_norms(deltas, layers)
    resting = {"holds_resting": True} if editor.resting_deltas() is not None else {}
    return {
        "id": uuid.uuid4().hex[:12],
        "edits": [{"prompt": prompt, "target": target} for prompt, target in facts],
        "on_top_of": active_ids(model),
        "base": editor.base_name,
        "base_options": editor.base_options,
        "base_fingerprint": base_fingerprint({name: layers[name] for name in sorted(layers)}),
        "weights": layer_fingerprints({name: layers[name] for name in deltas}),
        "relative_norm": {name: float(f"{norm:.4g}") for name, norm in norms.items()},
        "editor": own_class(editor).__name__,
        **resting,
        "prompt_format": editor.prompt_format,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "mend_lightning": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
