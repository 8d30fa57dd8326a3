"""Edits as a PEFT LoRA adapter: what serving stacks load beside the base model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from mend_lightning.edits.deltas import LowRankDelta, concatenated
from mend_lightning.edits.edit import Edit, combined
from mend_lightning.edits.export.lora import (
    adapter_tensors,
    check_outside_head,
    head_tensors,
    lora_config,
    low_rank_deltas,
)
from mend_lightning.edits.export.merging import tied_layers
from mend_lightning.errors import (
    AdapterError,
    ConfigError,
    OutputPathError,
    TiedWeightsWarning,
)
from mend_lightning.files import written_folder
from mend_lightning.models.compiled import unwrapped

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# The keys of the metadata in WEIGHTS_FILE that make an adapter an edit again.
MARK, ABOUT, RANKS = "mend_lightning_adapter", "about", "ranks"
FORMAT = "1"


def export_peft(
    edits: Edit | Sequence[Edit],
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    force: bool = False,
) -> Path:
    """Writes one LoRA adapter that does what the edits do together; returns its folder.

    `PeftModel.from_pretrained(model, folder)`, its `merge_and_unload()` and transformers' own
    `model.load_adapter(folder)` take it, and `import_peft` makes an edit of it again. The factors of several edits are set
    side by side. Their scaling is exactly 1, so float32 factors come back bit for bit. What the edits say about
    themselves is in the metadata of the adapter's safetensors file.

    Args:
        edits: one or several low-rank edits, made for `model`.
        model: the base; may be quantised.
        folder: a new folder.
        dtype: of the factors in the file; edits are small, and float32 keeps them exact.
        overwrite: replace a folder that an earlier export wrote; no adapter of somebody else.
        force: write it for other weights than the edits were made for, as long as layers and shapes are the same.

    Raises:
        MissingPackageError: peft is not installed.
        ConfigError: there is no edit, or none changes a layer.
        AdapterError: an edit is dense (so can be what `combined` makes of many: give those one by one) or in a classifier's
            head, or the model is no Hugging Face model.
        BaseModelMismatchError: an edit was made for another base.
        OutputPathError: the folder holds something, or cannot be written; nothing is left there then.

    Warns:
        TiedWeightsWarning: an edited layer shares its weight with another one, so the adapter must stay unmerged.
    """
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    model = unwrapped(model)
    if not edits:
        raise ConfigError("There is no edit to export. Give at least one.")
    deltas = [low_rank_deltas(each) for each in edits]
    if not isinstance(model, PreTrainedModel):
        raise AdapterError(f"PEFT adapters are for Hugging Face models; this is a {type(model).__name__}.")
    layers = {name: layer for each in edits for name, layer in each.layers_in(model, force).items()}
    if not layers:
        raise ConfigError("The edits change no layer, so there is nothing to export.")
    _warn_of_tied(model, layers)
    if overwrite:
        check_own_adapter(folder)
    edit = Edit(_side_by_side(deltas), _about(edits, force))
    check_outside_head(edit, model)
    config, head = lora_config(edit, model, layers), head_tensors(model)
    try:
        with written_folder(folder, CONFIG_FILE if overwrite else None) as temporary:
            config.save_pretrained(temporary)
            tensors = {**adapter_tensors(edit, dtype), **head}
            save_file(tensors, temporary / WEIGHTS_FILE, metadata=_metadata(edit))
    except OutputPathError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputPathError(
            f"The adapter could not be written to {folder}: {error}. Nothing is left there."
        ) from error
    return Path(folder)


def check_own_adapter(folder: str | Path) -> None:
    """Raises OutputPathError where the folder holds an adapter that was not exported from here: it may have been trained."""
    path = Path(folder, WEIGHTS_FILE)
    if not Path(folder, CONFIG_FILE).is_file():
        return
    try:
        with safe_open(path, "pt") as file:
            ours = MARK in (file.metadata() or {})
    except (OSError, SafetensorError):
        ours = False
    if not ours:
        raise OutputPathError(
            f"{folder} is not overwritten: it holds an adapter that `mend-lightning export` did not write. Give another "
            "folder, or empty it yourself."
        )


def _side_by_side(edits: Sequence[Mapping[str, LowRankDelta]]) -> dict[str, LowRankDelta]:
    """The sum of low-rank edits, still as factors whatever their number: an adapter cannot be dense."""
    names = dict.fromkeys(name for deltas in edits for name in deltas)
    return {name: concatenated([deltas[name] for deltas in edits if name in deltas]) for name in names}


def _about(edits: Sequence[Edit], force: bool) -> dict[str, Any]:
    """What the edits say, as one. Forced ones need not be of one base, so they say nothing of weights together."""
    if len(edits) == 1 or not force:
        return combined([Edit({}, edit.about) for edit in edits]).about
    about = combined([Edit({}, {**edit.about, "weights": {}}) for edit in edits]).about
    return {**about, "combined": [edit.about for edit in edits]}


def _warn_of_tied(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, other in tied_layers(model, layers).items():
        warnings.warn(
            f"The adapter changes {name}, whose weight is {other}'s as well (tied). Use it unmerged: PEFT's "
            "merge_and_unload would change both.",
            TiedWeightsWarning,
            stacklevel=3,
        )


def _metadata(edit: Edit) -> dict[str, str]:
    ranks = {name: delta.rank for name, delta in edit.deltas.items()}
    about = json.dumps(edit.about, ensure_ascii=False)
    return {"format": "pt", MARK: FORMAT, ABOUT: about, RANKS: json.dumps(ranks)}
