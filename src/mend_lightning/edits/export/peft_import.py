"""PEFT LoRA adapters as edits: our own come back as they were, others as far as they are plain LoRA."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mend_lightning.edits.deltas import LowRankDelta
from mend_lightning.edits.edit import Edit
from mend_lightning.edits.export.lora import PREFIX
from mend_lightning.edits.export.peft_export import ABOUT, CONFIG_FILE, FORMAT, MARK, RANKS, WEIGHTS_FILE
from mend_lightning.errors import AdapterError

# Settings of a LoraConfig that `W + scaling · B A` is the whole of, whatever they are. Any other one that is set, also one
# that later versions of PEFT will have, means more.
_PLAIN = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r rank_pattern lora_alpha "
    "alpha_pattern use_rslora lora_dropout fan_in_fan_out target_modules exclude_modules layers_to_transform layers_pattern "
    "megatron_core qalora_group_size eva_config ensure_weight_tying".split()
)
# Starting points that leave the base's weights as they are.
_PLAIN_VALUES = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}


def import_peft(folder: str | Path) -> Edit:
    """Reads a LoRA adapter as an edit; peft itself is not needed for it.

    An adapter that `export_peft` wrote comes back with its factors and its `about`; of several edits in one adapter, one
    edit comes back. A plain LoRA of somebody else becomes an edit with its scaling multiplied in; it does not know which
    weights it was made for, so it fits every model with these layers, and `about` says where it is from.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
        AdapterError: a file is missing or broken, or the adapter is more than a LoRA of linear layers (DoRA, IA³, biases,
            modules_to_save, …).
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    tensors, metadata = _read_weights(folder / WEIGHTS_FILE)
    ours = metadata.get(MARK) == FORMAT
    if ours:
        # A classifier's head lies beside them, as it is in the base: PEFT wants it there.
        tensors = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    else:
        _check_plain(config, folder)
    pairs = _pairs(tensors, folder)
    try:
        deltas = {name: _delta(*pair, scaling(config, name, len(pair[0]))) for name, pair in pairs.items()}
        if not ours:
            return Edit(deltas, _foreign_about(config, folder))
        # As they were: in their order, and without the zeros in place of a rank of 0.
        ranks = json.loads(metadata[RANKS])
        if missing := deltas.keys() - ranks.keys():
            raise ValueError(f"no rank of {sorted(missing)[0]}")
        return Edit({name: _first(deltas[name], rank) for name, rank in ranks.items()}, json.loads(metadata[ABOUT]))
    except (KeyError, ValueError, TypeError, AttributeError, re.error) as error:
        raise AdapterError(f"The adapter in {folder} has a part missing or broken: {error!r}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path} cannot be read; expected a folder that PEFT saved an adapter to: {error}"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{path} describes an adapter of type {kind}; only LORA is an edit of weights.")
    return config


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        hint = ""
        if path.with_suffix(".bin").exists():
            hint = " There is an adapter_model.bin (pickle), which is not read: save the adapter anew as safetensors."
        raise AdapterError(f"{path} cannot be read as the weights of an adapter: {error}.{hint}") from error


def _pairs(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (lora_A `[rank, d_in]`, lora_B `[d_out, rank]`)."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if found is None or tensor.dim() != 2:
            raise AdapterError(
                f"The adapter in {folder} holds {key} {list(tensor.shape)}, which is no LoRA factor of a linear layer, so it "
                "is more than an edit can say."
            )
        parts.setdefault(found[1], {})[found[2]] = tensor
    for name, pair in parts.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = {part: list(tensor.shape) for part, tensor in pair.items()}
            raise AdapterError(f"The adapter in {folder} has no matching lora_A and lora_B of {name}: {shapes}.")
    if not parts:
        raise AdapterError(f"The adapter in {folder} holds no LoRA factors.")
    return {name: (pair["A"], pair["B"]) for name, pair in parts.items()}


def _foreign_about(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {
        "edits": [],
        "editor": "PEFT LoRA",
        "base": config.get("base_model_name_or_path") or "",
        "base_options": {"revision": config.get("revision")},
        "imported_from": folder.name,
        "peft_version": config.get("peft_version"),
    }


def _check_plain(config: Mapping[str, Any], folder: Path) -> None:
    wrong = {
        key: value
        for key, value in config.items()
        if value and key not in _PLAIN and value not in _PLAIN_VALUES.get(key, ())
    }
    if wrong:
        said = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
        raise AdapterError(
            f"The adapter in {folder} is more than a plain LoRA ({said}), which an edit cannot say. Merge it into its base "
            "with PEFT (merge_and_unload), and edit that model."
        )


def scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    """The factor of `B A` of one layer, as PEFT finds it: alpha / rank, or alpha / √rank of rsLoRA.

    Example:
        >>> config = {"lora_alpha": 8, "alpha_pattern": {"layers.2.fc": 4}}
        >>> scaling(config, "layers.2.fc", 4), scaling(config, "layers.12.fc", 4)
        (1.0, 2.0)
    """
    patterns = config.get("alpha_pattern") or {}
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
    alpha = config["lora_alpha"] if key is None else patterns[key]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _delta(down: Tensor, up: Tensor, factor: float) -> LowRankDelta:
    if not bool(down.isfinite().all() and up.isfinite().all()):
        raise ValueError("a factor holds NaN or infinite values")
    delta = LowRankDelta(down.float()[None].contiguous(), up.float().T[None].contiguous())
    return delta if factor == 1 else delta.scaled(factor)


def _first(delta: LowRankDelta, rank: int) -> LowRankDelta:
    return LowRankDelta(delta.down[:, :rank].contiguous(), delta.up[:, :rank].contiguous())
