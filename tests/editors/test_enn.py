"""ENN against slow truth: one task at a time, dense weights, `functional_call`, float64, finite differences."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.bases import assert_same_state
from helpers.edits import compute_deltas
from helpers.models import ROUNDING, make_batch, make_rows, relative_error, tiny_model
from helpers.reference import kl, nll, rows_of_task
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors import Editor, EnnEditor
from mend_lightning.errors import ConfigError
from mend_lightning.training.checks import unreached_parameters
from mend_lightning.training.step import edit_step

C_EDIT, C_BASE = 0.1, 0.7
# The base is float64; factors, deltas and losses of the package are float32. Of a KL's parts of about 5 the last bit is 5e-7.
LOSS, GRADIENT = 2e-6, 5e-5


def spread_editor(model: nn.Module, layers=None, **settings) -> EnnEditor:
    """ΔW⁰ large enough to matter, and rates that differ."""
    editor = EnnEditor.for_model(model, layers, **{"edit_rate": 0.05, "c_base": C_BASE, **settings})
    with torch.no_grad():
        for weight in editor.resting:
            weight.copy_(0.02 * torch.randn_like(weight))
        editor.edit_rates.mul_(torch.linspace(0.5, 1.5, len(editor.edit_rates)))
    return editor


class ReferenceEnn:
    """The loss as the original's code has it, a function of (ΔW⁰, α) in float64."""

    def __init__(self, model: nn.Module, editor: EnnEditor) -> None:
        self.model, self.names = model, list(editor.layers)
        self.steps, self.first_order = editor.steps, editor.first_order
        modules = dict(model.named_modules())
        self.turned = {name: isinstance(modules[name], Conv1D) for name in self.names}

    def parameters(self, editor: EnnEditor) -> list[Tensor]:
        """ΔW⁰ of every layer, and the rates."""
        return [p.detach().double().requires_grad_() for p in (*editor.resting, editor.edit_rates)]

    def weights(self, changes: list[Tensor]) -> dict[str, Tensor]:
        modules = dict(self.model.named_modules())
        return {
            f"{name}.weight": modules[name].weight + (change.T if self.turned[name] else change)
            for name, change in zip(self.names, changes)
        }

    def edited(self, rows: list, resting: list[Tensor], rates: Tensor) -> list[Tensor]:
        """ΔW of every layer after the gradient steps."""
        changes = resting
        for _ in range(self.steps):
            # Fused attention has no second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                loss = nll(self.model, rows, self.weights(changes))
            gradients = torch.autograd.grad(loss, changes, create_graph=not self.first_order)
            changes = [change - rate * g for change, rate, g in zip(changes, rates, gradients)]
        return changes

    def losses(self, batch: EditBatch, resting: list[Tensor], rates: Tensor, fixed=None) -> dict[str, Tensor]:
        """Each loss by task; `fixed`: weights of the pre-edit model that locality is measured from."""
        found: dict[str, list[Tensor]] = {"edit": [], "locality": [], "drift": []}
        for task in range(batch.tasks):
            z_edit, x_out, x_in = (rows_of_task(rows, task) for rows in (batch.z_edit, batch.x_out, batch.x_in))
            edited = self.weights(self.edited(z_edit, resting, rates))
            at_rest = self.weights(resting)
            before = fixed or {name: weight.detach() for name, weight in at_rest.items()}
            found["edit"].append(nll(self.model, x_in, edited))
            found["locality"].append(kl(self.model, x_out, edited, "all", before))
            found["drift"].append(kl(self.model, x_out, at_rest, "all"))
        return {name: torch.stack(values) for name, values in found.items()}

    def total(self, batch: EditBatch, resting: list[Tensor], rates: Tensor, fixed=None) -> Tensor:
        losses = self.losses(batch, resting, rates, fixed)
        return (C_EDIT * losses["edit"] + losses["locality"] + C_BASE * losses["drift"]).mean()


