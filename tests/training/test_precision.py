"""The Trainer's precisions: what works is float32 where it must be, what cannot work is refused before anything loads."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers.bases import REMARKS, assert_same_state, first_batches, given, state_copy
from helpers.models import make_batch, make_rows, relative_error, spread_parameters, tiny_model
from lightning.pytorch.plugins import BitsandbytesPrecision, FSDPPrecision, MixedPrecision

from mend_lightning import MendEditor
from mend_lightning.editors import EnnEditor, KnowledgeEditor, knowledge_editor
from mend_lightning.editors.capture import Tape
from mend_lightning.editors.factors import edit_factors, loss_scale
from mend_lightning.editors.precondition import InputMoments
from mend_lightning.errors import ConfigError, NonFiniteError
from mend_lightning.models.base import BaseModel
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.layers import select_layers
from mend_lightning.training.module import MendModule
from mend_lightning.training.precision import check_trainer_precision
from mend_lightning.training.step import edit_step

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(
    *REMARKS,
    # A first step that the scaler leaves out is a step of the schedule all the same.
    "ignore:Detected call of `lr_scheduler.step.*",
)
SCALES = [1.0, 2.0**10, 2.0**16]


class Watch(L.Callback):
    """The editor's gradients before each step, and what it noted of each edit."""

    def __init__(self) -> None:
        self.gradients, self.losses, self.states = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in module.editor.named_parameters()})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))
        self.states.append(state_copy(module.editor))


