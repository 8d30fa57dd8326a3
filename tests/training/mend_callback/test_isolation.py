"""The parts of isolation and attachment, each alone; and what is said, before training starts, where it cannot work."""

from __future__ import annotations

import random
from pathlib import Path

import lightning as L
import numpy
import pytest
import torch
import yaml
from helpers.bases import REMARKS, SIZES, tiny_base
from helpers.hosts import Host, callback_for, host_loader, trainer_for
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from torch import nn

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.editors import EnnEditor, MendEditor
from mend_lightning.errors import (
    ConfigError,
    DataFileError,
    LayerNotFoundError,
    MendError,
    ModelNotFoundError,
    NoEffectWarning,
)
from mend_lightning.training.mend_callback.callback import MendCallback
from mend_lightning.training.mend_callback.find_model import find_model
from mend_lightning.training.mend_callback.host_checks import check_host_strategy, check_sharded
from mend_lightning.training.mend_callback.isolation import isolated
from mend_lightning.training.mend_callback.schedule import Clock, Schedule, steps_between

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(
    *REMARKS,
    "ignore:.torch.jit.script_method. is deprecated.*",
    "ignore:.is_gradient_checkpointing. is deprecated.*",
)


class Counting(nn.Module):
    """A module that changes its buffers as it runs, one in place and one by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(2, 2), nn.Dropout().eval()
        self.linear.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().clone()
        return self.dropout(self.linear(x))


@pytest.mark.parametrize("breaks", [False, True])
def test_what_is_isolated_is_as_it_was(breaks):
    model = Counting().train()
    model.dropout.eval()
    model.linear.weight.grad = torch.ones(2, 2)
    model.linear._compiled_call_impl = None if breaks else model.linear._call_impl
    compiled = model.linear._compiled_call_impl
    last, states = model.last, (random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].tolist())
    draws = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) if breaks else torch.inference_mode(), isolated(model, seed=3):
            assert not model.training and not any(p.requires_grad for p in model.parameters())
            assert model.linear._compiled_call_impl is None
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            model(torch.ones(1, 2))
            draws.append((random.random(), numpy.random.rand(), float(torch.rand(()))))
            if breaks:
                raise ZeroDivisionError
    assert draws[0] == draws[1]
    assert model.linear._compiled_call_impl is compiled
    assert model.training and model.linear.training and not model.dropout.training
    assert model.linear.weight.requires_grad and not model.linear.bias.requires_grad
    assert model.calls == 0 and model.last is last and model.linear.weight.grad.equal(torch.ones(2, 2))
    assert states[0] == random.getstate() and torch.equal(states[1], torch.get_rng_state())
    assert states[2] == numpy.random.get_state()[1].tolist()


def test_buffers_that_came_about_under_inference_mode():
    model = Counting()
    with torch.inference_mode():
        model.last = torch.ones(2)
    last = model.last
    with isolated(model, seed=0):
        x = torch.ones(2, requires_grad=True)
        (x * model.last).sum().backward()
    assert model.last is last and last.is_inference()


def test_packed_weights_are_not_copied(monkeypatch):
    monkeypatch.setattr("mend_lightning.training.mend_callback.isolation.LARGEST_COUNTER", 2)
    model = nn.Module()
    model.register_buffer("packed", torch.zeros(3, dtype=torch.int32))
    with isolated(model, seed=0):
        pass
    with pytest.raises(MendError, match="changed its buffer 'packed', 3 integers"), isolated(model, seed=0):
        model.packed += 1


def test_find_a_model(facts):
    host = Host()
    host.student = nn.ModuleDict({"encoder": tiny_base("t5", host.tokenizer)})
    host.compiled = torch.compile(tiny_base("llama", host.tokenizer))
    assert find_model(host, "model") is host.model
    assert find_model(host, "student.encoder") is host.student["encoder"]
    assert type(find_model(host, "compiled")).__name__ == "LlamaForCausalLM"
    assert find_model(Host(), "").__class__ is type(host.model)
    assert find_model(host.model, "") is host.model
    with pytest.raises(ModelNotFoundError, match="holds 3 of them. Give the attribute path of one: 'model'"):
        find_model(host, "")
    with pytest.raises(ModelNotFoundError, match="Host has a .*, which is no module there"):
        find_model(host, "tokenizer")


def test_peft_is_looked_through():
    peft = pytest.importorskip("peft")
    host = Host()
    config = peft.LoraConfig(target_modules=["c_fc", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    base = host.model
    host.model = peft.get_peft_model(base, config)
    assert find_model(host, "model") is base


class Wrapper(nn.Module):
    """A model that takes its inputs in a way of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, batch):
        return self.inner(**batch)


