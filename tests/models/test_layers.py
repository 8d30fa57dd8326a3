"""Which layers are edited: the default of every family by name, patterns, and errors by text."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers.models import tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from mend_lightning.errors import LayerNotFoundError
from mend_lightning.models.layers import (
    default_layers,
    editable_layers,
    find_stacks,
    is_editable,
    layer_shape,
    match_layers,
    select_layers,
)

# What is edited in each of the last blocks.
DEFAULTS = {
    "gpt2": ("transformer.h.{}.mlp.", ("c_fc", "c_proj"), (1, 2, 3)),
    "llama": ("model.layers.{}.mlp.", ("gate_proj", "up_proj", "down_proj"), (1, 2, 3)),
    "bert": ("bert.encoder.layer.{}.", ("intermediate.dense", "output.dense"), (1, 2, 3)),
}
DEFAULTS_OF_BOTH_STACKS = {
    "t5": (("encoder.block.{}.layer.1.", "decoder.block.{}.layer.2."), ("DenseReluDense.wi", "DenseReluDense.wo")),
    # As in the paper: wi_1 is left alone.
    "t5_gated": (
        ("encoder.block.{}.layer.1.", "decoder.block.{}.layer.2."),
        ("DenseReluDense.wi_0", "DenseReluDense.wo"),
    ),
    "bart": (("model.encoder.layers.{}.", "model.decoder.layers.{}."), ("fc1", "fc2")),
}

# Models of other names, as (config, class, settings, a block's edited layers).
SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, vocab_size=32)
OTHERS = {
    "GPTNeoX": (SIZES, "gpt_neox.layers.3.mlp.", ("dense_h_to_4h", "dense_4h_to_h")),
    "Mistral": ({**SIZES, "num_key_value_heads": 2}, "model.layers.3.mlp.", ("gate_proj", "up_proj", "down_proj")),
    "Qwen2": ({**SIZES, "num_key_value_heads": 2}, "model.layers.3.mlp.", ("gate_proj", "up_proj", "down_proj")),
    "Qwen3": ({**SIZES, "num_key_value_heads": 2}, "model.layers.3.mlp.", ("gate_proj", "up_proj", "down_proj")),
    "Gemma2": ({**SIZES, "num_key_value_heads": 2}, "model.layers.3.mlp.", ("gate_proj", "up_proj", "down_proj")),
    "Phi3": ({**SIZES, "pad_token_id": 0}, "model.layers.3.mlp.", ("gate_up_proj", "down_proj")),
    "Phi": (SIZES, "model.layers.3.mlp.", ("fc1", "fc2")),
    "OPT": (
        dict(hidden_size=16, ffn_dim=24, num_hidden_layers=4, num_attention_heads=2, vocab_size=32, word_embed_proj_dim=16),
        "model.decoder.layers.3.", ("fc1", "fc2"),
    ),
    "GPTJ": (dict(n_embd=16, n_layer=4, n_head=2, rotary_dim=4, vocab_size=32), "transformer.h.3.mlp.", ("fc_in", "fc_out")),
    "GPTNeo": (
        dict(hidden_size=16, num_layers=4, num_heads=2, attention_types=[[["global"], 4]], vocab_size=32),
        "transformer.h.3.mlp.", ("c_fc", "c_proj"),
    ),
    "Falcon": (SIZES, "transformer.h.3.mlp.", ("dense_h_to_4h", "dense_4h_to_h")),
    "Bloom": (dict(hidden_size=16, n_layer=4, n_head=2, vocab_size=32), "transformer.h.3.mlp.", ("dense_h_to_4h", "dense_4h_to_h")),
    "Mpt": (dict(d_model=16, n_layers=4, n_heads=2, vocab_size=32), "transformer.blocks.3.ffn.", ("up_proj", "down_proj")),
}  # fmt: skip


@pytest.mark.parametrize("family", list(DEFAULTS))
def test_default_is_the_mlp_of_the_last_three_blocks(family):
    block, names, last = DEFAULTS[family]
    assert default_layers(tiny_model(family)) == [block.format(i) + name for i in last for name in names]


@pytest.mark.parametrize("family", list(DEFAULTS_OF_BOTH_STACKS))
def test_default_is_the_mlp_of_the_last_two_blocks_of_both_stacks(family):
    blocks, names = DEFAULTS_OF_BOTH_STACKS[family]
    expected = [block.format(i) + name for block in blocks for i in (1, 2) for name in names]
    assert default_layers(tiny_model(family)) == expected


@pytest.mark.parametrize("family", list(OTHERS))
def test_defaults_of_other_families(family):
    settings, block, names = OTHERS[family]
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    assert default_layers(model, last_blocks=1) == [block + name for name in names]
    assert len(default_layers(model)) == 3 * len(names)


def test_of_a_model_that_sees_pictures_the_language_model_is_edited():
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=16, patch_size=4
    )  # fmt: skip
    with torch.device("meta"):
        alone = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**text))
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        model = transformers.Gemma3ForConditionalGeneration(config)
    names = [f"layers.{i}.mlp.{part}_proj" for i in (1, 2, 3) for part in ("gate", "up", "down")]
    assert default_layers(alone) == [f"model.{name}" for name in names]
    # The picture's blocks have an MLP of linear layers as well.
    assert list(find_stacks(model)) == ["model.vision_tower.encoder.layers", "model.language_model.layers"]
    assert default_layers(model) == [f"model.language_model.{name}" for name in names]
    # A module that holds the model, as a LightningModule does.
    assert default_layers(nn.ModuleDict({"base": model})) == [f"base.model.language_model.{name}" for name in names]


@pytest.mark.parametrize(
    ("family", "names"), [("DistilBert", ("ffn.lin1", "ffn.lin2")), ("Roberta", ("intermediate.dense", "output.dense"))]
)
def test_defaults_of_other_classifiers(family, names):
    settings = dict(dim=16, hidden_dim=24, n_layers=4, n_heads=2) if family == "DistilBert" else SIZES
    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")(**{"vocab_size": 32, **settings})
        model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    (stack,) = find_stacks(model)
    assert default_layers(model, last_blocks=1) == [f"{stack}.3.{name}" for name in names]


@pytest.mark.parametrize(("last_blocks", "count"), [(1, 1), (2, 2), (4, 4), (99, 4)])
def test_number_of_last_blocks(last_blocks, count):
    names = default_layers(tiny_model("gpt2"), last_blocks)
    assert len({name.split(".")[2] for name in names}) == count


def test_small_models_have_fewer_blocks_than_the_default():
    assert len(default_layers(tiny_model("llama", blocks=2))) == 6


def test_stacks(family):
    expected = {
        "gpt2": ["transformer.h"], "llama": ["model.layers"], "bert": ["bert.encoder.layer"],
        "bart": ["model.encoder.layers", "model.decoder.layers"],
    }  # fmt: skip
    stacks = find_stacks(tiny_model(family))
    assert list(stacks) == expected.get(family, ["encoder.block", "decoder.block"])
    assert all(isinstance(stack, nn.ModuleList) and len(stack) in (3, 4) for stack in stacks.values())


def test_lists_inside_a_block_are_no_stacks():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()]), "norms": nn.ModuleList([nn.LayerNorm(2)] * 2)})
    assert list(find_stacks(model)) == ["blocks"]


def test_no_default_is_known():
    with pytest.raises(
        LayerNotFoundError, match=r"No default layers are known for Sequential\. Name them: .* example, 0, 1\."
    ):
        default_layers(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)))
    with pytest.raises(LayerNotFoundError, match="none at all"):
        default_layers(nn.Sequential(nn.ReLU()))


def test_patterns_keep_their_order_and_name_no_layer_twice():
    patterns = ["model.layers.3.mlp.up_proj.weight", "model.layers.[02].mlp.up_proj", "*.3.mlp.up_proj"]
    expected = [f"model.layers.{index}.mlp.up_proj" for index in (3, 0, 2)]
    assert match_layers(tiny_model("llama"), patterns) == expected


def test_exact_name_is_no_pattern():
    """A name with brackets in it, as a ParameterDict's key may have, is found as it is."""
    model = nn.ModuleDict({"fc[0]": nn.Linear(2, 2), "fc0": nn.Linear(2, 2)})
    assert match_layers(model, ["fc[0]"]) == ["fc[0]"]