def scaled(scale: float) -> MixedPrecision:
    """fp16 autocast with a loss scaler, which Lightning itself sets up on a GPU only."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


def fitted(mend, edit_data, trainer, steps: int = 1, **settings):
    """A module after `steps` steps on one batch, and what was watched; whoever calls chooses the precision."""
    torch.manual_seed(0)
    module, watch = mend("llama", rank=4), Watch()
    batch = first_batches(module, edit_data(), 1)[0]
    trainer(max_steps=steps, callbacks=[watch], **settings).fit(module, given([batch] * steps))
    return module, watch


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_what_casts_the_editor_is_refused_before_anything_loads(precision, trainer):
    module = MendModule(BaseModel("there is no such model"))
    with pytest.raises(ConfigError, match=f"'{precision}'.*casts the editor.*'32-true' and choose.*model.base.dtype"):
        trainer(max_steps=1, precision=precision).fit(module, given([]))
    assert module.base_model is None


def test_other_plugins_that_are_refused():
    """What this machine cannot make a Trainer with."""
    for name in ("transformer-engine", "transformer-engine-float16"):
        with pytest.raises(ConfigError, match="computes it in 8 bit"):
            check_trainer_precision(SimpleNamespace(precision=name))
    for name in ("bf16-mixed", "16-true"):
        with pytest.raises(ConfigError, match="under FSDP" if name == "bf16-mixed" else "casts the editor"):
            check_trainer_precision(FSDPPrecision(name))
    check_trainer_precision(FSDPPrecision("32-true"))
    plugin = BitsandbytesPrecision.__new__(BitsandbytesPrecision)
    with pytest.raises(ConfigError, match="quantises the editor's layers as well.*model.base.quantize"):
        check_trainer_precision(plugin)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_the_plain_run_but_for_rounding(precision, mend, edit_data, trainer):
    """Losses, gradients, statistics and the parameters after three steps; all of the editor stays float32."""
    _, plain = fitted(mend, edit_data, trainer, 3)
    chosen = {"precision": precision} if precision == "bf16-mixed" else {"plugins": [scaled(2.0**10)]}
    module, mixed = fitted(mend, edit_data, trainer, 3, **chosen)
    rounding = {"bf16-mixed": 2.0**-8, "16-mixed": 2.0**-11}[precision]
    assert mixed.losses == pytest.approx(plain.losses, rel=30 * rounding)
    assert mixed.losses != plain.losses
    for name, value in mixed.states[0].items():
        assert value.dtype in (torch.float32, torch.int64), name
        if "stats" in name:
            assert relative_error(value, plain.states[0][name]) < 50 * rounding, name
    for name in ("transforms.0.nets.combined.layers.0.u", "edit_rates"):
        actual, expected = (watch.gradients[0][name] for watch in (mixed, plain))
        assert float((actual - expected).norm() / expected.norm()) < 50 * rounding, name
    assert module.skipped_steps == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["MEND", "ridge", "ENN", "KE"])
def test_autocast_does_not_reach_the_editor(kind, dtype, monkeypatch):
    """The same factors give the same deltas, bit for bit, with and without autocast."""
    model, rows = tiny_model("llama", torch.float32), make_rows("llama", [0, 1], 2)
    layers, trunk = select_layers(model), run_trunk(model, rows, select_layers(model))
    factors, _, _ = edit_factors(model, layers, rows, trunk)
    # What KE reads of the edits' text.
    lengths = torch.tensor([7, 5])
    monkeypatch.setattr(knowledge_editor, "edit_conditions", lambda *_: (rows.inputs["input_ids"], lengths))
    editor = {
        "MEND": lambda: MendEditor.for_model(model, rank=4, precondition=0.1),
        "ridge": lambda: MendEditor.for_model(model, rank=4, ridge=0.5),
        "ENN": lambda: EnnEditor.for_model(model),
        "KE": lambda: KnowledgeEditor.for_model(model, hidden=4, condition=8, embedding=16),
    }[kind]()
    if not editor.calibrated:
        editor.calibrate({name: moments_of(factors[name].u) for name in layers})
    editor.encoder = SimpleNamespace()
    spread_parameters(editor, 0.02)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            if kind == "ENN":
                found.append(editor._stepped(editor.base_deltas(), factors))
            else:
                # A copy: in training the factors go into its statistics.
                found.append(deepcopy(editor).from_factors(model, factors, rows, trunk))
    for name, delta in found[0].items():
        assert torch.equal(delta.dense(), found[1][name].dense()), name


def moments_of(rows: torch.Tensor) -> InputMoments:
    moments = InputMoments.empty(rows.shape[1], pairs=False)
    moments.add(rows)
    return moments


class Seen(L.Callback):
    """Every delta that a step took, as it came off the tape, and what the editor made of it."""

    def __init__(self, monkeypatch) -> None:
        self.raw, self.made = [], []
        gradients, forward = Tape.gradients, MendEditor.forward

        def keep_raw(tape, *args):
            self.raw.append(gradients(tape, *args))
            return self.raw[-1]

        def keep_made(editor, factors):
            self.made.append(forward(editor, factors))
            return self.made[-1]

        monkeypatch.setattr(Tape, "gradients", keep_raw)
        monkeypatch.setattr(MendEditor, "forward", keep_made)


def test_the_loss_scale_never_reaches_delta(mend, edit_data, trainer, monkeypatch):
    """u, delta, statistics and edits bit for bit, whatever the scale; the editor's gradients up to float16's rounding."""
    found = []
    for scale in SCALES:
        with monkeypatch.context() as patch:
            seen = Seen(patch)
            module, watch = fitted(mend, edit_data, trainer, plugins=[scaled(scale)])
        assert module.trainer.precision_plugin.scaler.get_scale() == scale and module.skipped_steps == 0
        found.append((seen, watch, state_copy(module.editor)))
    # All bases were read from one file, and their weights lie alike.
    (seen, watch, state), *others = found
    # Before the step's own there are those of the tiny rows that say how far gradients reach.
    assert (len(seen.raw), len(seen.made)) == (2, 1)
    for other, other_watch, other_state in others:
        assert other_watch.losses == watch.losses
        for name, pair in seen.raw[-1].items():
            assert all(torch.equal(*tensors) for tensors in zip(other.raw[-1][name], pair)), name
            delta, other_delta = seen.made[0][name], other.made[0][name]
            assert torch.equal(other_delta.down, delta.down) and torch.equal(other_delta.up, delta.up), name
        assert_same_state(*({n: v for n, v in each.items() if "stats" in n} for each in (other_state, state)))
        for name, gradient in watch.gradients[0].items():
            error = (other_watch.gradients[0][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert float(error) < 1e-2, name


def test_an_overflow_is_skipped_and_counted(mend, edit_data, trainer):
    """The step leaves the parameters as they are, clipping included; the scaler lowers its scale, and training continues."""
    module, watch = fitted(mend, edit_data, trainer, 10, plugins=[scaled(2.0**24)], gradient_clip_val=1.0)
    finite = [all(bool(g.isfinite().all()) for g in gradients.values()) for gradients in watch.gradients]
    assert not finite[0] and finite[-1], "the first step overflows, the last one does not"
    skipped = finite.count(False)
    assert module.skipped_steps == skipped and int(module.trainer.logged_metrics["train/skipped_steps"]) == skipped
    assert module.trainer.precision_plugin.scaler.get_scale() == 2.0 ** (24 - skipped)
    names = {name for name, _ in module.editor.named_parameters()}
    for step, (before, after) in enumerate(zip(watch.states, watch.states[1:]), start=1):
        same = all(torch.equal(before[name], after[name]) for name in names)
        assert same is not finite[step], step
    assert all(bool(value.isfinite().all()) for value in watch.states[-1].values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_gradient_that_no_scale_would_mend(precision, mend, edit_data, trainer):
    """Nothing would skip the step, so it is an error, and the parameters are as they were."""
    module = mend("llama", rank=4)
    batch = first_batches(module, edit_data(), 1)[0]
    start = state_copy(module.editor)
    # A gradient that is not finite of a loss that is.
    module.editor.edit_rates.register_hook(lambda gradient: gradient * float("inf"))
    chosen = {"precision": precision} if precision == "bf16-mixed" else {"plugins": [scaled(1.0)]}
    said = "in step 0;" if precision == "bf16-mixed" else "with the loss scaled by 1, which no smaller scale would mend"
    with pytest.raises(NonFiniteError, match=f"gradient is not finite.*{said}"):
        trainer(max_steps=1, gradient_clip_val=1.0, **chosen).fit(module, given([batch]))
    for name, parameter in module.editor.named_parameters():
        assert torch.equal(parameter, start[name]), name


def test_the_scale_of_the_inner_loss(monkeypatch):
    """A power of two above the label tokens of the largest task; float16 alone is scaled, and exact where nothing is lost."""
    assert loss_scale(1) == 64.0
    assert loss_scale(5) == 512.0
    scales, gradients = [], Tape.gradients

    def keep(tape, loss, scale=1.0):
        scales.append(scale)
        return gradients(tape, loss, scale)

    monkeypatch.setattr(Tape, "gradients", keep)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = tiny_model("llama", dtype)
        edit_factors(model, select_layers(model), make_rows("llama", [0, 0, 1, 1], 2))
    # Every other is of the tiny rows that say how far gradients reach.
    assert scales[1:4:2] == [1.0, 1.0] and scales[5] > 64


def test_small_gradients_in_float16(monkeypatch):
    """Of many edits at once: without the scale a large part of delta is 0, with it delta is as exact as float16 can be."""
    rows, model = make_rows("llama", [0] * 200, 1), tiny_model("llama", torch.float32)
    # A tiny model's gradients are large; the head makes them as small as a wide model's.
    model.get_output_embeddings().weight.mul_(3e-3)
    model = model.half()
    truth = deepcopy(model).double()
    expected = edit_factors(truth, select_layers(truth), rows)[0]
    found = {"scaled": edit_factors(model, select_layers(model), rows)[0]}
    monkeypatch.setattr("mend_lightning.editors.factors.loss_scale", lambda most: 1.0)
    found["plain"] = edit_factors(model, select_layers(model), rows)[0]
    errors = {name: [norm_error(each[n].delta, expected[n].delta) for n in expected] for name, each in found.items()}
    assert max(errors["scaled"]) < 1e-2, errors
    assert max(errors["plain"]) > 3 * max(errors["scaled"]), errors


def norm_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the Gram matrix over units: tokens that were lost count as zeros."""
    actual, expected = actual.double(), expected.double()
    gram, truth = actual.T @ actual, expected.T @ expected
    return float((gram - truth).norm() / truth.norm())


def test_what_is_too_large_for_float16_is_an_error_before_the_statistics_see_it():
    model, batch = tiny_model("llama", torch.float16), make_batch("llama")
    editor = MendEditor.for_model(model, rank=4).train()
    start = state_copy(editor)
    name = next(iter(editor.layers))
    with torch.no_grad():
        # The layer before: what it gives out is this layer's input.
        model.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0] * 1e5,))
    with pytest.raises(NonFiniteError, match="input of layer .* is not finite: it is too large for float16"):
        edit_step(model, editor, batch)
    assert_same_state(state_copy(editor), start)
