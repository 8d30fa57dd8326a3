"""`record_factors` against an ordinary backward: `deltaᵀ u` is `W.grad`."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import make_rows, relative_error, tiny_model
from torch import Tensor, nn

from mend_lightning.editors.capture import record_factors
from mend_lightning.editors.factors import kept_factors
from mend_lightning.edits.deltas import LowRankDelta
from mend_lightning.errors import InferenceModeError, LayerNotCalledError, MendError
from mend_lightning.models.forward.hooks import applied
from mend_lightning.models.forward.logits import label_mask, run_model
from mend_lightning.models.forward.losses import token_nll
from mend_lightning.models.layers import editable_layers


def label_loss(model: nn.Module, rows) -> Tensor:
    """Plain sum over label tokens, of all logits."""
    logits, mask = run_model(model, rows), label_mask(rows)
    if logits.dim() == 2:
        return nn.functional.binary_cross_entropy_with_logits(logits, rows.labels.to(logits.dtype), reduction="sum")
    return nn.functional.cross_entropy(logits[mask], rows.labels[mask], reduction="sum")


def weight_gradients(model: nn.Module, loss_of) -> dict[str, Tensor]:
    """`[d_out, d_in]` gradients of every editable layer by an ordinary backward, on a copy of the model."""
    model = copy.deepcopy(model).requires_grad_(True)
    layers = editable_layers(model)
    for layer in layers.values():
        # A head tied to the embedding would hold the embedding's gradient too.
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    loss_of(model).backward()
    grads = {name: layer.weight.grad for name, layer in layers.items()}
    return {name: grad.T if type(layers[name]).__name__ == "Conv1D" else grad for name, grad in grads.items()}


def product(u: Tensor, delta: Tensor) -> Tensor:
    return delta.flatten(0, -2).T @ u.flatten(0, -2)


class Chain(nn.Module):
    """Whatever happens between two linear layers."""

    def __init__(self, between=lambda x: x) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(3, 3), nn.Linear(3, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def test_every_layer_of_every_family(family):
    model, rows = tiny_model(family), make_rows(family, [0, 0, 1, 2], 3)
    expected = weight_gradients(model, lambda copied: label_loss(copied, rows))
    with record_factors(editable_layers(model)) as tape:
        loss = label_loss(model, rows)
    raw = tape.gradients(loss)
    assert raw.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(product(*raw[name]), gradient) < 1e-12, name


def test_each_task_is_separate(family):
    """One backward of the summed losses holds every task's own gradient."""
    model, rows = tiny_model(family), make_rows(family, [0, 2, 1, 2], 3)
    with record_factors(editable_layers(model)) as tape:
        raw = tape.gradients(label_loss(model, rows))
    for task in range(3):
        part = rows.part(torch.tensor([i for i, t in enumerate(rows.task.tolist()) if t == task]))
        expected = weight_gradients(model, lambda copied, part=part: label_loss(copied, part))
        for name, (u, delta) in raw.items():
            factors = kept_factors(u, delta, rows.task, 3)
            of_task = factors.task == task
            # kept_factors is float32, and sums over the tokens of a task.
            assert relative_error(product(factors.u[of_task], factors.delta[of_task]), expected[name]) < 1e-5, name


@pytest.mark.parametrize("trainable", [False, True])
def test_no_parameter_is_touched(family, trainable):
    model, rows = tiny_model(family).requires_grad_(trainable), make_rows(family, [0, 1], 2)
    with record_factors(editable_layers(model)) as tape:
        tape.gradients(label_loss(model, rows))
    assert all(parameter.grad is None and parameter.requires_grad is trainable for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_works_under_no_grad():
    model, x = Chain(), torch.randn(2, 4, 3)
    with torch.no_grad():
        with record_factors({"first": model.first}) as tape:
            u, delta = tape.gradients(model(x).sum())["first"]
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(u, x)
    torch.testing.assert_close(delta, model.second.weight.sum(0).expand_as(delta))


def test_layer_called_twice():
    model = Chain().double().requires_grad_(False)
    x = torch.randn(2, 4, 3, dtype=torch.float64)

    def loss_of(model):
        return model.first(model(x).tanh()).square().sum()

    expected = weight_gradients(model, loss_of)
    with record_factors(editable_layers(model)) as tape:
        raw = tape.gradients(loss_of(model))
    assert raw["first"][0].shape == (2, 8, 3)
    for name, gradient in expected.items():
        assert relative_error(product(*raw[name]), gradient) < 1e-12, name


def test_flat_inputs_of_a_layer_called_twice_stay_with_their_task():
    layer = torch.nn.Linear(3, 3).double().requires_grad_(False)
    x = torch.randn(2, 3, dtype=torch.float64)
    with record_factors({"fc": layer}) as tape:
        raw = tape.gradients(layer(layer(x).tanh()).square().sum())
    factors = kept_factors(*raw["fc"], torch.tensor([0, 1]), 2)
    for task in (0, 1):
        alone = torch.nn.Linear(3, 3).double()
        alone.load_state_dict(layer.state_dict())
        alone(alone(x[task : task + 1]).tanh()).square().sum().backward()
        mine = factors.task == task
        assert relative_error(factors.delta[mine].T @ factors.u[mine], alone.weight.grad.float()) < 1e-5


def test_layer_never_called():
    model = Chain()
    with record_factors(editable_layers(model)) as tape:
        loss = model.first(torch.ones(1, 1, 3)).sum()
    with pytest.raises(LayerNotCalledError, match=r"These layers did not run in the forward pass: second\. Choose"):
        tape.gradients(loss)


def test_layer_the_loss_does_not_depend_on():
    model = Chain()
    with record_factors(editable_layers(model)) as tape:
        loss = model.first(torch.ones(1, 2, 3)).sum()
        model.second(torch.ones(1, 2, 3))
    _, delta = tape.gradients(loss)["second"]
    assert delta.shape == (1, 2, 3)
    assert not delta.any()


@pytest.mark.parametrize(
    "between",
    [torch.relu_, torch.sigmoid_, lambda x: x.mul_(3), lambda x: x.add_(1).tanh_()],
    ids=["relu", "sigmoid", "mul", "add_tanh"],
)
@pytest.mark.parametrize("frozen_input", [True, False])
def test_output_changed_in_place(between, frozen_input):
    """The gradient belongs to what the layer returned, not to what became of it."""
    model = Chain(between).double().requires_grad_(False)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=not frozen_input)
    expected = weight_gradients(model, lambda copied: copied(x).square().sum())
    with record_factors(editable_layers(model)) as tape:
        raw = tape.gradients(model(x).square().sum())
    for name, gradient in expected.items():
        assert relative_error(product(*raw[name]), gradient) < 1e-12, name


