"""Writes the table of docs/models.md: every shipped config with its model, task and memory.

    python scripts/model_table.py          # prints the table
    python scripts/model_table.py --write  # puts it into docs/models.md

Sizes are counted on models without weights (torch's meta device), in the shapes of the published checkpoints, with the
layers and the editor that the config chooses.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from mend_lightning.config.files import config_names
from mend_lightning.config.overlays import read_config
from mend_lightning.editors.mend import MendEditor

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BYTES = {"float32": 4, "bfloat16": 2, "auto": 2}
RUN_BY_US = {"quickstart", "smollm2-world-facts", "small-t5-world-facts", "small-bert-statements"}


def grouped(hidden: int, mlp: int, blocks: int, heads: int, kv: int, vocabulary: int, tied: bool, **more: Any) -> dict:
    """Sizes of a model of Llama's kind."""
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, "tie_word_embeddings": tied, **more,
    }  # fmt: skip


def gpt2(width: int, blocks: int, heads: int) -> tuple[str, dict]:
    return "GPT2", {"n_embd": width, "n_layer": blocks, "n_head": heads}


def opt(width: int, blocks: int) -> tuple[str, dict]:
    return "OPT", {
        "hidden_size": width, "ffn_dim": 4 * width, "num_hidden_layers": blocks, "num_attention_heads": 32,
        "word_embed_proj_dim": width,
    }  # fmt: skip


def t5(width: int, mlp: int, blocks: int, heads: int, gated: bool) -> tuple[str, dict]:
    return "T5", {
        "d_model": width, "d_ff": mlp, "num_layers": blocks, "num_heads": heads, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu" if gated else "relu", "tie_word_embeddings": not gated,
    }  # fmt: skip


SMOLLM2 = ("Llama", grouped(576, 1536, 30, 9, 3, 49152, True))
GEMMA3_4B = grouped(2560, 10240, 34, 8, 4, 262208, True, head_dim=256)
SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 896, "patch_size": 14,
}  # fmt: skip
# Config -> (family in transformers, sizes that differ from its defaults).
MODELS: dict[str, tuple[str, dict]] = {
    "quickstart": SMOLLM2, "smollm2-world-facts": SMOLLM2,
    "small-t5-world-facts": ("T5", {
        "d_model": 256, "d_ff": 1024, "d_kv": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 2048,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }),
    "small-bert-statements": ("Bert", {
        "num_labels": 1, "vocab_size": 3000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    }),
    "bert-base": ("Bert", {"num_labels": 1}),
    "bart-base": ("Bart", {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072,
                           "decoder_ffn_dim": 3072, "encoder_attention_heads": 12, "decoder_attention_heads": 12}),
    "distilgpt2": gpt2(768, 6, 12),
    "gpt-neo-2.7b": ("GPTNeo", {"hidden_size": 2560, "num_layers": 32, "num_heads": 20,
                                "attention_types": [[["global", "local"], 16]]}),
    "gpt-j-6b": ("GPTJ", {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64}),
    "t5-small": t5(512, 2048, 6, 8, False), "t5-large": t5(1024, 4096, 24, 16, False),
    "t5-xl": t5(2048, 5120, 24, 32, True), "t5-xxl": t5(4096, 10240, 24, 64, True),
    "llama-3.2-1b": ("Llama", grouped(2048, 8192, 16, 32, 8, 128256, True, head_dim=64)),
    "llama-3.2-3b": ("Llama", grouped(3072, 8192, 28, 24, 8, 128256, True, head_dim=128)),
    "llama-3.1-8b": ("Llama", grouped(4096, 14336, 32, 32, 8, 128256, False)),
    "qwen2.5-0.5b": ("Qwen2", grouped(896, 4864, 24, 14, 2, 151936, True)),
    "qwen2.5-7b": ("Qwen2", grouped(3584, 18944, 28, 28, 4, 152064, False)),
    "qwen3-0.6b": ("Qwen3", grouped(1024, 3072, 28, 16, 8, 151936, True, head_dim=128)),
    "qwen3-8b": ("Qwen3", grouped(4096, 12288, 36, 32, 8, 151936, False, head_dim=128)),
    "mistral-7b": ("Mistral", grouped(4096, 14336, 32, 32, 8, 32768, False)),
    "gemma-2-2b": ("Gemma2", grouped(2304, 9216, 26, 8, 4, 256000, True, head_dim=256)),
    "gemma-3-1b": ("Gemma3Text", grouped(1152, 6912, 26, 4, 1, 262144, True, head_dim=256)),
    "gemma-3-4b": ("Gemma3", {"text_config": GEMMA3_4B, "vision_config": SIGLIP}),
    "phi-2": ("Phi", {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
                      "num_attention_heads": 32, "vocab_size": 51200}),
    "phi-3.5-mini": ("Phi3", grouped(3072, 8192, 32, 32, 32, 32064, False)),
    "phi-4-mini": ("Phi3", grouped(3072, 8192, 32, 24, 8, 200064, True)),
    "smollm2-360m": ("Llama", grouped(960, 2560, 32, 15, 5, 49152, True)),
    "smollm2-1.7b": ("Llama", grouped(2048, 8192, 24, 32, 32, 49152, True)),
    "gpt2": gpt2(768, 12, 12), "gpt2-medium": gpt2(1024, 24, 16), "gpt2-large": gpt2(1280, 36, 20),
    "gpt2-xl": gpt2(1600, 48, 25),
    "opt-1.3b": opt(2048, 24), "opt-6.7b": opt(4096, 32),
    "pythia-1.4b": ("GPTNeoX", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                                "num_attention_heads": 16, "vocab_size": 50304}),
    "pythia-6.9b": ("GPTNeoX", {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
                                "num_attention_heads": 32, "vocab_size": 50432}),
}  # fmt: skip


