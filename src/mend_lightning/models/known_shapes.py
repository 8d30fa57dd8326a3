"""The published shapes of known models, so that a model's size is known where neither it nor a network is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

from mend_lightning.errors import ModelLoadError
from mend_lightning.models.smollm2 import MODEL_NAME, find_smollm2

# A family of transformers, and the sizes that differ from its config's defaults.
Shape = tuple[str, dict[str, Any]]


def grouped(
    family: str, hidden: int, mlp: int, blocks: int, heads: int, kv: int, vocabulary: int, tied: bool, **more: Any
) -> Shape:
    """A model of Llama's kind."""
    return family, {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, "tie_word_embeddings": tied, **more,
    }  # fmt: skip


def gpt2(width: int, blocks: int, heads: int) -> Shape:
    return "GPT2", {"n_embd": width, "n_layer": blocks, "n_head": heads}


def opt(width: int, blocks: int) -> Shape:
    sizes = {"hidden_size": width, "ffn_dim": 4 * width, "num_hidden_layers": blocks, "num_attention_heads": 32}
    return "OPT", {**sizes, "word_embed_proj_dim": width}


def neox(width: int, blocks: int, heads: int, vocabulary: int) -> Shape:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": blocks}
    return "GPTNeoX", {**sizes, "num_attention_heads": heads, "vocab_size": vocabulary}


def t5(width: int, mlp: int, blocks: int, heads: int, gated: bool, vocabulary: int = 32128) -> Shape:
    return "T5", {
        "d_model": width, "d_ff": mlp, "num_layers": blocks, "num_heads": heads, "vocab_size": vocabulary,
        "feed_forward_proj": "gated-gelu" if gated else "relu", "tie_word_embeddings": not gated,
        "decoder_start_token_id": 0,
    }  # fmt: skip


_BERT: dict[str, Any] = {"num_labels": 1, "architectures": ["BertForSequenceClassification"]}
_BART_BASE = {
    "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
    "encoder_attention_heads": 12, "decoder_attention_heads": 12,
}  # fmt: skip
_SMALL_BERT = {
    "vocab_size": 3000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 896, "patch_size": 14,
}  # fmt: skip
_SMOLLM2 = grouped("Llama", 576, 1536, 30, 9, 3, 49152, True)
_LLAMA_8B = grouped("Llama", 4096, 14336, 32, 32, 8, 128256, False)
_GEMMA3_4B = grouped("Gemma3Text", 2560, 10240, 34, 8, 4, 262208, True, head_dim=256)[1]

