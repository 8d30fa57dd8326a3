"""A base model's blocks under torch.compile, where that is safe: blocks that hold no hook, and so no edit.

Blocks of one build share their code, whatever the number of rows and tokens. Dynamo does not see hooks that come after
it compiled, so a block that holds one at a call (a recorded or edited layer) runs as it is, that time.
"""

from __future__ import annotations

import itertools
import types
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.fx.experimental import _config as shape_config
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mend_lightning.errors import ConfigError, UncompiledWarning
from mend_lightning.models.layers import find_stacks
from mend_lightning.models.sharding.collectives import is_sharded

# Entered at every call; made once, for that takes longer than the call's own overhead.
_SETTINGS = (
    # Two lengths that happen to be equal would be one in the code, which would be compiled anew for others.
    shape_config.patch(use_duck_shape=False),
    # Inside of DDP, Dynamo would split the code for gradients that a frozen base does not have.
    torch._dynamo.config.patch(optimize_ddp=False),
)

# What is compiled, by what its code depends on, and what torch would compile again and again.
_compiled: dict[Any, Callable[..., Any]] = {}
_given_up: set[Any] = set()
_numbers = itertools.count()


def compile_blocks(model: nn.Module, gradients: bool = True) -> int:
    """Has torch compile the blocks of a frozen model in eval mode when they are first used; weights and names stay.

    A block that is like no other stays as it is, for its own code would hardly pay.

    Args:
        model: the base model. Compiled blocks can be edited, saved and copied like others.
        gradients: also in passes whose gradient is asked for; False where second-order gradients are (ENN), which torch
            cannot take through compiled code.

    Returns:
        The number of blocks.

    Raises:
        ConfigError: it is sharded or quantised, or no two blocks are alike.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=32)).eval()
        >>> compile_blocks(model)
        3
    """
    check_compilable(is_sharded(model), getattr(model, "hf_quantizer", None) is not None)
    blocks = {block: _build_of(block) for stack in find_stacks(model).values() for block in stack}
    alike = Counter(blocks.values())
    chosen = {block: build for block, build in blocks.items() if alike[build] > 1}
    if not chosen:
        raise ConfigError(
            f"{type(model).__name__} has no two blocks that are alike, so compile_blocks would compile each of them. Leave it out."
        )
    for block, build in chosen.items():
        block.__dict__["forward"] = _Forward(block, build, gradients)
    return len(chosen)


def uncompile_blocks(model: nn.Module) -> None:
    """Takes back what `compile_blocks` did; what was compiled is kept for the next time."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Forward):
            del module.__dict__["forward"]


@dataclass
class _Forward:
    """Stands in for a block's forward.

    Attributes:
        block: whose it is.
        build: what it is made of.
        gradients: see `compile_blocks`.
    """

    block: nn.Module
    build: tuple
    gradients: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward, where = type(self.block).forward, _cache_place(args, kwargs)
        layer = None if where is None else _cache_layer(self.block, (kwargs if isinstance(where, str) else args)[where])
        past = (layer.keys, layer.values) if layer is not None and layer.get_seq_length() else None
        key = forward, self.build, where, past is None, _mode(), _signature(args), _signature(kwargs)
        if not self._may_be_compiled(args, kwargs) or (where is not None and layer is None) or key in _given_up:
            return forward(self.block, *args, **kwargs)
        try:
            output, grown = _run(key, self.block, past, args, kwargs)
        except FailOnRecompileLimitHit:
            _given_up.add(key)
            warnings.warn(
                f"{type(self.block).__name__} needs code of its own too often, and runs uncompiled from now on.",
                UncompiledWarning, stacklevel=2,
            )  # fmt: skip
            return forward(self.block, *args, **kwargs)
        if past is not None:
            layer.keys, layer.values = grown
        elif layer is not None:
            layer.update(*grown)
        return output

    def _may_be_compiled(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        if torch.compiler.is_compiling() or self.block.training or (torch.is_grad_enabled() and not self.gradients):
            return False
        states = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        # torch makes code of its own for a single row and a single token (generation), which are quick as they are.
        many = states is not None and states.dim() > 2 and 1 not in states.shape[:2] and states.device.type != "meta"
        return many and _is_untouched(self.block)


def _run(key: tuple, block: nn.Module, past: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a block returns, and its part of the cache afterwards, by the code of `key`, which is made where it is missing."""
    new = key not in _compiled
    if new:
        forward, _, where, *_ = key
        _compiled[key] = _compile(forward, where)
    try:
        # Dynamo looks at what it is given from all sides, and is warned of that.
        with _SETTINGS[0], _SETTINGS[1], warnings.catch_warnings(action="ignore") if new else nullcontext():
            return _compiled[key](block, past, _settled(args), _settled(kwargs))
    except TorchDynamoException as error:
        raise ConfigError(
            f"compile_blocks: torch cannot compile {type(block).__name__}. Leave compile_blocks out; on a CPU torch needs a "
            f"C++ compiler. It said: {error}"
        ) from error


