"""KnowledgeEditor (KE): a network reads the edit as text and gates its gradient (De Cao, Aziz, Titov, EMNLP 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from mend_lightning.editors.editor import Editor
from mend_lightning.editors.factors import Factors, descent
from mend_lightning.edits.deltas import LowRankDelta
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.device import no_autocast
from mend_lightning.models.forward.hooks import Delta
from mend_lightning.models.forward.logits import input_embeddings, label_mask, logits_at
from mend_lightning.models.forward.trunk import TrunkOutputs, replayed
from mend_lightning.models.inputs.encoder import Encoder, class_name
from mend_lightning.models.inputs.positions import slots
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows


@dataclass(frozen=True)
class Gates:
    """What the condition makes of one layer's gradient; every field has one row an edit.

    Attributes:
        rows: `[edits, d_out]` r, sums to 1; columns: `[edits, d_in]` c.
        offset_rows: `[edits, d_out]` r′, sums to 1; offset_columns: `[edits, d_in]` c′.
        strength: `[edits, 1]` σ(η) times the largest scale.
    """

    rows: Tensor
    columns: Tensor
    offset_rows: Tensor
    offset_columns: Tensor
    strength: Tensor


class GateNetwork(nn.Module):
    """A condition vector to the gates of one layer: two weight-normalised layers with tanh between them.

    Args:
        shape: (d_in, d_out) of the layer.
        size: of the condition vector.
        hidden: width between the two (the original's 128).
        max_scale: largest strength (the original's 1).
    """

    def __init__(self, shape: tuple[int, int], size: int, hidden: int, max_scale: float) -> None:
        super().__init__()
        d_in, d_out = shape
        self.sizes, self.max_scale = [d_in, d_out, d_in, d_out, 1], max_scale
        self.net = nn.Sequential(
            weight_norm(nn.Linear(size, hidden)), nn.Tanh(), weight_norm(nn.Linear(hidden, sum(self.sizes)))
        )

    def forward(self, condition: Tensor) -> Gates:
        columns, rows, offset_columns, offset_rows, scale = self.net(condition).split(self.sizes, -1)
        return Gates(
            rows.softmax(-1), columns, offset_rows.softmax(-1), offset_columns, self.max_scale * scale.sigmoid()
        )


class KnowledgeEditor(Editor):
    """KE in factor form: `ΔW = −s σ(η) (diag(r) ∇W diag(c) + r′ c′ᵀ)`, all gates functions of the edit's text.

    The gates scale the gradient's factors, `(r ⊙ δ_t)(c ⊙ u_t)ᵀ`, and the offset adds rank one, so no matrix of the
    layer's size is made. Formula and sizes are those of De Cao et al.'s `OneShotLearner`; the layers, the loss and Adam
    are MEND's, as in the MEND authors' re-implementation (there `EFK`). Where this differs from De Cao et al.:

    - The gradient is subtracted, they add. c and c′ have either sign, so both can learn both.
    - The text is embedded by the base's own input embeddings, read and not stored. They start from a copy and train it.
    - `prediction` is read off the base (`predictions`), not from the data file: any edit has one, given alone as well.
    - r belongs to the layer's outputs in any layer. Theirs belongs to the stored weight's first axis: in GPT-2's `Conv1D`
      the inputs.
    - Of several edits made at once each gates its own gradient; `EFK` gates their sum.
    - They constrain the KL by a learned multiplier, smooth the edit's labels, use RMSprop (3e-4) for 200,000 steps and
      edit all weight matrices.

    Args:
        layers: name -> (d_in, d_out) of the edited layers.
        embedding: width of the base's input embeddings; None: `bind` takes it from the base.
        hidden: of each direction of the LSTM, and of the gates' networks.
        condition: size of the condition vector.
        max_scale: s, the largest strength.
        confidence: see `MendEditor`.

    Example:
        >>> editor = KnowledgeEditor({"fc": (2, 3)}, embedding=4)
        >>> gates = editor.gates["0"](torch.zeros(1, 1024))
        >>> gates.columns.shape, round(gates.rows.sum().item(), 4)
        (torch.Size([1, 2]), 1.0)
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[int, int]],
        embedding: int | None = None,
        hidden: int = 128,
        condition: int = 1024,
        max_scale: float = 1.0,
        confidence: float | None = None,
    ) -> None:
        super().__init__(
            layers, embedding=embedding, hidden=hidden, condition=condition, max_scale=max_scale, confidence=confidence
        )
        self.encode: ConditionEncoder | None = None
        if embedding is not None:
            self.encode = ConditionEncoder(embedding, hidden, condition)
        # In the order of `layers`: a module's name may not have the dots of a layer's.
        self.gates = nn.ModuleDict(
            {str(i): GateNetwork(shape, condition, hidden, max_scale) for i, shape in enumerate(self.layers.values())}
        )

    def bind(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As in `Editor`; builds the LSTM where the embeddings' width was not given."""
        super().bind(model, *args, **kwargs)
        if self.encode is None:
            width = self.settings["embedding"] = input_embeddings(model).embedding_dim
            sizes = (self.settings["hidden"], self.settings["condition"])
            self.encode = ConditionEncoder(width, *sizes).to(next(self.parameters()).device)

    def from_factors(
        self, model: nn.Module, factors: Mapping[str, Factors], z_edit: Rows, trunk: TrunkOutputs
    ) -> dict[str, Delta]:
        """The gated gradient of every layer.

        Raises:
            ConfigError: the rows have no text, or the base's embeddings have another width, or are not known.
        """
        if self.encode is None:
            raise ConfigError(
                "This KnowledgeEditor does not know its base yet. Call editor.bind(model), or give embedding."
            )
        ids, lengths = edit_conditions(model, z_edit, self.text_encoder(), trunk)
        with torch.no_grad():
            embedded = input_embeddings(model)(ids.to(z_edit.labels.device)).float()
        if embedded.shape[-1] != self.settings["embedding"]:
            raise ConfigError(
                f"The base embeds tokens in {embedded.shape[-1]} numbers; this editor has embedding: "
                f"{self.settings['embedding']}."
            )
        # Float32 under mixed precision too, as MEND's: `edit` runs without it and must give the same deltas.
        with no_autocast(embedded.device):
            condition = self.encode(embedded, lengths)
            return {
                name: gated(factors[name], network(condition), z_edit)
                for name, network in zip(self.layers, self.gates.values())
            }


def gated(factors: Factors, gates: Gates, z_edit: Rows) -> LowRankDelta:
    """`−Σ_rows s σ(η) (diag(r) ∇W_row diag(c) + r′ c′ᵀ)` for each task, from the tokens' factors.

    Args:
        factors: with the row of each token.
        gates: of every row.
        z_edit: the rows.
    """
    row, task, place = factors.row, torch.cat([factors.task, z_edit.task]), None
    if factors.place is not None:
        # The offsets come behind the tokens of all tasks.
        slot, rank = factors.place
        place = torch.cat([slot, rank + slots(z_edit.task, z_edit.tasks)]), rank + z_edit.rows_of_task
    u = torch.cat([factors.u * gates.columns[row], gates.offset_columns])
    delta = torch.cat([factors.delta * (gates.strength * gates.rows)[row], gates.strength * gates.offset_rows])
    whole = Factors(u, delta, task, factors.tasks, place=place)
    return descent(u, delta, whole, torch.ones((), device=u.device))


def condition_text(prediction: str, target: str, prompt: str) -> str:
    """What the editor is told about an edit (De Cao et al., EMNLP 2021, section 3).

    Example:
        >>> condition_text("Paris", "Zagreb", "What is the capital of France?")
        'Paris >> Zagreb || What is the capital of France?'
    """
    return f"{prediction} >> {target} || {prompt}"


@torch.no_grad()
def predictions(model: nn.Module, rows: Rows, encoder: Encoder, trunk: TrunkOutputs) -> list[str]:
    """What the model answers where each row has its labels: the most probable token at every one of them, as text.

    The original reads the prediction from the data file. This one is there for any edit, and the same in training, in
    evaluation and for a single edit; it is the greedy answer wherever that has the target's length or stops before.

    Args:
        model: the base model.
        rows: the edits.
        encoder: whose tokenizer reads the tokens.
        trunk: the trunk's outputs for `rows`.
    """
    mask = label_mask(rows)
    with replayed(trunk, slice(None)):
        logits = logits_at(model, rows, mask)
    if encoder.kind == "classifier":
        return [class_name(logit > 0, target) for logit, (_, target) in zip(logits[:, 0].tolist(), rows.texts)]
    said = torch.full_like(rows.labels, IGNORED_LABEL)
    said[mask] = logits.argmax(-1)
    texts = (encoder.tokenizer.decode(row[row != IGNORED_LABEL].tolist(), skip_special_tokens=True) for row in said)
    return [encoder.format_of(key).read(text) for key, text in zip(rows.formats or [""] * len(rows), texts)]


def condition_ids(texts: Sequence[str], encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Token ids `[rows, length]`, padded on the right with 0, and each row's length `[rows]`."""
    ids = [encoder.tokenizer(text)["input_ids"] for text in texts]
    lengths = torch.tensor([len(row) for row in ids])
    padded = torch.tensor([[*row, *[0] * (int(lengths.max()) - len(row))] for row in ids])
    return padded, lengths


def edit_conditions(model: nn.Module, z_edit: Rows, encoder: Encoder, trunk: TrunkOutputs) -> tuple[Tensor, Tensor]:
    """`condition_ids` of the edits.

    Raises:
        ConfigError: the rows have no text.
    """
    if len(z_edit.texts) != len(z_edit):
        raise ConfigError(
            "KnowledgeEditor reads the edits' text, and these rows were not made of text. Take rows from Encoder.rows, "
            "or batches from EditDataModule."
        )
    said = predictions(model, z_edit, encoder, trunk)
    texts = [condition_text(prediction, target, prompt) for prediction, (prompt, target) in zip(said, z_edit.texts)]
    return condition_ids(texts, encoder)


class ConditionEncoder(nn.Module):
    """A bidirectional LSTM over embedded tokens, and a layer over its two last states.

    Args:
        width: of the embeddings.
        hidden: of each direction of the LSTM (the original's 128).
        size: of the condition vector (the original's 1024).
    """

    def __init__(self, width: int, hidden: int, size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, size)

    def forward(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """`[rows, length, width]` float32, and lengths `[rows]`, to condition vectors `[rows, size]`."""
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return torch.tanh(self.linear(torch.cat([last[0], last[1]], -1)))
