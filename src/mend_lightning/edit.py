"""An edit as a thing: made, applied, looked at, saved, undone."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mend_lightning.confidence import target_nll, worst_of_task
from mend_lightning.data.encode import Encoder
from mend_lightning.data.prompts import PromptFormat
from mend_lightning.delta import Delta, LowRankDelta, applied
from mend_lightning.dense_delta import DenseDelta
from mend_lightning.editors.editor import Editor, Made
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

FORMAT = "1"


@dataclass(frozen=True)
class Edit:
    """A correction of a base model: one delta a layer, low-rank from most editors, and where it comes from.

    Attributes:
        deltas: layer name -> Delta of one task.
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

    deltas: dict[str, Delta]
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
        return replace(self, deltas={name: delta.to(device) for name, delta in self.deltas.items()})

    def layers_in(self, model: nn.Module) -> dict[str, nn.Module]:
        """name -> module of the layers the edit changes, after checking that it fits."""
        modules = dict(model.named_modules())
        for name, delta in self.deltas.items():
            if name not in modules or layer_shape(modules[name]) != delta.shape:
                raise BaseModelMismatchError(
                    f"The edit changes a layer {name!r} of shape {delta.shape}, which {type(model).__name__} does not have. "
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
        return sum(t.numel() * t.element_size() for delta in self.deltas.values() for t in delta.tensors().values())

    def relative_norm(self, model: nn.Module) -> dict[str, float]:
        """Layer name -> ‖ΔW‖ / ‖W‖ (Frobenius)."""
        layers = self.layers_in(model)
        return {n: float(d.norm()[0] / layers[n].weight.float().norm()) for n, d in self.deltas.items()}

    def save(self, path: str | Path) -> Path:
        """Writes the edit as one safetensors file (factors, with `about` as metadata); returns the path."""
        tensors = {}
        for name, delta in self.deltas.items():
            for part, tensor in delta.tensors().items():
                tensors[f"{name}.{part}"] = tensor.detach().cpu().contiguous()
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
            return cls({name: _delta_of(tensors, name) for name in names}, json.loads(metadata["about"]))
        except (KeyError, json.JSONDecodeError) as error:
            raise StateDictError(f"{path} is a saved edit with a part missing or broken: {error}") from error


def _delta_of(tensors: Mapping[str, Tensor], name: str) -> Delta:
    if f"{name}.weight" in tensors:
        return DenseDelta(tensors[f"{name}.weight"][None])
    return LowRankDelta(tensors[f"{name}.down"][None], tensors[f"{name}.up"][None])


def editor_encoder(editor: Editor, model: nn.Module, tokenizer: Any, max_length: int = 200) -> Encoder:
    """The encoder with the prompt format that `editor` was trained with."""
    return Encoder.for_model(model, tokenizer, PromptFormat(**editor.prompt_format), max_length)


def make_edit(
    editor: Editor, model: nn.Module, tokenizer: Any, facts: Sequence[tuple[str, str]] | tuple[str, str]
) -> Edit:
    """Edits `model` so that it answers each prompt with its target; the model itself stays as it is.

    Args:
        editor: a trained editor of this model.
        model: the base model, in eval mode.
        tokenizer: its tokenizer.
        facts: (prompt, target) pairs that make one edit together; or a single pair.

    Raises:
        BaseModelMismatchError: the editor is for another base.
        ConfigError: there is no fact, the model is in training mode, or the editor changes no weight.
    """
    facts = [tuple(facts)] if facts and isinstance(facts[0], str) else list(facts)
    if not facts:
        raise ConfigError("An edit needs at least one (prompt, target) pair.")
    if model.training:
        raise ConfigError("The model is in training mode, where dropout would change the edit. Call model.eval() first.")
    if not editor.changes_weights:
        raise ConfigError(
            f"{type(editor).__name__} changes no weight, so it makes no Edit that could be saved or merged. "
            "`mend-lightning edit` shows what it does; in Python use editor.edited(model, rows)."
        )
    made, probability = _made(model, editor, tokenizer, facts)
    parts = {name: delta.of_task(0) for name, delta in made.deltas.items()}
    if not any(bool(delta.norm() > 0) for delta in parts.values()):
        warnings.warn(f"The edit {facts} changes nothing: every delta is zero.", NoEffectWarning, stacklevel=2)
    if editor.confidence is not None and probability < 0.9 * editor.confidence:
        warnings.warn(
            f"After the edit {facts} the model gives the new answer with probability {probability:.2f}; the editor aims at "
            f"{editor.confidence}. Look at its answers before you keep it.",
            LowConfidenceWarning,
            stacklevel=2,
        )
    if made.reached is not None and not bool(made.reached.all()):
        warnings.warn(
            f"{type(editor).__name__} came to its end before the model gave the new answer of {facts} (probability "
            f"{probability:.2f}). Give it more steps or a higher learning rate, or look at its answers before you keep it.",
            LowConfidenceWarning,
            stacklevel=2,
        )
    return Edit(parts, {**_about(editor, model, facts), "probability": round(probability, 4)})


def _made(
    model: nn.Module, editor: Editor, tokenizer: Any, facts: Sequence[tuple[str, str]]
) -> tuple[Made, float]:
    """What the editor made, and the probability of the least probable fact under the edited model."""
    with ready(editor, model, tokenizer) as encoder, torch.no_grad():
        rows = encoder.rows(facts, [0] * len(facts), 1).to(next(model.parameters()).device)
        made = editor.make_deltas(model, rows)
        with applied(editor.modules_in(model), made.deltas):
            return made, math.exp(-float(worst_of_task(target_nll(model, rows), rows)))


@contextmanager
def ready(editor: Editor, model: nn.Module, tokenizer: Any) -> Iterator[Encoder]:
    """The editor in eval mode on the model's device, checked, with an encoder; afterwards where it was."""
    editor.check_base(model)
    encoder = editor_encoder(editor, model, tokenizer)
    training, before = editor.training, editor.encoder
    home = next((parameter.device for parameter in editor.parameters()), None)
    editor.eval().to(next(model.parameters()).device)
    editor.encoder = encoder
    try:
        yield encoder
    finally:
        editor.encoder = before
        editor.train(training)
        if home is not None:
            editor.to(home)


def _about(editor: Editor, model: nn.Module, facts: Sequence[tuple[str, str]]) -> dict[str, Any]:
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
