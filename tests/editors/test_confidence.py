"""How far an edit goes: against dense weights, a row and a scale at a time, and the interpolation in plain Python."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.bases import FORMATS
from helpers.edits import compute_deltas
from helpers.models import KINDS, make_batch, make_rows, relative_error, spread_parameters, tiny_model
from helpers.reference import log_probabilities, rows_of_task
from transformers.pytorch_utils import Conv1D

from mend_lightning import MendEditor, load_base
from mend_lightning.editors.confidence import (
    SCALES,
    STEPS,
    WITHIN,
    TargetScores,
    best_scale,
    confident_scales,
    first_crossing,
)
from mend_lightning.editors.making import editor_encoder, make_edit
from mend_lightning.errors import ConfigError, LowConfidenceWarning
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.inputs.prompts import PromptFormat
from mend_lightning.training.step import edit_step

pytest_plugins = ["helpers.bases"]
C_EDIT = 0.1


def make_editor(model, **settings) -> MendEditor:
    """Near the identity, where small edits help."""
    editor = MendEditor.for_model(model, rank=4, edit_rate=0.02, **settings)
    return spread_parameters(editor, 1e-3)


def slow_scores(model, editor, deltas, rows, task: int, scale: float) -> tuple[float, float]:
    """−log p of the least probable target of a task, and of the least probable end of one, with `W + scale ΔW` in the model."""
    modules, weights = dict(model.named_modules()), {}
    for name in editor.layers:
        change = (scale * deltas[name].up[task].T @ deltas[name].down[task]).detach().double()
        weights[f"{name}.weight"] = modules[name].weight + (change.T if isinstance(modules[name], Conv1D) else change)
    sums, ends = [], []
    for row in rows_of_task(rows, task):
        log_p = log_probabilities(model, row, weights)
        tokens = [-float(log_p[position, target]) for position, target in row.labels]
        sums.append(sum(tokens))
        ends.append(tokens[-1])
    return max(sums), max(ends)


def slow_nll(*args) -> float:
    return slow_scores(*args)[0]


def crossing(scales: list[float], nll: list[float], wanted: float) -> float:
    """The first crossing, on straight lines between points of a log-log plot."""
    index = next(i for i, value in enumerate(nll) if value <= wanted)
    if index == 0:
        return scales[0]
    (x0, y0), (x1, y1) = ((math.log(scales[i]), math.log(nll[i])) for i in (index - 1, index))
    return math.exp(x0 + (x1 - x0) * (y0 - math.log(wanted)) / (y0 - y1))


def slow_scale(scores, confidence: float) -> float:
    """What the search finds, one scale after another; `scores(scale)` as `slow_scores`."""
    wanted, found = -math.log(confidence), [scores(scale) for scale in SCALES]
    for index, (nll, _) in enumerate(found):
        if nll <= wanted and index == 0:
            return SCALES[0]
        if nll <= wanted:
            low, high = SCALES[index - 1 : index + 1]
            tried = [low, *(low * step for step in STEPS), high]
            return crossing(tried, [scores(scale)[0] for scale in tried], wanted)
    ending = [i for i, (_, end) in enumerate(found) if end <= math.log(2)] or range(len(SCALES))
    best = min(found[i][0] for i in ending)
    return SCALES[next(i for i in ending if found[i][0] <= WITHIN * best)]


@pytest.mark.parametrize("confidence", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("edits", [1, 2])
def test_scales_are_the_slow_ones(family, confidence, edits):
    model, rows = tiny_model(family), make_batch(family, edits=edits).z_edit
    editor = make_editor(model).eval()
    layers = editor.modules_in(model)
    with torch.no_grad():
        deltas = compute_deltas(model, editor, rows)
    scales = confident_scales(model, layers, deltas, rows, run_trunk(model, rows, layers), confidence).scale
    for task in range(rows.tasks):
        slow = slow_scale(lambda scale, t=task: slow_scores(model, editor, deltas, rows, t, scale), confidence)
        assert float(scales[task]) == pytest.approx(slow, rel=1e-3)


@pytest.mark.parametrize("factor", [2.0**-6, 2.0**6])
def test_a_rate_far_too_small_or_too_large_is_made_up_for(factor):
    """The edit has the size that its answer needs, whatever rate it started from."""
    model, rows = tiny_model("llama"), make_rows("llama", [0], 1)
    editor = make_editor(model).eval()
    with torch.no_grad():
        deltas = compute_deltas(model, editor, rows)
        nll = [slow_nll(model, editor, deltas, rows, 0, scale) for scale in (SCALES[0], 1.0)]
        assert nll[1] < 0.9 * nll[0], "the edit must help"
        editor.set_confidence(math.exp(-sum(nll) / 2))
        usual = compute_deltas(model, editor, rows)
        editor.edit_rates.data.mul_(factor)
        far = compute_deltas(model, editor, rows)
    for name in editor.layers:
        assert relative_error(far[name].dense(), usual[name].dense()) < 0.02


def test_an_edit_that_overflows_reaches_nothing():
    model, rows = tiny_model("llama"), make_rows("llama", [0], 1)
    editor = make_editor(model).eval()
    layers = editor.modules_in(model)
    with torch.no_grad():
        deltas = {name: each.scaled(1e30) for name, each in compute_deltas(model, editor, rows).items()}
    scale = confident_scales(model, layers, deltas, rows, run_trunk(model, rows, layers), 0.9)
    assert float(scale.scale) in SCALES and not bool(scale.reached)


def test_where_no_size_is_enough_an_answer_that_ends_is_preferred():
    scales = torch.tensor([1.0, 2.0, 4.0])[:, None]
    nll = torch.tensor([5.0, 3.0, 2.0])[:, None]
    never, late = torch.tensor([3.0, 2.0, 0.8])[:, None], torch.tensor([0.1, 0.9, 0.8])[:, None]
    assert best_scale(scales, TargetScores(nll, never)).item() == 4, "none ends: the most probable"
    assert best_scale(scales, TargetScores(nll, late)).item() == 1, "the only one that ends"
    little = torch.tensor([2.5, 2.1, 2.0])[:, None]
    assert best_scale(scales, TargetScores(little, 0 * little)).item() == 1, "twice the size for a tenth is harm"


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_an_edit_stops_at_its_confidence(family):
    """What the search promises, with the interpolation's error: measured with dense weights."""
    model, rows = tiny_model(family), make_rows(family, list(range(6)), 6)
    free, reached = make_editor(model).eval(), 0
    with torch.no_grad():
        largest = compute_deltas(model, free, rows)
    for task in range(6):
        nll = [slow_nll(model, free, largest, rows, task, scale) for scale in SCALES]
        if min(nll) < 0.9 * nll[0]:
            confidence = math.exp(-(min(nll) + nll[0]) / 2)
            bound = make_editor(model, confidence=confidence).eval()
            bound.load_state_dict(free.state_dict())
            with torch.no_grad():
                stopped = compute_deltas(model, bound, rows)
            found = slow_nll(model, bound, stopped, rows, task, 1.0)
            assert found == pytest.approx(-math.log(confidence), rel=0.1)
            reached += 1
    assert reached >= 2, "the case must occur"


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_a_step_is_that_of_an_editor_with_the_scaled_rates(family):
    """Of one task, the scale is a factor of all edit rates, and a constant to the gradient."""
    model, batch = tiny_model(family), make_batch(family, tasks=1)
    free, bound = make_editor(model).eval(), make_editor(model, confidence=0.3).eval()
    bound.load_state_dict(free.state_dict())
    layers = free.modules_in(model)
    with torch.no_grad():
        deltas = compute_deltas(model, free, batch.z_edit)
    trunk = run_trunk(model, batch.z_edit, layers)
    scale = float(confident_scales(model, layers, deltas, batch.z_edit, trunk, 0.3).scale)
    assert scale != pytest.approx(1, abs=0.05), "the search must matter"
    free.edit_rates.data.mul_(scale)
    outs = [edit_step(model, editor, batch) for editor in (free, bound)]
    for name in ("edit", "locality", "inner"):
        torch.testing.assert_close(getattr(outs[1], name), getattr(outs[0], name), rtol=1e-5, atol=1e-7)
    for out in outs:
        out.total(C_EDIT).backward()
    for (name, expected), actual in zip(free.named_parameters(), bound.parameters()):
        factor = scale if name == "edit_rates" else 1.0
        assert relative_error(actual.grad, factor * expected.grad) < 1e-4, name


