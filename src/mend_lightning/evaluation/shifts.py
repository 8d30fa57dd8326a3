"""Which questions an edit changes, and by how much: answers and their probabilities, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.edits.applying import Edits, applying
from mend_lightning.errors import ConfigError
from mend_lightning.evaluation.answer_probabilities import AskedAnswers, any_answer, first_labels
from mend_lightning.models.forward.generation import generate_answers
from mend_lightning.models.forward.logits import label_mask, logits_at
from mend_lightning.models.inputs.encoder import Encoder, class_name, in_words
from mend_lightning.models.inputs.rows import Rows


@dataclass(frozen=True)
class Shift:
    """What an edit did to one question.

    Attributes:
        question: as it stands in the data.
        kind: what it is to the edit: "edited", "rephrase", "unrelated", "neighbour", "keep", "neutral", or "".
        old, new: greedy answers of the base and of the edited model.
        p_old_before, p_old_after: probability of the whole old answer, its stop included, under the base and under the
            edited model (teacher-forced).
        p_new_before, p_new_after: likewise of the new answer.
        kl: KL(base ‖ edited), mean over the old answer's positions, in nats.

    Example:
        >>> shift = Shift("Where is Lyon?", "edited", "France", "Italy", 0.75, 0.25, 0.0, 0.625, 1.2)
        >>> shift.changed, shift.size
        (True, 0.625)
    """

    question: str
    kind: str
    old: str
    new: str
    p_old_before: float
    p_old_after: float
    p_new_before: float
    p_new_after: float
    kl: float

    @property
    def changed(self) -> bool:
        """Whether the greedy answer is another one."""
        return self.old != self.new

    @property
    def size(self) -> float:
        """How far the probability of the old or of the new answer moved, whichever moved farther: 0 to 1."""
        return max(abs(self.p_old_after - self.p_old_before), abs(self.p_new_after - self.p_new_before))

    def as_dict(self) -> dict[str, Any]:
        """Everything as builtins."""
        return {**asdict(self), "changed": self.changed, "size": self.size}


@dataclass(frozen=True)
class TokenShift:
    """Probability of one token (of a classifier: one class) before and after an edit.

    Attributes:
        token: its text, as the tokenizer decodes it alone.
        id: its id; of a classifier 0 or 1.
        before, after: its probability under the base and under the edited model.
    """

    token: str
    id: int
    before: float
    after: float


@torch.no_grad()
def answer_shifts(
    model: nn.Module,
    encoder: Encoder,
    questions: Sequence[str],
    edits: Edits,
    kinds: Sequence[str] | None = None,
    like: str | None = None,
    batch_size: int = 32,
) -> list[Shift]:
    """Asks every question of the base and of the edited model.

    Args:
        model: the base model, in eval mode, without the edits.
        encoder: the prompt format and tokenizer.
        questions: as they stand in the data, without the prompt format's text around them.
        edits: what makes it the edited model: an `Edit`, a sequence of them, or a function of the model that gives a
            context manager, such as `edit.applied`.
        kinds: what each question is to the edit (`Shift.kind`).
        like: of a classifier: an answer in whose words the classes are given ("true" makes REFUTES "false").
        batch_size: questions in one pass.

    Returns:
        One `Shift` a question, in their order.

    Raises:
        ConfigError: `kinds` are not as many as the questions, or the batch size is no positive number.
    """
    kinds = [""] * len(questions) if kinds is None else list(kinds)
    if len(kinds) != len(questions):
        raise ConfigError(
            f"{len(questions)} questions have {len(kinds)} kinds. Give one kind a question, or none at all."
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
    shifts: list[Shift] = []
    for start in range(0, len(questions), batch_size):
        part = slice(start, start + batch_size)
        shifts += _shifts(model, encoder, questions[part], kinds[part], edits, like)
    return shifts


@torch.no_grad()
def next_token_shifts(
    model: nn.Module, encoder: Encoder, question: str, edits: Edits, top: int = 10
) -> list[TokenShift]:
    """The likeliest first tokens of the answer, before and after the edit.

    Args: as in `answer_shifts`, and
        top: how many of the base's and how many of the edited model's.

    Returns:
        `top` to 2 × `top` tokens, the likeliest (before or after) first; both classes of a classifier.

    Raises:
        ConfigError: `top` is no positive number.
    """
    if top < 1:
        raise ConfigError(f"top must be at least 1, not {top}.")
    rows = encoder.rows([(question, any_answer(encoder))], [0], 1).to(_device(model))
    mask = first_labels(rows.labels)
    before, after = (each[0] for each in _distributions(model, rows, mask, edits))
    count = min(top, len(before))
    ids = torch.cat([before.topk(count).indices, after.topk(count).indices]).unique()
    ids = ids[torch.maximum(before, after)[ids].argsort(descending=True)]
    return _token_shifts(encoder, ids, before[ids], after[ids])


@torch.no_grad()
def token_shifts(model: nn.Module, encoder: Encoder, question: str, answer: str, edits: Edits) -> list[TokenShift]:
    """Every token of an answer, the stop included, given those before it: its probability before and after the edit.

    Their product is the probability of the whole answer (`Shift.p_new_before` and the like).

    Args: as in `answer_shifts`, and
        answer: whose tokens are looked at, in the order of the answer; of a classifier a class.

    Raises:
        TokenizerError: the answer is empty, or of a classifier no class.
    """
    rows = encoder.rows([(question, answer)], [0], 1).to(_device(model))
    mask = label_mask(rows)
    ids = rows.labels[mask]
    found = (each.gather(1, ids[:, None])[:, 0] for each in _distributions(model, rows, mask, edits))
    return _token_shifts(encoder, ids, *found)


def _shifts(
    model: nn.Module, encoder: Encoder, questions: Sequence[str], kinds: Sequence[str], edits: Edits, like: str | None
) -> list[Shift]:
    old = generate_answers(model, encoder, questions)
    asked = AskedAnswers(encoder, list(zip(questions, old)), _device(model))
    with applying(edits, model):
        after = asked.logits(model)
        new = _new_answers(model, encoder, questions, old, asked.greedy(after))
        changed = [i for i in range(len(questions)) if new[i] != old[i]]
        others = AskedAnswers(encoder, [(questions[i], new[i]) for i in changed], _device(model)) if changed else None
        p_new_after = others.probabilities(others.logits(model)) if others else []
    before = asked.logits(model)
    p_new_before = others.probabilities(others.logits(model)) if others else []
    # Where the answer stayed, the old one is the new one.
    of_old, of_new = (
        list(zip(asked.probabilities(before), asked.probabilities(after))),
        list(zip(p_new_before, p_new_after)),
    )
    new_by_question = dict(zip(changed, of_new))
    kl = asked.kl(before, after)
    if encoder.kind == "classifier" and like is not None:
        old, new = ([in_words(name, like) for name in names] for names in (old, new))
    return [
        Shift(questions[i], kinds[i], old[i], new[i], *of_old[i], *new_by_question.get(i, of_old[i]), kl[i])
        for i in range(len(questions))
    ]


def _new_answers(
    model: nn.Module, encoder: Encoder, questions: Sequence[str], old: Sequence[str], stayed: Sequence[bool]
) -> list[str]:
    """Greedy answers of the edited model; those that stayed are known and need not be decoded."""
    new = list(old)
    moved = [i for i, same in enumerate(stayed) if not same]
    for i, answer in zip(moved, generate_answers(model, encoder, [questions[i] for i in moved]) if moved else []):
        new[i] = answer
    return new


def _distributions(model: nn.Module, rows: Rows, mask: Tensor, edits: Edits) -> tuple[Tensor, Tensor]:
    """Probabilities at the positions of `mask`, before and after the edits: `[n, vocabulary]` each."""
    before = logits_at(model, rows, mask)
    with applying(edits, model):
        return _distribution(before), _distribution(logits_at(model, rows, mask))


def _distribution(logits: Tensor) -> Tensor:
    """Probabilities `[n, vocabulary]`; of a classifier's one logit `[n, 2]`: false, true."""
    if logits.shape[-1] == 1:
        true = logits.float().sigmoid()
        return torch.cat([1 - true, true], -1)
    return logits.float().softmax(-1)


def _token_shifts(encoder: Encoder, ids: Tensor, before: Tensor, after: Tensor) -> list[TokenShift]:
    found = zip(ids.tolist(), before.tolist(), after.tolist())
    return [TokenShift(_token_text(encoder, id), id, p, q) for id, p, q in found]


def _token_text(encoder: Encoder, id: int) -> str:
    return class_name(bool(id)) if encoder.kind == "classifier" else encoder.tokenizer.decode([id])


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