def test_nothing_matches():
    model = tiny_model("llama")
    text = r"'model\.layers\.3\.mlp\.upproj' matches no layer\. Did you mean model\.layers\.\d\.mlp\.up_proj,"
    with pytest.raises(LayerNotFoundError, match=text):
        match_layers(model, ["model.layers.3.mlp.upproj"])
    with pytest.raises(LayerNotFoundError, match=r"'§' matches no layer\. Linear layers are, for example, .*lm_head\."):
        match_layers(model, ["§"])
    with pytest.raises(ValueError):
        match_layers(model, ["model.layers.3.mlp.up_proj", "no*"])


def test_module_that_is_not_linear():
    with pytest.raises(LayerNotFoundError, match=r"'model\.layers\.3\.mlp' is a module that is not a linear layer"):
        match_layers(tiny_model("llama"), ["model.layers.3.mlp"])


def test_shapes_are_in_and_out_whatever_the_orientation():
    assert layer_shape(nn.Linear(2, 3)) == layer_shape(Conv1D(3, 2)) == (2, 3)
    model = tiny_model("gpt2")
    shapes = {name: layer_shape(layer) for name, layer in select_layers(model, last_blocks=1).items()}
    assert shapes == {"transformer.h.3.mlp.c_fc": (16, 24), "transformer.h.3.mlp.c_proj": (24, 16)}


def test_what_is_editable():
    assert is_editable(nn.Linear(2, 3))
    assert is_editable(Conv1D(3, 2))
    assert not any(map(is_editable, (nn.Embedding(2, 3), nn.LayerNorm(3), nn.Conv1d(2, 3, 1), nn.Sequential())))


def test_selection_gives_the_models_own_modules(family):
    model = tiny_model(family)
    for name, layer in select_layers(model).items():
        assert layer is model.get_submodule(name)
        assert layer is editable_layers(model)[name]
