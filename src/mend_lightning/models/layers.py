"""Which layers of a model are edited: patterns, the usual choice per family, near matches on error."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mend_lightning.errors import BaseModelMismatchError, LayerNotFoundError

# The MLP's matrices inside a block, by their names in transformers. The paper edits MLP matrices of
# the last blocks (its appendix C); for gated T5 the original takes wi_0 and wo and leaves wi_1.
MLP_LAYERS = (
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",  # Llama, Mistral, Qwen, Gemma, SmolLM
    "mlp.gate_up_proj",  # Phi-3
    "mlp.c_fc", "mlp.c_proj",  # GPT-2, GPT-Neo
    "mlp.fc_in", "mlp.fc_out", "mlp.fc1", "mlp.fc2",  # GPT-J, Phi
    "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon, Bloom
    "fc1", "fc2",  # BART, OPT
    "layer.*.DenseReluDense.wi", "layer.*.DenseReluDense.wi_0", "layer.*.DenseReluDense.wo",  # T5
    "intermediate.dense", "output.dense",  # BERT, RoBERTa
    "ffn.lin1", "ffn.lin2", "ffn.up_proj", "ffn.down_proj",  # DistilBERT, MPT
)  # fmt: skip

# What torch's FullyShardedDataParallel calls the module that it wraps.
FSDP_PREFIX = "_fsdp_wrapped_module"

# Last blocks of each stack to edit by default: the paper's choice.
LAST_BLOCKS = {"single": 3, "encoder_decoder": 2}


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of an editable layer, whatever the orientation of its weight.

    Example:
        >>> layer_shape(nn.Linear(2, 3)), layer_shape(Conv1D(3, 2))
        ((2, 3), (2, 3))
    """
    if isinstance(layer, Conv1D):
        # Not the weight's shape: a sharded one is flat.
        return layer.nx, layer.nf
    # Quantised linear layers keep these two numbers, not the weight's shape.
    linear: Any = layer
    return linear.in_features, linear.out_features


def layer_weight(layer: nn.Module) -> Tensor:
    """The weight as the layer holds it: transposed in a `Conv1D`, flat where FSDP1 shards it.

    Example:
        >>> layer_weight(nn.Linear(2, 3)).shape
        torch.Size([3, 2])
    """
    weight: Any = layer.weight
    return weight


def layer_device(layer: nn.Module) -> torch.device:
    """Where the layer's weight is; the CPU for a layer that shows no tensor (torch's own quantised ones)."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return tensors[0].device if tensors else torch.device("cpu")


def is_editable(module: nn.Module) -> bool:
    """Whether the module is a linear map whose output a low-rank delta can be added to."""
    if isinstance(module, Conv1D):
        return True
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """name -> module, by the names that they have without FSDP's wrappers around them (of which the wrapped one counts).

    Example:
        >>> list(named_modules(nn.Sequential(nn.Linear(1, 1))))
        ['', '0']
    """
    return {_unwrapped_name(name): module for name, module in model.named_modules()}


def _unwrapped_name(name: str) -> str:
    return f"{name}.".replace(f"{FSDP_PREFIX}.", "").removesuffix(".")


def editable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every editable layer of the model by name, in the order of its modules."""
    return {name: module for name, module in named_modules(model).items() if is_editable(module)}


