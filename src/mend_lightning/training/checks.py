"""What can be known to fail before hours of training: checks of the model, the trainer and the first batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors.editor import Editor
from mend_lightning.errors import (
    CheckpointingError,
    ConfigError,
    EmptyEditError,
    InferenceModeError,
)
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows
from mend_lightning.models.sharding.collectives import is_sharded
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


def check_inference_mode(trainer: Any) -> None:
    """Raises InferenceModeError if the Trainer evaluates in inference mode, where no gradient can be had."""
    # Validation inside `fit` has the Trainer's setting as well.
    if any(loop.inference_mode for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)):
        raise InferenceModeError(
            "Edits need gradients, also in validation and test, and Trainer(inference_mode=True) forbids them. "
            "Use Trainer(inference_mode=False); `mend-lightning` sets it."
        )


def check_loaded(model: nn.Module, editor: Editor, trainer: Any) -> None:
    """Checks a base and an editor that have just been loaded for a run, before it begins.

    Args:
        model: the base model.
        editor: the editor.
        trainer: Lightning's; None outside of a run.

    Raises:
        ConfigError: the Trainer's precision cast the editor, or it needs no training and is to be fitted on several
            processes.
        CheckpointingError: see `check_checkpointing`.
    """
    if trainer is not None and trainer.state.fn == "fit" and not editor.trainable:
        check_single_process(editor, trainer.world_size)
    check_checkpointing(model)
    check_precision(editor)


def check_numbers(**at_least_one: int | None) -> None:
    """Raises ConfigError where a number that counts something is below 1; None, the default, is not looked at."""
    for name, number in at_least_one.items():
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, not {number}.")


def check_trained(trained: bool, editor: Editor, stage: str) -> None:
    """Raises ConfigError if `stage` (validate, test, predict) is to run with an editor that has learned nothing."""
    if not trained and editor.trainable:
        raise ConfigError(
            f"{stage} needs a trained editor. Give --model.editor RUN/editor (the folder that fit wrote), or "
            "--ckpt_path CHECKPOINT."
        )


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


def unreached_parameters(model: nn.Module, editor: Editor, batch: EditBatch, positions: LocalityPositions) -> list[str]:
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
