"""Low-rank edits in the terms of PEFT's LoRA: its config, and the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mend_lightning.edits.deltas import LowRankDelta
from mend_lightning.edits.edit import Edit
from mend_lightning.errors import AdapterError, MissingPackageError, ModelLoadError
from mend_lightning.models.architecture import resolve_name
from mend_lightning.models.inputs.encoder import model_kind
from mend_lightning.models.smollm2 import MODEL_NAME

PREFIX = "base_model.model."
# What PEFT takes for the head of a classifier: it wants a copy of it in the adapter, and no LoRA inside it.
_HEADS = ("classifier", "score")
_TASKS = {"causal": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}


def lora_config(edit: Edit, model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> Any:
    """The `peft.LoraConfig` of the adapter: each edited layer with its own rank, and scaling 1.

    Args:
        edit: low-rank.
        model: the base.
        layers: name -> module of the edited layers.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingPackageError("Writing a PEFT adapter needs peft: pip install 'mend-lightning[peft]'") from error
    ranks = {name: stored_rank(delta) for name, delta in low_rank_deltas(edit).items()}
    largest = max(ranks.values())
    # PEFT matches a pattern anywhere after a dot; ^ keeps decoder.fc1 from matching other.decoder.fc1 too.
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules=_targets(list(ranks), model),
        # Of a model that has both kinds PEFT corrects it layer by layer, and says so.
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        task_type=_TASKS[model_kind(model)],
        base_model_name_or_path=_base_name(edit, model),
        revision=(edit.about.get("base_options") or {}).get("revision"),
        inference_mode=True,
    )


def _targets(names: list[str], model: nn.Module) -> list[str] | str:
    """The layers' full names; as a pattern where PEFT would take a name for the end of another layer's too."""
    edited = set(names)
    others = [name for name, _ in model.named_modules() if name not in edited]
    if any(other.endswith(f".{name}") for other in others for name in names):
        return "|".join(re.escape(name) for name in names)
    return names


def _base_name(edit: Edit, model: PreTrainedModel) -> str | None:
    """What transformers loads the base from."""
    name = edit.about.get("base") or model.name_or_path
    if name != MODEL_NAME:
        return name
    try:
        return resolve_name(name)
    except ModelLoadError:
        return name


def low_rank_deltas(edit: Edit) -> dict[str, LowRankDelta]:
    """The deltas of an edit that is low-rank at every layer.

    Raises:
        AdapterError: it is dense somewhere.
    """
    found = {name: delta for name, delta in edit.deltas.items() if isinstance(delta, LowRankDelta)}
    dense = [name for name in edit.deltas if name not in found]
    if dense:
        raise AdapterError(
            f"The edit is dense at {dense[0]} (made by {edit.about.get('editor') or 'an unknown editor'}), and a LoRA is "
            "low-rank. Truncate it first: Edit.compressed(rank=...) or Edit.compressed(energy=0.99), which say how much "
            "is lost; --rank N or --energy 0.99 on the command line. `mend-lightning merge` takes it as it is."
        )
    return found


def stored_rank(delta: LowRankDelta) -> int:
    """The rank in the adapter: a layer that the edit leaves alone has a LoRA of zeros, for PEFT knows no rank 0."""
    return max(delta.rank, 1)


def adapter_tensors(edit: Edit, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of the adapter under PEFT's names: `lora_A` `[rank, d_in]` and `lora_B` `[d_out, rank]`.

    Example:
        >>> edit = Edit({"fc": LowRankDelta(torch.ones(1, 2, 3), torch.ones(1, 2, 5))})
        >>> {name: list(tensor.shape) for name, tensor in adapter_tensors(edit, torch.float32).items()}
        {'base_model.model.fc.lora_A.weight': [2, 3], 'base_model.model.fc.lora_B.weight': [5, 2]}
    """
    tensors = {}
    for name, delta in low_rank_deltas(edit).items():
        down, up = (part[0].detach().cpu().to(dtype) for part in (delta.down, delta.up))
        missing = stored_rank(delta) - delta.rank
        down, up = (nn.functional.pad(part, (0, 0, 0, missing)) for part in (down, up))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = down.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up.T.contiguous()
    return tensors


def head_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A classifier's head as it is in the base, under PEFT's names; nothing of another model."""
    if model_kind(model) != "classifier":
        return {}
    # The same weight under two names would not be written.
    return {
        f"{PREFIX}{name}": value.detach().cpu().clone().contiguous()
        for name, value in model.state_dict().items()
        if _in_head(name)
    }


def _in_head(name: str) -> bool:
    return any(part in _HEADS for part in name.split("."))


def check_outside_head(edit: Edit, model: PreTrainedModel) -> None:
    """Raises AdapterError if the edit changes the head of a classifier."""
    inside = [name for name in edit.deltas if _in_head(name)]
    if inside and model_kind(model) == "classifier":
        raise AdapterError(
            f"The edit changes {inside[0]}, a part of the classifier's head, which PEFT keeps whole and takes no LoRA in. "
            "`mend-lightning merge` takes the edit as it is."
        )
