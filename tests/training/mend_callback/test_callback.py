"""MendCallback in somebody else's training: it learns, and the training is what it is without it, to the last bit."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from helpers.bases import REMARKS, assert_same_state, state_copy, tiny_base
from helpers.hosts import Host, ManualHost, callback_for, compare, host_loader, train_host, trainer_for
from helpers.models import ROUNDING, relative_error
from helpers.training import assert_same_training
from lightning.pytorch.callbacks import ModelCheckpoint

from mend_lightning.data.host_model import HostModel
from mend_lightning.editors import MendEditor
from mend_lightning.edits.edit import Edit
from mend_lightning.errors import BaseModelMismatchError, ConfigError, NoEffectWarning
from mend_lightning.evaluation.evaluate import evaluate_batch
from mend_lightning.training.mend_callback.callback import MendCallback
from mend_lightning.training.step import edit_step

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(
    *REMARKS,
    r"ignore:Be aware that when using `ckpt_path`, callbacks.*",
    "ignore:.*resuming from a checkpoint that ended.*",
    "ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning",
)


@pytest.mark.parametrize(
    ("host", "settings"),
    [
        (Host, {}),
        (Host, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (ManualHost, {}),
        (Host, {"precision": "bf16-mixed", "max_epochs": 1}),
    ],
    ids=["automatic", "accumulating", "manual", "bf16-mixed"],
)
def test_the_host_does_not_notice(host, settings, facts):
    callback = callback_for(facts)
    alone = train_host(facts, [], host, **settings)
    attached = train_host(facts, [callback], host, **settings)
    compare(alone, attached)
    steps = len({state[1] for state in alone["states"]} - {0})
    assert callback._kept["training"]["steps"] == steps // 2 > 0
    logged = {name for row in attached["trainer"].logger.rows for name in row if name.startswith("mend/")}
    assert {"mend/edit_loss", "mend/locality_loss", "mend/time_share", "mend/edit_success", "mend/drawdown"} <= logged


def fit(facts, callback, host=None, seed: int = 7, **settings):
    """Trains a host with the callback; gives both back with the Trainer."""
    L.seed_everything(seed, verbose=False)
    host = host or Host()
    callbacks, more = settings.pop("callbacks", []), settings.pop("fit", {})
    trainer = trainer_for([callback, *callbacks], **settings)
    trainer.fit(host, host_loader(host, facts), host_loader(host, facts, shuffle=False), **more)
    return host, trainer


@pytest.fixture(scope="module")
def trained(facts, tmp_path_factory):
    """A host trained for two epochs with the callback, and a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("trained")
    keep = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False)
    callback = callback_for(facts)
    host, trainer = fit(facts, callback, callbacks=[keep])
    return callback, host, folder


def test_after_fit_there_is_an_editor_of_the_final_weights(trained, tmp_path):
    callback, host, _ = trained
    assert isinstance(callback.editor, MendEditor) and callback.model is host.model
    assert callback.editor.prompt_format == vars(callback._attachment.edits.format) and not callback.editor.training
    training = {module: module.training for module in host.modules()}
    edit = callback.edit("In which country is Lyon?", "Peru")
    assert {module: module.training for module in host.modules()} == training
    assert edit.facts == [("In which country is Lyon?", "Peru")] and edit.about["probability"] > 0
    # What anybody would do with it.
    callback.editor.save_pretrained(tmp_path)
    host.model.eval()
    again = MendEditor.from_pretrained(tmp_path).edit(host.model, host.tokenizer, "In which country is Lyon?", "Peru")
    for name, delta in edit.deltas.items():
        assert relative_error(again.deltas[name].dense(), delta.dense()) < ROUNDING, name
    with edit.applied(host.model):
        pass
    host.model.train()


