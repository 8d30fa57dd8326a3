"""An editor attached to the model of a host: the model is found, checked, and used in isolation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.host_model import HostModel
from mend_lightning.data.order import repeated
from mend_lightning.editors.editor import Editor, EditorFactory
from mend_lightning.editors.making import make_edit
from mend_lightning.edits.edit import Edit
from mend_lightning.errors import ConfigError, NoEffectWarning
from mend_lightning.evaluation.evaluate import evaluate_batch, hard_rows
from mend_lightning.evaluation.metric_collection import Scoreboard
from mend_lightning.models.layers import layer_shape, select_layers
from mend_lightning.models.sharding.collectives import is_sharded
from mend_lightning.training.calibration import calibrate
from mend_lightning.training.editor_checkpoint import check_checkpoint
from mend_lightning.training.mend_callback.find_model import check_forward, find_model
from mend_lightning.training.mend_callback.host_checks import check_forward_pass, check_sharded
from mend_lightning.training.mend_callback.isolation import isolated


class HostAttachment:
    """The host's model and our editor of it.

    Args:
        path: of the model in its LightningModule.
        edits: the facts; None: only saved edits or a saved editor are used.
        algorithm: what builds a new editor.
        folder: of a saved editor to start from.
        layers, last_blocks: what a new editor edits.
        seed: of its values and random numbers.

    Attributes:
        model: the host's, once it is found; editor: ours, once it is built.
        ready: whether the editor has learned something (or has nothing to learn).
    """

    def __init__(
        self,
        path: str,
        edits: EditDataModule | None,
        algorithm: EditorFactory,
        folder: str | Path | None,
        layers: list[str] | None,
        last_blocks: int | None,
        seed: int,
    ) -> None:
        self.path, self.edits, self.seed = path, edits, seed
        self._algorithm, self._folder, self._layers, self._last_blocks = algorithm, folder, layers, last_blocks
        self.model: nn.Module | None = None
        self.editor: Editor | None = None
        self.ready = False
        self._tokenizer: Any = None
        self._autocast: torch.dtype | None = None
        self._pending: dict[str, Any] | None = None

    def found_model(self) -> nn.Module:
        """The host's model.

        Raises:
            ConfigError: it was not looked for yet.
        """
        if self.model is None:
            raise ConfigError("The host's model is not there yet: the callback finds it when the Trainer starts.")
        return self.model

    def built_editor(self) -> Editor:
        """Our editor.

        Raises:
            ConfigError: there is none yet.
        """
        if self.editor is None:
            raise ConfigError("There is no editor yet: the callback builds it when the Trainer starts.")
        return self.editor

    def given_edits(self) -> EditDataModule:
        """The facts.

        Raises:
            ConfigError: none were given.
        """
        if self.edits is None:
            raise ConfigError("There are no facts to train or measure with. Give edits=EditDataModule(...).")
        return self.edits

    @property
    def device(self) -> torch.device:
        return next(self.found_model().parameters()).device

    def isolated(self, step: int = 0) -> AbstractContextManager[None]:
        """The model for use in editing, with the random numbers of this step."""
        return isolated(self.found_model(), self.seed + step, self._autocast)

    def attach(
        self,
        host: nn.Module,
        rank: int = 0,
        world_size: int = 1,
        autocast: torch.dtype | None = None,
        check: bool = True,
        editing: bool = False,
    ) -> bool:
        """Finds the model, and brings the editor to where it is: as it was, as a checkpoint has it, or a new one.

        Args:
            host: the LightningModule.
            rank, world_size: this process among all.
            autocast: see `isolation.isolated`.
            check: whether the model is run once, to see that it takes edits.
            editing: whether there is use for an editor even without facts or a saved one.

        Returns:
            Whether the model has its weights; on the meta device nothing is checked or built yet.
        """
        self.model = find_model(host, self.path)
        self._tokenizer, self._autocast = getattr(host, "tokenizer", None), autocast
        if self.edits is not None:
            self.edits.attach(HostModel(self.model, self._tokenizer, rank, world_size, is_sharded(self.model)))
        if self.device.type == "meta":
            return False
        with self.isolated():
            if check and self.edits is not None:
                self._check(host)
            if editing or self.edits is not None or self._folder is not None:
                self._take_editor()
        return True

    def _check(self, host: nn.Module) -> None:
        model, edits = self.found_model(), self.given_edits()
        encoder = edits.encoder
        check_forward(model, encoder.kind, self.path, host)
        task = edits.sampler("train").task(0, 0)
        if encoder.kind == "classifier":
            # Also a model without any head looks like one, and then the target is none of its classes.
            ids = torch.tensor([encoder.asking(task.format).prompt_ids(task.prompt)])
            inputs: Mapping[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            inputs = encoder.rows([(task.prompt, task.target)], [0], 1, [task.format]).inputs
        check_forward_pass(model, {name: value.to(self.device) for name, value in inputs.items()}, self.path)

    def _take_editor(self) -> None:
        model = self.found_model()
        editor = self.editor = self._build(model) if self.editor is None else self.editor
        editor.eval().modules_in(model)
        if is_sharded(model):
            check_sharded(editor)
        if self._pending is not None:
            load_editor_state(editor, self._pending)
            self.ready, self._pending = self._pending["ready"], None
        editor.to(self.device)
        editor.encoder = self.edits.encoder if self.edits is not None else None

    def _build(self, model: nn.Module) -> Editor:
        if self._folder is not None:
            self.ready = True
            return Editor.from_pretrained(self._folder)
        chosen = select_layers(model, self._layers, self._last_blocks)
        editor = self._algorithm({name: layer_shape(layer) for name, layer in chosen.items()})
        self.ready = not editor.trainable
        return editor

    def calibrate(self, batches: int) -> None:
        """Estimates the editor's preconditioning from so many batches of training edits; the model must be isolated."""
        given = (batch.to(self.device) for batch in islice(self.given_edits().train_dataloader(), batches))
        calibrate(self.found_model(), self.built_editor(), given)

    def measure(self, split: str) -> dict[str, float]:
        """name -> value of every metric, on the "validation" or the "test" facts.

        Warns:
            NoEffectWarning: the editor has learned nothing yet, and nothing is measured.
        """
        if not self.ready:
            warnings.warn(
                "Nothing is measured: the editor has taken no step yet. In validate and test give ckpt_path= of a training that "
                "had this callback, or editor=FOLDER.",
                NoEffectWarning,
                stacklevel=3,
            )
            return {}
        edits = self.given_edits()
        loader = edits.val_dataloader() if split == "validation" else edits.test_dataloader()
        with self.isolated():
            return measure_editor(self.found_model(), self.built_editor(), loader)

    def edit(self, facts: Sequence[tuple[str, str]]) -> Edit:
        """One `Edit` of (prompt, target) pairs, made for the model's weights as they are now.

        Raises:
            ConfigError: there is no trained editor, or no tokenizer.
        """
        if self.model is None or self.editor is None or not self.ready:
            raise ConfigError(
                "There is no trained editor to make edits with. Train one (fit with edits=EditDataModule(...)), give "
                "editor=FOLDER, or run with ckpt_path= of a training that had this callback."
            )
        with self.isolated():
            self.bind()
            return make_edit(self.editor, self.model, self._find_tokenizer(), facts)

    def _find_tokenizer(self) -> Any:
        tokenizer = self.edits.encoder.tokenizer if self.edits is not None else self._tokenizer
        if tokenizer is None:
            raise ConfigError(
                "There is no tokenizer to make an edit with. Give edits=EditDataModule(..., tokenizer=...), or let the "
                "LightningModule have one as its attribute `tokenizer`."
            )
        return tokenizer

    def bind(self) -> None:
        """Notes the model's weights as they are now as what the editor is for."""
        model, editor = self.found_model(), self.built_editor()
        config = getattr(model, "config", None)
        name = getattr(config, "_name_or_path", "") or type(model).__name__
        editor.eval().to(self.device)
        editor.bind(model, name, asdict(self.edits.format) if self.edits is not None else None)

    def state_dict(self) -> dict[str, Any]:
        """The editor, as tensors and builtins."""
        return {**editor_state(self.built_editor()), "ready": self.ready}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps a state for the next `attach`: the model may not be there yet."""
        self._pending = state


def editor_state(editor: Editor) -> dict[str, Any]:
    """The editor's tensors, copied to the CPU, and what it is."""
    tensors = {name: value.detach().cpu().clone() for name, value in editor.state_dict().items()}
    return {"tensors": tensors, "description": editor.description()}


