"""MendCallback: an editor for the model that somebody is training already."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from mend_lightning.data.datamodule import EditData, EditDataModule
from mend_lightning.editors.editor import Editor, EditorFactory
from mend_lightning.editors.mend import MendEditor
from mend_lightning.editors.mend_settings import HostMendSettings
from mend_lightning.edits.edit import Edit
from mend_lightning.errors import ModelNotFoundError
from mend_lightning.training.checks import check_numbers
from mend_lightning.training.mend_callback.attachment import HostAttachment
from mend_lightning.training.mend_callback.editor_training import LearningSettings
from mend_lightning.training.mend_callback.host_checks import (
    check_budget,
    check_host_strategy,
    check_prefixes,
)
from mend_lightning.training.mend_callback.patch import Patch
from mend_lightning.training.mend_callback.schedule import Clock, Schedule
from mend_lightning.training.mend_callback.side_training import SideTraining
from mend_lightning.training.optimization import Decay
from mend_lightning.training.progress.console import console
from mend_lightning.training.step import LocalityPositions
from mend_lightning.training.trainer_parts import callbacks_of


class MendCallback(L.Callback):
    """Trains, measures and uses an editor of a model that a Trainer is training, whatever LightningModule it is in.

    The host's training is bit for bit what it is without: no gradient reaches its parameters, its random numbers, modes,
    flags and buffers are put back, and its logger gets keys with our prefix only. (Hooks that the host has on its model run
    in the editor's passes as well.) After `fit`, `callback.editor` is ready for the host's final weights.

    Args:
        model: attribute path of a Hugging Face model in the LightningModule, such as "student.encoder"; "": the
            LightningModule itself, or the only such model in it.
        edits: facts to learn and to be measured on. With `validation` it is measured, with `test` also by `trainer.test`. In the
            YAML of a LightningCLI an `EditData`.
        every_n_steps: the editor takes a step after every so many of the host's optimiser steps.
        time_budget: share of the wall time that the editor's steps may take; it chooses `every_n_steps`, as it goes.
        train: False: the editor is not trained, but measured or used.
        measure: whether `edits` are measured: at each validation of the host, or after each epoch where it has none.
        measure_every_n_epochs: measure after every so many epochs instead.
        patch: edits that the model has in `trainer.validate`, `test` and `predict`: paths of saved ones, and (prompt, target)
            pairs, of which the editor makes one edit.
        patch_force: apply saved edits also to other weights than they were made for.
        prefix: of what is logged.
        editor: folder of a saved editor to start from; its settings replace those below.
        algorithm: another editor than MEND, as in `MendModule`.
        layers, last_blocks, calibration_batches: see `MendModule`.
        lr, edit_rate_lr, warmup_steps, c_edit, locality_positions, tasks_at_once: see `MendModule`; steps are the editor's own.
        decay: "linear" lets the learning rates fall to 0 over the host's training.
        clip: largest norm of the editor's gradient.
        seed: of the editor's initial values and random numbers.
        mend: settings of MEND (`MendSettings`); here `rank` is 256, `edit_rate` 4e-4 and `confidence` 0.9 unless given.

    Example:
        >>> callback = MendCallback("model", edits=EditDataModule("world_facts/train"), every_n_steps=10)
        >>> callback.every_n_steps, callback.editor is None
        (10, True)
    """

    def __init__(
        self,
        model: str = "model",
        edits: EditDataModule | EditData | None = None,
        every_n_steps: int = 10,
        time_budget: float | None = None,
        train: bool = True,
        measure: bool = True,
        measure_every_n_epochs: int | None = None,
        patch: list[str | tuple[str, str]] | None = None,
        patch_force: bool = False,
        prefix: str = "mend",
        editor: str | Path | None = None,
        algorithm: EditorFactory | None = None,
        layers: list[str] | None = None,
        last_blocks: int | None = None,
        calibration_batches: int = 16,
        lr: float = 1e-4,
        edit_rate_lr: float = 3e-6,
        warmup_steps: int = 20,
        decay: Decay = "linear",
        clip: float = 100.0,
        c_edit: float = 0.3,
        locality_positions: LocalityPositions = "all",
        tasks_at_once: int | None = None,
        seed: int = 0,
        **mend: Any,
    ) -> None:
        super().__init__()
        check_numbers(
            every_n_steps=every_n_steps, measure_every_n_epochs=measure_every_n_epochs,
            calibration_batches=calibration_batches, tasks_at_once=tasks_at_once,
        )  # fmt: skip
        check_budget(time_budget)
        self.path, self.prefix, self.every_n_steps, self.time_budget = model, prefix, every_n_steps, time_budget
        self.measure, self.measure_every_n_epochs = measure, measure_every_n_epochs
        self.train, self.calibration_batches = train and edits is not None, calibration_batches
        settings = HostMendSettings(**mend)
        algorithm = algorithm or partial(MendEditor, **asdict(settings))
        # A copy, so that one data module serves several callbacks, each with its own model.
        edits = copy.copy(edits.module if isinstance(edits, EditData) else edits)
        self._attachment = HostAttachment(model, edits, algorithm, editor, layers, last_blocks, seed)
        self._learning = LearningSettings(
            lr, edit_rate_lr, warmup_steps, decay, clip, c_edit, locality_positions, tasks_at_once
        )
        self.clock = Clock()
        self.results: dict[str, float] = {}
        self._side_training: SideTraining | None = None
        self._patch = Patch(patch or [], patch_force)
        # The last word of the training: of a checkpoint, or of the end of `fit`.
        self._kept: dict[str, Any] = {}
        self._checked = self._resumed = False

    @property
    def model(self) -> nn.Module | None:
        """The host's model, once it is found."""
        return self._attachment.model

    @property
    def editor(self) -> Editor | None:
        """The editor of it; None before the Trainer runs."""
        return self._attachment.editor

    def edit(self, prompt: str, target: str) -> Edit:
        """An `Edit` that makes the model, with its weights as they are now, answer `prompt` with `target`.

        Raises:
            ConfigError: no editor has been trained or given.
        """
        return self._attachment.edit([(prompt, target)])

    # Arriving

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks the Trainer, the model, the data and the layers, and builds the editor."""
        check_host_strategy(trainer.strategy)
        check_prefixes([each.prefix for each in callbacks_of(trainer) if isinstance(each, MendCallback)])
        self._patch.take_off()
        self._checked = self._resumed = False
        if self._attachment.edits is not None:
            self._attachment.edits.setup(stage)
        if stage != "fit":
            self._patch.load()
        try:
            self._arrive(trainer, pl_module)
        except ModelNotFoundError:
            # One that is built in the hooks after this one is looked for again when the stage begins.
            if not any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model")):
                raise

    def _arrive(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        plugin = trainer.precision_plugin
        # In float16 the editor's gradients would be nothing: there it works in the weights' own dtype.
        mixed = isinstance(plugin, MixedPrecision) and plugin.precision == "bf16-mixed"
        arrived = self._attachment.attach(
            pl_module, trainer.global_rank, trainer.world_size, torch.bfloat16 if mixed else None,
            check=not self._checked, editing=bool(self._patch.facts),
        )  # fmt: skip
        self._checked = self._checked or arrived

    # Training

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._arrive(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes ready for training; by now a checkpoint has been read, whatever the strategy."""
        self._arrive(trainer, pl_module)
        self.clock, self._began = Clock(self._attachment.device), time.perf_counter()
        if not self.train or self.editor is None or not self.editor.trainable:
            return
        # -1 where neither the number of steps nor the length of an epoch is known.
        total = trainer.estimated_stepping_batches
        total = total if total > 0 else float("inf")
        schedule = Schedule(self.clock, self.every_n_steps, self.time_budget, trainer.global_step, total)
        self._side_training = SideTraining(
            self._attachment, self._learning, schedule, self.clock, self.calibration_batches, self._kept, self._resumed
        )
        self._resumed = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step of the editor where one is due: after the host's optimiser has stepped, not in the midst of accumulation."""
        if self._side_training is not None:
            self._side_training.on_host_step(trainer.global_step, time.perf_counter() - self._began)
            now: Any = {"on_step": True, "on_epoch": False, "batch_size": 1}
            pl_module.log_dict(self._named(self._side_training.losses), **now)
            pl_module.log(f"{self.prefix}/time_share", self.clock.share, prog_bar=True, **now)

    def _named(self, values: dict[str, Any]) -> dict[str, Any]:
        return {f"{self.prefix}/{name}": value for name, value in values.items()}

    # Measuring

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            if self.measure_every_n_epochs is None:
                self._measure(pl_module, "validation")
            return
        self._arrive(trainer, pl_module)
        self._measure(pl_module, "validation")
        self._put_on()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        every = self.measure_every_n_epochs or (None if trainer.enable_validation else 1)
        if every is not None and (trainer.current_epoch + 1) % every == 0:
            self._measure(pl_module, "validation")

    def _measure(self, pl_module: L.LightningModule, split: str) -> None:
        if not (self.measure and self._can_measure(split)):
            return
        with self.clock.ours():
            self.results = self._attachment.measure(split)
        # The same on all processes already; without sync_dist Lightning would warn of each.
        pl_module.log_dict(self._named(self.results), sync_dist=True, batch_size=1)

    def _can_measure(self, split: str) -> bool:
        return self._attachment.edits is not None and self._attachment.edits.files[split] is not None

    # Patching

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._arrive(trainer, pl_module)
        self._measure(pl_module, "test")
        self._put_on()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._arrive(trainer, pl_module)
        self._put_on()

    def _put_on(self) -> None:
        if self.model is not None:
            self._patch.put_on(self.model, self._attachment.edit)

    def _take_off(self, *args: Any, **kwargs: Any) -> None:
        self._patch.take_off()

    on_validation_end = on_test_end = on_predict_end = teardown = _take_off

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """What the editor has learned is kept."""
        self._patch.take_off()
        self._finish()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        side_training = self._side_training
        self._finish()
        if side_training is not None and trainer.is_global_zero:
            unmeasured = self.measure and not self._can_measure("validation")
            measured = "; nothing was measured: there are no validation facts" if unmeasured else ""
            console().print(f"MendCallback({self.path!r}): {side_training.summary()}{measured}", highlight=False)

    def _finish(self) -> None:
        """The end of a training: the editor is for the weights as they are now."""
        if self._side_training is not None:
            self.clock.stop()
            self._kept, self._side_training = self._side_training.state_dict(), None
            self._attachment.bind()

    # Checkpoints

    @property
    def state_key(self) -> str:
        return self._generate_state_key(model=self.path, prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """The editor and its training, as tensors and builtins; empty before there is one."""
        if self.editor is None:
            return {}
        kept = self._kept if self._side_training is None else self._side_training.state_dict()
        return {"editor": self._attachment.state_dict(), "training": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._attachment.load_state_dict(state_dict["editor"])
        self._kept = dict(state_dict["training"])
        self._resumed = bool(self._kept)
