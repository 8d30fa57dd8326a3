"""What a model continues a text with: sampled, a fixed number of tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mend_lightning.models.forward.generation import pad_id, padded_prompts
from mend_lightning.models.forward.logits import contiguous_head
from mend_lightning.models.inputs.encoder import Encoder


@torch.no_grad()
def sample_continuations(
    model: nn.Module, encoder: Encoder, prompts: Sequence[str], tokens: int, temperature: float = 1.0, seed: int = 0
) -> list[str | None]:
    """Samples from the model's own distribution, no special token in it.

    Args:
        model: a causal model.
        encoder: with a format without stop.
        prompts: texts to be continued.
        tokens: how many tokens each gets.
        temperature: of the distribution; nothing else changes it (no top-k, top-p or penalty).
        seed: the same seed and prompts give the same texts on the same machine; the random numbers of others stay.

    Returns:
        One text a prompt, leading blank included; None where encoding the text again gives other tokens (half a
        character, or a word that the tokenizer would cut differently): it would not be trained as it was sampled.
    """
    ids, mask = padded_prompts(encoder, prompts)
    device = next(model.parameters()).device
    generating: Any = model
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), contiguous_head(model):
        torch.manual_seed(seed)
        output = generating.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=tokens, do_sample=True,
            temperature=temperature, top_k=0, top_p=1.0, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
            min_length=0, eos_token_id=None, pad_token_id=pad_id(encoder.tokenizer),
            suppress_tokens=sorted(encoder.tokenizer.all_special_ids) or None,
        )  # fmt: skip
    rows = output[:, ids.shape[1] :].tolist()
    return [_text(encoder, prompt, row) for prompt, row in zip(prompts, rows)]


def _text(encoder: Encoder, prompt: str, ids: list[int]) -> str | None:
    text = encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text if text.strip() and encoder.target_ids(prompt, text) == ids else None


def batch_seed(seed: int, batch: int) -> int:
    """The seed of one batch, so that a run that is resumed draws what it would have drawn."""
    return zlib.crc32(f"{seed}/{batch}".encode())
