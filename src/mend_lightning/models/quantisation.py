"""Quantised base models: which library stores the weights in 8 or 4 bit, and how transformers is told."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, QuantoConfig

from mend_lightning.errors import ConfigError, MissingPackageError
from mend_lightning.models.fingerprint import is_quantized
from mend_lightning.models.layers import editable_layers, find_stacks

Quantize = Literal["int8", "int4"]

# What each library needs to be there, as modules.
PACKAGES = {"bitsandbytes": ("bitsandbytes", "accelerate"), "optimum-quanto": ("optimum.quanto", "accelerate")}


def quantizing_library() -> str:
    """The library that quantises on the device which computes: bitsandbytes on a CUDA device, optimum-quanto elsewhere."""
    return "bitsandbytes" if torch.cuda.is_available() else "optimum-quanto"


def quantization_config(
    quantize: Quantize, model_class: Any, config: Any, compute_dtype: torch.dtype | str, trust_remote_code: bool = False
) -> BitsAndBytesConfig | QuantoConfig:
    """What `from_pretrained` needs to quantise the blocks' linear layers while it loads them, without a full copy.

    Args:
        quantize: "int8" or "int4".
        model_class: transformers' class that will load the model.
        config: the model's own.
        compute_dtype: of the layers' inputs; bitsandbytes computes 4-bit layers in it, in bfloat16 where it is a string.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: `quantize` is neither, or the model's files are quantised already.
        MissingPackageError: the library is not installed.
    """
    if quantize not in ("int8", "int4"):
        raise ConfigError(f"quantize must be int8, int4 or nothing, not {quantize!r}.")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"The base model's files are quantised already, so it cannot be loaded with quantize {quantize!r}. Leave quantize "
            "out: the model loads as it is stored, and is edited as it is."
        )
    library = quantizing_library()
    _check_installed(library, quantize)
    with torch.device("meta"):
        skipped = layers_outside_of_blocks(model_class.from_config(config, trust_remote_code=trust_remote_code))
    if library == "optimum-quanto":
        return QuantoConfig(weights=quantize, modules_to_not_convert=skipped)
    return _for_bitsandbytes(quantize, skipped, compute_dtype)


def _for_bitsandbytes(
    quantize: Quantize, skipped: list[str] | None, compute_dtype: torch.dtype | str
) -> BitsAndBytesConfig:
    # By its name this argument is of 8 bit alone; it counts for 4 bit as well.
    kept = {"llm_int8_skip_modules": skipped}
    if quantize == "int8":
        # One remark for every product of every layer: it computes in float16 whatever the model's dtype.
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_remark_on_casts)
        return BitsAndBytesConfig(load_in_8bit=True, **kept)
    computed = torch.bfloat16 if isinstance(compute_dtype, str) else compute_dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed, **kept)


def layers_outside_of_blocks(model: nn.Module) -> list[str] | None:
    """Names of linear layers outside of the blocks, which keep their weights: what makes the logits, a pooler.

    Transformers' own choice (None, of a model without a stack of blocks) quantises the head of a classifier.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> layers_outside_of_blocks(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=32)))
        ['lm_head']
    """
    stacks = tuple(f"{name}." for name in find_stacks(model))
    return [name for name in editable_layers(model) if not name.startswith(stacks)] if stacks else None


def prepare_quantized(model: nn.Module, quantize: Quantize) -> None:
    """Makes a model that was loaded with `quantization_config` ready to be edited.

    Raises:
        ConfigError: loading quantised nothing.
    """
    if not any(is_quantized(layer) for layer in editable_layers(model).values()):
        raise ConfigError(
            f"quantize {quantize!r} changed no layer of {type(model).__name__}: {quantizing_library()} quantises nn.Linear, "
            "and this model's linear layers are of another kind (GPT-2's are Conv1D). Leave quantize out."
        )
    if quantizing_library() == "optimum-quanto":
        compute_dequantized(model)


def _is_no_remark_on_casts(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.getMessage()


def check_whole(quantize: Quantize | None) -> None:
    """Raises ConfigError if a base that is to be quantised is to be sharded."""
    if quantize is not None:
        raise ConfigError(
            f"model.base.quantize {quantize!r} and a sharded base cannot go together: FSDP gathers plain weights. Use "
            "--trainer.strategy ddp, where every device has the whole base in few bits, or leave quantize out."
        )


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes; of a quantised one, or this rank's shard, those of what it is made of.

    Example:
        >>> stored_bytes(torch.zeros(3, dtype=torch.bfloat16))
        6
    """
    inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    parts = [part for part in (getattr(tensor, name) for name in inner) if isinstance(part, Tensor)]
    return sum(map(stored_bytes, parts)) if parts else tensor.numel() * tensor.element_size()


def _check_installed(library: str, quantize: Quantize) -> None:
    missing = [package for package in PACKAGES[library] if not _is_installed(package)]
    if missing:
        raise MissingPackageError(
            f"A base with quantize {quantize!r} needs {library} on this machine, and {missing[0].replace('.', '-')} is not "
            f"installed: pip install {library} accelerate (or pip install 'mend-lightning[quantized]')."
        )


def _is_installed(module: str) -> bool:
    parent = module.partition(".")[0]
    return find_spec(parent) is not None and find_spec(module) is not None


class _Linear(torch.autograd.Function):
    """`x Wᵀ + b` with a quantised W, which is dequantised once for each product and kept in its few bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight.dequantize().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight.dequantize().to(grad.dtype), None, None


def compute_dequantized(model: nn.Module) -> None:
    """Has every quanto layer of `model` compute what a plain layer with the dequantised weight computes, bit for bit.

    Quanto's own product of bfloat16 and 8-bit weights on a CPU is made for single tokens: on whole rows it took four times
    as long, for layers 24 wide it ended the process, and no product of its works under autocast.
    """
    kind, dequantizing = _classes()
    for module in model.modules():
        if type(module) is kind:
            # Not an instance's own `forward`: that would be a cycle, and the base would outlive its last use.
            module.__class__ = dequantizing


@cache
def _classes() -> tuple[type[nn.Module], type[nn.Module]]:
    from optimum.quanto import QLinear

    class DequantizingLinear(QLinear):
        def forward(self, x: Tensor) -> Tensor:
            return _Linear.apply(x, self.weight, self.bias)

    return QLinear, DequantizingLinear
