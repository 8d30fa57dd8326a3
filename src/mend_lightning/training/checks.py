"""What can be known to fail before hours of training: checks of the model, the trainer and the first batch."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors.editor import Editor
from mend_lightning.errors import (
    BaseModelMismatchError,
    CheckpointingError,
    ConfigError,
    EmptyEditError,
    StateDictError,
)
from mend_lightning.models.fingerprint import same_base
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows
from mend_lightning.models.sharding.collectives import is_sharded, own_class
from mend_lightning.training.random_states import kept_random_states
from mend_lightning.training.step import LocalityPositions, edit_step


def check_checkpointing(model: nn.Module) -> None:
    """Raises CheckpointingError if the base uses reentrant activation checkpointing.

    Reentrant checkpointing runs the blocks without a graph and once more in the backward pass, so hooks see
    activations that have no gradient.
    """
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is None or not getattr(module, "gradient_checkpointing", False):
            continue
        if getattr(function, "keywords", {}).get("use_reentrant", False):
            raise CheckpointingError(
                f"{name or type(module).__name__} uses reentrant activation checkpointing, which hides activations "
                "from the editor. Enable it with gradient_checkpointing_enable("
                "gradient_checkpointing_kwargs={'use_reentrant': False}), or not at all: the base is frozen, and "
                "only its edited blocks keep activations."
            )


def check_prompt_format(saved: dict[str, str], given: dict[str, str] | None) -> None:
    """Raises ConfigError if an editor was trained with another prompt format than the data has."""
    if saved and given and saved != given:
        raise ConfigError(
            f"The editor was trained with the prompt format {saved}, but data has {given}. Give data.prompt, data.target "
            "and data.stop as they were in training (the run's config)."
        )


def check_checkpoint(checkpoint: Mapping[str, Any], editor: Editor) -> None:
    """Raises where a checkpoint is not of this editor and base model, or lacks a part of the editor.

    Raises:
        StateDictError: MendModule did not write it, or an entry is missing.
        BaseModelMismatchError: it is of another editor or base model.

    Warns:
        UnverifiedBaseWarning: the base is quantised in another way now, or in one of the two only.
    """
    if "shards" in checkpoint:
        raise StateDictError(
            "This is a sharded checkpoint, whose tensors lie in a folder beside it. Read it with the plugin that knows them: "
            "Trainer(plugins=[mend_lightning.training.distributed.checkpoint_io.EditorCheckpointIO()]), or the command line."
        )
    saved = checkpoint.get("mend_lightning")
    if saved is None:
        raise StateDictError("This checkpoint was not written by MendModule: it has no 'mend_lightning' entry.")
    mine = editor.description()
    # Settings that came later have their defaults in an older checkpoint.
    parameters = signature(own_class(editor)).parameters.items()
    defaults = {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty}
    saved = {"class": "MendEditor", **saved, "settings": {**defaults, **saved["settings"]}}
    mine["settings"] = {**defaults, **mine["settings"]}
    for name in ("class", "layers", "settings", "base_fingerprint"):
        pair = saved[name], mine[name]
        if not (same_base(*pair, "checkpoint") if name == "base_fingerprint" else pair[0] == pair[1]):
            raise BaseModelMismatchError(
                f"The checkpoint is of another editor or base model: its {name} is {saved[name]}, here it is "
                f"{mine[name]}. Use the config and base model it was trained with ({saved['base']})."
            )
    missing = [key for key in editor.state_dict() if f"editor.{key}" not in checkpoint["state_dict"]]
    if missing:
        raise StateDictError(f"The checkpoint lacks {len(missing)} entries of the editor, among them {missing[0]!r}.")


def check_single_process(editor: Editor, world_size: int) -> None:
    """Raises ConfigError if an editor without parameters is to be fitted on several processes, which DDP refuses."""
    if world_size > 1:
        raise ConfigError(
            f"{type(editor).__name__} needs no training, and fit on {world_size} processes cannot run without. Use "
            "--trainer.devices 1 (and one node) for fit, or leave it out: test works without."
        )


def check_strategy(strategy: Any) -> None:
    """Raises ConfigError if the Trainer's strategy shards the model in a way of its own."""
    kind = type(strategy).__name__
    if kind in ("ModelParallelStrategy", "DeepSpeedStrategy", "FSDPStrategy"):
        raise ConfigError(
            f"{kind} cannot shard this model: the base is loaded and sharded by MendModule. Use the strategy fsdp2 "
            "(mend_lightning.ShardedStrategy) or fsdp1, or ddp where the base fits on each device."
        )


def check_precision(editor: nn.Module) -> None:
    """Raises ConfigError if the trainer's precision cast the editor away from float32."""
    for name, parameter in editor.named_parameters():
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"The editor must stay float32 (its gradients are tiny), but {name} is {parameter.dtype}: "
                "Trainer(precision=...) cast it. Leave precision at '32-true' and choose the base model's dtype "
                "with model.base.dtype."
            )


def check_rows(rows: Rows, name: str) -> None:
    """Raises if rows are padded on the left, or if a row has no label."""
    mask = rows.inputs.get("attention_mask")
    if mask is not None and bool((mask.diff(dim=1) > 0).any()):
        raise ConfigError(
            f"{name} is padded on the left (its attention mask rises along a row). Batches must be padded on the "
            "right; EditDataModule does that whatever the tokenizer's padding_side."
        )
    empty = (rows.labels == IGNORED_LABEL).all(1)
    if bool(empty.any()):
        raise EmptyEditError(
            f"Row {int(empty.nonzero()[0])} of {name} has no label token: every label is {IGNORED_LABEL}. Its target "
            "is empty or was cut off; raise max_length."
        )


def check_batch(batch: EditBatch) -> None:
    """Checks the three sets of a batch; see `check_rows`."""
    for name in ("z_edit", "x_out", "x_in"):
        check_rows(getattr(batch, name), name)


def unreached_parameters(
    model: nn.Module, editor: nn.Module, batch: EditBatch, positions: LocalityPositions
) -> list[str]:
    """Names of editor parameters that one step on `batch` gives no gradient; leaves no trace.

    The first pass is made in evaluation mode, so that the running statistics do not take the batch in.
    """
    training = editor.training
    editor.eval()
    try:
        with kept_random_states():
            loss = edit_step(model, editor, batch, positions).total(1.0)
        if is_sharded(editor):
            # Until then the loss depends on gathered parameters; only `backward` brings the gradient to the sharded ones.
            loss.backward()
            missing = [name for name, parameter in editor.named_parameters() if parameter.grad is None]
            editor.zero_grad()
            return missing
        named = dict(editor.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return [name for name, gradient in zip(named, gradients) if gradient is None]
    finally:
        editor.train(training)