def sizes(name: str) -> tuple[int, int]:
    """Parameters of a config's base model and of its editor."""
    family, options = MODELS[name]
    # The library's default padding id need not lie in another vocabulary.
    if "text_config" not in options:
        options = {"pad_token_id": 0, **options}
    config = getattr(transformers, f"{family}Config")(**options)
    values = read_config(name).values()["model"]
    with torch.device("meta"):
        if family == "Bert":
            model = transformers.BertForSequenceClassification(config)
        elif family in ("T5", "Bart"):
            model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
        editor = MendEditor.for_model(model, values.get("layers"), values.get("last_blocks"), rank=values["rank"])
    base, small = (sum(p.numel() for p in module.parameters()) for module in (model, editor))
    if options.get("tie_word_embeddings") is False and model.config.tie_word_embeddings:
        # transformers ties a T5's embeddings until it loads weights that differ.
        base += model.get_output_embeddings().weight.numel()
    return base, small


def row(name: str) -> str:
    """A config's line of the table."""
    values = read_config(name).values()
    base, editor = sizes(name)
    dtype = values["model"]["base"].get("dtype", "auto")
    weights, training = base * BYTES[dtype] / 2**30, 16 * editor / 2**30
    shown = "bfloat16" if dtype == "auto" else dtype
    cells = [
        f"`{name}`", f"`{values['model']['base']['name']}`", task(values["data"]), f"{base / 1e6:,.0f} M, {shown}",
        f"{editor / 1e6:,.0f} M", f"{weights:.1f} + {training:.1f} = {weights + training:.1f}",
        "yes" if name in RUN_BY_US else "no",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def task(data: dict) -> str:
    if "statements" in data["train"]:
        return "statements"
    return {"kilt": "zsRE", "fever": "FEVER", "wikitext": "Wikitext"}.get(data.get("format", ""), "world_facts")


def table() -> str:
    columns = ("config", "model", "task", "its weights", "editor", "memory in GiB", "run on real weights")
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    order = sorted(config_names(), key=list(MODELS).index)
    return "\n".join([head, *map(row, order)])


def written(page: str, text: str) -> str:
    """The page with the table between its marks."""
    begin, end = "<!-- table:begin -->\n", "\n<!-- table:end -->"
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}{text}{end}", page, flags=re.DOTALL)


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), table()), encoding="utf-8")
    else:
        sys.stdout.write(table() + "\n")