def _compile(forward: Callable[..., Any], where: int | str | None) -> Callable[..., Any]:
    """`forward` compiled, with the place of the key-value cache among its arguments."""

    def call(block: nn.Module, past: tuple[Tensor, Tensor] | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        if where is None:
            return forward(block, *args, **kwargs), None
        cache = _OneLayer(past)
        if isinstance(where, str):
            kwargs = {**kwargs, where: cache}
        else:
            args = (*args[:where], cache, *args[where + 1 :])
        return forward(block, *args, **kwargs), cache.states

    # Dynamo counts what it compiled by code, of which every function made here would have the same.
    code = call.__code__.replace(co_name=f"block_{next(_numbers)}")
    own = types.FunctionType(code, call.__globals__, code.co_name, call.__defaults__, call.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)


class _OneLayer:
    """A block's own part of a key-value cache: without the others' there is no number of a layer in the code."""

    def __init__(self, states: tuple[Tensor, Tensor] | None) -> None:
        self.states = states

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new = keys, values
        self.states = new if self.states is None else tuple(torch.cat(pair, dim=-2) for pair in zip(self.states, new))
        return self.states


def _cache_place(args: tuple, kwargs: dict[str, Any]) -> int | str | None:
    """Where among a block's arguments a key-value cache is."""
    places = [*enumerate(args), *kwargs.items()]
    return next((place for place, value in places if isinstance(value, Cache)), None)


def _cache_layer(block: nn.Module, cache: Cache) -> DynamicLayer | None:
    """The block's part of the cache, if that is an ordinary one."""
    number = next((module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")), None)
    if type(cache) is not DynamicCache or number is None or number >= len(cache.layers):
        return None
    layer = cache.layers[number]
    return layer if type(layer) is DynamicLayer else None


def _is_untouched(block: nn.Module) -> bool:
    """Whether nothing inside of the block has a hook or another forward than its class's; the block's own are outside."""
    if _has_any_global_hook():
        return False
    for module in block.modules():
        hooks = (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        if module is not block and (hooks or "forward" in module.__dict__):
            return False
    return True


def _build_of(block: nn.Module) -> tuple:
    """What blocks that are alike have in common: their modules by name and class, and their parameters' shapes."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, tuple(each.shape), each.dtype) for name, each in block.named_parameters())


def _settled(value: Any) -> Any:
    """Arguments that are views of other tensors as tensors of their own: code for a view asks for its base's sizes."""
    if isinstance(value, Tensor):
        if not value._is_view() or value.requires_grad:
            return value
        # As much for where it begins and for its strides.
        apart = value.storage_offset() or not value.is_contiguous()
        return value.clone(memory_format=torch.contiguous_format) if apart else value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(map(_settled, value))
    return {name: _settled(each) for name, each in value.items()} if isinstance(value, dict) else value


def _mode() -> tuple:
    """What else code is made for; the attention kernels among it, of which one is chosen while it is compiled."""
    kernels = torch.backends.cuda
    chosen = kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.math_sdp_enabled()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *chosen


def _signature(value: Any) -> Any:
    """What of an argument the code depends on: not a tensor's sizes, unless they are 1."""
    if isinstance(value, Tensor):
        return (
            value.dtype,
            value.device,
            value.requires_grad and value._is_view(),
            value.requires_grad,
            tuple(size == 1 for size in value.shape),
        )
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((name, _signature(each)) for name, each in value.items())
    return value if value is None or isinstance(value, (bool, str)) else type(value)


def check_compilable(sharded: bool, quantized: bool) -> None:
    """Raises ConfigError for a base whose blocks cannot be compiled."""
    what = "sharded over processes" if sharded else "quantised" if quantized else None
    if what:
        raise ConfigError(
            f"compile_blocks: the base is {what}, and its blocks cannot be compiled. Leave compile_blocks out."
        )