def test_input_changed_in_place():
    layer = nn.Linear(3, 3).requires_grad_(False)
    x = torch.randn(1, 2, 3)
    with record_factors({"fc": layer}) as tape:
        loss = layer(x).sum()
        x.add_(1)
    with pytest.raises(MendError, match=r"The input of layer 'fc' was changed in place after the layer used it"):
        tape.gradients(loss)


def test_hooks_are_gone_after_an_exception():
    model = Chain(lambda x: x @ torch.ones(7, 7))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), record_factors(editable_layers(model)):
        model(torch.ones(1, 2, 3))
    assert not model.first._forward_hooks
    assert not model.second._forward_hooks


def test_inference_mode():
    with torch.inference_mode():
        with pytest.raises(
            InferenceModeError, match=r"torch\.inference_mode\(\)\. Use Trainer\(inference_mode=False\)"
        ):
            with record_factors({}):
                pass


def test_gradient_factors_of_an_edited_layer():
    """What an edit adds belongs to the layer: recording above `applied` gives the edited model's gradient."""
    model = Chain().double().requires_grad_(False)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    delta = LowRankDelta(torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64))
    edited = copy.deepcopy(model)
    edited.first.weight += delta.dense()[0]
    expected = weight_gradients(edited, lambda copied: copied(x).square().sum())
    with applied({"first": model.first}, {"first": delta}), record_factors(editable_layers(model)) as tape:
        raw = tape.gradients(model(x).square().sum())
    for name, gradient in expected.items():
        assert relative_error(product(*raw[name]), gradient) < 1e-12, name


def test_kept_factors_drop_what_adds_nothing():
    u = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[2.0, 2.0], [3.0, 0.0]]])
    delta = torch.tensor([[[1.0], [4.0]], [[0.0], [5.0]]])
    factors = kept_factors(u, delta, torch.tensor([1, 0]), tasks=2)
    assert factors.u.tolist() == [[1.0, 0.0], [3.0, 0.0]]
    assert factors.delta.tolist() == [[1.0], [5.0]]
    assert (factors.task.tolist(), factors.tasks) == ([1, 0], 2)


def test_kept_factors_have_no_padding(family):
    """Rows alone and the same rows padded into one batch keep the same tokens."""
    model, rows = tiny_model(family), make_rows(family, [0, 1, 2], 3)
    layers = editable_layers(model)
    for row in range(3):
        counts = []
        for part in (rows, alone(rows, row)):
            with record_factors(layers) as tape:
                raw = tape.gradients(label_loss(model, part))
            kept = {name: kept_factors(u, delta, part.task, 3) for name, (u, delta) in raw.items()}
            # Attention scores of the first token have gradient 0 up to rounding, which keeps it or not.
            counts.append({n: int((f.task == row).sum()) for n, f in kept.items() if not is_query(n)})
        assert counts[0] == counts[1]


def is_query(name: str) -> bool:
    return name.endswith((".q", ".q_proj", ".k", ".k_proj", ".c_attn", ".query", ".key"))


def alone(rows, row: int):
    """One row, cut to its real length."""
    part = rows.part(slice(row, row + 1))
    lengths = {name: int(part.inputs[name.replace("input_ids", "attention_mask")].sum())
               for name in part.inputs if name.endswith("input_ids")}  # fmt: skip
    inputs = {
        name: tensor[:, : lengths[name.replace("attention_mask", "input_ids")]] for name, tensor in part.inputs.items()
    }
    length = lengths.get("decoder_input_ids", lengths["input_ids"])
    return type(rows)(inputs, part.labels[:, :length], part.task, rows.tasks, grouped=False)


def test_half_precision_factors_are_float32():
    model = tiny_model("llama", torch.bfloat16)
    rows, layers = make_rows("llama", [0, 1], 2), editable_layers(tiny_model("llama", torch.bfloat16))
    layers = editable_layers(model)
    with record_factors(layers) as tape:
        mask = label_mask(rows)
        raw = tape.gradients(token_nll(run_model(model, rows)[mask], rows.labels[mask]).sum())
    factors = kept_factors(*raw["model.layers.3.mlp.up_proj"], rows.task, 2)
    assert factors.u.dtype == factors.delta.dtype == torch.float32
