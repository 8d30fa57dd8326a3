"""What is on one model: the edits, the hooks of their layers, and what the edits of a layer add up to."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.edits.deltas import added_at_once, sum_of
from mend_lightning.edits.edit import Edit, ids_of
from mend_lightning.models.compiled import forget_compiled, unwrapped
from mend_lightning.models.forward.hooks import Delta


@dataclass(frozen=True)
class StackedEdit:
    """An edit in a stack: its name there, and whether it is switched on."""

    name: str
    edit: Edit
    enabled: bool = True


class StackState:
    """The edits of one model. It holds no module and the layers' hooks hold it, so it lives as long as the model does.

    Changes are made under `lock`. A forward pass takes it only for the first total after a change. An interrupt in
    the middle of a change leaves hooks that add what the entries say, or nothing.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.entries: dict[str, StackedEdit] = {}
        # What an edit can be looked up by -> names of the edits; so that no change walks through all of them.
        self._index: dict[str, dict[str, None]] = {}
        self._hooked: dict[str, None] = {}
        # Emptied before every change, so that an interrupt leaves nothing stale.
        self._totals: dict[tuple[str, torch.device, torch.dtype], Delta | None] = {}

    def names_of(self, key: str) -> list[str]:
        """Names of the edits with a key (see `_keys`), in the order in which they came."""
        return [name for name in self._index.get(key, ()) if name in self.entries]

    def put(self, entry: StackedEdit, model: nn.Module) -> None:
        """Adds an edit, or replaces that of the same name in its place."""
        self._totals = {}
        try:
            for key in _keys(entry.edit):
                self._index.setdefault(key, {})[entry.name] = None
            self._hook(entry.edit, model)
            self.entries[entry.name] = entry
        except BaseException:
            if entry.name not in self.entries:
                self._forget(entry, model)
            raise
        finally:
            forget_compiled(model)

    def drop(self, name: str, model: nn.Module) -> None:
        """Takes an edit away, and the hooks of layers that no edit changes any more."""
        self._totals = {}
        try:
            self._forget(self.entries.pop(name), model)
        finally:
            forget_compiled(model)

    def arrange(self, names: Sequence[str], model: nn.Module) -> None:
        """Puts the edits into the order of `names`."""
        self._totals = {}
        self.entries = {name: self.entries[name] for name in names}
        forget_compiled(model)

    def drop_all(self, model: nn.Module) -> None:
        """Takes every edit and every hook away."""
        self._totals = {}
        # Empty first: whatever stops what follows, a hook without edits changes nothing.
        self.entries, self._index = {}, {}
        self._unhook(list(self._hooked), model)
        forget_compiled(model)

    def total(self, layer: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Delta | None:
        """What the enabled edits of a layer add up to, in float32 and then rounded to `dtype`; None if there is none."""
        totals, key = self._totals, (layer, device, dtype)
        if key in totals:
            return totals[key]
        # torch.compile cannot trace through a lock.
        with nullcontext() if torch.compiler.is_compiling() else self.lock:
            totals = self._totals
            totals[key] = self._summed(layer, device, dtype)
            return totals[key]

    def _summed(self, layer: str, device: torch.device, dtype: torch.dtype) -> Delta | None:
        active = [each.edit for each in self.entries.values() if each.enabled and layer in each.edit.deltas]
        if not active:
            return None
        # It is kept for later passes: neither autocast's rounding nor inference tensors, which no gradient can go through.
        with nullcontext() if torch.compiler.is_compiling() else _plainly(device):
            # The model may have been moved since the edits came.
            return sum_of([edit.deltas[layer] for edit in active]).to(device).to(dtype)

    def _hook(self, edit: Edit, model: nn.Module) -> None:
        new = [layer for layer in edit.deltas if layer not in self._hooked]
        modules = dict(unwrapped(model).named_modules()) if new else {}
        for layer in new:
            # Noted before it is there: what is not noted would stay.
            self._hooked[layer] = None
            modules[layer].register_forward_hook(_LayerHook(self, layer))

    def _unhook(self, layers: Sequence[str], model: nn.Module) -> None:
        gone = set(layers)
        for module in unwrapped(model).modules() if layers else ():
            # By what they are and not by their handles, which a copy of the model does not have; and in every module, for
            # PEFT puts a layer inside of another one, which has its name then.
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _LayerHook) and hook.layer in gone]:
                del hooks[key]
        for layer in layers:
            self._hooked.pop(layer, None)

    def _forget(self, entry: StackedEdit, model: nn.Module) -> None:
        for key in _keys(entry.edit):
            names = self._index.get(key, {})
            names.pop(entry.name, None)
            if not names:
                self._index.pop(key, None)
        self._unhook([layer for layer in entry.edit.deltas if not self._is_changed(layer)], model)

    def _is_changed(self, layer: str) -> bool:
        return any(name in self.entries for name in self._index.get(_changes(layer), ()))

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has a copy of its edits, and a lock of its own.
        return {key: value for key, value in vars(self).items() if key not in ("lock", "_totals")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        StackState.__init__(self)
        vars(self).update(state)


class _LayerHook:
    """Adds a layer's total to its output; without one the output passes as it is, bit for bit."""

    def __init__(self, state: StackState, layer: str) -> None:
        self.state, self.layer = state, layer

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        total = self.state.total(self.layer, output.device, _dtype_beside(args[0], output))
        return None if total is None else added_at_once(output, args[0], total)


def _dtype_beside(x: Tensor, output: Tensor) -> torch.dtype:
    """What a layer's edits are computed in: bfloat16 beside a bfloat16 layer, which rounds its own output as much.

    In float32 they would take longer than the layer itself. Under autocast the base has float32's digits, and float16 has
    too small a range.
    """
    plain = not torch.is_autocast_enabled(output.device.type)
    return torch.bfloat16 if plain and x.dtype == output.dtype == torch.bfloat16 else torch.float32


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """Neither under autocast nor in inference mode."""
    with torch.autocast(device.type, enabled=False):
        if not torch.is_inference_mode_enabled():
            yield
            return
        with torch.inference_mode(False), torch.no_grad():
            yield


def question_key(prompt: str) -> str:
    """What makes two prompts the same question: their words.

    Example:
        >>> question_key("Which city is the capital of France?") == question_key("which city is the capital of  france")
        True
    """
    return "asks " + " ".join(re.findall(r"\w+", prompt.casefold()))


def _changes(layer: str) -> str:
    return f"changes {layer}"


def _keys(edit: Edit) -> set[str]:
    keys = {_changes(layer) for layer in edit.deltas} | {question_key(prompt) for prompt, _ in edit.facts}
    keys |= {f"needs {each}" for each in edit.about.get("on_top_of", [])}
    keys |= {f"is {each}" for each in ids_of(edit)}
    return keys | ({"resting"} if edit.about.get("holds_resting") else set())


_STATES: weakref.WeakKeyDictionary[nn.Module, StackState] = weakref.WeakKeyDictionary()
_STATES_LOCK = threading.Lock()


def state_of(model: nn.Module) -> StackState:
    """The state of a model, made at the first call; that of a copied model is the one its hooks came with."""
    with _STATES_LOCK:
        if model not in _STATES:
            _STATES[model] = _copied_state(model) or StackState()
        return _STATES[model]


def _copied_state(model: nn.Module) -> StackState | None:
    """The state that the hooks of a copied model hold. Of a part of an edited model the layers have other names."""
    for name, module in model.named_modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, _LayerHook) and hook.layer == name:
                return hook.state
    return None


def active_ids(model: nn.Module) -> list[str]:
    """Ids of the enabled edits on a model."""
    state = _STATES.get(unwrapped(model))
    entries = state.entries.values() if state else ()
    return [each_id for each in entries if each.enabled for each_id in ids_of(each.edit)]
