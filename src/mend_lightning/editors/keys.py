"""Questions as vectors: the mean of the base model's final hidden states, by which the cache looks edits up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows


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
    encodes = getattr(model.config, "is_encoder_decoder", False)
    body = model.get_encoder() if encodes else getattr(model, model.base_model_prefix, model)
    return body(**inputs).last_hidden_state


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    hidden = hidden.float() * mask[..., None]
    return hidden.sum(1) / mask.sum(1, keepdim=True)
