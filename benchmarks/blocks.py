"""Blocks of the benchmark's models as bare calls of torch's and transformers' modules, with a say in the edited layers' outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

# What stands in for a call of one of an MLP's linear layers.
Linear = Callable[[nn.Module, Tensor], Tensor]
Kwargs = Mapping[str, Any]


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def gpt2_block(block: nn.Module, h: Tensor, linear: Linear, kwargs: Kwargs) -> Tensor:
    h = h + block.attn(block.ln_1(h), attention_mask=kwargs.get("attention_mask"))[0]
    mlp = block.mlp
    return h + linear(mlp.c_proj, mlp.act(linear(mlp.c_fc, block.ln_2(h))))


def gptj_block(block: nn.Module, h: Tensor, linear: Linear, kwargs: Kwargs) -> Tensor:
    normed, mlp = block.ln_1(h), block.mlp
    attended = block.attn(normed, attention_mask=kwargs["attention_mask"], position_ids=kwargs["position_ids"])[0]
    return attended + linear(mlp.fc_out, mlp.act(linear(mlp.fc_in, normed))) + h


def llama_block(block: nn.Module, h: Tensor, linear: Linear, kwargs: Kwargs) -> Tensor:
    h = h + block.self_attn(block.input_layernorm(h), **kwargs)[0]
    mlp, normed = block.mlp, block.post_attention_layernorm(h)
    return h + linear(mlp.down_proj, mlp.act_fn(linear(mlp.gate_proj, normed)) * linear(mlp.up_proj, normed))


def t5_block(block: nn.Module, h: Tensor, linear: Linear, kwargs: Kwargs) -> Tensor:
    h = block.layer[0](h, attention_mask=kwargs["attention_mask"], position_bias=kwargs["position_bias"])[0]
    if len(block.layer) == 3:
        h = block.layer[1](
            h, key_value_states=kwargs["encoder_hidden_states"], attention_mask=kwargs["encoder_attention_mask"],
            position_bias=kwargs["encoder_decoder_position_bias"],
        )[0]  # fmt: skip
    mlp, normed = block.layer[-1].DenseReluDense, block.layer[-1].layer_norm(h)
    return h + linear(mlp.wo, mlp.act(linear(mlp.wi_0, normed)) * linear(mlp.wi_1, normed))


BLOCKS = {"GPT2Block": gpt2_block, "GPTJBlock": gptj_block, "LlamaDecoderLayer": llama_block, "T5Block": t5_block}


def run_block(block: nn.Module, h: Tensor, linear: Linear, kwargs: Kwargs) -> Tensor:
    """A block's output `[rows, length, width]`.

    Args:
        block: of a class in `BLOCKS`.
        h: its input.
        linear: calls the MLP's linear layers.
        kwargs: what the model called it with (`recorded_calls`).
    """
    return BLOCKS[type(block).__name__](block, h, linear, kwargs)


@torch.no_grad()
def recorded_calls(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[nn.Module, tuple[Tensor, dict[str, Any]]]:
    """Block -> its input and its other arguments in a forward pass: masks, position biases and the like cost nothing later.

    Raises:
        ValueError: the floor knows no block of this model.
    """
    calls: dict[nn.Module, tuple[Tensor, dict[str, Any]]] = {}

    def record(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = signature(block.forward).bind(*args, **kwargs).arguments
        others = given.pop("kwargs", {})
        calls[block] = given.pop("hidden_states"), {**given, **others}

    blocks = [module for module in model.modules() if type(module).__name__ in BLOCKS]
    if not blocks:
        raise ValueError(f"The floor is written for {', '.join(BLOCKS)}, and {type(model).__name__} has none of them.")
    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls
