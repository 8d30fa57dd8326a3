"""An edit as a thing: applied, looked at, made smaller, saved, undone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mend_lightning.edits.compress import truncated
from mend_lightning.edits.deltas import DenseDelta, LowRankDelta, sum_of
from mend_lightning.errors import BaseModelMismatchError, ConfigError, StateDictError
from mend_lightning.files import written
from mend_lightning.models.compiled import changing_hooks, unwrapped
from mend_lightning.models.fingerprint import base_fingerprint, layer_fingerprints, readable_weight, same_base
from mend_lightning.models.forward.hooks import Delta, applied
from mend_lightning.models.layers import is_editable, layer_device, layer_shape

FORMAT = "1"


@dataclass(frozen=True)
class Edit:
    """A correction of a base model: one delta a layer, low-rank from most editors, and where it comes from.

    Attributes:
        deltas: layer name -> Delta of one task.
        about: JSON-able facts about the edit: `id`, `edits` (prompt and target of each), `on_top_of` (ids of the edits that
            were active when it was made), `probability_before` and `probability` (that the base and the edited model give
            the whole target; of several, the least), `base`, `base_options` (revision, kind), `base_fingerprint` (of the
            editor's layers), `weights` (of each layer), `relative_norm`, `editor`, `prompt_format`, `date`, `versions`; of one
            that was made in another format than the editor's, `format` (its name) and `own_format` (the editor's).

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> model = nn.ModuleDict({"fc": layer})
        >>> edit = Edit({"fc": LowRankDelta(torch.ones(1, 1, 2), torch.ones(1, 1, 2))})
        >>> before = layer(torch.ones(1, 2))
        >>> with edit.applied(model):
        ...     after = layer(torch.ones(1, 2))
        >>> (after - before).round().tolist()
        [[2.0, 2.0]]
    """

    deltas: Mapping[str, Delta]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """(prompt, target) of what the edit was made of; empty where that is not known."""
        return [(each["prompt"], each["target"]) for each in self.about.get("edits", [])]

    @contextmanager
    def applied(self, model: nn.Module, force: bool = False) -> Iterator[nn.Module]:
        """The model with this edit while the block runs; bit-equal to the base afterwards, whatever happens.

        Every thread that runs the model meanwhile sees the edit. For edits that stay, see `EditStack`.

        Args:
            model: the base model; quantised, or compiled by torch.compile, as well.
            force: apply it to other weights than it was made for, as long as layers and shapes are the same.

        Raises:
            BaseModelMismatchError: `model` is not the base the edit was made for.
        """
        layers = self.layers_in(model, force)
        with changing_hooks(model), applied(layers, self.beside(layers).deltas):
            yield model

    def beside(self, layers: Mapping[str, nn.Module]) -> Edit:
        """The same edit with each layer's factors where the layer's weight is: a model may be spread over devices."""
        return replace(self, deltas={name: delta.to(layer_device(layers[name])) for name, delta in self.deltas.items()})

    def layers_in(self, model: nn.Module, force: bool = False) -> dict[str, nn.Module]:
        """name -> module of the layers the edit changes, after checking that it fits.

        Args:
            model: the base model.
            force: only layers and shapes must be the same, not the weights.
        """
        modules = dict(unwrapped(model).named_modules())
        for name, delta in self.deltas.items():
            found = modules.get(name)
            if found is None or not is_editable(found) or layer_shape(found) != delta.shape:
                raise BaseModelMismatchError(
                    f"The edit changes a layer {name!r} of shape {delta.shape}, which {type(unwrapped(model)).__name__} does "
                    f"not have. It was made for {self.about.get('base') or 'another model'}.{_inner_hint(model)}"
                )
        layers = {name: modules[name] for name in self.deltas}
        if not force:
            self._check_base(layers)
        return layers

    def _check_base(self, layers: Mapping[str, nn.Module]) -> None:
        wanted = self.about.get("weights") or self.about.get("base_fingerprint", "")
        ordered = {name: layers[name] for name in sorted(layers)}
        found = layer_fingerprints(ordered) if self.about.get("weights") else base_fingerprint(ordered)
        if not same_base(wanted, found, "edit"):
            raise BaseModelMismatchError(
                f"The edit was made for {self.about.get('base')}; the given model has the same shapes and other weights "
                f"({_difference(wanted, found)}). Load the base model the edit was made for; or apply it all the same with "
                "force=True (--force), and look at what the model answers."
            )

    def size(self) -> int:
        """Bytes of all factors."""
        return sum(t.numel() * t.element_size() for delta in self.deltas.values() for t in delta.tensors().values())

    def relative_norm(self, model: nn.Module, force: bool = False) -> dict[str, float]:
        """Layer name -> ‖ΔW‖ / ‖W‖ (Frobenius)."""
        return relative_norms(self.deltas, self.layers_in(model, force))

    def compressed(self, rank: int | None = None, energy: float | None = None) -> tuple[Edit, dict[str, float]]:
        """The edit at a lower rank (`compress.truncated`), also the way to make a dense edit low-rank.

        Args:
            rank: largest rank of a layer.
            energy: share of every layer's ‖ΔW‖² to keep.

        Returns:
            The smaller edit, and name -> ‖ΔW − smaller‖ / ‖ΔW‖; the edit's `about` says both as `compressed`.
        """
        pairs = {name: truncated(delta, rank, energy) for name, delta in self.deltas.items()}
        errors = {name: error for name, (_, error) in pairs.items()}
        about = {**self.about, "compressed": {"rank": rank, "energy": energy, "relative_error": errors}}
        return Edit({name: delta for name, (delta, _) in pairs.items()}, about), errors

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
            return cls({name: _delta_of(tensors, name) for name in names}, _about_of(metadata["about"]))
        except (KeyError, ValueError) as error:
            raise StateDictError(f"{path} is a saved edit with a part missing or broken: {error}") from error


def _difference(wanted: str | Mapping[str, str], found: str | Mapping[str, str]) -> str:
    """Which fingerprints differ, of layers that can be many: the first one, and how many."""
    if isinstance(wanted, str) or isinstance(found, str):
        return f"{found}, not {wanted}"
    layers = [name for name in found if name in wanted and found[name] != wanted[name]]
    return f"{layers[0]}: {found[layers[0]]}, not {wanted[layers[0]]}; {len(layers)} of {len(found)} layers differ"


def _inner_hint(model: nn.Module) -> str:
    """What to give in place of a model that another library wrapped: its layers have other names."""
    if hasattr(model, "get_base_model"):
        return " This is a PEFT model: give its get_base_model()."
    return " Give the model inside: its .module." if isinstance(getattr(model, "module", None), nn.Module) else ""


def combined(edits: Sequence[Edit]) -> Edit:
    """Several edits as one: the sum of their deltas, layer by layer, exact to float32.

    Args:
        edits: edits of the same base.

    Raises:
        ConfigError: there is none.
        BaseModelMismatchError: they were made for different bases.
    """
    if not edits:
        raise ConfigError("There is no edit to combine. Give at least one.")
    if len(edits) == 1:
        return edits[0]
    check_summable(edits)
    weights: dict[str, str] = {}
    for edit in edits:
        clash = [name for name, mark in edit.about.get("weights", {}).items() if weights.setdefault(name, mark) != mark]
        if clash:
            raise BaseModelMismatchError(
                f"The edits were made for different base models: their weights of {clash[0]!r} are {weights[clash[0]]} and "
                f"{edit.about['weights'][clash[0]]} ({edits[0].about.get('base')}, {edit.about.get('base')}). They cannot "
                "become one edit."
            )
    names = dict.fromkeys(name for edit in edits for name in edit.deltas)
    deltas = {name: sum_of([edit.deltas[name] for edit in edits if name in edit.deltas]) for name in names}
    kept: dict[str, Any] = {
        key: edits[0].about[key]
        for key in ("base", "base_options", "prompt_format", "format", "own_format")
        if key in edits[0].about
    }
    facts = [fact for edit in edits for fact in edit.about.get("edits", [])]
    resting = {"holds_resting": True} if any(edit.about.get("holds_resting") for edit in edits) else {}
    return Edit(
        deltas, {**kept, **resting, "edits": facts, "weights": weights, "combined": [edit.about for edit in edits]}
    )


def check_summable(edits: Sequence[Edit]) -> None:
    """Raises ConfigError where edits must not be added up: two of them hold what training added to the base (ENN)."""
    holding = [edit for edit in edits if edit.about.get("holds_resting")]
    if len(holding) > 1:
        raise ConfigError(
            f"{len(holding)} of the edits hold what {holding[0].about.get('editor')}'s training adds to the base model, which "
            "would be added as often. Make their facts one edit (--edits FILE), or leave out all but one."
        )


def ids_of(edit: Edit) -> list[str]:
    """The ids of an edit, or of the edits that it was combined from."""
    abouts = [edit.about, *edit.about.get("combined", [])]
    return [about["id"] for about in abouts if "id" in about]


def relative_norms(deltas: Mapping[str, Delta], layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Layer name -> ‖ΔW‖ / ‖W‖ (Frobenius) of deltas of a single task; a weight that cannot be read is left out."""
    weights = {name: readable_weight(layers[name]) for name in deltas}
    return {
        name: float(deltas[name].norm()[0] / weight.float().norm())
        for name, weight in weights.items()
        if weight is not None
    }


