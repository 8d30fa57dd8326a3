"""`applied` against `torch.func.functional_call` with dense W + ΔW, a row at a time."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers.models import make_rows, relative_error, tiny_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from mend_lightning.editors.factors import pack_tasks, task_slots
from mend_lightning.edits.deltas import DenseDelta, LowRankDelta, SumDelta
from mend_lightning.errors import BaseModelMismatchError
from mend_lightning.models.forward.hooks import applied
from mend_lightning.models.forward.logits import run_model
from mend_lightning.models.layers import editable_layers, layer_shape

TASKS, RANK = 3, 4


def random_deltas(layers: dict[str, nn.Module], rank: int = RANK, dtype=torch.float64) -> dict[str, LowRankDelta]:
    """Leaves that require grad; task 1 has one rank less, padded with zeros."""
    deltas = {}
    for name, layer in layers.items():
        down, up = (0.3 * torch.randn(TASKS, rank, width, dtype=dtype) for width in layer_shape(layer))
        down[1, -1:] = up[1, -1:] = 0
        deltas[name] = LowRankDelta(down.requires_grad_(), up.requires_grad_())
    return deltas


def dense_weights(model: nn.Module, deltas: dict[str, LowRankDelta], task: int) -> dict[str, Tensor]:
    """W + Σ_r up_r down_rᵀ of one task, by the weights' names, as an outer product a rank."""
    modules, weights = dict(model.named_modules()), {}
    for name, delta in deltas.items():
        update = sum(torch.outer(up, down) for up, down in zip(delta.up[task], delta.down[task]))
        update = update.T if isinstance(modules[name], Conv1D) else update
        weights[f"{name}.weight"] = modules[name].weight + update.to(modules[name].weight.dtype)
    return weights


def dense_logits(model: nn.Module, deltas, rows) -> Tensor:
    """Every row alone, under the dense weights of its task."""
    logits = []
    for row, task in enumerate(rows.task.tolist()):
        inputs = {name: tensor[row : row + 1] for name, tensor in rows.inputs.items()}
        # tie_weights: an edit of an output head is no edit of the embedding that shares its weight.
        output = functional_call(model, dense_weights(model, deltas, task), (), inputs, tie_weights=False)
        logits.append(output.logits)
    return torch.cat(logits)


def gradients(loss: Tensor, deltas: dict[str, LowRankDelta]) -> list[Tensor]:
    leaves = [leaf for delta in deltas.values() for leaf in (delta.down, delta.up)]
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("task", [[0, 0, 1, 1, 2, 2], [2, 0, 2, 1]], ids=["grouped", "mapped"])
def test_logits_and_gradients_equal_dense_weights(family, task):
    model, rows = tiny_model(family), make_rows(family, task, TASKS)
    assert rows.grouped is (len(task) == 6)
    layers = {name: layer for name, layer in editable_layers(model).items() if name != "lm_head"}
    deltas = random_deltas(layers)
    expected = dense_logits(model, deltas, rows)
    with applied(layers, deltas, rows.task_of_row):
        actual = run_model(model, rows)
    assert relative_error(expected, run_model(model, rows)) > 0.1
    assert relative_error(actual, expected) < 1e-12
    weight = torch.randn_like(expected)
    for ours, theirs in zip(gradients((actual * weight).sum(), deltas), gradients((expected * weight).sum(), deltas)):
        assert relative_error(ours, theirs) < 1e-10


def test_output_head_that_shares_the_embeddings_weight():
    model, rows = tiny_model("gpt2"), make_rows("gpt2", [0, 2, 1], TASKS)
    assert model.lm_head.weight is model.transformer.wte.weight
    deltas = random_deltas({"lm_head": model.lm_head})
    with applied({"lm_head": model.lm_head}, deltas, rows.task_of_row):
        actual = run_model(model, rows)
    hidden = model.transformer(**rows.inputs).last_hidden_state
    for row, task in enumerate(rows.task.tolist()):
        expected = hidden[row] @ dense_weights(model, deltas, task)["lm_head.weight"].T
        assert relative_error(actual[row], expected) < 1e-12


def test_a_single_task_needs_no_mapping():
    layer, x = nn.Linear(5, 3).double(), torch.randn(4, 2, 5, dtype=torch.float64)
    delta = LowRankDelta(torch.randn(1, 2, 5, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64))
    with applied({"fc": layer}, {"fc": delta}):
        actual = layer(x)
    torch.testing.assert_close(actual, x @ (layer.weight + delta.up[0].T @ delta.down[0]).T + layer.bias)


@pytest.mark.parametrize("task", [[0, 1, 2], [2, 0, 0, 1]], ids=["grouped", "mapped"])
@pytest.mark.parametrize("beams", [1, 3])
def test_beams_stay_next_to_their_row(task, beams):
    delta = random_deltas({"fc": nn.Linear(5, 3)})["fc"]
    x = torch.randn(len(task) * beams, 7, 5, dtype=torch.float64)
    actual = delta.output(x, None if task == [0, 1, 2] else torch.tensor(task))
    for row in range(len(x)):
        of_task = task[row // beams]
        expected = sum(torch.outer(x[row] @ delta.down[of_task, r], delta.up[of_task, r]) for r in range(RANK))
        torch.testing.assert_close(actual[row], expected)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (3, 2, 4, 5), (12, 5)])
