"""Reads editor checkpoints of the original repository (eric-mitchell/mend)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mend_lightning.editors.transform import Inputs, group_layers, network_widths
from mend_lightning.errors import BaseModelMismatchError, StateDictError
from mend_lightning.models.layers import is_editable, layer_shape

# Entries under which a checkpoint or an archive of the original may hold the editor's state dict.
_WRAPPERS = ("model", "state_dict", "mend", "archive")
_NETS = {"combined": "mlp", "u": "mlp1", "delta": "mlp2"}
_PARAMETERS = {"scale": "mode_scale.weight", "shift": "mode_shift.weight"}
_STATISTICS = {
    "u_stats.count": "k", "u_stats.mean": "u_mean", "u_stats.m2": "u_s",
    "delta_stats.count": "k", "delta_stats.mean": "v_mean", "delta_stats.m2": "v_s",
}  # fmt: skip
_NETWORK_KEY = re.compile(r"(mlp[12]?)\.layers\.(\d+)\.")


def read_original(
    base_model: nn.Module, state_dict: Mapping[str, Any], layers: Sequence[str]
) -> tuple[dict[str, tuple[int, int]], dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint of the original repository tells of its editor.

    Args:
        base_model: the model the editor was trained on.
        state_dict: the whole checkpoint or its editor's state dict; base model entries are ignored.
        layers: the original's `inner_params`, all of them, in their order; `.weight` may be left out.

    Returns:
        The layers' shapes (name -> (d_in, d_out)), the settings of a `MendEditor` that can be read off (rank, number of
        hidden layers, sharing, the networks' inputs), and the checkpoint's own entries, for `converted_state`.

    Raises:
        StateDictError: entries are missing, foreign, or of another shape.
        BaseModelMismatchError: the model lacks a layer, or its layers have other shapes.

    Example:
        >>> base = nn.ModuleDict({"fc": nn.Linear(2, 3)})
        >>> entries = {"edit_lrs": torch.tensor([0.5]), "mend.fc#weight.mlp.layers.0.u": torch.ones(5, 1)}
        >>> shapes, settings, _ = read_original(base, entries, ["fc.weight"])
        >>> shapes, settings["rank"], settings["shared"]
        ({'fc': (2, 3)}, 1, False)
    """
    given = editor_entries(state_dict)
    shapes = _layer_shapes(base_model, layers)
    _check_layer_count(given, shapes)
    return shapes, _inferred_settings(given, shapes), given


def converted_state(
    given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], shared: bool, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The original's entries under the names of `state`, the state dict of an editor that they are for.

    The original adds its update where MEND's paper subtracts it: the edit rates come out negated. Statistics that are NaN
    (an editor that never trained) become an empty normaliser's.
    """
    names = original_names(shapes, shared, state)
    _check_entries(given, names, state)
    return {ours: _converted(theirs, given) for ours, theirs in names.items()}


def editor_entries(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The editor's own entries of whatever the original saved.

    A mapping without `edit_lrs` is a wrapper: its entry `model`, `state_dict`, `mend` or `archive` is
    opened instead. Beside `edit_lrs`, the base model (`model.*`) and `model_config` are left out.

    Example:
        >>> list(editor_entries({"step": 3, "model": {"edit_lrs": 0, "model_config": 0, "model.fc.weight": 0}}))
        ['edit_lrs']
    """
    top = list(checkpoint)
    while "edit_lrs" not in checkpoint:
        inside = [checkpoint[name] for name in _WRAPPERS if isinstance(checkpoint.get(name), Mapping)]
        if not inside:
            raise StateDictError(
                f"This is no MEND checkpoint of the original repository: no entry 'edit_lrs', neither at the "
                f"top nor inside {', '.join(_WRAPPERS)}. It holds {_some(top)}. Pass what torch.load gives "
                "for a checkpoint that was trained with alg=mend."
            )
        checkpoint = inside[0]
    return {k: v for k, v in checkpoint.items() if not k.startswith("model.") and k != "model_config"}


def original_names(shapes: Mapping[str, tuple[int, int]], shared: bool, entries: Iterable[str]) -> dict[str, str]:
    """The original's name of every entry of an editor's state dict.

    Example:
        >>> original_names({"fc": (2, 3)}, True, ["transforms.0.nets.combined.layers.1.scale"])
        {'transforms.0.nets.combined.layers.1.scale': 'mend.(2, 3).mlp.layers.1.mode_scale.weight'}
    """
    keys = _group_keys(shapes, shared)
    names = {}
    for ours in entries:
        kind, _, rest = ours.partition(".")
        index, _, rest = rest.partition(".")
        names[ours] = "edit_lrs" if kind == "edit_rates" else f"mend.{keys[int(index)]}.{_inner_name(rest)}"
    return names


def _inner_name(ours: str) -> str:
    if ours in _STATISTICS:
        return _STATISTICS[ours]
    _, side, _, index, parameter = ours.split(".")
    return f"{_NETS[side]}.layers.{index}.{_PARAMETERS.get(parameter, parameter)}"


