"""Rows that ask how probable whole answers are, empty ones as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mend_lightning.models.forward.generation import stop_ids
from mend_lightning.models.forward.logits import label_mask, logits_at, row_of
from mend_lightning.models.forward.losses import is_correct, mean_by_task, rows_all_true, rows_sum, token_kl, token_nll
from mend_lightning.models.inputs.encoder import Encoder, class_name
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows


def answer_rows(
    encoder: Encoder, asked: Sequence[tuple[str, str]], device: torch.device
) -> tuple[Rows, Tensor, Tensor]:
    """Rows of (question, answer), the positions that count `[rows, length]`, and which answers are empty `[rows]`.

    Of an answer all its tokens count, the stop included. An empty answer has none: there the first position counts, where
    the model stops.
    """
    pairs = [(question, answer or any_answer(encoder)) for question, answer in asked]
    rows = encoder.rows(pairs, [0] * len(pairs), 1).to(device)
    empty = torch.tensor([not answer for _, answer in asked], device=device)
    return rows, torch.where(empty[:, None], first_labels(rows.labels), label_mask(rows)), empty


def answer_nll(logits: Tensor, targets: Tensor, empty: Tensor, encoder: Encoder) -> Tensor:
    """Negative log-likelihood of each position: `[n]` float32.

    Args:
        logits: `[n, vocabulary]`; targets: `[n]` ids.
        empty: `[n]` bool, positions of empty answers: there it is that of all tokens that end an answer together.
        encoder: knows which those are.
    """
    nll = token_nll(logits, targets)
    if bool(empty.any()):
        ids = list(stop_ids(encoder.tokenizer, encoder.format.stop or ""))
        nll[empty] = -logits[empty].float().log_softmax(-1)[:, ids].logsumexp(-1)
    return nll


def first_labels(labels: Tensor) -> Tensor:
    """The first position with a label of every row: `[rows, length]` bool.

    Example:
        >>> first_labels(torch.tensor([[-100, 5, 6, -100]])).tolist()
        [[False, True, False, False]]
    """
    mask = labels != IGNORED_LABEL
    return mask & (mask.cumsum(1) == 1)


def any_answer(encoder: Encoder) -> str:
    """An answer for rows of which only the first position counts: what is answered there does not matter."""
    return class_name(True) if encoder.kind == "classifier" else "a"


class AskedAnswers:
    """Rows of questions and answers, and what logits at the answers' positions say of each row."""

    def __init__(self, encoder: Encoder, pairs: Sequence[tuple[str, str]], device: torch.device) -> None:
        self.encoder = encoder
        self.rows, self.mask, self.empty = answer_rows(encoder, pairs, device)
        self.row, self.targets = row_of(self.mask), self.rows.labels[self.mask]

    def logits(self, model: nn.Module) -> Tensor:
        return logits_at(model, self.rows, self.mask)

    def probabilities(self, logits: Tensor) -> list[float]:
        """Of each row's whole answer."""
        nll = answer_nll(logits, self.targets, self.empty[self.row], self.encoder)
        return rows_sum(nll, self.row, len(self.rows)).neg().exp().tolist()

    def greedy(self, logits: Tensor) -> list[bool]:
        """Whether each row's answer is for sure what greedy decoding gives: every token, the stop too, is the likeliest."""
        hit = is_correct(logits, self.targets) & ~self.empty[self.row]
        return rows_all_true(hit, self.row, len(self.rows)).tolist()

    def kl(self, before: Tensor, after: Tensor) -> list[float]:
        """KL(base ‖ edited) of each row, mean over its positions."""
        return mean_by_task(token_kl(before, after), self.row, len(self.rows)).tolist()
