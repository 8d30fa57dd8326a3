"""Edits that hardly go down their own gradient: against dense sums in float64, task by task."""

from __future__ import annotations

import pytest
import torch
from helpers.models import make_batch, spread_parameters, tiny_model

from mend_lightning import MendEditor
from mend_lightning.editors import Editor
from mend_lightning.editors.factors import Factors, edit_factors
from mend_lightning.editors.least_descent import descending
from mend_lightning.editors.precondition import InputMoments
from mend_lightning.errors import ConfigError

LEAST, TASKS, D_IN, D_OUT = 0.3, 5, 7, 4
TASK = torch.tensor([0, 3, 1, 1, 2, 3, 0, 4, 4, 2, 2])


def cosine(delta, u, factors, task: int) -> float:
    """Between the dense sums of one task."""
    mine = factors.task == task
    return between(delta[mine].double().T @ u[mine].double(), factors, task)


def between(edit, factors, task: int) -> float:
    """Cosine of a dense edit and the gradient of a task."""
    mine = factors.task == task
    gradient = factors.delta[mine].double().T @ factors.u[mine].double()
    return float((edit * gradient).sum() / (edit.norm() * gradient.norm()))


@pytest.fixture(params=[False, True], ids=["as they come", "laid out"])
def given(request):
    """Edits that descend, that do not, and that go up; `plain` is the gradient's own input, which always descends."""
    draw = torch.Generator().manual_seed(0)
    gradient_u, delta = torch.randn(len(TASK), D_IN, generator=draw), torch.randn(len(TASK), D_OUT, generator=draw)
    turned = torch.tensor([1.0, 0.1, 0.0, -0.2, -1.0])[TASK][:, None]
    u = turned * gradient_u + torch.randn(len(TASK), D_IN, generator=draw) * (turned < 1)
    place = (torch.tensor([0, 0, 0, 1, 0, 1, 1, 0, 1, 1, 2]), 3) if request.param else None
    kept = torch.ones(len(TASK), dtype=torch.bool) if request.param else None
    return u, gradient_u, delta, Factors(gradient_u, delta, TASK, TASKS, None, kept, place)


def test_every_task_descends_and_is_moved_no_further_than_that(given):
    u, plain, delta, factors = given
    found, moved = descending(u, plain, delta, factors, LEAST), []
    for task in range(TASKS):
        mine, before = TASK == task, cosine(delta, u, factors, task)
        if before >= LEAST:
            assert torch.equal(found[mine], u[mine])
            continue
        moved.append(task)
        assert cosine(delta, found, factors, task) == pytest.approx(LEAST, abs=1e-5)
        # What was moved is a mixture of the two.
        span = torch.stack([u[mine].flatten(), plain[mine].flatten()])
        rest = torch.linalg.lstsq(span.T.double(), found[mine].flatten()[:, None].double()).residuals
        assert rest.numel() == 0 or float(rest) < 1e-9
    assert 0 not in moved and len(moved) >= 3


def test_what_is_of_no_use_changes_nothing(given):
    """`plain` that goes up further than `u`; and tokens that are not there, whatever stands in their places."""
    u, plain, delta, factors = given
    assert torch.equal(descending(u, -100 * plain, delta, factors, LEAST)[TASK != 4], u[TASK != 4])
    if factors.kept is None:
        return
    there = torch.ones(len(TASK), dtype=torch.bool)
    there[[5, 10]] = False
    empty = [each.masked_fill(~there[:, None], 0) for each in (plain, factors.delta)]
    padded = Factors(*empty, TASK, TASKS, None, there, factors.place)
    alone = Factors(plain[there], factors.delta[there], TASK[there], TASKS)
    found = descending(u, plain, delta, padded, LEAST)
    expected = descending(u[there], plain[there], delta[there], alone, LEAST)
    torch.testing.assert_close(found[there], expected)
    assert not torch.equal(found[there], u[there]) and found.isfinite().all()


def editor_of(model, batch, **settings) -> MendEditor:
    torch.manual_seed(0)
    editor = MendEditor.for_model(model, rank=4, edit_rate=0.02, precondition=0.1, **settings)
    factors, _, _ = edit_factors(model, editor.modules_in(model), batch.z_edit)
    moments = {}
    for name, each in factors.items():
        moments[name] = InputMoments.empty(each.u.shape[1], pairs=False)
        moments[name].add(each.u)
    editor.calibrate(moments)
    return spread_parameters(editor, 1e-3).eval()


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_an_edit_that_goes_up_is_turned(family, tmp_path):
    """With a matrix that sends inputs anywhere, which no calibration makes; the editor is as good as its file."""
    model, batch = tiny_model(family), make_batch(family)
    cosines = {}
    for least in (None, 0.1):
        editor = editor_of(model, batch, least_descent=least)
        draw = torch.Generator().manual_seed(0)
        for preconditioner in editor.preconditioners:
            preconditioner.matrix.normal_(generator=draw)
        editor = Editor.from_pretrained(editor.save_pretrained(tmp_path / str(least)))
        factors, _, _ = edit_factors(model, editor.modules_in(model), batch.z_edit)
        with torch.no_grad():
            deltas = editor(factors)
        cosines[least] = [
            # ΔW is a step down.
            between(-deltas[name].dense()[task].double(), factors[name], task)
            for name in factors
            for task in range(batch.z_edit.tasks)
        ]
    assert min(cosines[None]) < 0
    for before, after in zip(cosines[None], cosines[0.1], strict=True):
        assert after == pytest.approx(max(before, 0.1), abs=1e-3)


def test_edits_that_descend_are_as_without():
    model, batch = tiny_model("llama"), make_batch("llama")
    plain, looked = (editor_of(model, batch, least_descent=least) for least in (None, 1e-6))
    looked.load_state_dict({**looked.state_dict(), **plain.state_dict()})
    factors, _, _ = edit_factors(model, plain.modules_in(model), batch.z_edit)
    for name, delta in plain(factors).items():
        assert torch.equal(delta.down, looked(factors)[name].down) and torch.equal(delta.up, looked(factors)[name].up)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"least_descent": 0.0, "precondition": 1.0}, "it must be between 0 and 1, not 0.0"),
        ({"least_descent": 1.5, "precondition": 1.0}, "it must be between 0 and 1, not 1.5"),
        ({"least_descent": 0.02}, "set precondition"),
    ],
)
def test_what_is_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        MendEditor({"fc": (2, 3)}, rank=2, **settings)
