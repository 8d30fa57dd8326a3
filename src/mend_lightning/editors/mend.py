"""MEND's editor: gradient factors of the edit in, low-rank weight deltas out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.editors.editor import Editor
from mend_lightning.editors.factors import Factors, descent
from mend_lightning.editors.least_descent import descending
from mend_lightning.editors.mend_settings import MendSettings
from mend_lightning.editors.original_checkpoint import converted_state, read_original
from mend_lightning.editors.precondition import InputMoments, InputPreconditioner
from mend_lightning.editors.ridge import ridge_delta
from mend_lightning.editors.transform import GradientTransform, group_layers
from mend_lightning.edits.deltas import LowRankDelta
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.device import no_autocast


class MendEditor(Editor):
    """The learned part of MEND: one gradient transform per layer shape and one edit rate per layer.

    It knows layer names and shapes, not the model: factors come in, deltas go out.

    Args:
        layers: name -> (d_in, d_out) of the edited layers. Their order is the order in which layers of one
            shape update the shared statistics.
        settings: `rank`, `edit_rate`, `precondition`, `confidence` and the others of `MendSettings`.

    Example:
        >>> editor = MendEditor({"fc": (2, 3)}, rank=4)
        >>> factors = Factors(torch.rand(5, 2), torch.rand(5, 3), torch.zeros(5, dtype=torch.long), tasks=1)
        >>> editor({"fc": factors})["fc"].dense().shape
        torch.Size([1, 3, 2])
    """

    constrains = True

    def __init__(self, layers: Mapping[str, tuple[int, int]], **settings: Any) -> None:
        chosen = MendSettings(**settings)
        super().__init__(layers, **asdict(chosen))
        self.groups = group_layers(self.layers, chosen.shared)
        self.edit_rates = nn.Parameter(torch.full((len(self.layers),), float(chosen.edit_rate)))
        # Its logarithm is learned: λ stays positive, and an optimiser's step is a share of it.
        log_ridge = None if chosen.ridge is None else math.log(chosen.ridge)
        self.log_ridge = None if log_ridge is None else nn.Parameter(torch.full((len(self.layers),), log_ridge))
        # Any, here and below: a ModuleList does not say what it holds.
        self.transforms: Any = nn.ModuleList(
            GradientTransform(
                *self.layers[group[0]], len(group), chosen.rank, chosen.n_hidden, chosen.init, chosen.inputs,
                chosen.shared, chosen.normalize, chosen.constant_units,
            )
            for group in self.groups
        )  # fmt: skip
        self.preconditioners: Any = nn.ModuleList()
        if chosen.precondition is not None:
            keeps_inverse = chosen.contrasts > 0 or chosen.least_descent is not None
            settings_of_each = chosen.precondition, chosen.rephrase_ridge, keeps_inverse
            self.preconditioners.extend(
                InputPreconditioner(d_in, *settings_of_each) for d_in, _ in self.layers.values()
            )

    @classmethod
    def default_settings(cls) -> dict[str, Any]:
        return asdict(MendSettings())

    @classmethod
    def from_original(
        cls, base_model: nn.Module, state_dict: Mapping[str, Any], layers: Sequence[str], **settings: Any
    ) -> MendEditor:
        """An editor from a checkpoint of the original repository (eric-mitchell/mend).

        Rank, number of hidden layers, sharing and the networks' inputs are read off the checkpoint. The original adds its
        update where MEND's paper subtracts it: the edit rates come out negated.

        Args:
            base_model: the model the editor was trained on.
            state_dict: what `torch.load(path, weights_only=False)` gives (the original pickles a config, so load only
                files you trust): the whole checkpoint or its editor's state dict.
            layers: the original's `inner_params`, all of them, in their order; `.weight` may be left out.
            settings: what a checkpoint does not tell: `normalize` (default True), `init` ("identity", or "xavier"),
                `constant_units` ("center", or "original"; see `RunningNormalizer`).

        Raises:
            StateDictError: entries are missing, foreign, or of another shape.
            BaseModelMismatchError: the model lacks a layer, or its layers have other shapes.

        Example:
            >>> base = nn.ModuleDict({"fc": nn.Linear(2, 3)})
            >>> sizes = {"mlp.layers.0.u": (5, 1), "mlp.layers.0.v": (1, 5), "mlp.layers.0.bias": (5,),
            ...          "u_mean": (2,), "u_s": (2,), "v_mean": (3,), "v_s": (3,), "k": (1,)}
            >>> checkpoint = {f"mend.fc#weight.{key}": torch.ones(size) for key, size in sizes.items()}
            >>> editor = MendEditor.from_original(base, {"edit_lrs": torch.tensor([0.5]), **checkpoint}, ["fc.weight"])
            >>> editor.edit_rates.tolist(), editor.settings["rank"], editor.settings["shared"]
            ([-0.5], 1, False)
        """
        shapes, inferred, given = read_original(base_model, state_dict, layers)
        editor = cls(shapes, **{**inferred, **settings})
        editor.load_state_dict(converted_state(given, shapes, editor.settings["shared"], editor.state_dict()))
        editor.bind(base_model, getattr(getattr(base_model, "config", None), "_name_or_path", ""))
        return editor

    def input_metrics(self) -> dict[str, Tensor]:
        named = zip(self.layers, self.preconditioners)
        return {name: each.inverse for name, each in named if each.inverse is not None}

    @property
    def calibrated(self) -> bool:
        """Whether edits can be made: always without preconditioning, else after `calibrate`."""
        return all(preconditioner.ready for preconditioner in self.preconditioners)

    @property
    def follows_rephrases(self) -> bool:
        """Whether calibration needs pairs of phrasings."""
        return self.settings["rephrase_ridge"] is not None

    def shard_units(self) -> list[nn.Module]:
        return [net for transform in self.transforms for net in transform.nets.values()]

    def calibrate(self, moments: Mapping[str, InputMoments]) -> None:
        """Fixes the preconditioning from moments of the layers' inputs (name -> InputMoments, all processes')."""
        for name, preconditioner in zip(self.layers, self.preconditioners):
            moments[name].all_reduce()
            preconditioner.calibrate(moments[name])

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, LowRankDelta]:
        """Turns the gradient factors of several independent tasks into weight deltas.

        In training mode the running statistics take the factors in first.

        Args:
            factors: name -> Factors of every layer of this editor.

        Returns:
            name -> LowRankDelta with `ΔW = −α Σ_t δ̃_t ũ_tᵀ`. The sign is the paper's; the original
            code adds (its author called that a bug), so its checkpoints have α negated.

        Raises:
            ConfigError: the editor preconditions and was not calibrated.
        """
        if not self.calibrated:
            raise ConfigError(
                "This editor preconditions its edits and has not been calibrated. MendModule does that at the start "
                "of fit; elsewhere call editor.calibrate(moments)."
            )
        # An editor is float32 under mixed precision too: `edit` runs without it and must give the same deltas.
        with no_autocast(self.edit_rates.device):
            transformed = self._transform(factors)
            self._precondition(transformed, factors)
            return {name: self._delta(i, *transformed[name], factors[name]) for i, name in enumerate(self.layers)}

    def _delta(self, layer: int, u: Tensor, delta: Tensor, factors: Factors) -> LowRankDelta:
        """ΔW of one layer: the sum over tokens, or the ridge regression."""
        if self.log_ridge is None:
            return descent(u, delta, factors, self.edit_rates[layer])
        return ridge_delta(u, delta, factors, self.edit_rates[layer], self.log_ridge[layer].exp())

    def _transform(self, factors: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor]]:
        """name -> (ũ, δ̃), one pass for each group of layers."""
        transformed: dict[str, tuple[Tensor, Tensor]] = {}
        for transform, group in zip(self.transforms, self.groups):
            pairs = [(factors[name].u, factors[name].delta) for name in group]
            kept = [factors[name].kept for name in group]
            transformed.update(zip(group, transform(pairs, list(range(len(group))), kept)))
        return transformed

    def _precondition(self, transformed: dict[str, tuple[Tensor, Tensor]], factors: Mapping[str, Factors]) -> None:
        """Replaces every ũ by its preconditioned self, in place of the dictionary."""
        transform_of = {name: t for t, group in zip(self.transforms, self.groups) for name in group}
        for name, preconditioner in zip(self.layers, self.preconditioners):
            u, delta = transformed[name]
            transform = transform_of[name]
            # The matrix is in the units of the layer's inputs, ũ in normalised ones.
            u = transform.u_stats.inverse(u) if transform.normalize else u
            own, least = preconditioner(u), self.settings["least_descent"]
            if least is not None:
                own = descending(own, u @ preconditioner.inverse, delta, factors[name], least)
            transformed[name] = own, delta