def test_first_crossing_never_leaves_the_scales():
    scales = torch.tensor(SCALES)[:, None].expand(-1, 50)
    found = first_crossing(scales, 10 * torch.rand(scales.shape), 2.0)
    assert bool(((found >= SCALES[0] * 0.999) & (found <= SCALES[-1] * 1.001)).all())
    assert first_crossing(scales, torch.zeros(scales.shape), 2.0).tolist() == pytest.approx([SCALES[0]] * 50)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 1.5, -0.2])
def test_confidence_must_be_a_probability(confidence):
    with pytest.raises(ConfigError, match=f"must be between 0 and 1, not {confidence}"):
        MendEditor({"fc": (2, 3)}, rank=2, confidence=confidence)


def test_it_is_saved_with_the_editor(tmp_path):
    editor = MendEditor({"fc": (2, 3)}, rank=2, confidence=0.8)
    assert MendEditor.from_pretrained(editor.save_pretrained(tmp_path)).confidence == 0.8
    description = json.loads((tmp_path / "editor.json").read_text())
    del description["settings"]["confidence"]
    (tmp_path / "editor.json").write_text(json.dumps(description))
    assert MendEditor.from_pretrained(tmp_path).confidence is None, "an editor from before there was one"


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_edit_says_how_probable_its_answer_became(family, base_folder):
    # The base knows this one, and an editor that was not trained makes it less sure.
    fact = ("Which continent is North Korea in?", "Asia")
    model, tokenizer = load_base(str(base_folder(family)), "float32")
    editor = spread_parameters(MendEditor.for_model(model, rank=2, edit_rate=0.1), 0.02)
    editor.bind(model, "tiny", vars(FORMATS[KINDS[family]]))
    edit = make_edit(editor, model, tokenizer, fact)
    (row,) = rows_of_task(editor_encoder(editor, model, tokenizer).rows([fact], [0], 1), 0)

    @torch.no_grad()
    def probability() -> float:
        log_p = log_probabilities(model, row)
        return math.exp(sum(float(log_p[position, target]) for position, target in row.labels))

    before = probability()
    with edit.applied(model):
        assert edit.about["probability"] == pytest.approx(probability(), abs=1e-4)
    assert abs(edit.about["probability"] - before) > 0.01


def test_an_edit_that_cannot_reach_it_warns(base_folder):
    model, tokenizer = load_base(str(base_folder("llama")), "float32")
    editor = MendEditor.for_model(model, rank=2, edit_rate=1e-9, confidence=0.9)
    editor.bind(model, "tiny", vars(PromptFormat("Q: {input}\nA:", stop="\n")))
    with pytest.warns(LowConfidenceWarning, match=r"with probability 0\.\d\d; the editor aims at 0\.9"):
        make_edit(editor, model, tokenizer, ("Which city is the capital of France?", "Zagreb"))
