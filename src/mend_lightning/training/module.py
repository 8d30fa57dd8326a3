"""MendModule: trains an editor of a frozen base model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.order import repeated
from mend_lightning.editors.editor import Editor, EditorFactory
from mend_lightning.editors.mend import MendEditor
from mend_lightning.editors.mend_settings import MendSettings
from mend_lightning.errors import NoEffectWarning
from mend_lightning.evaluation.metric_collection import Scoreboard
from mend_lightning.models.base import BaseModel
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.inputs.encoder import Encoder, model_kind
from mend_lightning.training.checks import (
    check_inference_mode,
    check_loaded,
    check_numbers,
    check_prompt_format,
    check_trained,
)
from mend_lightning.training.distributed.placement import SHARDING, ddp_leaves_out, load_for
from mend_lightning.training.editor_checkpoint import check_checkpoint, keep_editor_only
from mend_lightning.training.editor_preparation import take_in_facts
from mend_lightning.training.evaluation_steps import predict_batch
from mend_lightning.training.finite import FiniteChecks, check_finite, skips_step
from mend_lightning.training.looks import Looks
from mend_lightning.training.optimization import Decay, adam, edit_rate_range, gradient_norm, lr_factor
from mend_lightning.training.precision import check_trainer_precision, loss_scaler
from mend_lightning.training.random_states import set_own_random_states
from mend_lightning.training.run_editor import new_editor, saved_editor
from mend_lightning.training.step import LocalityPositions, StepOutput, step_loss
from mend_lightning.training.trainer_parts import data_of
from mend_lightning.training.trunk_cache import CachedTrunk
from mend_lightning.training.trunk_cache.trunk_report import check_trunk_cache
from mend_lightning.training.validations import Validations


class MendModule(L.LightningModule):
    """MEND as a LightningModule: a frozen base model, an editor, and the meta-learning step.

    Automatic optimisation with one Adam: clipping, accumulation and the number of devices are the Trainer's.
    Checkpoints hold the editor only.

    Args:
        base: the model whose beliefs are edited.
        editor: folder of a saved editor to start from (or to test); its settings replace those below.
        algorithm: another editor than MEND, a class of `mend_lightning.editors` with its own arguments, and then the
            settings of MEND mean nothing; None: MEND with those. With `editor` it says what class the folder must hold.
        layers: names or patterns of the layers to edit; None: the MLP matrices of the last blocks.
        last_blocks: how many blocks of each stack, when `layers` is None; None: 3, or 2 + 2 (the paper's).
        calibration_batches: training batches that the preconditioning is estimated from, before the first step; at most
            one epoch.
        lr: Adam's learning rate of the transforms, or whatever else the editor learns (paper: 1e-6).
        edit_rate_lr: the same of the edit rates (the paper says 1e-4; the released code in effect used 1e-6), and of other
            numbers a layer, such as log λ of `ridge`.
        warmup_steps: steps in which both rise from 0.
        decay: "linear" lets both fall to 0 over the Trainer's steps; "none" keeps them.
        c_edit: weight of the edit loss (paper: 0.1). ENN's weight of its base loss, `c_base`, is the editor's setting.
        locality_positions: positions the locality loss looks at: "all" (the original) or "answer".
        tasks_at_once: edits of a batch whose outer pass is in memory at a time; None: all. The step is the same with any, which
            it is not with fewer edits a batch and `accumulate_grad_batches` (see `edit_step_in_chunks`).
        trunk_cache: folder in which `fit` keeps, for this run and later ones, what the blocks below the edited layers return
            for the training rows (docs/speed.md says where that pays). It may grow large. None: they run every time.
        compile_blocks: has no effect, and is accepted so that earlier configurations load.
        validate_first: whether `fit` validates before its first step, so that one sees what training adds (`FirstLook`).
        mend: `rank`, `edit_rate`, `precondition`, `confidence` and the others of `MendSettings`.

    Warns:
        NoEffectWarning: `compile_blocks` is set.
        FailingRunWarning: the first look at the edits says that the run fails (`evaluation/doubts.py`).

    Example:
        >>> module = MendModule(rank=256, lr=1e-5)
        >>> module.c_edit
        0.1
    """

    # `configure_model` sets them; before it they are None.
    base_model: nn.Module
    tokenizer: Any
    editor: Editor

    def __init__(
        self,
        base: BaseModel = BaseModel(),
        editor: str | Path | None = None,
        algorithm: EditorFactory | None = None,
        layers: list[str] | None = None,
        last_blocks: int | None = None,
        calibration_batches: int = 16,
        lr: float = 1e-6,
        edit_rate_lr: float = 1e-6,
        warmup_steps: int = 0,
        decay: Decay = "none",
        c_edit: float = 0.1,
        locality_positions: LocalityPositions = "all",
        tasks_at_once: int | None = None,
        trunk_cache: str | Path | None = None,
        compile_blocks: bool = False,
        validate_first: bool = True,
        **mend: Any,
    ) -> None:
        super().__init__()
        # The base is not in the checkpoints, so a checkpoint lacks its keys; `on_load_checkpoint` checks ours.
        self.strict_loading = False
        self.base = base
        settings = MendSettings(**mend)
        own = algorithm or partial(MendEditor, **asdict(settings))
        self.new_editor = partial(new_editor, algorithm=own, layers=layers, last_blocks=last_blocks)
        self._build_editor: Callable[[nn.Module], Editor] = self.new_editor
        if editor is not None:
            self._build_editor = partial(saved_editor, folder=editor, algorithm=algorithm)
        check_numbers(calibration_batches=calibration_batches, tasks_at_once=tasks_at_once)
        if compile_blocks:
            warnings.warn("compile_blocks has no effect. Leave it out.", NoEffectWarning, stacklevel=2)
        self.calibration_batches, self.tasks_at_once = calibration_batches, tasks_at_once
        self.lr, self.edit_rate_lr, self.warmup_steps, self.decay = lr, edit_rate_lr, warmup_steps, decay
        self.c_edit, self.locality_positions = c_edit, locality_positions
        # What runs the trunk in training; `on_fit_start` puts the cache here.
        self.trunk_cache, self.trunk_of = trunk_cache, run_trunk
        self.base_model = self.tokenizer = self.editor = None  # type: ignore[assignment]
        self.scoreboard = Scoreboard()
        self.results: dict[str, float] = {}
        # Steps that a loss scaler left out because the gradient overflowed.
        self.skipped_steps = 0
        self._trained, self.looks = editor is not None, Looks(validate_first, trained=editor is not None)
        self._finite = FiniteChecks()
        self._random_states: list[dict[str, Any]] | None = None

    def configure_model(self) -> None:
        """Loads the base and builds the editor, once; Lightning calls this before every stage."""
        if self.base_model is None:
            self._load()
        # Without a Trainer the data's prompt format is not known yet, and an encoder that was set by hand stays.
        encoder = self._encoder()
        self.editor.encoder = encoder or self.editor.encoder
        given = asdict(encoder.format) if encoder else None
        check_prompt_format(self.editor.prompt_format, given)
        self.editor.bind(self.base_model, self.base.name, given, self.base.options())

    def _load(self) -> None:
        strategy = None if self._trainer is None else self._trainer.strategy
        self.base_model, self.tokenizer = load_for(strategy, self.base)
        self.editor = self._build_editor(self.base_model)
        check_loaded(self.base_model, self.editor, self._trainer)
        if isinstance(strategy, SHARDING):
            strategy.shard_editor(self.editor)
        self._ddp_params_and_buffers_to_ignore = ddp_leaves_out(self)

    def _encoder(self) -> Encoder | None:
        """The data's, whose prompt format is saved with the editor; None (another data module) keeps a loaded editor's."""
        data = data_of(self._trainer) if self._trainer is not None else None
        return data.encoder if isinstance(data, EditDataModule) else None

    @property
    def base_kind(self) -> str:
        """ "causal", "encoder_decoder" or "classifier"."""
        return model_kind(self.base_model)

    def train(self, mode: bool = True) -> MendModule:
        """Training mode reaches the editor only: the base is frozen, its dropout stays off."""
        super().train(mode)
        if self.base_model is not None:
            self.base_model.eval()
        return self

    def setup(self, stage: str) -> None:
        """Checks the Trainer, before gigabytes load."""
        check_trainer_precision(self.trainer.precision_plugin)
        if stage == "fit" and self.trunk_cache is not None:
            check_trunk_cache(self.trunk_cache, self.trainer.strategy)
        check_inference_mode(self.trainer)

    def check_last_step(self) -> None:
        """Raises NonFiniteError if a number of the last step was not finite and that was not known before."""
        self._finite.flush()

    on_train_epoch_end = on_train_end = check_last_step

    def on_validation_start(self) -> None:
        self.check_last_step()
        if self.trainer.state.fn == "validate":
            check_trained(self._trained, self.editor, "validate")
        self.looks.begin(self)

    def on_test_start(self) -> None:
        check_trained(self._trained, self.editor, "test")
        self.looks.begin(self)

    def on_predict_start(self) -> None:
        check_trained(self._trained, self.editor, "predict")

    def on_fit_start(self) -> None:
        """Estimates the preconditioning, unless a checkpoint or a loaded editor brought it."""
        self._trained, self._finite = True, FiniteChecks()
        if self.trunk_cache is not None:
            self.trunk_of = CachedTrunk(self.trunk_cache, self.tokenizer)
        if not self.editor.trainable:
            # Nothing to do; `on_fit_end` puts it back.
            self._max_epochs, self.trainer.fit_loop.max_epochs = self.trainer.fit_loop.max_epochs, 0
        take_in_facts(self.trainer, self.base_model, self.editor, self.calibration_batches, self.trunk_of)
        self.looks.begin_fit(self)

    def on_fit_end(self) -> None:
        if isinstance(self.trunk_of, CachedTrunk):
            self.trunk_of.close()
        self.trunk_of = run_trunk
        if not self.editor.trainable:
            self.trainer.fit_loop.max_epochs = self._max_epochs
        self.looks.end_fit(self)

    def training_step(self, batch: EditBatch, batch_idx: int) -> Tensor:
        self._finite.flush()
        settings = (self.c_edit, self.tasks_at_once, self.locality_positions)
        loss, out = step_loss(self.base_model, self.editor, batch, *settings, self.trunk_of)
        check_finite({"inner": out.inner, **out.losses()}, batch, self.global_step, self._finite)
        self._log_losses(loss, out, len(batch))
        return loss

    def _log_losses(self, loss: Tensor, out: StepOutput, edits: int) -> None:
        """Means over the processes, whose batches are equally large: what one process would log of the whole batch."""
        means = self.trainer.strategy.reduce(out.means(loss), reduce_op="mean")
        for name, mean in zip([*out.losses(), "loss", "skipped_tokens"], means.unbind()):
            self.log(f"train/{name}", mean, prog_bar=name in out.losses(), batch_size=edits)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm, scaler = gradient_norm(self.editor), loss_scaler(self.trainer.precision_plugin)
        self.skipped_steps += skips_step(norm, scaler, self.global_step, self._finite)
        if scaler is not None:
            self.log("train/skipped_steps", float(self.skipped_steps), prog_bar=True)
        self.log("train/grad_norm", norm, prog_bar=True)
        self.log_dict({f"train/{name}": rate for name, rate in edit_rate_range(self.editor).items()})

    def validation_step(self, batch: EditBatch, batch_idx: int) -> None:
        metrics = None if repeated(self.trainer.val_dataloaders, batch_idx) else self.scoreboard
        self.looks.validate(self, batch, metrics)

    def on_validation_epoch_end(self) -> None:
        # Metrics are reduced over processes already, and the same on each; without sync_dist Lightning would warn of each.
        self.log_dict({f"val/{name}": value for name, value in self.looks.end_validation(self).items()}, sync_dist=True)

    # A list of records, which Lightning hands on to callbacks as it is.
    def test_step(self, batch: EditBatch, batch_idx: int) -> list[dict[str, Any]]:  # type: ignore[override]
        """Scores a batch and asks the edited model; returns one record a task for the report."""
        metrics = None if repeated(self.trainer.test_dataloaders, batch_idx) else self.scoreboard
        return self.looks.measure(self, self._encoder(), batch, metrics)

    def on_test_epoch_end(self) -> None:
        self.results = self.looks.end_test(self)
        self.log_dict({f"test/{name}": value for name, value in self.results.items()}, sync_dist=True)

    def predict_step(self, batch: EditBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record a task: the question, the target, and the answers before and after the edit."""
        records = predict_batch(self.base_model, self.editor, self._encoder(), batch, self.base_kind == "classifier")
        return [] if repeated(self.trainer.predict_dataloaders, batch_idx) else records

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig | None:
        # Lightning cannot clip before a fused step when it mixes precisions.
        fused = not isinstance(self.trainer.precision_plugin, MixedPrecision)
        return adam(self.editor, self.lr, self.edit_rate_lr, fused, self._lr_factor)

    def _lr_factor(self, step: int) -> float:
        return lr_factor(step, self.trainer.estimated_stepping_batches, self.warmup_steps, self.decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # What is not finite must not be saved.
        self.check_last_step()
        keep_editor_only(checkpoint, self.editor)
        checkpoint["validations"] = self.looks.validations.saved()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(checkpoint, self.editor)
        self._trained = True
        # Checkpoints of earlier versions have neither.
        self._random_states = checkpoint.get("random_states")
        self.looks.validations = Validations.of(checkpoint.get("validations"))

    def on_train_start(self) -> None:
        """Goes on with a resumed run's random numbers; what was drawn until here (a new editor's start) is not part of it."""
        self.looks.begin_training(self)
        if self._random_states is not None:
            set_own_random_states(self._random_states, self.global_rank)
            self._random_states = None
