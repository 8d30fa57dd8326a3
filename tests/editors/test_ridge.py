"""Ridge aggregation against the dense normal equation, a task at a time in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.models import make_rows, relative_error, spread_parameters, tiny_model
from helpers.reference import ReferenceMend

from mend_lightning.editors import MendEditor
from mend_lightning.editors.factors import Factors, descent, edit_factors
from mend_lightning.editors.ridge import ridge_delta
from mend_lightning.errors import ConfigError

WIDTH, OUT, TASK = 6, 5, [0, 2, 0, 1, 2, 2, 2]


def dense_ridge(keys, u, delta, rate, damping):
    """(Σ_t d_t u_tᵀ)(Σ_t u_t u_tᵀ + λI)⁻¹ with d_t = ΔW_t u_t, from the single tokens' dense ΔW_t."""
    effects = [-rate * torch.outer(delta[t], u[t]) @ keys[t] for t in range(len(keys))]
    right = sum(torch.outer(effect, key) for effect, key in zip(effects, keys))
    gram = sum(torch.outer(key, key) for key in keys)
    return right @ torch.linalg.inv(gram + damping * torch.eye(gram.shape[0], dtype=gram.dtype))


@pytest.mark.parametrize("repeats", [1, 3], ids=["fewer tokens than features", "more tokens than features"])
def test_values_and_gradients_equal_the_normal_equation(repeats):
    task = torch.tensor(TASK * repeats)
    tokens = len(task)
    keys, u = torch.randn(2, tokens, WIDTH, dtype=torch.float64)
    delta = torch.randn(tokens, OUT, dtype=torch.float64)
    # Two tokens with one input: the matrix is singular but for λ.
    keys[2] = keys[0]
    assert bool(torch.bincount(task).max() > WIDTH) is (repeats == 3)
    rate, damping = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (u, delta, rate, damping)]
    ours = ridge_delta(u, delta, Factors(keys, delta.detach(), task, 3), rate, damping).dense()
    expected = torch.stack([
        dense_ridge(keys[task == i], u[task == i], delta[task == i], rate, damping) for i in range(3)
    ])  # fmt: skip
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    weight = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad((each * weight).sum(), leaves) for each in (ours, expected))):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_one_token_and_no_damping_is_the_plain_sum_on_its_own_input():
    """What the sum does to the token's input, the regression does as well; elsewhere it is free."""
    keys, u, delta = torch.randn(1, WIDTH), torch.randn(1, WIDTH), torch.randn(1, OUT)
    factors = Factors(keys, delta, torch.tensor([0]), 1)
    both = [
        make(u, delta, factors, torch.tensor(0.5), *rest).output(keys)
        for make, rest in ((descent, ()), (ridge_delta, (torch.tensor(1e-9),)))
    ]
    torch.testing.assert_close(*both)


def test_almost_equal_inputs_of_many_tokens_do_not_break_float32():
    keys = torch.randn(1, 64) * 30 + 1e-4 * torch.randn(40, 64)
    factors = Factors(keys, torch.randn(40, 8), torch.zeros(40, dtype=torch.long), 1)
    delta = ridge_delta(factors.u, factors.delta, factors, torch.tensor(1e-4), torch.tensor(1e-3))
    assert bool(delta.dense().isfinite().all())


def test_an_editor_with_ridge_is_the_dense_formula(family):
    model, rows = tiny_model(family), make_rows(family, [0, 0, 1], 2)
    editor = spread_parameters(MendEditor.for_model(model, rank=5, ridge=0.4), 0.05)
    factors = edit_factors(model, editor.modules_in(model), rows)[0]
    editor.train()
    editor(factors)
    editor.eval()
    # The layers' statistics grew layer by layer; evaluated, all tokens meet the same ones.
    deltas = editor.make_deltas(model, rows).deltas
    reference = ReferenceMend(editor)
    for index, (name, each) in enumerate(factors.items()):
        transform = next(t for t, group in zip(editor.transforms, editor.groups) if name in group)
        for task in range(2):
            mine = each.task == task
            pairs = zip(transform.u_stats(each.u[mine]).double(), transform.delta_stats(each.delta[mine]).double())
            made = [reference.edit_factors(name, u, delta) for u, delta in pairs]
            u, delta = (torch.stack(column).detach() for column in zip(*made))
            rate, damping = editor.edit_rates[index].double(), editor.log_ridge[index].double().exp()
            expected = dense_ridge(each.u[mine].double(), u, delta, rate, damping)
            assert relative_error(deltas[name].dense()[task].double(), expected) < 1e-4, name


def test_ridge_must_be_positive():
    with pytest.raises(ConfigError, match="ridge is the damping of a regression and must be positive, not 0"):
        MendEditor({"fc": (2, 2)}, ridge=0.0)
