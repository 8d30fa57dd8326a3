"""MendModule under a real Trainer: it learns, touches nothing but the editor, and says what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace

import lightning as L
import pytest
import torch
from helpers.bases import REMARKS, assert_same_state, first_batches, given, state_copy
from helpers.models import KINDS, relative_error
from helpers.training import MOMENTS
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from mend_lightning.editors import FineTuning, MendEditor
from mend_lightning.errors import (
    CheckpointingError,
    ConfigError,
    EmptyEditError,
    InferenceModeError,
    MendError,
    NoEffectWarning,
    NonFiniteError,
)
from mend_lightning.models.base import BaseModel
from mend_lightning.training.checks import check_single_process
from mend_lightning.training.run_callbacks import SaveEditor, StartReport, gathered
from mend_lightning.training.step import edit_step

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)


class Watch(L.Callback):
    """Notes what each step saw: the losses, the gradients before clipping, and their norm after it."""

    def __init__(self) -> None:
        self.losses, self.gradients, self.norms = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in module.editor.named_parameters()})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))
        self.norms.append(norm([p.grad for p in module.editor.parameters()]))


def norm(gradients) -> float:
    return float(nn.utils.get_total_norm(list(gradients)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_it_learns_and_touches_the_editor_alone(family, mend, edit_data, trainer):
    module, watch = mend(family), Watch()
    batch = first_batches(module, edit_data(KINDS[family]), 1)[0]
    base, start = state_copy(module.base_model), state_copy(module.editor)
    trainer(max_steps=30, callbacks=[watch]).fit(module, given([batch] * 30))
    assert sum(watch.losses[-3:]) < 0.8 * sum(watch.losses[:3]), watch.losses
    assert_same_state(state_copy(module.base_model), base)
    assert not any(p.requires_grad or p.grad is not None for p in module.base_model.parameters())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.base_model.modules())
    unmoved = [name for name, value in module.editor.state_dict().items() if torch.equal(value, start[name])]
    assert not unmoved


def test_a_module_that_was_configured_by_hand_learns_the_prompt_format_of_its_data(mend, edit_data, trainer):
    module, data = mend("llama"), edit_data()
    module.configure_model()
    assert module.editor.prompt_format == {} and module.editor.encoder is None
    trainer(max_steps=1).fit(module, data)
    assert module.editor.prompt_format == vars(data.format) and module.editor.encoder.format == data.format


def test_one_adam_with_two_groups(mend, edit_data, trainer):
    module = mend("llama", lr=1e-3, edit_rate_lr=1e-4)
    batch = first_batches(module, edit_data(), 1)[0]
    run = trainer(max_steps=1)
    run.fit(module, given([batch]))
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, torch.optim.Adam)
    assert {group["name"]: group["initial_lr"] for group in optimizer.param_groups} == {
        "transforms": 1e-3,
        "edit_rates": 1e-4,
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.editor.parameters()))


def test_warmup_and_decay(mend, edit_data, trainer):
    module = mend("llama", lr=1.0, warmup_steps=3, decay="linear")
    batch = first_batches(module, edit_data(), 1)[0]
    run = trainer(max_steps=8)
    run.fit_loop.max_epochs = 1
    rates = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    run.callbacks.append(Rates())
    run.fit(module, given([batch] * 8))
    assert rates == pytest.approx([min(1, (step + 1) / 4) * (1 - step / 8) for step in range(8)])


def test_what_is_logged(mend, edit_data, trainer):
    module = mend("llama")
    batch = first_batches(module, edit_data(), 1)[0]
    run = trainer(max_steps=1)
    run.fit(module, given([batch]))
    names = {"edit", "locality", "loss", "skipped_tokens", "grad_norm", "edit_rate_min", "edit_rate_max"}
    assert {f"train/{name}" for name in names} <= run.logged_metrics.keys()
    assert {"train/edit", "train/locality", "train/grad_norm"} <= run.progress_bar_metrics.keys()
    assert run.logged_metrics["train/loss"] == pytest.approx(
        run.logged_metrics["train/edit"] + run.logged_metrics["train/locality"]
    )


def test_accumulation_is_the_mean_of_the_gradients(mend, edit_data, trainer):
    module, other, watch = mend("llama"), mend("llama"), Watch()
    batches = first_batches(module, edit_data(), 2)
    other.configure_model()
    other.editor.load_state_dict(module.editor.state_dict())
    trainer(max_steps=1, accumulate_grad_batches=2, callbacks=[watch]).fit(module, given(batches))
    for batch in batches:
        (edit_step(other.base_model, other.editor, batch).total(1.0) / 2).backward()
    assert len(watch.gradients) == 1
    for name, parameter in other.editor.named_parameters():
        assert relative_error(watch.gradients[0][name], parameter.grad) < MOMENTS, name


def test_clipping(mend, edit_data, trainer):
    module, watch = mend("llama"), Watch()
    batch = first_batches(module, edit_data(), 1)[0]
    run = trainer(max_steps=2, gradient_clip_val=1e-3, callbacks=[watch])
    run.fit(module, given([batch] * 2))
    before = [norm(gradients.values()) for gradients in watch.gradients]
    assert min(before) > 1e-2
    assert watch.norms == pytest.approx([1e-3] * 2, rel=1e-2)
    assert run.logged_metrics["train/grad_norm"] == pytest.approx(before[-1]), "the norm before clipping is shown"


def test_early_stopping_and_the_best_checkpoint(mend, edit_data, trainer, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="val/loss")
    stop = EarlyStopping("val/loss", patience=2)
    settings = {"val_check_interval": 1, "check_val_every_n_epoch": None, "enable_checkpointing": True}
    # Nothing is learned, so the first validation stays the best.
    run = trainer(max_steps=9, callbacks=[keep, stop], **settings)
    run.fit(mend("llama", lr=0.0, edit_rate_lr=0.0, normalize=False), edit_data())
    assert run.global_step == 3
    assert stop.stopped_epoch >= 0
    assert torch.load(keep.best_model_path, weights_only=True)["global_step"] == 1
    assert float(keep.best_model_score) == float(run.callback_metrics["val/loss"])


def test_the_kept_editor_is_saved_and_not_the_last(mend, edit_data, trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2)
    run = trainer(max_steps=3, callbacks=[keep, SaveEditor()], enable_checkpointing=True)
    run.fit(mend("llama"), edit_data())
    kept = torch.load(keep.best_model_path, weights_only=True)
    assert (kept["global_step"], run.global_step) == (2, 3)
    saved = MendEditor.from_pretrained(tmp_path / "editor").state_dict()
    assert_same_state({f"editor.{name}": value for name, value in saved.items()}, kept["state_dict"])


def test_an_ended_run_without_a_checkpoint_saves_the_editor_as_it_is(mend, edit_data, trainer, tmp_path):
    class Ended(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            raise SIGTERMException

    module = mend("llama")
    with pytest.raises(SIGTERMException):
        trainer(max_steps=3, callbacks=[SaveEditor(), Ended()]).fit(module, edit_data())
    assert_same_state(MendEditor.from_pretrained(tmp_path / "editor").state_dict(), module.editor.state_dict())


def test_a_run_that_diverged_is_stopped(mend, edit_data, trainer):
    run = trainer(max_steps=8, val_check_interval=1, check_val_every_n_epoch=None)
    with pytest.raises(NonFiniteError, match="not finite"):
        run.fit(mend("llama", lr=1e4, edit_rate_lr=1e4), edit_data())


def test_an_untrained_editor_is_not_measured(mend, edit_data, trainer):
    with pytest.raises(ConfigError, match="test needs a trained editor. Give --model.editor RUN/editor"):
        trainer().test(mend("llama"), edit_data())


def test_an_editor_without_training_on_several_processes():
    editor = FineTuning({"fc": (2, 2)})
    check_single_process(editor, 1)
    with pytest.raises(
        ConfigError, match="FineTuning needs no training, and fit on 2 processes cannot run without. Use"
    ):
        check_single_process(editor, 2)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_inference_mode(stage, mend, edit_data, trainer):
    module = mend("llama")
    with pytest.raises(InferenceModeError, match=r"Use Trainer\(inference_mode=False\)"):
        getattr(trainer(max_steps=1, inference_mode=True), stage)(module, datamodule=edit_data())
    assert module.base_model is None, "before gigabytes load"


@dataclass(frozen=True)
class CheckpointedBase(BaseModel):
    """A base with activation checkpointing."""

    reentrant: bool = True

    def load(self):
        model, tokenizer = super().load()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": self.reentrant})
        return model, tokenizer


# Its new name is not in every transformers 5.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated.*")
def test_activation_checkpointing(mend, edit_data, trainer):
    module = mend("llama")
    module.base = CheckpointedBase(module.base.name, "float32")
    with pytest.raises(CheckpointingError, match="use_reentrant': False"):
        trainer(max_steps=1).fit(module, edit_data())
    module = mend("llama")
    module.base = CheckpointedBase(module.base.name, "float32", reentrant=False)
    trainer(max_steps=1).fit(module, edit_data())


def test_bf16_mixed_learns(mend, edit_data, trainer):
    module, watch = mend("llama"), Watch()
    batch = first_batches(module, edit_data(), 1)[0]
    trainer(max_steps=15, precision="bf16-mixed", callbacks=[watch]).fit(module, given([batch] * 15))
    assert watch.losses[-1] < 0.9 * watch.losses[0]
    assert all(value.dtype != torch.bfloat16 for value in module.editor.state_dict().values())


def test_nan_names_the_prompt(mend, edit_data, trainer):
    module = mend("llama")
    batch = first_batches(module, edit_data(), 1)[0]
    with torch.no_grad():
        module.base_model.get_output_embeddings().weight[7] = float("nan")
    text = batch.texts[0]
    with pytest.raises(NonFiniteError) as error:
        trainer(max_steps=1).fit(module, given([batch]))
    assert f"in step 0 for task 0 ({text.prompt!r} -> {text.target!r}); task 1 (" in str(error.value)


def padded_left(batch):
    inputs = {name: value.flip(1) for name, value in batch.x_in.inputs.items()}
    return replace(batch, x_in=replace(batch.x_in, inputs=inputs))


def without_a_label(batch):
    labels = batch.x_out.labels.clone()
    labels[3] = -100
    return replace(batch, x_out=replace(batch.x_out, labels=labels))


def with_another_target(batch):
    return replace(batch, texts=(replace(batch.texts[0], target="Atlantis"), *batch.texts[1:]))


@pytest.mark.parametrize(
    "change, error, text",
    [
        (padded_left, ConfigError, "x_in is padded on the left.*must be padded on the right"),
        (without_a_label, EmptyEditError, "Row 3 of x_out has no label token.*raise max_length"),
        (with_another_target, MendError, "which does not hold the target 'Atlantis'"),
        (lambda batch: batch.z_edit, ConfigError, r"batches of type EditBatch \(EditDataModule\), got Rows"),
    ],
)
def test_first_batch_is_checked(change, error, text, mend, edit_data, trainer):
    module = mend("llama")
    batch = change(first_batches(module, edit_data(), 1)[0])
    with pytest.raises(error, match=text):
        trainer(max_steps=1, callbacks=[StartReport()]).fit(module, given([batch]))


def test_unreached_parameters_are_an_error(mend, edit_data, trainer):
    module = mend("llama", normalize=False)
    batch = first_batches(module, edit_data(), 1)[0]
    module.editor.stranger = nn.Parameter(torch.zeros(1))
    with pytest.raises(MendError, match="1 editor parameter.* get no gradient from the first batch, .*'stranger'"):
        trainer(max_steps=1, callbacks=[StartReport()]).fit(module, given([batch]))


def test_the_start_report_says_what_is_trained_and_leaves_no_trace(mend, edit_data, trainer, capsys):
    module, plain = mend("llama"), mend("llama")
    batch = first_batches(module, edit_data(), 1)[0]
    plain.configure_model()
    plain.editor.load_state_dict(module.editor.state_dict())
    trainer(max_steps=1, callbacks=[StartReport()]).fit(module, given([batch]))
    trainer(max_steps=1).fit(plain, given([batch]))
    assert_same_state(module.editor.state_dict(), plain.editor.state_dict())
    shown = capsys.readouterr().out
    parameters = sum(p.numel() for p in module.editor.parameters())
    assert f"Editor: MendEditor, {parameters:,} parameters" in shown
    assert shown.count("edits model.layers.") == 9
    assert f"First edit: {batch.texts[0].prompt!r} -> ' {batch.texts[0].target}\\n'" in shown
    assert "Memory: base" in shown


@pytest.mark.filterwarnings("ignore:.*configure_optimizers.*returned.*None.*")
def test_the_trainer_is_left_as_it_was_where_nothing_is_trained(mend, edit_data, trainer):
    module, run = mend("llama", algorithm=FineTuning), trainer(max_steps=4)
    before = run.fit_loop.max_epochs
    run.fit(module, edit_data())
    assert (run.global_step, run.fit_loop.max_epochs) == (0, before)


@pytest.mark.parametrize("edits_at_once", [1, 2])
def test_records_of_all_processes_are_put_in_the_order_of_the_data(edits_at_once, monkeypatch):
    """Process r of two has the tasks r, r + 2, …; five tasks in all."""
    tasks = [[f"{task}.{edit}" for edit in range(edits_at_once)] for task in range(5)]
    parts = [[record for task in tasks[rank::2] for record in task] for rank in range(2)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda out, _: out.__setitem__(slice(None), parts))
    assert gathered(parts[0], edits_at_once) == [record for task in tasks for record in task]


def test_compile_blocks_of_earlier_configurations(mend):
    with pytest.warns(NoEffectWarning, match="compile_blocks has no effect"):
        module = mend("llama", compile_blocks=True)
    module.configure_model()
    assert all(part._compiled_call_impl is None and "forward" not in vars(part) for part in module.base_model.modules())


@pytest.mark.parametrize("algorithm", [None, FineTuning])
def test_a_setting_that_is_not_there_is_refused_with_any_editor(mend, algorithm):
    with pytest.raises(TypeError, match="rankk"):
        mend("llama", algorithm=algorithm, rankk=4)
