"""Tiny random models of every architecture that a shipped config names, and which config names which.

A new config needs a line in `CONFIGS`; a new architecture one in `ARCHITECTURES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import nn

from helpers.bases import small_tokenizer
from mend_lightning.models.inputs.encoder import ModelKind

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2)
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
T5 = dict(d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=3, num_decoder_layers=3, decoder_start_token_id=0)
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        config, model: names of its classes in transformers.
        sizes: of the tiny model.
        edited: what is edited by default in its last block (in the last block of each stack).
        kind: see `ModelKind`.
    """

    config: str
    model: str
    sizes: dict
    edited: tuple[str, ...]
    kind: ModelKind = "causal"


def causal(name: str, sizes: dict, *edited: str) -> Architecture:
    return Architecture(f"{name}Config", f"{name}ForCausalLM", sizes, edited)


def gated(name: str, last: str = "model.layers.3", **more) -> Architecture:
    return causal(name, {**GROUPED, **more}, *(f"{last}.mlp.{part}_proj" for part in ("gate", "up", "down")))


def t5(activation: str, *names: str) -> Architecture:
    blocks = ("encoder.block.2.layer.1", "decoder.block.2.layer.2")
    edited = [f"{block}.DenseReluDense.{name}" for block in blocks for name in names]
    sizes = {**T5, "feed_forward_proj": activation, "tie_word_embeddings": activation == "relu"}
    return Architecture("T5Config", "T5ForConditionalGeneration", sizes, tuple(edited), "encoder_decoder")


ARCHITECTURES = {
    "bert": Architecture(
        "BertConfig", "BertForSequenceClassification", {**SIZES, "num_labels": 1},
        ("bert.encoder.layer.3.intermediate.dense", "bert.encoder.layer.3.output.dense"), "classifier",
    ),
    "bart": Architecture(
        "BartConfig", "BartForConditionalGeneration",
        dict(d_model=16, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=24, decoder_ffn_dim=24,
             encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=128,
             decoder_start_token_id=1, forced_eos_token_id=1),
        tuple(f"model.{stack}.layers.2.{name}" for stack in ("encoder", "decoder") for name in ("fc1", "fc2")),
        "encoder_decoder",
    ),
    "t5": t5("relu", "wi", "wo"),
    "t5_gated": t5("gated-gelu", "wi_0", "wo"),
    "gpt2": Architecture(
        "GPT2Config", "GPT2LMHeadModel", dict(n_embd=16, n_head=2, n_layer=4),
        ("transformer.h.3.mlp.c_fc", "transformer.h.3.mlp.c_proj"),
    ),
    "gpt_neo": causal(
        "GPTNeo", dict(hidden_size=16, num_layers=4, num_heads=2, attention_types=[[["global", "local"], 2]]),
        "transformer.h.3.mlp.c_fc", "transformer.h.3.mlp.c_proj",
    ),
    "gptj": causal(
        "GPTJ", dict(n_embd=16, n_layer=4, n_head=2, rotary_dim=4),
        "transformer.h.3.mlp.fc_in", "transformer.h.3.mlp.fc_out",
    ),
    "gpt_neox": causal(
        "GPTNeoX", SIZES, "gpt_neox.layers.3.mlp.dense_h_to_4h", "gpt_neox.layers.3.mlp.dense_4h_to_h"
    ),
    "opt": causal(
        "OPT", dict(hidden_size=16, ffn_dim=24, num_hidden_layers=4, num_attention_heads=2, word_embed_proj_dim=16),
        "model.decoder.layers.3.fc1", "model.decoder.layers.3.fc2",
    ),
    "llama": gated("Llama"),
    "llama_30": gated("Llama", "model.layers.29", num_hidden_layers=30),
    "mistral": gated("Mistral"),
    "qwen2": gated("Qwen2"),
    "qwen3": gated("Qwen3"),
    "gemma2": gated("Gemma2"),
    "gemma3": Architecture(
        "Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED, gated("Gemma3").edited
    ),
    "gemma3_vision": Architecture(
        "Gemma3Config", "Gemma3ForConditionalGeneration",
        dict(text_config=GROUPED, vision_config=VISION, mm_tokens_per_image=4),
        gated("Gemma3", "model.language_model.layers.3").edited,
    ),
    "phi": causal("Phi", SIZES, "model.layers.3.mlp.fc1", "model.layers.3.mlp.fc2"),
    "phi3": causal(
        "Phi3", {**SIZES, "num_key_value_heads": 1}, "model.layers.3.mlp.gate_up_proj", "model.layers.3.mlp.down_proj"
    ),
}  # fmt: skip

# Config -> architecture of the model it names.
CONFIGS = {
    "quickstart": "llama_30", "smollm2-world-facts": "llama_30", "small-t5-world-facts": "t5_gated",
    "small-bert-statements": "bert",
    "bert-base": "bert", "bart-base": "bart", "distilgpt2": "gpt2", "gpt-neo-2.7b": "gpt_neo", "gpt-j": "gptj",
    "t5-small": "t5", "t5-large": "t5", "t5-xl": "t5_gated", "t5-xxl": "t5_gated",
    "llama-3.2-1b": "llama", "llama-3.2-3b": "llama", "llama-3.1-8b": "llama", "llama-3-8b": "llama",
    "qwen2.5-0.5b": "qwen2", "qwen2.5-7b": "qwen2", "qwen2.5-72b": "qwen2", "qwen3-0.6b": "qwen3", "qwen3-8b": "qwen3",
    "mistral-7b": "mistral",
    "gemma-2-2b": "gemma2", "gemma-3-1b": "gemma3", "gemma-3-4b": "gemma3_vision",
    "phi-2": "phi", "phi-3.5-mini": "phi3", "phi-4-mini": "phi3", "smollm2-360m": "llama", "smollm2-1.7b": "llama",
    "gpt2": "gpt2", "gpt2-medium": "gpt2", "gpt2-large": "gpt2", "gpt2-xl": "gpt2",
    "opt-1.3b": "opt", "opt-6.7b": "opt", "pythia-1.4b": "gpt_neox", "pythia-6.9b": "gpt_neox",
}  # fmt: skip


_tokenizer = cache(small_tokenizer)


def save_tiny(name: str, folder: Path) -> Path:
    """A tiny random model of the architecture with the tests' tokenizer, as a user would have it on disk."""
    architecture = ARCHITECTURES[name]
    tokenizer = _tokenizer(architecture.kind)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    sizes = dict(architecture.sizes)
    if "text_config" in sizes:
        sizes["text_config"] = {**sizes["text_config"], **ids}
        ids = {}
    config = getattr(transformers, architecture.config)(**sizes, **ids)
    # Whoever asks first must not move the random numbers of the test that asks.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, architecture.model)(config)
        _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _spread(model: nn.Module) -> None:
    """Weights large enough for gradients to be no rounding errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
