"""An edit as a thing: made, applied, looked at, saved, undone."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mend_lightning.confidence import target_nll, worst_of_task
from mend_lightning.data.encode import Encoder
from mend_lightning.data.prompts import PromptFormat
from mend_lightning.delta import LowRankDelta, applied
from mend_lightning.editors.mend import MendEditor
from mend_lightning.errors import (
    BaseModelMismatchError,
    ConfigError,
    LowConfidenceWarning,
    NoEffectWarning,
    StateDictError,
)
from mend_lightning.files import written
from mend_lightning.fingerprint import base_fingerprint
from mend_lightning.layers import layer_shape
from mend_lightning.prefix import run_trunk
from mend_lightning.step import make_deltas
from mend_lightning.trunk import replayed
from mend_lightning.types import Rows

FORMAT = "1"


@dataclass(frozen=True)
class Edit:
    """A correction of a base model: one low-rank delta a layer, and where it comes from.

    Attributes:
        deltas: layer name -> LowRankDelta of one task.
        about: JSON-able facts about the edit: `edits` (prompt and target of each), `probability` (that the
            edited model gives the whole target; of several, the least), `base`, `base_fingerprint`, `editor`, `date`,
            `versions`.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> model = nn.ModuleDict({"fc": layer})
        >>> edit = Edit({"fc": LowRankDelta(torch.ones(1, 1, 2), torch.ones(1, 1, 2))})
        >>> before = layer(torch.ones(1, 2))
        >>> with edit.applied(model):
        ...     after = layer(torch.ones(1, 2))
        >>> (after - before).round().tolist()
        [[2.0, 2.0]]
    """

    deltas: dict[str, LowRankDelta]
    about: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with this edit while the block runs; bit-equal to the base afterwards, whatever happens.

        Raises:
            BaseModelMismatchError: `model` is not the base the edit was made for.
        """
        with applied(self.layers_in(model), self.on(next(model.parameters()).device).deltas):
            yield model

    def on(self, device: torch.device | str) -> Edit:
        """The same edit with its factors on `device`."""
        deltas = {name: LowRankDelta(d.down.to(device), d.up.to(device)) for name, d in self.deltas.items()}
        return replace(self, deltas=deltas)

    def layers_in(self, model: nn.Module) -> dict[str, nn.Module]:
        """name -> module of the layers the edit changes, after checking that it fits."""
        modules = dict(model.named_modules())
        for name, delta in self.deltas.items():
            shape = (delta.down.shape[-1], delta.up.shape[-1])
            if name not in modules or layer_shape(modules[name]) != shape:
                raise BaseModelMismatchError(
                    f"The edit changes a layer {name!r} of shape {shape}, which {type(model).__name__} does not have. "
                    f"It was made for {self.about.get('base') or 'another model'}."
                )
        layers = {name: modules[name] for name in self.deltas}
        wanted, found = self.about.get("base_fingerprint"), None
        if wanted:
            found = base_fingerprint({name: modules[name] for name in sorted(self.deltas)})
        if wanted != found:
            raise BaseModelMismatchError(
                f"The edit was made for {self.about.get('base')} (weights {wanted}); the given model has the same "
                f"shapes and other weights ({found}). Load the base model the edit was made for."
            )
        return layers

    def size(self) -> int:
        """Bytes of all factors."""
        return sum(t.numel() * t.element_size() for d in self.deltas.values() for t in (d.down, d.up))

    def relative_norm(self, model: nn.Module) -> dict[str, float]:
        """Layer name -> ‖ΔW‖ / ‖W‖ (Frobenius)."""
        layers = self.layers_in(model)
        return {n: float(d.norm()[0] / layers[n].weight.float().norm()) for n, d in self.deltas.items()}

    def save(self, path: str | Path) -> Path:
        """Writes the edit as one safetensors file (factors, with `about` as metadata); returns the path."""
        tensors = {}
        for name, delta in self.deltas.items():
            tensors[f"{name}.down"] = delta.down[0].detach().cpu().contiguous()
            tensors[f"{name}.up"] = delta.up[0].detach().cpu().contiguous()
        metadata = {"format": "pt", "mend_lightning_edit": FORMAT, "about": json.dumps(self.about, ensure_ascii=False)}
        with written(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Reads what `save` wrote.

        Raises:
            StateDictError: the file is missing, truncated, or no edit.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise StateDictError(f"{path} cannot be read as a saved edit: {error}") from error
        if metadata.get("mend_lightning_edit") != FORMAT:
            raise StateDictError(f"{path} is a safetensors file, but not an edit saved by mend-lightning.")
        names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        try:
            deltas = {n: LowRankDelta(tensors[f"{n}.down"][None], tensors[f"{n}.up"][None]) for n in names}
            return cls(deltas, json.loads(metadata["about"]))
        except (KeyError, json.JSONDecodeError) as error:
            raise StateDictError(f"{path} is a saved edit with a part missing or broken: {error}") from error


def editor_encoder(editor: MendEditor, model: nn.Module, tokenizer: Any, max_length: int = 200) -> Encoder:
    """The encoder with the prompt format that `editor` was trained with."""
    return Encoder.for_model(model, tokenizer, PromptFormat(**editor.prompt_format), max_length)


def make_edit(
    editor: MendEditor, model: nn.Module, tokenizer: Any, facts: Sequence[tuple[str, str]] | tuple[str, str]
) -> Edit:
    """Edits `model` so that it answers each prompt with its target; the model itself stays as it is.

    Args:
        editor: a trained editor of this model.
        model: the base model, in eval mode.
        tokenizer: its tokenizer.
        facts: (prompt, target) pairs that make one edit together; or a single pair.

    Raises:
        BaseModelMismatchError: the editor is for another base.
        ConfigError: there is no fact, or the model is in training mode.
    """
    facts = [tuple(facts)] if facts and isinstance(facts[0], str) else list(facts)
    if not facts:
        raise ConfigError("An edit needs at least one (prompt, target) pair.")
    if model.training:
        raise ConfigError("The model is in training mode, where dropout would change the edit. Call model.eval() first.")
    editor.check_base(model)
    rows = editor_encoder(editor, model, tokenizer).rows(facts, [0] * len(facts), 1)
    training, home, device = editor.training, editor.edit_rates.device, next(model.parameters()).device
    editor.eval().to(device)
    try:
        with torch.no_grad():
            rows = rows.to(device)
            deltas, probability = _made(model, editor, rows)
    finally:
        editor.train(training).to(home)
    parts = {name: delta.of_task(0) for name, delta in deltas.items()}
    if not any(bool(delta.norm() > 0) for delta in parts.values()):
        warnings.warn(f"The edit {facts} changes nothing: every delta is zero.", NoEffectWarning, stacklevel=2)
    if editor.confidence is not None and probability < 0.9 * editor.confidence:
        warnings.warn(
            f"After the edit {facts} the model gives the new answer with probability {probability:.2f}; the editor aims at "
            f"{editor.confidence}. Look at its answers before you keep it.",
            LowConfidenceWarning,
            stacklevel=2,
        )
    return Edit(parts, {**_about(editor, model, facts), "probability": round(probability, 4)})


def _made(model: nn.Module, editor: MendEditor, rows: Rows) -> tuple[dict[str, LowRankDelta], float]:
    """The deltas, and the probability of the least probable fact under the edited model."""
    layers = editor.modules_in(model)
    trunk = run_trunk(model, rows, layers)
    deltas, _, _ = make_deltas(model, editor, rows, trunk)
    with replayed(trunk, slice(None)), applied(layers, deltas):
        return deltas, math.exp(-float(worst_of_task(target_nll(model, rows), rows)))


def _about(editor: MendEditor, model: nn.Module, facts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    import transformers

    from mend_lightning import __version__

    layers = editor.modules_in(model)
    return {
        "edits": [{"prompt": prompt, "target": target} for prompt, target in facts],
        "base": editor.base_name,
        "base_fingerprint": base_fingerprint({name: layers[name] for name in sorted(layers)}),
        "editor": type(editor).__name__,
        "prompt_format": editor.prompt_format,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"mend_lightning": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