def package_gradients(model: nn.Module, editor: EnnEditor, batch: EditBatch) -> list[Tensor]:
    loss = edit_step(model, editor, batch).total(C_EDIT)
    return list(torch.autograd.grad(loss, [*editor.resting, editor.edit_rates]))


@pytest.mark.parametrize(
    "settings", [{}, {"first_order": True}, {"steps": 2}, {"steps": 2, "first_order": True}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_losses_and_gradients(family, settings):
    model, batch = tiny_model(family), make_batch(family)
    editor = spread_editor(model, **settings)
    reference = ReferenceEnn(model, editor)
    parameters = reference.parameters(editor)
    expected = reference.losses(batch, parameters[:-1], parameters[-1])
    actual = edit_step(model, editor, batch)
    for name, values in expected.items():
        assert getattr(actual, name).tolist() == pytest.approx(values.tolist(), rel=LOSS, abs=1e-6), name
    gradients = torch.autograd.grad(reference.total(batch, parameters[:-1], parameters[-1]), parameters)
    for found, wanted in zip(package_gradients(model, editor, batch), gradients):
        assert wanted.abs().max() > 0
        assert relative_error(found, wanted) < GRADIENT


def in_double(model: nn.Module) -> nn.Module:
    """The model with its RMS norms in float64: transformers has them in float32, too coarse for differences."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(rms_norm, module.weight, module.variance_epsilon)
    return model


def rms_norm(weight: Tensor, epsilon: float, x: Tensor) -> Tensor:
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("steps", [1, 2])
def test_meta_gradient_against_finite_differences(family, steps):
    """Slopes along a random direction of all ΔW⁰ and along one of the rates, from float64 values of the loss alone."""
    model, batch = in_double(tiny_model(family)), make_batch(family, tasks=2)
    editor = spread_editor(model, steps=steps)
    reference = ReferenceEnn(model, editor)
    here = reference.parameters(editor)
    # KL(pre-edit ‖ edited) passes no gradient to its first argument, so that one stays where it is.
    fixed = reference.weights([parameter.detach() for parameter in here[:-1]])
    gradients = package_gradients(model, editor, batch)
    for part in (slice(0, -1), slice(-1, None)):
        directions = [torch.zeros_like(parameter) for parameter in here]
        directions[part] = [1e-5 * torch.randn_like(parameter) / parameter.numel() ** 0.5 for parameter in here[part]]
        ends = []
        for sign in (1, -1):
            *resting, rates = [(p.detach() + sign * d).requires_grad_() for p, d in zip(here, directions)]
            ends.append(float(reference.total(batch, resting, rates, fixed).detach()))
        slope = sum(float((gradient.double() * d).sum()) for gradient, d in zip(gradients, directions))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-4)


def test_first_order_is_another_gradient(family):
    """Of ΔW⁰, where the gradient's own dependence on it is left out; the rates only scale the gradient."""
    model, batch = tiny_model(family), make_batch(family)
    second, first = spread_editor(model), spread_editor(model, first_order=True)
    first.load_state_dict(second.state_dict())
    *resting, rates = zip(package_gradients(model, first, batch), package_gradients(model, second, batch))
    assert max(relative_error(*pair) for pair in resting) > 1e-2
    assert relative_error(*rates) < GRADIENT


@pytest.mark.parametrize("edits", [1, 2])
def test_an_edit_is_a_gradient_step_of_dense_weights(family, edits):
    """W + ΔW = (W + ΔW⁰) − α W.grad, with the weights changed in place and an ordinary backward pass."""
    model, z_edit = tiny_model(family), make_batch(family, tasks=1, edits=edits).z_edit
    editor = spread_editor(model)
    base = {name: module.weight.clone() for name, module in editor.modules_in(model).items()}
    deltas = compute_deltas(model, editor, z_edit)
    trained = tiny_model(family)
    layers = editor.modules_in(trained)
    for layer, change in zip(layers.values(), editor.resting):
        layer.weight += change.detach().T if isinstance(layer, Conv1D) else change.detach()
        layer.weight.requires_grad_()
    nll(trained, rows_of_task(z_edit, 0)).backward()
    for (name, layer), rate in zip(layers.items(), editor.edit_rates.tolist()):
        expected = layer.weight.detach() - rate * layer.weight.grad - base[name]
        change = deltas[name].dense()[0]
        assert relative_error(change.T if isinstance(layer, Conv1D) else change, expected) < ROUNDING, name


def test_tasks_do_not_meet(family):
    """Four tasks at once are four times one task."""
    model = tiny_model(family)
    editor = spread_editor(model, steps=2)
    rows = make_rows(family, [0, 1, 2, 3], 4)
    together = compute_deltas(model, editor, rows)
    for task in range(4):
        alone = replace(rows.part(slice(task, task + 1)), task=torch.tensor([0]), tasks=1, grouped=True)
        for name, delta in compute_deltas(model, editor, alone).items():
            assert relative_error(together[name].of_task(task).dense(), delta.dense()) < ROUNDING, name


def test_gradients_off_and_on_give_one_edit(family):
    """Fused attention where no graph is kept, plain attention where it is."""
    model, z_edit = tiny_model(family), make_batch(family).z_edit
    editor = spread_editor(model)
    with torch.no_grad():
        without = compute_deltas(model, editor, z_edit)
    for name, delta in compute_deltas(model, editor, z_edit).items():
        assert delta.dense().requires_grad and not without[name].dense().requires_grad
        assert relative_error(without[name].dense(), delta.dense()) < ROUNDING


@pytest.mark.parametrize("first_order", [False, True])
def test_a_new_editor_is_fine_tuning_and_gradients_reach_all_of_it(family, first_order):
    """Also with ΔW⁰ = 0, where the drift has no gradient; and nothing of it stays in the model."""
    model, batch = tiny_model(family), make_batch(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    editor = EnnEditor.for_model(model, first_order=first_order)
    assert unreached_parameters(model, editor, batch, "all") == []
    out = edit_step(model, editor, batch)
    assert out.drift.tolist() == pytest.approx([0.0] * batch.tasks, abs=1e-6)
    out.total(C_EDIT).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in editor.parameters())
    assert_same_state(model.state_dict(), before)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bfloat16_base():
    """The editor and its gradients stay float32, and the second-order pass runs."""
    model, batch = tiny_model("llama", torch.bfloat16), make_batch("llama")
    editor = spread_editor(model)
    exact = package_gradients(tiny_model("llama"), editor, batch)
    for found, expected in zip(package_gradients(model, editor, batch), exact):
        assert found.dtype == torch.float32
        assert float(torch.cosine_similarity(found.flatten(), expected.float().flatten(), dim=0)) > 0.98


def test_saved_and_loaded(tmp_path):
    model, z_edit = tiny_model("gpt2"), make_batch("gpt2").z_edit
    editor = spread_editor(model, steps=2, first_order=True)
    loaded = Editor.from_pretrained(editor.save_pretrained(tmp_path))
    assert (type(loaded), loaded.settings) == (EnnEditor, editor.settings)
    assert_same_state(loaded.state_dict(), editor.state_dict())
    deltas = compute_deltas(model, editor, z_edit)
    for name, delta in compute_deltas(model, loaded, z_edit).items():
        assert relative_error(delta.dense(), deltas[name].dense()) < ROUNDING


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="number of gradient steps of an edit; it must be at least 1, not 0"):
        EnnEditor({"fc": (2, 3)}, steps=0)
    with pytest.raises(ConfigError, match="c_base is the weight of a loss; it must not be negative, and it is -1"):
        EnnEditor({"fc": (2, 3)}, c_base=-1.0)
    with pytest.raises(ConfigError, match="EnnEditor has no confidence"):
        EnnEditor({"fc": (2, 3)}).set_confidence(0.5)
