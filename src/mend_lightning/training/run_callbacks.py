"""Callbacks of a run from the command line: report at the start, editor, picture and results at the end."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mend_lightning.data.batch import EditBatch
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.editors.saving import DESCRIPTION, WEIGHTS, save_editor
from mend_lightning.errors import ConfigError, MendError
from mend_lightning.evaluation.cost import EditCost, measure_cost
from mend_lightning.evaluation.report import results_table, write_results
from mend_lightning.files import check_writable, output_file, write_jsonl
from mend_lightning.models.inputs.rows import IGNORED_LABEL
from mend_lightning.models.layers import layer_shape
from mend_lightning.models.quantisation import quantizing_library, stored_bytes
from mend_lightning.models.sharding.collectives import is_sharded, own_class, whole_state
from mend_lightning.models.sharding.fsdp import load_whole_state
from mend_lightning.training.checks import check_batch, unreached_parameters
from mend_lightning.training.curves import plot_curves
from mend_lightning.training.distributed.checkpoint_file import editor_state
from mend_lightning.training.format_report import PICTURE, report_formats
from mend_lightning.training.module import MendModule
from mend_lightning.training.progress.console import console
from mend_lightning.training.trainer_parts import data_of, is_fast_dev_run
from mend_lightning.training.validations import validation_of

logger = logging.getLogger(__name__)

# What each stage leaves in the run's folder.
_OUTPUTS = {
    "fit": (f"editor/{WEIGHTS}", f"editor/{DESCRIPTION}", "curves.png"),
    "test": ("results.json", "examples.jsonl", PICTURE),
    "predict": ("predictions.jsonl",),
}
# Edits whose cost is measured, each alone.
COST_EDITS = 8


class StartReport(L.Callback):
    """Says at the start of `fit` what will be trained, and checks that it can be.

    On the first batch: no label is fully masked, labels decode to the target text (shown), and gradients
    reach every editor parameter.
    """

    _said = False

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        for keep in trainer.checkpoint_callbacks:
            if stage == "fit" and isinstance(keep, ModelCheckpoint) and keep.dirpath:
                check_writable(keep.dirpath)
                output_file(Path(keep.dirpath, f"{keep.CHECKPOINT_NAME_LAST}{keep.FILE_EXTENSION}"))
        for name in _OUTPUTS.get(stage, ()):
            output_file(Path(trainer.default_root_dir, name))

    def on_sanity_check_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Where `fit` validates before its first step, what will be trained is said before that."""
        self._say(trainer, module)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._say(trainer, module)
        self._said = False
        if trainer.is_global_zero and trainer.ckpt_path:
            console().print(f"Resuming from {trainer.ckpt_path}, after step {trainer.global_step}", highlight=False)

    def _say(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and not self._said:
            for line in self.lines(_mend_module(module)):
                console().print(line, highlight=False)
        self._said = True

    def lines(self, module: MendModule) -> list[str]:
        """What is edited, with how many parameters, and how much memory that needs."""
        editor, base = module.editor, module.base_model
        parameters = sum(p.numel() for p in editor.parameters())
        base_bytes = sum(map(stored_bytes, base.parameters()))
        shapes = {name: layer_shape(layer) for name, layer in editor.modules_in(base).items()}
        quantized = f", {module.base.quantize} by {quantizing_library()}" if module.base.quantize else ""
        lines = [f"Base model: {module.base.name}, {own_class(base).__name__}, {base.dtype}{quantized}"]
        lines += [f"  edits {name}  {d_in} -> {d_out}" for name, (d_in, d_out) in shapes.items()]
        # The editor's gradient and Adam's two moments are as large as the editor.
        return [
            *lines,
            f"Editor: {own_class(editor).__name__}, {parameters:,} parameters",
            "  " + ", ".join(f"{name} {value}" for name, value in editor.settings.items() if value is not None),
            f"Memory: base {base_bytes / 2**20:,.0f} MB + editor, gradient and Adam {16 * parameters / 2**20:,.0f} MB, "
            "and activations",
        ]

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if getattr(self, "_checked", False):
            return
        self._checked = True
        if not isinstance(batch, EditBatch):
            raise ConfigError(f"Training needs batches of type EditBatch (EditDataModule), got {type(batch).__name__}.")
        check_batch(batch)
        mend = _mend_module(module)
        self._show_labels(trainer, mend, batch)
        missing = unreached_parameters(mend.base_model, mend.editor, batch, mend.locality_positions)
        if missing:
            raise MendError(
                f"{len(missing)} editor parameter(s) get no gradient from the first batch, among them {missing[0]!r}. "
                "Do the chosen layers lie on the way to the loss?"
            )

    def _show_labels(self, trainer: L.Trainer, module: MendModule, batch: EditBatch) -> None:
        if not batch.texts or module.base_kind == "classifier":
            return
        text, tokenizer = batch.texts[0], module.tokenizer
        labels = batch.z_edit.labels[0]
        shown = tokenizer.decode(labels[labels != IGNORED_LABEL].tolist())
        # Some tokenizers change a text (case, blanks, unknown letters): compare with what they make of the target.
        wanted = tokenizer.decode(tokenizer(text.target, add_special_tokens=False)["input_ids"]).strip()
        if wanted not in shown:
            raise MendError(f"Labels decode to {shown!r}, which does not hold the target {text.target!r}.")
        if trainer.is_global_zero:
            console().print(f"First edit: {text.prompt!r} -> {shown!r}", highlight=False, markup=False)


class SaveEditor(L.Callback):
    """Writes the best checkpoint's editor to `<root>/editor` when training ends, and puts it into the module."""

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Ctrl-C and SIGTERM keep what was learned: the best checkpoint's editor, or the current one."""
        mend = _mend_module(module)
        ended = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        if not ended or trainer.state.fn != "fit" or mend.editor is None:
            return
        # By one process, with what it has: the others may be anywhere, and never answer.
        if not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        best = best_checkpoint(trainer)
        state = None if best is None else editor_state(best)
        if state is None:
            mend.check_last_step()
            state = None if is_sharded(mend.editor) else mend.editor.state_dict()
        if state is not None:
            self._save(trainer, mend, state)
        console().print("Interrupted. To resume: the same command with --ckpt_path last", highlight=False)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if is_fast_dev_run(trainer):
            return
        editor = _mend_module(module).editor
        # Read by one process, for the others may be on machines that do not have the folder; a test that follows in
        # this process must find the same editor on all of them.
        best = best_checkpoint(trainer) if trainer.is_global_zero else None
        found = None if best is None else (editor_state(best), validation_of(best))
        found = trainer.strategy.broadcast(found)
        if found is not None:
            state, _mend_module(module).looks.validations.kept = found
            load_whole_state(editor, state)
        else:
            state = whole_state(editor)
        if trainer.is_global_zero:
            self._save(trainer, _mend_module(module), state)

    def _save(self, trainer: L.Trainer, module: MendModule, state: dict[str, torch.Tensor]) -> None:
        folder = save_editor(module.editor.description(), state, Path(trainer.default_root_dir) / "editor")
        best = Path(getattr(trainer.checkpoint_callback, "best_model_path", "")).name
        source = f"best checkpoint, {best}" if best else "the last step; no checkpoint was kept"
        source = source if module.editor.trainable else f"{own_class(module.editor).__name__} needs no training"
        console().print(f"Editor saved to {folder} ({source})", highlight=False)


def best_checkpoint(trainer: L.Trainer) -> dict[str, Any] | None:
    """The best checkpoint that was kept, on the CPU; None if there is none."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    # Through the plugin: the file may still be on its way to the disk, and may be one of shards.
    return trainer.strategy.checkpoint_io.load_checkpoint(best, map_location="cpu") if best else None


class CurvePlot(L.Callback):
    """Draws the training and validation curves to `<root>/curves.png` when training ends."""

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        for run_logger in trainer.loggers:
            path = Path(run_logger.log_dir or "") / "metrics.csv"
            if path.is_file():
                target = plot_curves(path, Path(trainer.default_root_dir) / "curves.png")
                console().print(f"Curves drawn to {target}", highlight=False)
                return


class ResultsReport(L.Callback):
    """Collects `test`'s records, prints the results table, writes results.json and examples.jsonl.

    `predict`'s records go to predictions.jsonl.
    """

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._started = 0.0

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._records, self._started = [], time.perf_counter()

    def on_test_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self._records.extend(outputs)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        mend, data = _mend_module(module), data_of(trainer)
        records = gathered(self._records, data.edits_at_once)
        seconds = time.perf_counter() - self._started
        # On every process: where the base is sharded, an edit needs them all.
        cost, formats = _cost(data, mend), report_formats(data, mend)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        about = {
            "editor": own_class(mend.editor).__name__,
            "base": mend.base.name,
            "base_fingerprint": mend.editor.base_fingerprint,
            "test": str(data.files["test"]),
            "prompt_format": mend.editor.prompt_format,
            "seed": data.seed,
            "seconds": round(seconds, 1),
            "edits_at_a_time": data.edits_at_once,
            "cost_of_an_edit": asdict(cost),
            **formats.about(),
        }
        if data.edits_at_once == 1:
            formats.note(records)
        results = write_results(folder, mend.results, records, about)
        many = about["edits_at_a_time"]
        together = "one at a time" if many == 1 else f"{many} at once"
        title = f"{len(records)} edits of {mend.base.name}, {together}, on {about['test']} ({seconds:.0f} s)"
        console().print(results_table(title, mend.results, results["intervals_95"]))
        console().print(_cost_line(results["cost_of_an_edit"]), highlight=False)
        formats.show(folder)
        console().print(f"Written: {folder / 'results.json'}, {folder / 'examples.jsonl'}", highlight=False)

    def on_predict_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self._records.extend(outputs)

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        records = gathered(self._records, data_of(trainer).edits_at_once)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "predictions.jsonl"
            write_jsonl(path, records)
            console().print(f"Written: {path}", highlight=False)


def _mend_module(module: L.LightningModule) -> MendModule:
    """The module of a run: these callbacks are for no other."""
    mend: Any = module
    return mend


def _cost(data: EditDataModule, module: MendModule) -> EditCost:
    """Of the first edits of the test set, each made alone."""
    tasks = [data.sampler("test").task(0, index) for index in range(min(COST_EDITS, len(data.sampler("test"))))]
    pairs = [([(task.prompt, task.target)], [0], 1, [task.format]) for task in tasks]
    rows = [data.encoder.rows(*pair).to(module.device) for pair in pairs]
    return measure_cost(module.base_model, module.editor, rows)


def _cost_line(cost: dict[str, Any]) -> str:
    memory = (
        "" if cost["megabytes"] is None else f", {cost['megabytes']:.0f} MB of memory beyond the model and the editor"
    )
    return f"Making one edit takes {cost['seconds']:.3g} s (median of {cost['edits']}){memory}."


def gathered(records: list[Any], edits_at_once: int = 1) -> list[Any]:
    """The records of all processes, in the order of the data (processes take tasks in turn)."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return records
    parts: list[list[Any]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, records)
    tasks = [[part[i : i + edits_at_once] for i in range(0, len(part), edits_at_once)] for part in parts]
    in_turn = (part[i] for i in range(max(map(len, tasks))) for part in tasks if i < len(part))
    return [record for task in in_turn for record in task]