def test_inputs_of_any_rank(shape):
    """A layer may see rows, rows of tokens, or all tokens in one dimension."""
    delta = random_deltas({"fc": nn.Linear(5, 3)})["fc"]
    x = torch.randn(shape, dtype=torch.float64)
    expected = torch.cat([part @ (delta.up[task].T @ delta.down[task]).T for task, part in enumerate(x.chunk(3))])
    torch.testing.assert_close(delta.output(x), expected)
    torch.testing.assert_close(delta.output(x, torch.arange(3)), expected)


def test_generation_with_beams(causal_family):
    """Whole beam searches of several edits at once are those of each edit alone under dense weights."""
    model = tiny_model(causal_family, torch.float32)
    model.generation_config.pad_token_id = 0
    layers = {name: layer for name, layer in editable_layers(model).items() if name.endswith(("c_proj", "down_proj"))}
    deltas = random_deltas(layers, dtype=torch.float32)
    prompts, settings = torch.randint(2, 40, (3, 4)), dict(max_new_tokens=4, num_beams=3, do_sample=False)
    with torch.no_grad(), applied(layers, deltas):
        actual = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    for task, prompt in enumerate(prompts):
        edited = tiny_model(causal_family, torch.float32)
        edited.generation_config.pad_token_id = 0
        edited.load_state_dict(dense_weights(model, deltas, task), strict=False)
        expected = edited.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **settings)
        assert actual[task, : expected.shape[1]].tolist() == expected[0].tolist()