def test_a_step_is_the_step_of_the_method(facts):
    """The gradient by the editor, with plain Adam by hand, on a copy of the host's model as it was when the step came."""
    callback, seen = callback_for(facts, every_n_steps=3, decay="none"), []

    class Peek(L.Callback):
        def on_train_batch_end(self, trainer, module, *args) -> None:
            if trainer.global_step == 3:
                seen.append(copy.deepcopy(module.model).eval().requires_grad_(False))
                seen.append(copy.deepcopy(callback.editor))

    L.seed_everything(7, verbose=False)
    host = Host()
    # Before the callback, so that it sees what the callback will.
    trainer = trainer_for([Peek(), callback], max_steps=3, max_epochs=-1)
    trainer.fit(host, host_loader(host, facts))
    model, editor = seen
    edits = callback_for(facts)._attachment.edits
    edits.attach(HostModel(model, host.tokenizer))
    loss = edit_step(model, editor.train(), next(iter(edits.train_dataloader()))).total(0.3)
    loss.backward()
    torch.optim.Adam(editor.parameters(), lr=1e-2).step()
    assert_same_training(callback.editor.state_dict(), editor.state_dict(), rate=1e-2, steps=1)


def test_it_learns_while_the_model_moves(facts):
    callback = callback_for(facts, every_n_steps=1)
    _, trainer = fit(facts, callback, max_epochs=12, limit_val_batches=0)
    losses = [float(row["mend/edit_loss"]) for row in trainer.logger.rows if "mend/edit_loss" in row]
    assert sum(losses[-4:]) < 0.93 * sum(losses[:4]), losses


def test_a_resumed_run_is_as_if_nothing_had_been(facts, tmp_path):
    """In mid-epoch of host and edits. The host's model does not move: its own loader starts anew, in another order."""
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False)
    whole, again = callback_for(facts), callback_for(facts, edit_rate=1e-2)
    fit(facts, whole, Host("llama", lr=0.0), callbacks=[keep], max_epochs=3)
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["callbacks"]
    assert [key for key in state if key.startswith("MendCallback")] == [whole.state_key]
    fit(facts, again, Host("llama", lr=0.0), 3, max_epochs=3, fit={"ckpt_path": tmp_path / "step=5.ckpt"})
    assert_same_state(state_copy(again.editor), state_copy(whole.editor))
    assert again._kept["training"]["steps"] == whole._kept["training"]["steps"] == 6
    other = callback_for(facts, rank=4)
    with pytest.raises(BaseModelMismatchError, match="its settings is"):
        fit(facts, other, Host("llama", lr=0.0), max_epochs=3, fit={"ckpt_path": tmp_path / "step=5.ckpt"})


def test_fit_twice_trains_on(facts):
    callback = callback_for(facts)
    host, _ = fit(facts, callback, max_epochs=1)
    editor, before = callback.editor, state_copy(callback.editor)
    fit(facts, callback, host, max_epochs=1)
    assert callback.editor is editor and callback._kept["training"]["steps"] == 4
    assert not all(torch.equal(value, before[name]) for name, value in editor.state_dict().items())


def test_one_trainer_for_everything(facts):
    """Fit, fit on, and test with a patch that the editor makes then."""
    callback, host = callback_for(facts, patch=[("In which country is Osaka?", "Chile")]), Host()
    trainer, loader = trainer_for([callback], max_epochs=1), host_loader(host, facts, shuffle=False)
    trainer.fit(host, host_loader(host, facts), loader)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(host, host_loader(host, facts), loader)
    assert trainer.global_step == 8 and callback._kept["training"]["steps"] == 4
    before = trainer_for([]).test(host, loader, verbose=False)[0]["test_loss"]
    found = trainer.test(host, loader, verbose=False)[0]
    assert found["test_loss"] != before and "mend/edit_success" in found
    callback.editor.check_base(host.model)


def test_patch_in_every_stage_and_off_again(trained, facts, tmp_path):
    """Saved edits and facts, under the Trainer's inference mode; the loss is that of the edited model, and then the old one."""
    callback, host, _ = trained
    path = callback.edit("In which country is Lyon?", "Peru").save(tmp_path / "lyon.safetensors")
    fact = ("In which country is Osaka?", "Chile")
    patched = callback_for(facts, patch=[str(path), fact], measure=False)
    patched.load_state_dict(callback.state_dict())
    loader = host_loader(host, facts, shuffle=False)
    trainer, plain = trainer_for([patched]), trainer_for([])
    before = plain.test(host, loader, verbose=False)[0]["test_loss"]
    state = state_copy(host)
    made = callback._attachment.edit([fact])
    with Edit.load(path).applied(host.model), made.applied(host.model):
        wanted = plain.test(host, loader, verbose=False)[0]["test_loss"]
    assert wanted != before
    assert trainer.test(host, loader, verbose=False)[0]["test_loss"] == wanted
    assert trainer.validate(host, loader, verbose=False)[0]["val_loss"] == pytest.approx(wanted)
    assert float(trainer.predict(host, loader)[0]) != float(plain.predict(host, loader)[0])
    kept = {name: value for name, value in state_copy(host).items() if not name.endswith("calls")}
    assert_same_state(kept, {name: state[name] for name in kept})
    assert plain.test(host, loader, verbose=False)[0]["test_loss"] == before