# What a model is loaded by -> its shape: every model that a shipped config names, and some of their kind.
SHAPES: dict[str, Shape] = {
    MODEL_NAME: _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-360M-Instruct": grouped("Llama", 960, 2560, 32, 15, 5, 49152, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": grouped("Llama", 2048, 8192, 24, 32, 32, 49152, True),
    # Folders that the paper's fine-tuned models, and this repository's scripts, are put into.
    "runs/small-t5": t5(256, 1024, 4, 4, True, 2048),
    "runs/small-bert": ("Bert", {**_BERT, **_SMALL_BERT}),
    "models/bert-base-fever": ("Bert", _BERT),
    "models/bart-base-zsre": ("Bart", _BART_BASE),
    "distilgpt2": gpt2(768, 6, 12),
    "openai-community/gpt2": gpt2(768, 12, 12),
    "openai-community/gpt2-medium": gpt2(1024, 24, 16),
    "openai-community/gpt2-large": gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": gpt2(1600, 48, 25),
    "EleutherAI/gpt-neo-2.7B": ("GPTNeo", {
        "hidden_size": 2560, "num_layers": 32, "num_heads": 20, "attention_types": [[["global", "local"], 16]],
    }),
    "EleutherAI/gpt-j-6B": ("GPTJ", {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64}),
    "EleutherAI/pythia-1.4b": neox(2048, 24, 16, 50304),
    "EleutherAI/pythia-6.9b": neox(4096, 32, 32, 50432),
    "facebook/opt-1.3b": opt(2048, 24),
    "facebook/opt-6.7b": opt(4096, 32),
    "google/t5-small-ssm-nq": t5(512, 2048, 6, 8, False),
    "google/t5-large-ssm-nq": t5(1024, 4096, 24, 16, False),
    "google/t5-xl-ssm-nq": t5(2048, 5120, 24, 32, True),
    "google/t5-xxl-ssm-nq": t5(4096, 10240, 24, 64, True),
    "google/t5-v1_1-base": t5(768, 2048, 12, 12, True),
    "google/t5-v1_1-large": t5(1024, 2816, 24, 16, True),
    "meta-llama/Llama-3.2-1B": grouped("Llama", 2048, 8192, 16, 32, 8, 128256, True, head_dim=64),
    "meta-llama/Llama-3.2-3B": grouped("Llama", 3072, 8192, 28, 24, 8, 128256, True, head_dim=128),
    "meta-llama/Meta-Llama-3-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "mistralai/Mistral-7B-v0.3": grouped("Mistral", 4096, 14336, 32, 32, 8, 32768, False),
    "Qwen/Qwen2.5-0.5B": grouped("Qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "Qwen/Qwen2.5-7B": grouped("Qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2.5-72B": grouped("Qwen2", 8192, 29568, 80, 64, 8, 152064, False),
    "Qwen/Qwen3-0.6B-Base": grouped("Qwen3", 1024, 3072, 28, 16, 8, 151936, True, head_dim=128),
    "Qwen/Qwen3-8B-Base": grouped("Qwen3", 4096, 12288, 36, 32, 8, 151936, False, head_dim=128),
    "google/gemma-2-2b": grouped("Gemma2", 2304, 9216, 26, 8, 4, 256000, True, head_dim=256),
    "google/gemma-3-1b-pt": grouped("Gemma3Text", 1152, 6912, 26, 4, 1, 262144, True, head_dim=256),
    "google/gemma-3-4b-pt": ("Gemma3", {"text_config": _GEMMA3_4B, "vision_config": _SIGLIP}),
    "microsoft/phi-2": ("Phi", {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 51200,
    }),
    "microsoft/Phi-3.5-mini-instruct": grouped("Phi3", 3072, 8192, 32, 32, 32, 32064, False),
    "microsoft/Phi-4-mini-instruct": grouped("Phi3", 3072, 8192, 32, 24, 8, 200064, True),
}  # fmt: skip


def known_architecture(
    name: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """A model's transformers config, without a network: its folder's, the hub cache's, or the one that ships here.

    Args:
        name: a local folder, a Hugging Face id, or the quickstart model's name.
        revision: of a Hugging Face id in the cache.
        trust_remote_code: run code that comes with a config on this machine.

    Raises:
        ModelLoadError: nothing on this machine says what shape the model has.

    Example:
        >>> known_architecture("EleutherAI/gpt-j-6B").n_layer
        28
    """
    found = local_config(str(name), revision, trust_remote_code)
    return found if found is not None else shipped_config(str(name))


def local_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig | None:
    """The config in a local folder or in the hub cache; None where neither has one.

    Raises:
        ModelLoadError: there is one, and transformers cannot read it.
    """
    where = local_name(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": True}
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        if Path(where).is_dir():
            raise ModelLoadError(f"{where}/config.json is no config that transformers can read: {error}") from error
        return None


def local_name(name: str) -> str:
    """What a model's files are looked for by: the prepared quickstart model's folder for its name, `~` resolved."""
    if name == MODEL_NAME:
        return str(find_smollm2() or name)
    return str(Path(name).expanduser()) if name.startswith("~") else name


def shipped_config(name: str) -> PretrainedConfig:
    """The config of a model whose published shape is in `SHAPES`; hub ids are found in any case of letters.

    Raises:
        ModelLoadError: it is not among them.
    """
    shape = next((shape for known, shape in SHAPES.items() if known.casefold() == name.casefold()), None)
    if shape is None:
        raise ModelLoadError(
            f"The shape of {name!r} is not known here: it is no local folder with a config.json, it is not in the Hugging "
            "Face cache, and it is none of the models whose shapes ship with mend-lightning. Put the model's config.json "
            "(no weights are needed) into a folder and give that folder as its name, or load the config once on a "
            "machine with network."
        )
    family, sizes = shape
    # The families' own ids need not lie in another vocabulary, and which ids end and pad a text is the tokenizer's business.
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    if "text_config" in sizes:
        sizes, ids = {**sizes, "text_config": {**sizes["text_config"], **ids}}, {}
    # BART's ids are those of its vocabulary, and its decoder starts with one of them.
    return getattr(transformers, f"{family}Config")(**{**({} if family == "Bart" else ids), **sizes})
