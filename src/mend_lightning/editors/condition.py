"""KnowledgeEditor's condition: the edit as a text, and a vector that an LSTM makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.logits import label_mask, logits_at
from mend_lightning.models.forward.trunk import TrunkOutputs, replayed
from mend_lightning.models.inputs.encoder import Encoder, class_name
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows


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
    return [encoder.format.read(text) for text in texts]


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
