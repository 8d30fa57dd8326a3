"""What training changed: the editor that a run leaves beside the one that it began with, on the same edits."""

from __future__ import annotations

from typing import Any

import lightning as L

from mend_lightning.training.progress.console import console
from mend_lightning.training.trainer_parts import is_fast_dev_run
from mend_lightning.training.validations import Validation

# Metric -> how it is called; shares, of which more is better.
SHARES = {"edit_success": "success", "generality": "generality", "kept": "kept"}
KL = "locality_kl"
# A KL that is lower or higher by less than this share of it is the same.
SAME_KL = 0.05


def training_change(before: Validation, after: Validation, began_with: str = "the untrained editor") -> str:
    """One line about what training changed, and whether that was worth it.

    A share that moved by less than one edit in all of them has not moved. (Which edits succeed is not known here, only how
    many; `mend-lightning compare` pairs them and gives intervals.)

    Args:
        before: the validation before the first step.
        after: that of the editor which the run leaves.
        began_with: names the editor before the first step.

    Example:
        >>> before = Validation(0, 96, {"edit_success": 0.955, "kept": 0.98, "locality_kl": 0.0118})
        >>> after = Validation(60, 96, {"edit_success": 0.983, "kept": 0.98, "locality_kl": 0.01})
        >>> training_change(before, after)
        'Training changed, on 96 validation edits: success 0.955 → 0.983, kept 0.980 → 0.980, KL 0.0118 → 0.0100.'
    """
    names = {**SHARES, KL: "KL"}
    both = [name for name in names if name in before.values and name in after.values]
    pairs = [f"{names[name]} {_number(name, before)} → {_number(name, after)}" for name in both]
    verdict = _verdict(*_moved(before, after, both), began_with)
    return f"Training changed, on {after.edits} validation edits: {', '.join(pairs)}.{verdict}"


def _number(name: str, validation: Validation) -> str:
    return f"{validation.values[name]:.{4 if name == KL else 3}f}"


def _moved(before: Validation, after: Validation, both: list[str]) -> tuple[list[str], list[str]]:
    """What is better, and what is worse, by more than nothing."""
    better: list[str] = []
    worse: list[str] = []
    for name in both:
        change = after.values[name] - before.values[name]
        least = SAME_KL * before.values[name] if name == KL else 1 / after.edits
        # What is printed as equal is equal, whatever rounding made of it.
        if abs(change) > 1e-6 and abs(change) >= 0.999 * least:
            gains = change < 0 if name == KL else change > 0
            (better if gains else worse).append("KL" if name == KL else SHARES[name])
    return better, worse


def _verdict(better: list[str], worse: list[str], began_with: str) -> str:
    if worse:
        also = f" It is better in {' and '.join(better)}." if better else " It is better in nothing."
        return f" It did harm: the editor is worse than {began_with} in {' and '.join(worse)}.{also}"
    return "" if better else f" The editor is no better than {began_with}."


class TrainingChange(L.Callback):
    """Says at the end of `fit` what training changed (`training_change`), where the run validated before its first step."""

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        mend: Any = module
        validations = mend.looks.validations
        after = validations.kept or validations.last
        if trainer.is_global_zero and not is_fast_dev_run(trainer) and validations.first and after:
            line = training_change(validations.first, after, mend.looks.began_with)
            if validations.kept is None and after.step != trainer.global_step:
                line += (
                    f" (That is the validation after step {after.step}: the editor that was kept has none of its own.)"
                )
            console().print(line, highlight=False, markup=False, soft_wrap=True)
