"""ENN against slow truth: one task at a time, dense weights, `functional_call`, float64, finite differences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from models import make_batch, make_rows, relative_error, tiny_model
from reference import kl, nll, rows_of_task
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from mend_lightning.editors import EnnEditor
from mend_lightning.errors import ConfigError
from mend_lightning.step import compute_deltas, edit_step
from mend_lightning.types import EditBatch

C_EDIT, C_BASE = 0.1, 0.7
# The base is float64; factors, deltas and losses of the package are float32.
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
        """Each loss by task; `fixed`: weights of the resting model that locality is measured from."""
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


@pytest.mark.parametrize("settings", [{}, {"first_order": True}, {"steps": 2}], ids=str)
def test_losses_and_gradients(family, settings):
    model, batch = tiny_model(family), make_batch(family)
    editor = spread_editor(model, **settings)
    reference = ReferenceEnn(model, editor)
    parameters = reference.parameters(editor)
    expected = reference.losses(batch, parameters[:-1], parameters[-1])
    actual = edit_step(model, editor, batch)
    for name, values in expected.items():
        assert getattr(actual, name).tolist() == pytest.approx(values.tolist(), rel=LOSS, abs=2e-7), name
    gradients = torch.autograd.grad(reference.total(batch, parameters[:-1], parameters[-1]), parameters)
    for found, wanted in zip(package_gradients(model, editor, batch), gradients):
        assert wanted.abs().max() > 0
        assert relative_error(found, wanted) < GRADIENT


def in_double(model: nn.Module) -> nn.Module:
    """The model with its RMS norms computed in float64: transformers computes them in float32, too coarse for differences."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(rms_norm, module.weight, module.variance_epsilon)
    return model


def rms_norm(weight: Tensor, epsilon: float, x: Tensor) -> Tensor:
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("steps", [1, 2])
def test_meta_gradient_against_finite_differences(family, steps):
    """The slope along a random direction in every ΔW⁰ and in the rates, from float64 values of the loss alone."""
    model, batch = in_double(tiny_model(family)), make_batch(family, tasks=2)
    editor = spread_editor(model, steps=steps)
    reference = ReferenceEnn(model, editor)
    here = reference.parameters(editor)
    # KL(resting ‖ edited) passes no gradient to its first argument, so that one stays where it is.
    fixed = reference.weights([parameter.detach() for parameter in here[:-1]])
    for index, gradient in enumerate(package_gradients(model, editor, batch)):
        direction = torch.randn_like(here[index])
        direction *= 1e-5 / direction.norm()
        ends = [
            reference.total(batch, *moved(here, index, sign * direction), fixed).detach().item() for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / 2
        assert float((gradient.double() * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-5 * abs(float(gradient.norm() * direction.norm())))


def moved(parameters: list[Tensor], index: int, by: Tensor) -> tuple[list[Tensor], Tensor]:
    """(ΔW⁰ of every layer, rates) with one of them changed."""
    new = [p.detach() + by if i == index else p.detach() for i, p in enumerate(parameters)]
    new = [parameter.requires_grad_() for parameter in new]
    return new[:-1], new[-1]
