"""Numbers that are not finite on a device that answers late: the run ends a step later, and nothing of that step is saved."""

from __future__ import annotations

import pytest
import torch
from helpers.bases import REMARKS, first_batches, given
from helpers.models import make_batch, tiny_model
from lightning.pytorch.callbacks import ModelCheckpoint

from mend_lightning.editors import MendEditor
from mend_lightning.errors import NonFiniteError
from mend_lightning.models.forward import device
from mend_lightning.training.finite import FiniteChecks
from mend_lightning.training.run_callbacks import SaveEditor
from mend_lightning.training.step import edit_step

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)


@pytest.fixture
def late(monkeypatch):
    """The CPU as a device whose answers must be waited for."""
    monkeypatch.setattr(device, "SYNCHRONOUS_DEVICES", frozenset())


def test_flags_are_told_in_order_and_once(late):
    checks, told = FiniteChecks(), []
    checks.add(torch.tensor([True]), lambda flags: told.append(flags.tolist()))
    checks.add(torch.tensor([False, True]), lambda flags: told.append(flags.tolist()))
    assert told == []
    checks.flush()
    checks.flush()
    assert told == [[True], [False, True]]


def spoilt_after(module, steps: int) -> None:
    """The base's head becomes NaN behind so many training steps."""
    original, done = module.training_step, []

    def training_step(batch, batch_idx):
        if len(done) == steps:
            with torch.no_grad():
                module.base_model.get_output_embeddings().weight[7] = float("nan")
        done.append(batch_idx)
        return original(batch, batch_idx)

    module.training_step = training_step


@pytest.mark.parametrize("steps", [2, 4])
def test_a_loss(steps, late, mend, edit_data, trainer, tmp_path):
    """In the midst of an epoch, and in its last step: what is saved is from before."""
    module, keep = mend("llama"), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    batch = first_batches(module, edit_data(), 1)[0]
    spoilt_after(module, 1)
    callbacks = [keep, SaveEditor()]
    with pytest.raises(NonFiniteError) as error:
        trainer(max_steps=steps, callbacks=callbacks, enable_checkpointing=True).fit(module, given([batch] * steps))
    text = batch.texts[0]
    assert f"loss is not finite in step 1 for task 0 ({text.prompt!r} -> {text.target!r}); task 1 (" in str(error.value)
    saved = [torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")]
    assert [checkpoint["global_step"] for checkpoint in saved] == [1]
    assert all(bool(value.isfinite().all()) for value in saved[0]["state_dict"].values())
    assert not (tmp_path / "editor").exists()


def test_a_loss_of_the_last_step(late, mend, edit_data, trainer, tmp_path):
    module = mend("llama")
    batch = first_batches(module, edit_data(), 1)[0]
    spoilt_after(module, 0)
    with pytest.raises(NonFiniteError, match="not finite in step 0"):
        trainer(max_steps=1, callbacks=[SaveEditor()]).fit(module, given([batch]))
    assert not (tmp_path / "editor").exists()


def test_a_gradient(late, mend, edit_data, trainer):
    module = mend("llama", rank=4)
    batch = first_batches(module, edit_data(), 1)[0]
    module.editor.edit_rates.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match="gradient is not finite in step 0; the last checkpoint is from before"):
        trainer(max_steps=3, gradient_clip_val=1.0).fit(module, given([batch] * 3))


def test_the_next_fit_starts_anew(late, mend, edit_data, trainer):
    module = mend("llama")
    batch = first_batches(module, edit_data(), 1)[0]
    module._finite.add(torch.tensor(False), lambda flags: pytest.fail("of another fit"))
    trainer(max_steps=1).fit(module, given([batch]))


def test_what_is_too_large_for_float16(late):
    """A step gets NaN where the CPU raises; an edit that is made without gradients raises anywhere."""
    model, batch = tiny_model("llama", torch.float16), make_batch("llama")
    editor = MendEditor.for_model(model, rank=4).train()
    name = next(iter(editor.layers))
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0] * 1e5,))
    assert edit_step(model, editor, batch).inner.isnan().all()
    with torch.no_grad(), pytest.raises(NonFiniteError, match="it is too large for float16"):
        editor.make_deltas(model, batch.z_edit)
