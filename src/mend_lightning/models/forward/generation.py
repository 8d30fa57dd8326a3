"""What the model says by itself: greedy answers that end at their natural stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.models.forward.hooks import Delta, applied
from mend_lightning.models.forward.logits import contiguous_head, run_model
from mend_lightning.models.forward.shared_prompt import beginning_cache, one_task, padded, shared_beginning
from mend_lightning.models.inputs.encoder import Encoder, class_name
from mend_lightning.models.sharding.collectives import is_sharded

# Longest answer in tokens. A constant, never the target's length: that would tell the model when to stop.
MAX_NEW_TOKENS = 24


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[str],
    layers: Mapping[str, nn.Module] | None = None,
    deltas: Mapping[str, Delta] | None = None,
    task_of_row: Tensor | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    lengths: Sequence[int] | None = None,
) -> list[str]:
    """Greedy answers to `prompts`, up to the stop text, the end-of-sequence token or `max_new_tokens`.

    Where the format has no stop (running text), nothing ends an answer, the end-of-sequence token neither: it has
    `max_new_tokens` tokens, or as many as `lengths` says. What prompts begin with in common (the format's few-shot
    examples) runs once where all rows are asked under the same edit and the model can continue from there.

    Args:
        model: a causal model or an encoder-decoder; a binary classifier answers with the name of a class.
        encoder: the prompt format and tokenizer.
        prompts: questions as they stand in the data.
        layers, deltas: an edit to apply meanwhile; None asks the model as it is.
        task_of_row: `[prompts]`, which of the deltas' tasks each prompt is asked under; None: grouped.
        lengths: number of tokens of each answer, where the format has no stop.

    Returns:
        One answer a prompt, without stop and blanks. An answer that did not stop in time is what there is.
    """
    if encoder.kind == "classifier":
        return _classes(model, encoder, prompts, layers, deltas, task_of_row)
    running = encoder.format.stop is None
    if running and lengths is not None:
        max_new_tokens = max(lengths)
    rows = [encoder.prompt_ids(prompt) for prompt in prompts]
    same_edit = one_task(deltas, task_of_row)
    beginning = 0 if same_edit is None else shared_beginning(model, rows, max_new_tokens)
    if beginning:
        deltas, task_of_row = same_edit, None
    device = next(model.parameters()).device
    ids, mask = (tensor.to(device) for tensor in padded(rows, encoder.kind == "causal", beginning))
    generating: Any = model
    edit = applied(layers or {}, deltas, task_of_row) if deltas else nullcontext()
    with edit, contiguous_head(model):
        cache = beginning_cache(model, ids[:1, :beginning], len(rows)) if beginning else None
        output = generating.generate(
            input_ids=ids,
            attention_mask=mask,
            **({} if cache is None else {"past_key_values": cache}),
            max_new_tokens=max_new_tokens,
            # A process whose answers have ended runs on with the others, which need its shards.
            synced_gpus=is_sharded(model) or None,
            do_sample=False,
            num_beams=1,
            eos_token_id=None if running else list(stop_ids(encoder.tokenizer, encoder.format.stop)) or None,
            pad_token_id=pad_id(encoder.tokenizer),
            # Sampling settings that a model's generation_config may hold make greedy decoding warn.
            temperature=None, top_p=None, top_k=None,
            # Penalties that it may hold would make it another decoding than greedy.
            repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0,
        )  # fmt: skip
    # An encoder-decoder's output begins with its start token.
    new = output[:, ids.shape[1] if encoder.kind == "causal" else 1 :]
    if running and lengths is not None:
        new = [row[:length] for row, length in zip(new, lengths)]
    return [encoder.format.read(encoder.tokenizer.decode(row, skip_special_tokens=True)) for row in new]


def _classes(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[str],
    layers: Mapping[str, nn.Module] | None,
    deltas: Mapping[str, Delta] | None,
    task_of_row: Tensor | None,
) -> list[str]:
    """SUPPORTS or REFUTES of every prompt."""
    # Rows have labels; which ones, no logit knows.
    rows = encoder.rows([(prompt, class_name(True)) for prompt in prompts], [0] * len(prompts), 1)
    with applied(layers or {}, deltas, task_of_row) if deltas else nullcontext():
        logits = run_model(model, rows.to(next(model.parameters()).device))
    return [class_name(logit > 0) for logit in logits[:, 0].tolist()]


def padded_prompts(encoder: Encoder, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded on the left for causal models: what is generated must follow the prompt."""
    return padded([encoder.prompt_ids(prompt) for prompt in prompts], left=encoder.kind == "causal")


def pad_id(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


@lru_cache(maxsize=8)
def stop_ids(tokenizer: Any, stop: str) -> tuple[int, ...]:
    """Every token that ends an answer: EOS, and each whose text holds the stop."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if stop:
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        ids += [i for i, text in enumerate(texts) if stop in text]
    return tuple(dict.fromkeys(ids))