class OwnWords(Wrapper):
    """One that says it takes them, and does not."""

    def forward(self, input_ids, attention_mask):
        return self.inner(inputs_embeds=input_ids)


def wrapped(kind: type[Wrapper]) -> Host:
    host = Host()
    host.wrapper = kind(host.model)
    return host


CASES = {
    "path": ({"model": "modl"}, Host, ModelNotFoundError, r"model='modl': Host has nothing there. Did you mean 'model'"),
    "layers": ({"layers": ["no.such"]}, Host, LayerNotFoundError, "'no.such' matches no layer"),
    "no layer": ({"model": "model.transformer.wte"}, Host, ConfigError, "takes .input., and an editor calls it with input_ids"),
    "forward": ({"model": "wrapper"}, lambda: wrapped(Wrapper), ConfigError, r"takes \(batch\).* inside: 'model'"),
    "run": ({"model": "wrapper"}, lambda: wrapped(OwnWords), ConfigError, "does not take a batch of edits with input_ids"),
    "headless": ({"model": "model.transformer"}, Host, ConfigError, "returns no logits"),
    "data": ({"edits": EditDataModule("nowhere.jsonl")}, Host, DataFileError, "nowhere.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_said_before_training_starts(case, facts):
    settings, make, error, words = CASES[case]
    started = []

    class Started(L.Callback):
        def on_fit_start(self, trainer, pl_module) -> None:
            started.append(True)

    host = make()
    with pytest.raises(error, match=words):
        trainer_for([callback_for(facts, **settings), Started()]).fit(host, host_loader(host, facts))
    assert not started


def test_a_tokenizer_is_needed(facts, tmp_path):
    """The host's own, or one that is given, also by name as from YAML."""
    host = Host()
    loader = host_loader(host, facts)
    tokenizer, host.tokenizer = host.tokenizer, None
    with pytest.raises(ConfigError, match="has no tokenizer. Pass tokenizer="):
        trainer_for([callback_for(facts)]).fit(host, loader)
    host.tokenizer = tokenizer
    tokenizer.save_pretrained(tmp_path)
    data = EditDataModule(facts / "train.jsonl", tokenizer=str(tmp_path))
    assert data.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_a_model_that_the_host_builds_later(facts):
    class Late(Host):
        def configure_model(self) -> None:
            self.model = getattr(self, "model", None) or self._kept.pop()

    host = Late()
    loader = host_loader(host, facts)
    host._kept = [host.model]
    del host.model
    callback = callback_for(facts)
    trainer_for([callback], max_epochs=1).fit(host, loader)
    assert callback.model is host.model and callback._kept["training"]["steps"] == 2


def test_strategies_that_cannot_work():
    for kind, way in ((DeepSpeedStrategy, "strategy='ddp'"), (FSDPStrategy, "ModelParallelStrategy")):
        with pytest.raises(ConfigError, match=f"cannot work under {kind.__name__}.*Use {way}"):
            check_host_strategy(kind.__new__(kind))
    with pytest.raises(ConfigError, match="starts its processes by spawn"):
        check_host_strategy(DDPStrategy(start_method="spawn"))
    check_host_strategy(DDPStrategy())
    with pytest.raises(ConfigError, match="EnnEditor cannot work on a sharded model"):
        check_sharded(EnnEditor({"fc": (2, 2)}))
    check_sharded(MendEditor({"fc": (2, 2)}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, not 0"),
        ({"time_budget": 10.0}, "time_budget is a share"),
        ({"measure_every_n_epochs": 0}, "measure_every_n_epochs must be at least 1"),
    ],
)
def test_settings_that_cannot_work(settings, words):
    with pytest.raises(ConfigError, match=words):
        MendCallback(**settings)


def test_steps_by_a_budget(monkeypatch):
    """Half a second a step of ours, a tenth one of the host's: a budget of a fifth leaves every twentieth."""
    assert steps_between(0.5, 0.1, 0.2) == 20 and steps_between(0.001, 0.1, 0.5) == 1
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()
    schedule = Schedule(clock, every_n_steps=10, time_budget=0.2)
    taken = []
    for step in range(1, 201):
        now[0] += 0.1
        # Two batches a step; the first ones of both warm up.
        assert not schedule.is_due(step - 1, 0.05)
        if schedule.is_due(step, 0.05 if step > 1 else 5.0):
            with clock.ours(step=True):
                now[0] += 0.5 if taken else 7.0
            taken.append(step)
            schedule.stepped("cpu")
    assert taken[:4] == [1, 2, 22, 42]
    assert clock.share == pytest.approx((7.0 + 0.5 * (len(taken) - 1)) / clock.total)


def test_a_training_too_short_for_a_step_says_so(facts):
    host = Host()
    with pytest.warns(NoEffectWarning, match=r"took no step: the host's optimisers stepped 2 time.*waits for 50"):
        trainer_for([callback_for(facts, every_n_steps=50, measure=False)], max_steps=2, max_epochs=-1).fit(
            host, host_loader(host, facts)
        )


def test_an_editor_that_learned_nothing_is_not_measured(facts):
    host = Host()
    trainer = trainer_for([callback_for(facts)])
    with pytest.warns(NoEffectWarning, match="Nothing is measured: the editor has taken no step yet"):
        found = trainer.test(host, host_loader(host, facts, shuffle=False), verbose=False)[0]
    assert list(found) == ["test_loss"]


def test_the_cost_is_told(facts, capsys):
    host = Host()
    trainer_for([callback_for(facts)], max_epochs=1).fit(host, host_loader(host, facts))
    told = capsys.readouterr().out
    assert "MendCallback('model'): 2 editor steps; " in told and "nothing was measured" not in told


class FromCli(Host):
    """A host of a LightningCLI, with a loader of its own."""

    def __init__(self, facts: str, lr: float = 1e-3) -> None:
        super().__init__(lr=lr)
        self.facts = Path(facts)

    def train_dataloader(self):
        return host_loader(self, self.facts)


def callback_config(facts: Path, **settings) -> dict:
    edits = {split: str(facts / f"{split}.jsonl") for split in SIZES} | {"max_length": 96, "validation_edits": 2}
    given = {"edits": {"class_path": "mend_lightning.EditData", "init_args": edits}, **settings}
    return {"class_path": "mend_lightning.MendCallback", "init_args": given}


def test_in_the_yaml_of_a_lightning_cli(facts, tmp_path, monkeypatch):
    """Which takes data modules in its config for its own, whatever they are for."""
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer["callbacks"] = [callback_config(facts, every_n_steps=2, rank=8)]
    path = tmp_path / "host.yaml"
    path.write_text(yaml.safe_dump({"seed_everything": 0, "trainer": trainer, "model": {"facts": str(facts)}}))
    monkeypatch.setattr("sys.argv", ["host", "fit", "--config", str(path)])
    cli = LightningCLI(FromCli, save_config_callback=None)
    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, MendCallback))
    assert callback._kept["training"]["steps"] == 2 and "mend/edit_success" in cli.trainer.callback_metrics


def test_every_argument_from_yaml(facts, tmp_path):
    patch = ["a.safetensors", ["In which country is Lyon?", "Peru"]]
    algorithm = {"class_path": "mend_lightning.EnnEditor"}
    config = callback_config(facts, model="student.encoder", time_budget=0.1, patch=patch, algorithm=algorithm)
    (tmp_path / "trainer.yaml").write_text(yaml.safe_dump({"callbacks": [config]}))
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[L.Callback])
    (callback,) = parser.instantiate_classes(parser.parse_path(tmp_path / "trainer.yaml")).callbacks
    assert isinstance(callback, MendCallback) and (callback.path, callback.time_budget) == ("student.encoder", 0.1)
    assert callback._attachment.edits.files["test"] == str(facts / "test.jsonl")
    assert callback._patch.facts == [("In which country is Lyon?", "Peru")]
    assert isinstance(callback._attachment._algorithm({"fc": (2, 3)}), EnnEditor)
