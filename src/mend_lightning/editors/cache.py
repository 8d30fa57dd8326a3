"""A cache of edits before the model (the MEND paper's table 11): near questions get the stored answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.editors.editor import Editor
from mend_lightning.editors.in_context import tasks_of_prompts
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.generation import generate_answers
from mend_lightning.models.forward.head import HeadStates
from mend_lightning.models.forward.hooks import Delta
from mend_lightning.models.forward.logits import logits_at
from mend_lightning.models.forward.trunk import TrunkOutputs, replayed
from mend_lightning.models.inputs.encoder import Encoder, class_name
from mend_lightning.models.inputs.positions import Positions
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows


class Cache(Editor):
    """Remembers each edit's question as a vector; a question near one gets the stored answer, any other the base's.

    The vector is the mean of the final hidden state over the question's tokens (of an encoder-decoder: the encoder's),
    and near is an L2 distance below `threshold` to the nearest key of the row's task. No training, and no weight
    changes.

    `threshold` (ε) is a length in the space of one model's hidden states under one prompt format: it must be chosen for
    each model, on validation facts. `key_distances` gives the distances to choose it by; rephrases should lie below it,
    and unrelated facts above.

    Measured on SmolLM2-135M-Instruct (96 validation edits of world_facts, the quickstart's prompt, bfloat16; test was
    not looked at). The default is where edit success and known facts retained are largest together:

    | ε | edit success | rephrases | retained | retained, same relation |
    |---|---|---|---|---|
    | 2.5 | 0.45 | 0.18 | 0.97 | 0.94 |
    | 3.0 | 0.55 | 0.32 | 0.94 | 0.89 |
    | 3.5 | 0.69 | 0.54 | 0.91 | 0.83 |
    | 4.0 | 0.84 | 0.76 | 0.83 | 0.72 |
    | 4.5 | 0.94 | 0.92 | 0.75 | 0.59 |
    | 5.0 | 0.98 | 0.97 | 0.60 | 0.41 |

    Args:
        layers: name -> (d_in, d_out): only to tell the base model by; they are not edited.
        threshold: ε; see above (the code of the authors' later work, `algs/lu.py` of SERAC, has 1 in its config).
        probability: what a hit gives each token of the stored answer; the rest is spread over the other tokens. That
            code gives the token a logit of 1 and the others 0, which is right by argmax and says nothing by NLL; at 1
            the KL would be infinite.

    Example:
        >>> Cache({"fc": (2, 3)}, threshold=2.5).settings
        {'threshold': 2.5, 'probability': 0.999}
    """

    changes_weights = False

    def __init__(
        self, layers: Mapping[str, tuple[int, int]], threshold: float = 4.5, probability: float = 0.999
    ) -> None:
        super().__init__(layers, threshold=threshold, probability=probability)
        if not threshold > 0:
            raise ConfigError(f"threshold of Cache is a distance; it must be greater than 0, not {threshold}.")
        if not 0 < probability < 1:
            raise ConfigError(f"probability of Cache must lie between 0 and 1, not {probability}.")
        self.threshold, self.probability = threshold, probability

    def edited(
        self, model: nn.Module, z_edit: Rows, trunk: TrunkOutputs | None = None, x_keep: Rows | None = None
    ) -> CachedModel:
        """The model with the edits of `z_edit` in its cache."""
        trunk = trunk or TrunkOutputs(len(z_edit))
        answers = [row[row != IGNORED_LABEL] for row in z_edit.labels]
        texts = [target for _, target in z_edit.texts]
        with replayed(trunk, slice(None)):
            keys = question_keys(model, z_edit)
        return CachedModel(keys, z_edit.task, answers, texts, self.threshold, self.probability)


@dataclass(frozen=True)
class CachedModel:
    """The base model behind a cache (an `Edited`).

    Attributes:
        keys: `[edits, width]` float32.
        task: `[edits]`, the task of each key.
        labels: of each edit, the ids of its answer with the stop; of a classifier, the class.
        texts: of each edit, the answer as text; empty where the edits were not made of text.
        threshold, probability: see `Cache`.
    """

    keys: Tensor
    task: Tensor
    labels: Sequence[Tensor]
    texts: Sequence[str]
    threshold: float
    probability: float
    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    deltas: Mapping[str, Delta] = field(default_factory=dict)

    def nearest(self, keys: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """Distance of each question `[rows, width]` to the nearest key of its task `[rows]`, and which key that is."""
        # Not cdist: its fast way loses the small distances.
        distances = torch.stack([(self.keys - key).norm(dim=1) for key in keys])
        return distances.masked_fill(task[:, None] != self.task, math.inf).min(1)

    def states_at(self, model: nn.Module, rows: Rows, where: Positions, trunk: TrunkOutputs) -> HeadStates:
        """See `Edited.states_at`. Behind the stored answer's end its last token, the stop, is said again."""
        with replayed(trunk, slice(None)):
            logits = logits_at(model, rows, where)
            distances, which = self.nearest(question_keys(model, rows), rows.task)
        # Of each position, how many of its row come before it.
        position = torch.arange(len(where), device=where.row.device) - torch.searchsorted(where.row, where.row)
        for hit in (distances < self.threshold).nonzero().flatten().tolist():
            labels, of_row = self.labels[int(which[hit])], where.row == hit
            said = labels[position[of_row].clamp(max=len(labels) - 1)]
            logits[of_row] = certain_logits(said, logits.shape[-1], self.probability).to(logits)
        return HeadStates.known(logits)

    def answers(
        self,
        model: nn.Module,
        encoder: Encoder,
        prompts: Sequence[str],
        task_of_row: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> list[str]:
        """See `Edited.answers`; a hit is answered with the stored text.

        Raises:
            ConfigError: the edits were not made of text.
        """
        if not self.texts:
            raise ConfigError(
                "Cache answers with the text of edits (Rows.texts), which these lack. Encoder.rows sets it."
            )
        tasks = torch.tensor(tasks_of_prompts(len(prompts), int(self.task.max()) + 1, task_of_row))
        distances, which = self.nearest(prompt_keys(model, encoder, prompts), tasks.to(self.task.device))
        answers = [encoder.format.read(self.texts[i]) for i in which.tolist()]
        if encoder.kind == "classifier":
            answers = [class_name(bool(self.labels[i])) for i in which.tolist()]
        missed = (distances >= self.threshold).nonzero().flatten().tolist()
        if missed:
            kept = None if lengths is None else [lengths[i] for i in missed]
            texts = generate_answers(model, encoder, [prompts[i] for i in missed], lengths=kept)
            for i, text in zip(missed, texts):
                answers[i] = text
        return answers


def certain_logits(said: Tensor, vocabulary: int, probability: float) -> Tensor:
    """Logits that give each of the tokens `said` `[n]` this probability: `[n, vocabulary]`; `[n, 1]` of a classifier.

    Example:
        >>> certain_logits(torch.tensor([2]), 4, 0.97).softmax(-1).round(decimals=2).tolist()
        [[0.01, 0.01, 0.97, 0.01]]
    """
    odds = probability / (1 - probability)
    if vocabulary == 1:
        return (2 * said[:, None].double() - 1) * math.log(odds)
    logits = torch.zeros(len(said), vocabulary, dtype=torch.float64, device=said.device)
    return logits.scatter(1, said[:, None], math.log(odds * (vocabulary - 1)))


@torch.no_grad()
def key_distances(model: nn.Module, z_edit: Rows, rows: Rows) -> Tensor:
    """How far each of `rows` is from the nearest edit of its task: `[rows]`, to choose `Cache`'s threshold by.

    Args:
        model: the base model.
        z_edit: edits; rows: questions, with the same tasks (`EditBatch.x_in` and `x_out`).
    """
    cached = CachedModel(question_keys(model, z_edit), z_edit.task, (), (), math.inf, 0.5)
    return cached.nearest(question_keys(model, rows), rows.task)[0]


def question_mask(rows: Rows) -> Tensor:
    """The question's positions in `input_ids`, without padding: `[rows, length]` bool.

    A causal row also holds the answer; its first label stands at the question's last token.
    """
    ids = rows.inputs["input_ids"]
    mask = rows.inputs.get("attention_mask", torch.ones_like(ids)).bool()
    if "decoder_input_ids" in rows.inputs or rows.labels.shape != ids.shape:
        return mask
    first = (rows.labels != IGNORED_LABEL).int().argmax(1)
    return mask & (torch.arange(ids.shape[1], device=ids.device) <= first[:, None])


@torch.no_grad()
def question_keys(model: nn.Module, rows: Rows) -> Tensor:
    """The mean final hidden state of each row's question: `[rows, width]` float32."""
    inputs = {name: rows.inputs[name] for name in ("input_ids", "attention_mask") if name in rows.inputs}
    return _mean(final_hidden(model, inputs), question_mask(rows))


@torch.no_grad()
def prompt_keys(model: nn.Module, encoder: Encoder, prompts: Sequence[str]) -> Tensor:
    """The same of questions that are only asked: `[prompts, width]` float32."""
    ids = [torch.tensor(encoder.prompt_ids(prompt)) for prompt in prompts]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=encoder.pad_token_id or 0)
    device = next(model.parameters()).device
    inputs = {"input_ids": padded.to(device), "attention_mask": mask.to(device)}
    return _mean(final_hidden(model, inputs), inputs["attention_mask"].bool())


def final_hidden(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The last layer's states, after the final norm where there is one: `[rows, length, width]`.

    Of an encoder-decoder its encoder's, as in the original.
    """
    whole: Any = model
    encodes = getattr(whole.config, "is_encoder_decoder", False)
    body = whole.get_encoder() if encodes else getattr(whole, whole.base_model_prefix, whole)
    return body(**inputs).last_hidden_state


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    hidden = hidden.float() * mask[..., None]
    return hidden.sum(1) / mask.sum(1, keepdim=True)
