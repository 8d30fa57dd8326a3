"""Counts the bytes of tensors that are alive while a block runs, each under the name of the phase that made it."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends.cuda import flash_sdp_enabled
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mend_lightning.models.forward.phases import phase_of


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside the block, on any device: on the meta device too, where they take none.

    Views share their tensor's bytes. What was there before the block is not counted. Scratch memory inside a kernel is
    not seen.

    Attributes:
        phase: name under which what is made next is counted, outside of all blocks that say theirs (`phases.phase`).
        now: bytes alive; peak: the most that was alive at once; parts: phase -> bytes alive at that moment.

    Example:
        >>> import torch
        >>> with LiveBytes() as live:
        ...     kept = torch.ones(100)
        ...     both = (kept + 1).sum()
        >>> live.now, live.peak
        (404, 804)
    """

    def __init__(self, phase: str = "") -> None:
        super().__init__()
        self.phase = phase
        self.now = self.peak = 0
        self.parts: dict[str, int] = {}
        self._alive: dict[int, tuple[str, int]] = {}
        self._by_phase: Counter[str] = Counter()
        self._entered: list[str | None] = []

    def reset_peak(self) -> None:
        """The peak begins anew at what is alive."""
        self.peak, self.parts = self.now, dict(self._by_phase)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "profiler":
            return self._label(function, args)
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # Models ask whether a mask is all ones, or whether ids hold padding. Without numbers the answer is no.
            return 0
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._add(leaf)
        if self.now > self.peak:
            self.reset_peak()
        return output

    def _label(self, function: Any, args: tuple) -> Any:
        if function is torch.ops.profiler._record_function_enter_new.default:
            self._entered.append(phase_of(args[0]))
        elif self._entered:
            self._entered.pop()
        return function(*args)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        phase = next((entered for entered in reversed(self._entered) if entered), self.phase)
        self._alive[key] = phase, size
        self.now += size
        self._by_phase[phase] += size
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        phase, size = self._alive.pop(key)
        self.now -= size
        self._by_phase[phase] -= size


class FusedAttention(TorchFunctionMode):
    """Has the meta device take torch's fused attention, as CPUs and GPUs do: it keeps no matrix of tokens x tokens.

    Where `sdpa_kernel` rules it out, it is left out here as well.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention and args and args[0].is_meta and flash_sdp_enabled():
            return _fused(*args, **kwargs)
        return function(*args, **kwargs)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
