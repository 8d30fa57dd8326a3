"""ENN through the same fit, test and edit as every editor, from the command line, and resumed."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from helpers.bases import REMARKS, SIZES, assert_same_state, first_batches, given, run_config, state_copy
from helpers.commandline import call
from helpers.models import KINDS, ROUNDING, relative_error
from lightning.pytorch.callbacks import ModelCheckpoint

from mend_lightning import Edit, EnnEditor, MendModule, load_base
from mend_lightning.editors import Editor
from mend_lightning.models.base import BaseModel

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS, "ignore:Checkpoint directory .* exists and is not empty.*")
QUESTION, TARGET = "Which continent is North Korea in?", "Oceania"


@pytest.fixture(scope="module", params=["llama", "t5", "bert"])
def session(request, base_folder, facts, tmp_path_factory) -> SimpleNamespace:
    """fit -> test -> edit of a tiny base, as a user types them."""
    family, root = request.param, tmp_path_factory.mktemp(f"enn_{request.param}")
    settings = {"edit_rate": 0.1, "steps": 2, "c_base": 0.5}
    path = run_config(
        root,
        base_folder(family),
        facts,
        KINDS[family],
        logged=True,
        max_steps=3,
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    config = yaml.safe_load(path.read_text())
    config["model"]["algorithm"] = {"class_path": "mend_lightning.editors.EnnEditor", "init_args": settings}
    path.write_text(yaml.safe_dump(config))
    asked = ["--prompt", QUESTION, "--target", TARGET, "--out", root / "edit.safetensors", "--dtype", "float32"]
    results = {
        "fit": call("fit", "--config", path),
        "test": call("test", "--config", path, "--model.editor", root / "editor"),
    }
    if family != "bert":
        results["edit"] = call("edit", "--editor", root / "editor", *asked)
    return SimpleNamespace(root=root, base=base_folder(family), settings=settings, results=results, family=family)


def test_every_command_succeeds(session):
    codes = {name: (result.code, result.err) for name, result in session.results.items()}
    assert codes == dict.fromkeys(session.results, (0, ""))
    results = json.loads((session.root / "results.json").read_text())
    assert (results["editor"], results["edits"]) == ("EnnEditor", SIZES["test"])


def test_what_was_trained(session):
    editor = Editor.from_pretrained(session.root / "editor")
    assert isinstance(editor, EnnEditor)
    assert {name: editor.settings[name] for name in session.settings} == session.settings
    assert all(bool(weight.any()) for weight in editor.resting)
    assert all(rate != pytest.approx(0.1, abs=1e-6) for rate in editor.edit_rates.tolist())
    columns = (session.root / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/drift", "train/edit", "train/locality", "train/edit_rate_min"} <= set(columns)
    weights = sum(d_in * d_out for d_in, d_out in editor.layers.values())
    assert f"Editor: EnnEditor, {weights + len(editor.layers):,} parameters" in session.results["fit"].out


def test_the_saved_edit_is_dense_and_can_be_applied(session):
    if session.family == "bert":
        pytest.skip("a classifier gives no answers, so `edit` is not for it")
    edit, editor = Edit.load(session.root / "edit.safetensors"), Editor.from_pretrained(session.root / "editor")
    model, tokenizer = load_base(str(session.base), "float32")
    before = state_copy(model)
    made = editor.edit(model, tokenizer, QUESTION, TARGET)
    for name, (d_in, d_out) in editor.layers.items():
        assert edit.deltas[name].dense().shape == (1, d_out, d_in)
        assert relative_error(edit.deltas[name].dense(), made.deltas[name].dense()) < ROUNDING
    with edit.applied(model):
        pass
    assert_same_state(state_copy(model), before)


@pytest.fixture
def enn(base_folder):
    """`enn(family, **settings)`: a MendModule that trains ENN on a tiny base."""

    def module(family: str, **settings) -> MendModule:
        algorithm = partial(EnnEditor, edit_rate=0.1, **settings)
        base = BaseModel(str(base_folder(family)), "float32")
        return MendModule(base, algorithm=algorithm, lr=1e-3, edit_rate_lr=1e-2, c_edit=1.0)

    return module


@pytest.mark.parametrize(
    "family, settings", [("llama", {}), ("llama", {"first_order": True}), ("t5", {}), ("bert", {})]
)
def test_it_learns_and_the_base_stays_as_it_is(family, settings, enn, edit_data, trainer):
    module = enn(family, **settings)
    batch = first_batches(module, edit_data(KINDS[family]), 1)[0]
    base = state_copy(module.base_model)
    losses = []
    run = trainer(max_steps=12, callbacks=[Losses(losses)])
    run.fit(module, given([batch] * 12))
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3]), losses
    assert_same_state(state_copy(module.base_model), base)
    assert not any(p.requires_grad or p.grad is not None for p in module.base_model.parameters())
    logged = run.logged_metrics
    parts = logged["train/edit"] + logged["train/locality"] + logged["train/drift"]
    assert logged["train/loss"] == pytest.approx(parts)


class Losses(L.Callback):
    """Notes the loss of each step."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))


def test_rates_have_their_own_learning_rate(enn, edit_data, trainer):
    module = enn("llama")
    run = trainer(max_steps=1)
    run.fit(module, edit_data())
    groups = {group["name"]: (group["initial_lr"], len(group["params"])) for group in run.optimizers[0].param_groups}
    assert groups == {"transforms": (1e-3, len(module.editor.layers)), "edit_rates": (1e-2, 1)}


def test_a_resumed_run_ends_as_one_that_was_not_stopped(enn, edit_data, trainer, tmp_path):
    """Bit for bit, in the second epoch."""
    ends = {}
    for name, stop in (("whole", None), ("resumed", tmp_path / "step=2.ckpt")):
        keep = ModelCheckpoint(
            tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1, enable_version_counter=False
        )
        run = trainer(max_steps=6, callbacks=[keep], enable_checkpointing=True)
        module = enn("llama")
        run.fit(module, edit_data(), ckpt_path=stop)
        ends[name] = {**state_copy(module), **moments(run)}
    assert_same_state(ends["resumed"], ends["whole"])


def moments(run: L.Trainer) -> dict[str, torch.Tensor]:
    """What Adam holds."""
    state = run.optimizers[0].state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