def layers_of_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, nn.Module]:
    """name -> module of the layers that an editor was made for.

    Args:
        model: the base model.
        shapes: name -> (d_in, d_out) of the editor's layers.

    Raises:
        BaseModelMismatchError: the model lacks one of them, or it has another shape there.
    """
    modules = named_modules(model)
    for name, shape in shapes.items():
        if name not in modules:
            raise BaseModelMismatchError(
                f"This editor was made for a model with a layer {name!r} of shape {shape}; "
                f"{type(model).__name__} has none. Load the base model the editor was trained on."
            )
        if layer_shape(modules[name]) != shape:
            raise BaseModelMismatchError(
                f"Layer {name!r} is {layer_shape(modules[name])} (d_in, d_out) in this model, but the editor "
                f"was made for {shape}. Load the base model the editor was trained on."
            )
    return {name: modules[name] for name in shapes}


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The model's stacks of transformer blocks: outermost lists of two or more like modules.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2, vocab_size=32)
        >>> list(find_stacks(LlamaForCausalLM(config)))
        ['model.layers']
    """
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in named_modules(model).items():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and not inside and _is_stack(module):
            stacks[name] = module
    return stacks


def _is_stack(modules: nn.ModuleList) -> bool:
    alike = len({type(module) for module in modules}) == 1
    return alike and any(is_editable(child) for child in modules[0].modules())


def text_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The stacks that read text: of a model that also sees pictures or hears, its language model's alone.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> list(text_stacks(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=32))))
        ['transformer.h']
    """
    stacks = find_stacks(model)
    whole: Any = next((module for module in model.modules() if hasattr(module, "get_decoder")), None)
    if len(stacks) < 2 or whole is None or getattr(whole.config, "is_encoder_decoder", False):
        return stacks
    inside = {id(module) for module in whole.get_decoder().modules()}
    return {name: stack for name, stack in stacks.items() if id(stack) in inside} or stacks


def default_layers(model: nn.Module, last_blocks: int | None = None) -> list[str]:
    """The paper's choice: the MLP matrices of the last blocks of every stack that reads text.

    Args:
        model: a Hugging Face model, or a module that holds one.
        last_blocks: how many blocks of each stack; None means 3, and 2 + 2 for an encoder-decoder.

    Raises:
        LayerNotFoundError: the model has no block stack, or its MLPs have names not known here.
    """
    stacks = text_stacks(model)
    if last_blocks is None:
        last_blocks = LAST_BLOCKS["encoder_decoder" if len(stacks) > 1 else "single"]
    names = [
        f"{stack_name}.{index}.{name}"
        for stack_name, stack in stacks.items()
        for index in range(max(0, len(stack) - last_blocks), len(stack))
        for name in editable_layers(stack[index])
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in MLP_LAYERS)
    ]
    if not names:
        raise LayerNotFoundError(
            f"No default layers are known for {type(model).__name__}. Name them: layers=[...] takes module "
            f"names or patterns; the model's linear layers are, for example, {_examples(model)}."
        )
    return names


def match_layers(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the layers that the patterns select, in the order of the patterns.

    Args:
        model: the base model.
        patterns: module names or shell patterns (`model.layers.2[7-9].mlp.*`); a trailing
            `.weight` is allowed, as in the original's configs.

    Raises:
        LayerNotFoundError: a pattern matches no editable layer; near matches are listed.
    """
    known = editable_layers(model)
    names: dict[str, None] = {}
    for pattern in (pattern.removesuffix(".weight") for pattern in patterns):
        found = [pattern] if pattern in known else [n for n in known if fnmatch.fnmatchcase(n, pattern)]
        if not found:
            raise LayerNotFoundError(_no_match(model, pattern, list(known)))
        names.update(dict.fromkeys(found))
    return list(names)


def _no_match(model: nn.Module, pattern: str, known: list[str]) -> str:
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    if pattern in named_modules(model):
        cause = "is a module that is not a linear layer, so it has no u and delta"
    else:
        cause = "matches no layer"
    hint = f"Did you mean {', '.join(near)}?" if near else f"Linear layers are, for example, {_examples(model)}."
    return f"Layer pattern {pattern!r} {cause}. {hint}"


def _examples(model: nn.Module) -> str:
    names = list(editable_layers(model))
    return ", ".join(names[-4:]) or "none at all"


def select_layers(
    model: nn.Module, patterns: Sequence[str] | None = None, last_blocks: int | None = None
) -> dict[str, nn.Module]:
    """name -> module of the layers to edit: by pattern, or the default choice."""
    names = match_layers(model, patterns) if patterns else default_layers(model, last_blocks)
    modules = named_modules(model)
    return {name: modules[name] for name in names}