@pytest.mark.parametrize("stage", ["fit", "test", "validate", "predict"])
def test_an_exception_in_the_host_leaves_nothing_behind(stage, trained, facts):
    class Breaks(Host):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("the host's own")
            return super().training_step(batch, batch_idx)

        def test_step(self, batch, batch_idx) -> None:
            raise RuntimeError("the host's own")

        validation_step = predict_step = test_step

    host = Breaks()
    callback = callback_for(facts, patch=[("In which country is Osaka?", "Chile")], measure=False)
    callback.load_state_dict(trained[0].state_dict())
    trainer = trainer_for([callback], num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="the host's own"):
        getattr(trainer, stage)(host, host_loader(host, facts, shuffle=False))
    assert not any(module._forward_hooks for module in host.modules())
    assert all(p.requires_grad for name, p in host.named_parameters() if "wpe" not in name)
    if stage == "fit":
        assert callback._kept["training"]["steps"] == 5
        callback.edit("In which country is Osaka?", "Chile")


def test_measured_at_test_and_at_validate(trained, facts):
    callback, host, folder = trained
    again = callback_for(facts)
    trainer = trainer_for([again])
    checkpoint = {"ckpt_path": folder / "step=8.ckpt", "weights_only": True}
    loader = host_loader(host, facts, shuffle=False)
    found = trainer.test(host, loader, **checkpoint, verbose=False)[0]
    assert 0 <= found["mend/edit_success"] <= 1 and "mend/drawdown" in found
    # With another seed of the loop: the same facts, and the module as MendModule measures it.
    with again._attachment.isolated():
        scores = [
            evaluate_batch(host.model, callback.editor, batch) for batch in again._attachment.edits.test_dataloader()
        ]
    right = torch.cat([torch.cat([each.edit.correct_after, each.rephrase.correct_after]) for each in scores])
    assert found["mend/edit_success"] == pytest.approx(float(right.float().mean()))
    assert "mend/edit_success" in trainer.validate(host, loader, **checkpoint, verbose=False)[0]


def test_every_n_epochs_and_without_a_validation_of_the_host(facts, tmp_path):
    callback, host = callback_for(facts, measure_every_n_epochs=2), Host()
    trainer = trainer_for([callback], max_epochs=4)
    trainer.fit(host, host_loader(host, facts), host_loader(host, facts, shuffle=False))
    assert [row["epoch"] for row in trainer.logger.rows if "mend/drawdown" in row] == [1, 3]
    best = ModelCheckpoint(tmp_path, "best", monitor="mend/locality_kl")
    alone = trainer_for([callback_for(facts), best], max_epochs=2)
    alone.fit(host, host_loader(host, facts))
    measured = {row["epoch"]: row["mend/locality_kl"] for row in alone.logger.rows if "mend/locality_kl" in row}
    assert list(measured) == [0, 1] and float(best.best_model_score) == min(measured.values())


def test_several_at_once(facts, tmp_path):
    """Two models in one host, each with its editor, one data module; one checkpoint holds both."""
    host = Host()
    host.teacher = torch.nn.ModuleList([tiny_base("llama", host.tokenizer)])
    edits = callback_for(facts)._attachment.edits
    pair = [
        callback_for(facts, edits=edits),
        callback_for(facts, model="teacher.0", edits=edits, prefix="teacher", every_n_steps=3),
    ]
    keep = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    trainer = trainer_for([*pair, keep], max_epochs=1)
    trainer.fit(host, host_loader(host, facts), host_loader(host, facts, shuffle=False))
    assert pair[0].editor.layers.keys() != pair[1].editor.layers.keys()
    assert {"mend/edit_success", "teacher/edit_success"} <= trainer.callback_metrics.keys()
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert {each.state_key for each in pair} <= saved.keys()
    with pytest.raises(ConfigError, match="log under the prefix 'mend'. Give each its own"):
        trainer_for([pair[0], callback_for(facts, model="teacher.0")]).fit(host, host_loader(host, facts))


