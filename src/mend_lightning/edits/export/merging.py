"""Edits added to the weights: a full model folder that plain transformers loads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mend_lightning.edits.edit import Edit, check_summable
from mend_lightning.errors import ConfigError, MergeError, NoEffectWarning, OutputPathError, RoundingWarning
from mend_lightning.files import write_json, written_folder
from mend_lightning.models.compiled import unwrapped
from mend_lightning.models.layers import layer_weight

EDITS_FILE = "mend_lightning_edits.json"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# From here on a layer's rounding is worth a warning: this part of ΔW (Frobenius) is not what was stored.
MUCH_LOST = 0.25


def merge(
    edits: Edit | Sequence[Edit],
    model: nn.Module,
    folder: str | Path | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    force: bool = False,
) -> MergeReport:
    """Writes the model with the edits in its weights; the given model stays as it is, bit for bit.

    `W + ΣΔW` is computed in float32 from the base's weights and rounded once, to the base's dtype. Beside the model only
    the edited layers are held a second time.

    Args:
        edits: one or several, each made for `model`.
        model: the base, not quantised.
        folder: a new folder; None writes nothing and tells what rounding would lose.
        tokenizer: written beside the model.
        overwrite: replace a folder that an earlier merge wrote.
        force: merge into other weights than the edits were made for, as long as layers and shapes are the same.

    Raises:
        ConfigError: there is no edit, or none changes a layer.
        MergeError: the model is quantised, sharded or offloaded, an edited weight is tied to another layer's, or the sum
            does not fit the base's dtype.
        BaseModelMismatchError: an edit was made for another base.
        OutputPathError: the folder holds something, or cannot be written; nothing is left there then.

    Warns:
        RoundingWarning: much of an edit is lost in the base's dtype.
        NoEffectWarning: every ΔW is zero.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mend_lightning import LowRankDelta
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...                      num_attention_heads=2, vocab_size=32)
        >>> delta = LowRankDelta(torch.ones(1, 1, 8), torch.ones(1, 1, 16))
        >>> report = merge(Edit({"model.layers.1.mlp.up_proj": delta}), LlamaForCausalLM(config))
        >>> report.layers["model.layers.1.mlp.up_proj"].changed, report.lost, report.dtype
        (128, 0.0, 'float32')
    """
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    if not edits:
        raise ConfigError("There is no edit to merge. Give at least one.")
    check_summable(edits)
    base = _mergeable(unwrapped(model))
    layers = {name: layer for edit in edits for name, layer in edit.layers_in(base, force).items()}
    if not layers:
        raise ConfigError("The edits change no layer, so there is nothing to merge.")
    _check_layers(base, layers)
    merged, roundings = _merged_weights(edits, layers)
    if folder is not None:
        _write(base, merged, tokenizer, Path(folder), edits, EDITS_FILE if overwrite else None)
    report = MergeReport(roundings, _dtypes(merged.values()), None if folder is None else Path(folder))
    report.warn()
    return report


def _mergeable(model: nn.Module) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise MergeError(
            f"Only a Hugging Face model can be written as a model folder; this is a {type(model).__name__}. Give the "
            "PreTrainedModel itself (of a PEFT model: after unload(), or load the base anew)."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise MergeError("The model has PEFT adapters loaded, which would be written in its place. Load the base anew.")
    sharded = next((name for name, weight in model.named_parameters() if _is_elsewhere(weight)), None)
    if sharded:
        raise MergeError(f"{sharded} is sharded or offloaded. Load the base whole, in one process, to merge into it.")
    quantized = getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None)
    # Quantisers other than transformers' own leave no mark but their weights.
    packed = next((name for name, weight in model.named_parameters() if not _is_plain(weight)), None)
    if quantized or packed:
        raise MergeError(
            f"The base model is quantised{f' ({packed} is no plain floating-point weight)' if packed else ''}, and an edit "
            "rounded to its few levels would be lost or would change more than the edit. Load the base in bfloat16 or "
            "float32 and merge into that; on the quantised base apply the edit as it is, or export it as a PEFT adapter."
        )
    return model


def _is_elsewhere(weight: Tensor) -> bool:
    return hasattr(weight, "full_tensor") or weight.is_meta


def _is_plain(weight: Tensor) -> bool:
    """Whether this is a weight that can be added to, and not a quantiser's."""
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in _DTYPES


def _check_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if "weight" not in layer._parameters:
            raise MergeError(
                f"{name} is a {type(layer).__name__}, which computes its weight, so none can be added to it."
            )
    for name, other in tied_layers(model, layers).items():
        raise MergeError(
            f"The edit changes {name}, whose weight is {other}'s as well (tied), so a merged model would change both. Apply "
            "the edit as it is, or export it as a PEFT adapter and leave that unmerged; to merge, make an edit of other "
            "layers."
        )


