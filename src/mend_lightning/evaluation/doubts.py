"""What speaks against a run at the first look at its edits, and what is likely to have caused it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from mend_lightning.edits.provenance import ENOUGH
from mend_lightning.errors import FailingRunWarning
from mend_lightning.models.inputs.prompts import RUNNING_TEXT

# Of the unrelated questions the base shall answer so many right, or nobody sees what edits cost.
BASE_KNOWS = 0.1
# From so many edits on that miss their confidence it is not the edits.
MISSES = 0.2
# Fewer edits than that succeed.
SUCCEEDS = 0.5
# What is left out of values where it is not a number.
LOSSES = ("edit_nll", "locality_kl")
# A cause is named where the figure that speaks for it is below this.
SUSPICIOUS = 0.5


@dataclass(frozen=True)
class Asked:
    """What an evaluation was asked to do, as far as its figures can be judged by it.

    Attributes:
        prompt_format: the text around questions and answers, as it is saved with an editor; empty where nobody knows it.
        confidence: probability of its new answer that each edit aims at; None: the editor does not look.
        classifies: whether the base answers with a class, which nothing ends.
        trained: whether the editor has been trained, or needs no training: one that is to learn how large an edit is does
            not succeed before it has.
    """

    prompt_format: Mapping[str, str | None]
    confidence: float | None = None
    classifies: bool = False
    trained: bool = True

    @property
    def has_stop(self) -> bool:
        """Whether something ends an answer, and is measured with it."""
        return not self.classifies and self.prompt_format.get("stop") is not None

    @property
    def running_text(self) -> bool:
        """Whether the data are texts to go on with, of which nobody knows every word; perplexity measures those."""
        return all(self.prompt_format.get(name) == getattr(RUNNING_TEXT, name) for name in ("target", "stop"))

    @property
    def judges_success(self) -> bool:
        return self.trained or self.confidence is not None


def findings(values: Mapping[str, float], asked: Asked) -> dict[str, str]:
    """What is wrong, each under the metric that shows it: "edit_nll", "base_accuracy", "confident", "edit_success".

    Args:
        values: name -> value, from `Scoreboard.compute`.
        asked: what they are judged by.

    Example:
        >>> values = {"edit_success": 0.1, "base_accuracy": 0.6, "edit_nll": 4.0, "locality_kl": 0.1}
        >>> findings(values, Asked({"prompt": "{input}", "stop": "."}))
        {'edit_success': 'edit success is 0.100, under one half'}
    """
    found = {}
    if not all(name in values for name in LOSSES):
        found["edit_nll"] = "the losses of edited models are not finite"
    if "base_accuracy" in values and values["base_accuracy"] < BASE_KNOWS and not asked.running_text:
        found["base_accuracy"] = (
            f"the base model answers {values['base_accuracy']:.3f} of the unrelated questions (x_out) right, fewer than a "
            "tenth, so nobody sees what edits cost"
        )
    # Metrics are float32.
    if "confident" in values and 1 - values["confident"] >= MISSES - 1e-6:
        found["confident"] = (
            f"{1 - values['confident']:.3f} of the edits miss their confidence: less than {ENOUGH} × {asked.confidence}, "
            f"median probability {values['probability']:.3g}"
        )
    if asked.judges_success and values.get("edit_success", 1.0) < SUCCEEDS:
        found["edit_success"] = f"edit success is {values['edit_success']:.3f}, under one half"
    return found


def causes(values: Mapping[str, float], asked: Asked, found: Mapping[str, str]) -> list[str]:
    """The likely causes of what `findings` found, the likeliest first, each with the figure that speaks for it."""
    named = []
    if values.get("stop_probability", 1.0) < SUSPICIOUS:
        named.append(
            f"the stop text (data.stop, {_stop(asked)}): behind the true answers of x_out the base model says it with probability "
            f"{values['stop_probability']:.2g}. Take one that the model does say there, or null where the answer goes on"
        )
    if values.get("base_accuracy", 1.0) < SUSPICIOUS and not asked.running_text:
        named.append(
            f"the prompt (data.prompt, {asked.prompt_format.get('prompt')!r}): asked so, the base model answers "
            f"{values['base_accuracy']:.3f} of x_out right. A worked example in it often helps, and so do facts that a model of "
            "this size knows"
        )
    if found.keys() - {"base_accuracy"}:
        reached = f"{values['confident']:.3f} of the edits reach their confidence, " if "confident" in values else ""
        named.append(
            f"the layers (model.layers): {reached}the new answers' median probability is {values['probability']:.3g}. Earlier or "
            "later blocks, or more of them, may reach further (`mend-lightning layers MODEL`)"
        )
        size = f": ‖ΔW‖/‖W‖ is {values['delta_norm']:.3g}" if "delta_norm" in values else ""
        named.append(
            f"the edit rate (model.edit_rate, and what it learns by){size}. Too small, an edit does not reach its answer; too "
            "large, it overshoots"
        )
    return named


def _stop(asked: Asked) -> str:
    stop = asked.prompt_format.get("stop")
    return repr(stop) if stop else "the end-of-sequence token"


def failure(values: Mapping[str, float], edits: int, asked: Asked, what: str) -> str | None:
    """What to say of an evaluation that fails; None where it does not.

    Args:
        values: name -> value, from `Scoreboard.compute`.
        edits: that were evaluated.
        asked: what they are judged by.
        what: names the evaluation.
    """
    found = findings(values, asked)
    if not found:
        return None
    numbered = "; ".join(f"({number}) {cause}" for number, cause in enumerate(causes(values, asked, found), start=1))
    likely = f" Likely causes, the likeliest first: {numbered}." if numbered else ""
    return f"{what} fails, on {edits} edits: {'; '.join(found.values())}.{likely}"


def warn_of_failure(values: Mapping[str, float], edits: int, asked: Asked, what: str) -> bool:
    """Warns (FailingRunWarning) of an evaluation that fails, and returns whether it does; arguments as in `failure`."""
    text = failure(values, edits, asked, what)
    if text is not None:
        warnings.warn(text, FailingRunWarning, stacklevel=2)
    return text is not None