def test_weight_averaging(facts):
    """The averaged weights are the model at the end, and what the editor is for; the average is that without the callback."""
    averages = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    weights = []
    for callbacks in ([], [callback_for(facts)]):
        L.seed_everything(7, verbose=False)
        host = Host()
        averaging = averages.WeightAveraging(avg_fn=lambda old, new, count: old + 0.5 * (new - old))
        trainer = trainer_for([*callbacks, averaging], max_epochs=2)
        trainer.fit(host, host_loader(host, facts), host_loader(host, facts, shuffle=False))
        weights.append(state_copy(host))
    assert_same_state(*weights)
    assert callbacks[0].editor.base_fingerprint
    callbacks[0].editor.check_base(host.model)


def test_a_gradient_that_is_not_finite_costs_a_step_and_not_the_run(facts):
    callback = callback_for(facts, every_n_steps=1)

    class Breaks(Host):
        def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
            pass

        def on_train_batch_start(self, batch, batch_idx) -> None:
            if batch_idx == 2:
                with torch.no_grad():
                    self.model.lm_head.weight.data[0, 0] = float("nan")

    with pytest.warns(NoEffectWarning, match="not finite in its step 3"):
        fit(facts, callback, Breaks(), max_epochs=1, limit_val_batches=0)
    assert all(bool(value.isfinite().all()) for value in callback.editor.state_dict().values())
    assert callback._kept["training"]["skipped"] == 2


def test_adapters_on_the_edited_layers(facts):
    """Of LoRA on the very layers that are edited: the adapters' part is in what the editor sees."""
    peft = pytest.importorskip("peft")
    host = Host("llama")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    host.model = peft.get_peft_model(host.model, config).train()
    callback = callback_for(facts)
    fit(facts, callback, host, max_epochs=1)
    layers = callback.editor.modules_in(callback.model)
    assert hasattr(layers["model.layers.3.mlp.down_proj"], "lora_A") and "model.layers.3.mlp.down_proj" in layers
    assert {name for name, p in host.named_parameters() if p.requires_grad} == {
        name for name, _ in host.named_parameters() if "lora_" in name
    }


def test_a_patch_alone_and_a_saved_editor_alone(facts, tmp_path):
    """Without facts: only saved edits, no editor is built; or a saved editor, which makes its edit with the host's tokenizer."""
    callback = callback_for(facts)
    host, _ = fit(facts, callback, max_epochs=1)
    path = callback.edit("In which country is Lyon?", "Peru").save(tmp_path / "lyon.safetensors")
    callback.editor.save_pretrained(tmp_path / "editor")
    loader = host_loader(host, facts, shuffle=False)
    alone = MendCallback("model", patch=[str(path)])
    made = MendCallback(
        "model", editor=tmp_path / "editor", patch=[("In which country is Lyon?", "Peru")], prefix="made"
    )
    losses = [
        trainer_for([each]).test(host, loader, verbose=False)[0]["test_loss"]
        for each in (alone, made, MendCallback("model"))
    ]
    assert losses[0] == losses[1] != losses[2]
    assert alone.editor is None and alone.state_dict() == {}
    with pytest.raises(ConfigError, match="no trained editor to make edits with"):
        alone.edit("In which country is Lyon?", "Peru")
    # In training such a callback does nothing, and its weights are then others than the edit's.
    fit(facts, alone, host, max_epochs=1)
    with pytest.raises(BaseModelMismatchError, match="other weights"):
        trainer_for([alone]).test(host, loader, verbose=False)
    trainer_for([MendCallback("model", patch=[path], patch_force=True)]).test(host, loader, verbose=False)
    assert not any(module._forward_hooks for module in host.modules())