def _merged_weights(
    edits: Sequence[Edit], layers: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, LayerRounding]]:
    """Layer name -> new weight on the CPU, in the orientation of the layer, and what rounding did to it."""
    merged, report = {}, {}
    with torch.no_grad():
        for name, layer in layers.items():
            change = weight_change([edit.deltas[name] for edit in edits if name in edit.deltas], layer)
            weight = layer_weight(layer).detach()
            exact = weight.to(change.dtype) + change
            stored = exact.to(weight.dtype)
            if not bool(stored.isfinite().all()):
                raise MergeError(
                    f"W + ΔW of {name} holds values that {_dtypes([stored])} cannot, or NaN. Load the base in bfloat16 or "
                    "float32, or look at the edit: its largest change is as large as that."
                )
            report[name] = layer_rounding(weight, change, exact, stored)
            merged[name] = stored.cpu()
    return merged, report


def weight_change(deltas: Sequence[Any], layer: nn.Module) -> Tensor:
    """`ΣΔW` of one layer in float32 (of a float64 base: float64), in the orientation of the layer's weight.

    Example:
        >>> from mend_lightning import LowRankDelta
        >>> delta = LowRankDelta(torch.ones(1, 1, 2), torch.ones(1, 1, 3))
        >>> weight_change([delta], nn.Linear(2, 3)).shape, weight_change([delta], Conv1D(3, 2)).shape
        (torch.Size([3, 2]), torch.Size([2, 3]))
    """
    weight = layer_weight(layer)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = sum(delta.to(weight.device).dense()[0].to(dtype) for delta in deltas)
    return total.T if isinstance(layer, Conv1D) else total


def _dtypes(weights: Any) -> str:
    return ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights}))


def _write(
    model: PreTrainedModel,
    merged: Mapping[str, Tensor],
    tokenizer: Any,
    folder: Path,
    edits: Sequence[Edit],
    replaces: str | None,
) -> None:
    base = Path(model.name_or_path or "")
    if replaces and base.is_dir() and folder.resolve() == base.resolve():
        raise OutputPathError(f"{folder} holds the model that is being merged into. Keep it, and give another folder.")
    state = {**model.state_dict(), **{f"{name}.weight": weight for name, weight in merged.items()}}
    try:
        with written_folder(folder, replaces) as temporary:
            model.save_pretrained(temporary, state_dict=state)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            write_json(temporary / EDITS_FILE, [edit.about for edit in edits])
    except OutputPathError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputPathError(
            f"The merged model could not be written to {folder}: {error}. Nothing is left there."
        ) from error


@dataclass(frozen=True)
class LayerRounding:
    """What storing `W + ΔW` in the base's dtype did to one layer.

    Attributes:
        entries: of the weight.
        changed: how many of them ΔW changes (is not 0 at).
        lost: how many of those are stored as they were in the base.
        relative_error: ‖stored − (W + ΔW)‖ / ‖ΔW‖ (Frobenius); 0 where ΔW is 0.
    """

    entries: int
    changed: int
    lost: int
    relative_error: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        layers: layer name -> LayerRounding.
        dtype: that the edited weights are stored in.
        folder: where the model was written; None if it was not.
    """

    layers: dict[str, LayerRounding]
    dtype: str
    folder: Path | None = None

    @property
    def lost(self) -> float:
        """Share of the entries that ΔW changes which are stored as they were."""
        changed = sum(layer.changed for layer in self.layers.values())
        return sum(layer.lost for layer in self.layers.values()) / changed if changed else 0.0

    def warn(self) -> None:
        """Warns of a layer of whose change much is not what was stored, and of edits that change nothing."""
        if not any(layer.changed for layer in self.layers.values()):
            warnings.warn("The edits change nothing: every ΔW is zero.", NoEffectWarning, stacklevel=3)
        name, worst = max(self.layers.items(), key=lambda item: item[1].relative_error)
        if worst.relative_error > MUCH_LOST:
            warnings.warn(
                f"Much of the edit is lost in {self.dtype}: of {name} {100 * worst.relative_error:.0f} % of ΔW (Frobenius) "
                f"is rounding, and {100 * self.lost:.0f} % of all changed entries are stored as they were. Ask the merged "
                "model; float32 keeps the edit.",
                RoundingWarning,
                stacklevel=3,
            )


def layer_rounding(base: Tensor, change: Tensor, exact: Tensor, stored: Tensor) -> LayerRounding:
    """Compares what was stored with `exact = base + change`, all of one shape.

    Example:
        >>> import torch
        >>> base, change = torch.ones(2).bfloat16(), torch.tensor([1e-4, 1.0])
        >>> layer_rounding(base, change, base + change, (base + change).bfloat16())
        LayerRounding(entries=2, changed=2, lost=1, relative_error=0.0001000165...)
    """
    changed = change != 0
    size = float(change.norm())
    error = float((stored.to(exact.dtype) - exact).norm()) / size if size else 0.0
    return LayerRounding(change.numel(), int(changed.sum()), int((changed & (stored == base)).sum()), error)


def tied_layers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of the named layers those whose weight is reached under another name too -> that name.

    Example:
        >>> model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3), "fc": nn.Linear(2, 2)})
        >>> model["head"].weight = model["embedding"].weight
        >>> tied_layers(model, ["head", "fc"])
        {'head': 'embedding'}
    """
    owners: dict[int, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    others = {name: [o for o in owners.get(id(modules[name].weight), []) if o != name] for name in names}
    return {name: found[0] for name, found in others.items() if found}