def _group_keys(shapes: Mapping[str, tuple[int, int]], shared: bool) -> list[str]:
    """What the original calls the transform of each group of layers."""
    groups = group_layers(shapes, shared)
    return [str(shapes[group[0]]) if shared else f"{group[0]}.weight".replace(".", "#") for group in groups]


def _layer_shapes(base_model: nn.Module, layers: Sequence[str]) -> dict[str, tuple[int, int]]:
    modules = dict(base_model.named_modules())
    names = [name.removesuffix(".weight") for name in layers]
    for name in names:
        if name not in modules or not is_editable(modules[name]):
            near = difflib.get_close_matches(name, modules, n=3) or ["none"]
            raise BaseModelMismatchError(
                f"{type(base_model).__name__} has no linear layer {name!r} (near matches: {', '.join(near)}). Pass the "
                "original's inner_params and the base model they belong to."
            )
    return {name: layer_shape(modules[name]) for name in names}


def _check_layer_count(given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> None:
    expected = given["edit_lrs"].numel()
    if expected != len(shapes):
        raise StateDictError(
            f"The checkpoint has {expected} edit rates, but {len(shapes)} different layers were given. Pass the "
            "original's inner_params, all of them, in their order."
        )


def _inferred_settings(given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    parts = [(*key.split(".", 2), "", "")[1:3] for key in given if key.startswith("mend.")]
    groups = {group for group, _ in parts}
    shared = any(group.startswith("(") for group in groups)
    _check_groups(groups, shapes, shared)
    networks = [(group, match) for group, rest in parts if (match := _NETWORK_KEY.match(rest))]
    ranks = [tensor.shape[1] for key, tensor in given.items() if key.endswith(".u") and tensor.dim() == 2]
    if not ranks or not networks:
        raise StateDictError(
            f"No low-rank networks (mend.*.mlp.layers.*.u) in the checkpoint, which holds {_some(given)}. Only "
            "mlp_class=IDMLP with a rank, the original's default, can be imported."
        )
    sides = {group: {match[1] for name, match in networks if name == group} for group in sorted(groups)}
    depth = max(int(match[2]) for _, match in networks)
    return {"rank": max(ranks), "n_hidden": depth, "shared": shared, "inputs": _inferred_inputs(sides, shapes, shared)}


def _check_groups(groups: set[str], shapes: Mapping[str, tuple[int, int]], shared: bool) -> None:
    expected = set(_group_keys(shapes, shared))
    if groups == expected:
        return
    what = "layers of the shapes (d_in, d_out)" if shared else "the layers"
    error = BaseModelMismatchError if shared else StateDictError
    raise error(
        f"The checkpoint has transforms for {what} {_some(sorted(groups))}; the layers given need "
        f"{_some(sorted(expected))}. Pass the base model and the inner_params that the editor was trained with."
    )


def _inferred_inputs(sides: dict[str, set[str]], shapes: Mapping[str, tuple[int, int]], shared: bool) -> str:
    """Which networks there are tells what they see. One-sided nets all on one side are read as that side."""
    first = {key: shapes[group[0]] for key, group in zip(_group_keys(shapes, shared), group_layers(shapes, shared))}
    for inputs in get_args(Inputs):
        if all(sides[key] == {_NETS[side] for side in network_widths(inputs, *shape)} for key, shape in first.items()):
            return inputs
    found = "; ".join(f"{key}: {', '.join(sorted(nets)) or 'none'}" for key, nets in sides.items())
    raise StateDictError(
        f"The networks in the checkpoint fit no variant of MEND ({found}): expected mlp everywhere, or mlp1 and mlp2, "
        "or one of them. Is the file complete?"
    )


def _check_entries(given: Mapping[str, Tensor], names: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    expected = set(names.values())
    missing = sorted(expected - set(given))
    # The standard deviations follow from the sums of squares and the count.
    foreign = sorted(key for key in set(given) - expected if not key.endswith((".u_std", ".v_std")))
    if missing or foreign:
        raise StateDictError(
            f"The checkpoint does not fit the layers given: missing {_some(missing)}; foreign {_some(foreign)}. Pass a "
            "complete checkpoint of the original repository and its inner_params, in their order."
        )
    for ours, tensor in state.items():
        shape, wanted = tuple(given[names[ours]].shape), tuple(tensor.shape) or (1,)
        if shape != wanted:
            raise StateDictError(
                f"{names[ours]!r} has shape {shape}, expected {wanted} for the layers given. Pass the base model and "
                "the inner_params that the editor was trained with."
            )


def _converted(theirs: str, given: Mapping[str, Tensor]) -> Tensor:
    """One entry as this package keeps it."""
    value = given[theirs].detach().float()
    if theirs == "edit_lrs":
        return -value
    group, _, name = theirs.rpartition(".")
    if name not in _STATISTICS.values():
        return value
    if bool(given[f"{group}.k"].isnan().any()):
        value = torch.zeros_like(value)
    if not bool(value.isfinite().all()):
        raise StateDictError(
            f"{theirs!r} holds NaN or infinity: the editor's statistics are spoilt. Use an earlier file."
        )
    return value.reshape(()).long() if name == "k" else value


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    shown = [str(name) for name in list(names)[:4]]
    return (", ".join(shown) + (", …" if len(names) > 4 else "")) or "nothing"