def load_editor_state(editor: Editor, state: dict[str, Any]) -> None:
    """Loads what `editor_state` gave into an editor of the same class, layers and settings.

    Raises:
        BaseModelMismatchError: it has others.
        StateDictError: a tensor is missing.
    """
    # The base's weights have moved since, so that its fingerprint says nothing.
    about = {**state["description"], "base_fingerprint": editor.base_fingerprint}
    tensors = {f"editor.{name}": value for name, value in state["tensors"].items()}
    check_checkpoint({"mend_lightning": about, "state_dict": tensors}, editor)
    editor.load_state_dict(state["tensors"])


@torch.no_grad()
def measure_editor(model: nn.Module, editor: Editor, batches: Iterable[EditBatch]) -> dict[str, float]:
    """name -> value of every metric of `Scoreboard`, over the batches of all processes.

    Args:
        model: the host's, isolated (`isolation.isolated`).
        editor: in eval mode.
        batches: a loader of evaluation tasks.
    """
    device = next(model.parameters()).device
    scoreboard = Scoreboard().to(device)
    for index, batch in enumerate(batches):
        batch = batch.to(device)
        scores = evaluate_batch(model, editor, batch)
        if not repeated(batches, index):
            scoreboard.update(scores, hard_rows(batch))
    return scoreboard.compute()
