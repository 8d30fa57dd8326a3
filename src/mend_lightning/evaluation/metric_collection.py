"""All metrics of an evaluation side by side, updated from one batch's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.edits.provenance import ENOUGH
from mend_lightning.evaluation.evaluate import BatchScores, ComparedScores, RowScores
from mend_lightning.evaluation.metrics import (
    Drawdown,
    EditSuccess,
    MedianShare,
    PerplexityDrawdown,
    RowShare,
    WeightedMean,
)
from mend_lightning.models.fingerprint import readable_weight
from mend_lightning.models.forward.hooks import Delta

# name -> (what it says, how it is measured): the results table and results.json quote this.
PROTOCOL = {
    "edit_success": ("Edit success (paper)", "x_e and rephrases, teacher-forced, whole row"),
    "reliability": ("Reliability", "x_e only, teacher-forced, whole row"),
    "generality": ("Generality", "rephrases only, teacher-forced, whole row (the original's edit/acc)"),
    "token_accuracy": ("Token accuracy", "x_e and rephrases, teacher-forced, per token"),
    "generated_exact_match": (
        "Generated exact match",
        "x_e and rephrases, greedy until the natural stop (running text: the target's length)",
    ),
    "generated_f1": ("Generated F1", "x_e and rephrases, word overlap of the same answers"),
    "confident": ("Confident edits", f"x_e, share whose whole answer reaches {ENOUGH} × confidence, teacher-forced"),
    "probability": ("Probability of the new answer", "x_e, whole answer, teacher-forced, median over edits"),
    "base_accuracy": ("Base knows", "x_out right before the edit, teacher-forced, whole row"),
    "stop_probability": ("Base ends its answers", "x_out, probability of the stop behind the true answer, mean"),
    "kept": ("Known facts retained (locality)", "of x_out right before, share right after"),
    "kept_hard": (
        "Known facts retained, hard",
        "the same, hard x_out only (the edit's relation, or named so by the data)",
    ),
    "drawdown": ("Drawdown (paper)", "accuracy on x_out before minus after"),
    "perplexity_drawdown": ("Perplexity drawdown", "perplexity of x_out's answers after minus before"),
    "locality_agreement": ("Locality agreement", "answer positions of x_out whose arg max is unchanged"),
    "locality_kl": ("Locality KL (nats)", "KL(base ‖ edited), mean over answer positions of x_out"),
    "delta_norm": ("‖ΔW‖ / ‖W‖", "Frobenius, mean over edited layers"),
}


@torch.no_grad()
def weight_norms(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """name -> Frobenius norm of each layer's weight, but for weights that cannot be read (packed in 4 or 8 bit).

    Every process that shares the layers must ask.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> torch.equal(weight_norms({"fc": layer})["fc"], layer.weight.norm())
        True
    """
    weights = {name: readable_weight(layer) for name, layer in layers.items()}
    return {name: weight.float().norm() for name, weight in weights.items() if weight is not None}


def reaches(rows: RowScores, confidence: float) -> Tensor:
    """Which rows' new answers are about as probable as was asked for: `[rows]` bool."""
    return rows.probability_after >= ENOUGH * confidence


class Scoreboard(nn.Module):
    """Every metric of one evaluation; states are reduced over processes by torchmetrics."""

    def __init__(self) -> None:
        super().__init__()
        shares = (
            "reliability",
            "generality",
            "base_accuracy",
            "kept",
            "kept_hard",
            "generated_exact_match",
            "confident",
        )
        means = (
            "token_accuracy", "locality_agreement", "locality_kl", "generated_f1", "delta_norm", "edit_nll",
            "stop_probability",
        )  # fmt: skip
        # Any: a ModuleDict does not say what it holds.
        self.metrics: Any = nn.ModuleDict(
            {
                "edit_success": EditSuccess(),
                "drawdown": Drawdown(),
                "perplexity_drawdown": PerplexityDrawdown(),
                "probability": MedianShare(),
                **{name: RowShare() for name in shares},
                **{name: WeightedMean() for name in means},
            }
        )

    def update(
        self, scores: BatchScores, hard: Tensor, confidence: float | None = None, has_stop: bool = False
    ) -> None:
        """Takes in a batch.

        Args:
            scores: from `evaluate_batch`.
            hard: `[locality rows]` bool, which of them have the edit's relation.
            confidence: probability of its new answer that each edit aims at; None: the editor does not look.
            has_stop: whether the last label token of a row is what ends its answer.
        """
        metrics = self.metrics
        for part in (scores.edit, scores.rephrase):
            metrics["edit_success"].update(part.correct_after)
            metrics["token_accuracy"].update(part.hits / part.tokens, part.tokens)
        metrics["reliability"].update(scores.edit.correct_after)
        metrics["generality"].update(scores.rephrase.correct_after)
        metrics["edit_nll"].update(scores.rephrase.nll_after / scores.rephrase.tokens, scores.rephrase.tokens)
        metrics["probability"].update(scores.edit.probability_after)
        if confidence is not None:
            metrics["confident"].update(reaches(scores.edit, confidence))
        self._update_locality(scores.locality, hard)
        if has_stop:
            metrics["stop_probability"].update(scores.locality.end_before)

    def _update_locality(self, rows: ComparedScores, hard: Tensor) -> None:
        metrics, known = self.metrics, rows.correct_before
        metrics["base_accuracy"].update(known)
        metrics["kept"].update(rows.correct_after[known])
        metrics["kept_hard"].update(rows.correct_after[known & hard])
        metrics["drawdown"].update(known, rows.correct_after)
        metrics["perplexity_drawdown"].update(rows.nll_before, rows.nll_after, rows.tokens)
        metrics["locality_agreement"].update(rows.agreement / rows.tokens, rows.tokens)
        metrics["locality_kl"].update(rows.kl / rows.tokens, rows.tokens)

    def update_norms(self, deltas: Mapping[str, Delta], weights: Mapping[str, Tensor]) -> None:
        """Takes in how large the deltas are beside the weights they stand for, whose norms are `weights` (`weight_norms`)."""
        for name in deltas.keys() & weights.keys():
            self.metrics["delta_norm"].update(deltas[name].norm() / weights[name])

    def update_generated(self, matches: Sequence[bool], f1: Sequence[float]) -> None:
        """Takes in the exact match and F1 of generated answers."""
        device = self.metrics["generated_f1"].value_sum.device
        self.metrics["generated_exact_match"].update(torch.tensor(matches, device=device))
        self.metrics["generated_f1"].update(torch.tensor(f1, device=device))

    def compute(self) -> dict[str, float]:
        """name -> value of every metric that saw something on some process."""
        values = {name: float(metric.compute()) for name, metric in self.metrics.items() if metric.update_called}
        return {name: value for name, value in values.items() if value == value}

    def edits(self) -> int:
        """Edits that were taken in by all processes together, each of which must ask."""
        metric = self.metrics["reliability"]
        with metric.sync_context():
            return int(metric.rows)

    def reset(self) -> None:
        for metric in self.metrics.values():
            metric.reset()
