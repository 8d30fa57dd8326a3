"""What an edit says of itself, and what speaks against it."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
import transformers
from torch import nn

from mend_lightning import __version__
from mend_lightning.edits.edit import relative_norms
from mend_lightning.edits.stack_state import active_ids, question_key
from mend_lightning.errors import CollidingEditWarning, LowConfidenceWarning, NoEffectWarning
from mend_lightning.models.fingerprint import base_fingerprint, layer_fingerprints
from mend_lightning.models.forward.hooks import Delta

# An edit has missed its confidence where it reaches less than this share of it.
ENOUGH = 0.9


def warn_of_contradictions(facts: Sequence[tuple[str, str]]) -> None:
    """Warns (CollidingEditWarning) where two facts give the same question different answers."""
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


def warn_of_doubts(
    editor: str,
    confidence: float | None,
    facts: Sequence[tuple[str, str]],
    deltas: Mapping[str, Delta],
    probability: float,
    reached: bool = True,
) -> None:
    """Warns of what speaks against an edit: it does nothing, or does not make the model as sure as was asked.

    Args:
        editor: the name of the editor's class.
        confidence: the probability of the new answer that it aims at; None: it does not look.
        facts: (prompt, target) pairs of the edit.
        deltas: layer name -> Delta of one task.
        probability: of the least probable new answer under the edit.
        reached: whether the new answers are the edited model's greedy output, where the editor looks.
    """
    if not any(bool(delta.norm() > 0) for delta in deltas.values()):
        warnings.warn(f"The edit {facts} changes nothing: every delta is zero.", NoEffectWarning, stacklevel=3)
    if confidence is not None and probability < ENOUGH * confidence:
        warnings.warn(
            f"After the edit {facts} the model gives the new answer with probability {probability:.2f}; the editor aims at "
            f"{confidence}. Look at its answers before you keep it.",
            LowConfidenceWarning,
            stacklevel=3,
        )
    if not reached:
        warnings.warn(
            f"{editor} came to its end before the model gave the new answer of {facts} (probability "
            f"{probability:.2f}). Give it more steps or a higher learning rate, or look at its answers before you keep it.",
            LowConfidenceWarning,
            stacklevel=3,
        )


def provenance(
    description: Mapping[str, Any],
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    facts: Sequence[tuple[str, str]],
    deltas: Mapping[str, Delta],
    probabilities: tuple[float, float],
    holds_resting: bool = False,
) -> dict[str, Any]:
    """What an edit's file says of it beside the factors: its facts, base, editor, size, date and versions.

    Args:
        description: of the editor (`Editor.description`).
        model: the base, whose enabled edits the new one is on top of.
        layers: layer name -> module of every layer of the editor.
        facts: (prompt, target) pairs of the edit.
        deltas: layer name -> Delta of one task.
        probabilities: of the least probable new answer before and under the edit.
        holds_resting: whether the deltas hold what the editor trained of the base as well.
    """
    norms = relative_norms(deltas, layers)
    return {
        "id": uuid.uuid4().hex[:12],
        "edits": [{"prompt": prompt, "target": target} for prompt, target in facts],
        "on_top_of": active_ids(model),
        "base": description["base"],
        "base_options": description["base_options"],
        "base_fingerprint": base_fingerprint({name: layers[name] for name in sorted(layers)}),
        "weights": layer_fingerprints({name: layers[name] for name in deltas}),
        "relative_norm": {name: four_digits(norm) for name, norm in norms.items()},
        "editor": description["class"],
        **({"holds_resting": True} if holds_resting else {}),
        "prompt_format": description["prompt_format"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "mend_lightning": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "probability_before": four_digits(probabilities[0]),
        "probability": four_digits(probabilities[1]),
    }


def four_digits(number: float) -> float:
    """Four significant digits: a base gives an answer with probability 1e-7, not with 0.

    Example:
        >>> four_digits(1.23456e-7)
        1.235e-07
    """
    return float(f"{number:.4g}")
