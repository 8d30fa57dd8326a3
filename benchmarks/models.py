"""The benchmark's models, most of the real shapes but with random weights, and batches of random ids for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors import MendEditor
from mend_lightning.models.architecture import Architecture, model_class
from mend_lightning.models.base import load_base
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows
from mend_lightning.models.known_shapes import known_architecture, local_name
from mend_lightning.models.random_weights import random_model

TARGET_TOKENS = 6
# The paper starts at 1e-4. On random weights that hardly moves the model: its KL would be below the
# difference allowed between the losses, whose equality would prove nothing. The time is the same.
EDIT_RATE = 3e-3

# T5 v1.1 base: 12 + 12 blocks, gated. It ties its head to the embedding here, as every T5 of transformers 5.
_T5 = dict(dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
_GPT2 = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
_T5_BASE = dict(d_model=768, d_ff=2048, d_kv=64, num_heads=12, num_layers=12, vocab_size=32128)
_T5_TINY = dict(d_model=32, d_ff=48, d_kv=16, num_heads=2, num_layers=3, vocab_size=100)
_GPT2_TINY = dict(n_embd=32, n_head=2, n_layer=4, vocab_size=100, bos_token_id=0, eos_token_id=0)

MODELS = {
    "gpt2-small": (GPT2LMHeadModel, GPT2Config, _GPT2),
    "t5-base": (T5ForConditionalGeneration, T5Config, {**_T5, **_T5_BASE}),
    "tiny-gpt2": (GPT2LMHeadModel, GPT2Config, {**_GPT2, **_GPT2_TINY}),
    "tiny-t5": (T5ForConditionalGeneration, T5Config, {**_T5, **_T5_TINY}),
}


# Larger ones, drawn without their class's own slow initialisation.
SHAPES = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M",
    "llama-1b": "meta-llama/Llama-3.2-1B",
    "t5-large": "google/t5-v1_1-large",
    "t5-xl": "google/t5-xl-ssm-nq",
    "gpt-j": "EleutherAI/gpt-j-6B",
}


def tiny_variant(name: str) -> str:
    """A small model of the same kind."""
    return "tiny-t5" if "t5" in name else "tiny-gpt2"


def make_model(name: str, seed: int = 0, dtype: str = "float32", device: str = "cpu") -> nn.Module:
    """A frozen model in eval mode.

    Args:
        name: key of `MODELS` or `SHAPES`, whose weights are random; else a model's name or folder, with its own.
        seed: of the random weights of `MODELS`; those of `SHAPES` are always the same.
        dtype: of the weights.
        device: where they lie.
    """
    if name in MODELS:
        torch.manual_seed(seed)
        model_type, config_type, settings = MODELS[name]
        model = model_type(config_type(**settings)).to(getattr(torch, dtype))
    elif name in SHAPES:
        config = known_architecture(SHAPES[name])
        parts = (config, None, model_class(config), getattr(torch, dtype))
        model = random_model(Architecture(local_name(SHAPES[name]), *parts, {"trust_remote_code": False}))
    else:
        model = load_base(name, dtype)[0]
    return model.to(device).eval().requires_grad_(False)


def make_editor(model: nn.Module, rank: int, seed: int = 1) -> MendEditor:
    """An editor of the paper's layers, a little away from the identity.

    At the identity the networks add exactly 0, and a mistake in them would not show in the losses.
    """
    torch.manual_seed(seed)
    editor = MendEditor.for_model(model, rank=rank, edit_rate=EDIT_RATE)
    for transform in editor.transforms:
        for layer in transform.nets["combined"].layers:
            # U V h is then about a tenth of h, whatever the width and rank.
            nn.init.normal_(layer.u, std=0.1 / layer.u.numel() ** 0.5)
            nn.init.normal_(layer.bias, std=0.01)
    return editor.to(next(model.parameters()).device)


def make_batch(model: nn.Module, edits: int, tokens: int, seed: int = 2) -> EditBatch:
    """One edit row, one rephrase and one unrelated row for each edit, all of `tokens` tokens.

    A T5 row has `tokens` input tokens and 6 target tokens; a GPT-2 row ends in its 6 target tokens.
    """
    if tokens < TARGET_TOKENS + 2:
        raise ValueError(f"A row of {tokens} tokens has no room for a prompt and {TARGET_TOKENS} target tokens.")
    generator = torch.Generator().manual_seed(seed)
    target, other = _ids(model, generator, edits, TARGET_TOKENS), _ids(model, generator, edits, TARGET_TOKENS)
    rows_of = _t5_rows if model.config.is_encoder_decoder else _causal_rows
    # The rephrase asks for the target of the edit.
    batch = EditBatch(*(rows_of(_ids(model, generator, edits, tokens), each) for each in (target, other, target)))
    return batch.to(next(model.parameters()).device)


def _ids(model: nn.Module, generator: torch.Generator, rows: int, length: int) -> Tensor:
    # 0 and 1 are padding and end of sequence in T5.
    return torch.randint(2, model.config.vocab_size, (rows, length), generator=generator)


def _t5_rows(ids: Tensor, target: Tensor) -> Rows:
    # The decoder starts with id 0 and reads the target one step late.
    decoder = torch.nn.functional.pad(target[:, :-1], (1, 0))
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": decoder, "decoder_attention_mask": torch.ones_like(decoder),
    }  # fmt: skip
    return Rows(inputs, target, torch.arange(len(ids)), len(ids))


def _causal_rows(ids: Tensor, target: Tensor) -> Rows:
    ids = torch.cat([ids[:, :-TARGET_TOKENS], target], dim=1)
    labels = torch.full_like(ids, IGNORED_LABEL)
    # labels[t] is what the logits at t must predict: the id at t + 1.
    labels[:, -TARGET_TOKENS - 1 : -1] = target
    return Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, torch.arange(len(ids)), len(ids))