@pytest.mark.parametrize("fails", [False, True])
def test_base_is_bit_equal_afterwards(family, fails):
    model, rows = tiny_model(family, torch.bfloat16), make_rows(family, [0, 1, 2], TASKS)
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, run_model(model, rows)
    layers = editable_layers(model)
    try:
        with applied(layers, random_deltas(layers, dtype=torch.float32)):
            assert not torch.equal(run_model(model, rows), logits)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(run_model(model, rows), logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_bfloat16_base_keeps_float32_factors():
    """The sum is rounded to bfloat16 once; factors of 1e-3 are not rounded before that."""
    layer = nn.Linear(8, 8).to(torch.bfloat16)
    x = torch.randn(2, 3, 8).to(torch.bfloat16)
    delta = LowRankDelta(torch.randn(2, 4, 8).requires_grad_(), (1e-3 * torch.randn(2, 4, 8)).requires_grad_())
    with applied({"fc": layer}, {"fc": delta}):
        actual = layer(x)
    expected = torch.stack([row @ (up.T @ down).T for row, up, down in zip(x.float(), delta.up, delta.down)])
    torch.testing.assert_close(delta.output(x), expected)
    assert torch.equal(actual, layer(x) + expected.to(torch.bfloat16))
    actual.sum().backward()
    assert delta.up.grad.dtype == delta.down.grad.dtype == torch.float32


def test_autocast_does_not_round_the_factors():
    layer, x = nn.Linear(8, 8), torch.randn(2, 3, 8)
    delta = LowRankDelta(torch.randn(1, 4, 8), torch.randn(1, 4, 8))
    with torch.autocast("cpu", torch.bfloat16):
        with applied({"fc": layer}, {"fc": delta}):
            actual = layer(x)
        plain = layer(x)
    assert torch.equal(actual, plain + delta.output(x).to(torch.bfloat16))


def test_edits_stack():
    """The edit of an edited model sees the first one."""
    layer, x = nn.Linear(5, 3).double(), torch.randn(3, 2, 5, dtype=torch.float64)
    one, two = (random_deltas({"fc": layer})["fc"] for _ in range(2))
    with applied({"fc": layer}, {"fc": one}), applied({"fc": layer}, {"fc": two}):
        actual = layer(x)
    expected = [x[t] @ (layer.weight + one.dense()[t] + two.dense()[t]).T + layer.bias for t in range(3)]
    torch.testing.assert_close(actual, torch.stack(expected))


def test_layer_that_is_not_there():
    layer = nn.Linear(5, 3)
    deltas = random_deltas({"fc": layer, "gone": layer})
    with pytest.raises(BaseModelMismatchError, match=r"The model has no layer 'gone', which the edit changes"):
        with applied({"fc": layer}, deltas):
            pass
    assert not layer._forward_hooks


def test_dense_norm_and_of_task():
    delta = random_deltas({"fc": nn.Linear(5, 3)})["fc"]
    for task in range(TASKS):
        expected = torch.zeros(3, 5, dtype=torch.float64)
        for r in range(RANK):
            expected = expected + torch.outer(delta.up[task, r], delta.down[task, r])
        torch.testing.assert_close(delta.dense()[task], expected)
        torch.testing.assert_close(delta.norm()[task], expected.square().sum().sqrt())
        alone = delta.of_task(task)
        torch.testing.assert_close(alone.dense()[0], expected.detach())
        assert (alone.tasks, alone.rank) == (1, RANK - (task == 1))
        assert not alone.down.requires_grad
        assert alone.down.untyped_storage().data_ptr() != delta.down.untyped_storage().data_ptr()


def test_rank_zero():
    delta = LowRankDelta(torch.zeros(2, 0, 5), torch.zeros(2, 0, 3))
    assert torch.equal(delta.output(torch.randn(2, 4, 5)), torch.zeros(2, 4, 3))
    assert torch.equal(delta.dense(), torch.zeros(2, 3, 5))
    assert delta.norm().tolist() == [0.0, 0.0]
    assert delta.of_task(1).rank == 0


@pytest.mark.parametrize("task", [[0, 2, 2, 0, 2], [1], []])
def test_packing_ragged_tasks(task):
    rows, task = torch.randn(len(task), 4, requires_grad=True), torch.tensor(task, dtype=torch.long)
    slot, rank = task_slots(task, TASKS)
    packed = pack_tasks(rows, task, TASKS, rank, slot)
    of_task = [[row for row, t in zip(rows, task) if t == each] for each in range(TASKS)]
    assert rank == max(map(len, of_task))
    for each in range(TASKS):
        assert torch.equal(packed[each, : len(of_task[each])], torch.stack([*of_task[each], torch.zeros(4)])[:-1])
        assert not packed[each, len(of_task[each]) :].any()
    weight = torch.randn_like(packed)
    (packed * weight).sum().backward()
    assert torch.equal(rows.grad, weight[task, slot])


@pytest.mark.parametrize("task", [[0, 0, 1, 1, 2, 2], [2, 0, 2, 1]], ids=["grouped", "mapped"])
def test_dense_and_summed_deltas_equal_dense_weights(family, task):
    """A dense delta a task, and a dense delta of all tasks plus a low-rank one of each."""
    model, rows = tiny_model(family), make_rows(family, task, TASKS)
    layers = {name: layer for name, layer in editable_layers(model).items() if name != "lm_head"}
    low = random_deltas(layers)
    base = {
        name: 0.1 * torch.randn(1, *reversed(layer_shape(layer)), dtype=torch.float64) for name, layer in layers.items()
    }
    dense = {name: DenseDelta(delta.dense()) for name, delta in low.items()}
    summed = {name: SumDelta((DenseDelta(base[name]), delta)) for name, delta in low.items()}
    with applied(layers, dense, rows.task_of_row):
        actual = run_model(model, rows)
    assert relative_error(actual, dense_logits(model, low, rows)) < 1e-12
    with applied(layers, summed, rows.task_of_row):
        actual = run_model(model, rows)
    with _shifted(layers, base):
        assert relative_error(actual, dense_logits(model, low, rows)) < 1e-12


@contextmanager
def _shifted(layers: dict[str, nn.Module], base: dict[str, Tensor]):
    """The model with `base` added to its weights, which dense_logits then reads."""
    changes = {name: change[0].T if isinstance(layers[name], Conv1D) else change[0] for name, change in base.items()}
    for name, change in changes.items():
        layers[name].weight.data += change
    yield
    for name, change in changes.items():
        layers[name].weight.data -= change


def test_what_a_dense_and_a_summed_delta_say_of_themselves():
    change, low = torch.randn(3, 4, 2), LowRankDelta(torch.randn(3, 1, 2), torch.randn(3, 1, 4))
    dense, summed = DenseDelta(change), SumDelta((DenseDelta(change[:1]), low))
    factor = torch.tensor([1.0, -2.0, 0.5])
    for delta, whole in ((dense, change), (summed, change[:1] + low.dense())):
        assert (delta.tasks, delta.shape) == (3, (2, 4))
        torch.testing.assert_close(delta.dense(), whole)
        torch.testing.assert_close(delta.norm(), torch.stack([torch.linalg.matrix_norm(each) for each in whole]))
        torch.testing.assert_close(
            delta.scaled(factor).dense(), torch.stack([f * each for f, each in zip(factor, whole)])
        )
        torch.testing.assert_close(delta.of_task(2).tensors()["weight"], whole[2])
    assert summed.rank == dense.rank == 2


@pytest.mark.parametrize("each", [1, 2])
def test_a_dense_delta_of_rows_in_any_order(each):
    """Each row with its own task's ΔW; beam search multiplies rows."""
    delta, x = DenseDelta(torch.randn(3, 4, 2)), torch.randn(5 * each, 6, 2, dtype=torch.bfloat16)
    task = torch.tensor([2, 0, 2, 2, 0])
    expected = torch.stack([row.float() @ delta.weight[task[i // each]].T for i, row in enumerate(x)])
    torch.testing.assert_close(delta.output(x, task), expected)
    torch.testing.assert_close(delta.output(x[:, 0], task), expected[:, 0])