def _about_of(text: str) -> dict[str, Any]:
    about = json.loads(text)
    if not isinstance(about, dict):
        raise ValueError(f"about is a {type(about).__name__} in place of an object")
    kinds = {"edits": list, "combined": list, "on_top_of": list, "relative_norm": dict, "weights": dict}
    for key, kind in kinds.items():
        if not isinstance(about.get(key, kind()), kind):
            raise ValueError(f"{key} is {about[key]!r} in place of a {kind.__name__}")
    for fact in about.get("edits", []):
        if not (isinstance(fact, dict) and all(isinstance(fact.get(key), str) for key in ("prompt", "target"))):
            raise ValueError(f"edits holds {fact!r} in place of a prompt and a target")
    return about


def _delta_of(tensors: Mapping[str, Tensor], name: str) -> Delta:
    if f"{name}.weight" in tensors:
        return DenseDelta(_matrix(tensors[f"{name}.weight"], name)[None])
    down, up = (_matrix(tensors[f"{name}.{part}"], name) for part in ("down", "up"))
    if len(down) != len(up):
        raise ValueError(f"{name} has {len(down)} input and {len(up)} output factors; they must be as many")
    return LowRankDelta(down[None], up[None])


def _matrix(tensor: Tensor, name: str) -> Tensor:
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(
            f"{name} holds a {tensor.dtype} tensor of shape {tuple(tensor.shape)} in place of a float matrix"
        )
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinite values")
    return tensor
