"""What calibration collects: against one row, one token at a time, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.bases import REMARKS, first_batches, given
from helpers.models import KINDS, ROUNDING, make_batch, relative_error, tiny_model
from torch.nn.functional import pad

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors import MendEditor
from mend_lightning.editors.precondition import InputMoments
from mend_lightning.errors import ConfigError
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows
from mend_lightning.models.layers import select_layers
from mend_lightning.training.calibration import collect_moments

pytest_plugins = ["helpers.bases"]
TASKS = 3


def with_answers(rows: Rows) -> Rows:
    """Two labels at the end of every row, which tell its task."""
    if rows.labels.shape[1] == 1:
        return rows
    labels = torch.full_like(rows.labels, IGNORED_LABEL)
    for index, (task, length) in enumerate(zip(rows.task.tolist(), lengths(rows))):
        labels[index, length - 2 : length] = torch.tensor([5 + task, 9])
    return replace(rows, labels=labels)


def lengths(rows: Rows) -> list[int]:
    """Of the sequences that the labels belong to."""
    mask = rows.inputs.get("decoder_attention_mask", rows.inputs["attention_mask"])
    return mask.sum(1).tolist()


def batch_of(family: str, seed: int, prefix: int = 0) -> EditBatch:
    batch = make_batch(family, TASKS, seed=seed, prefix=prefix)
    return EditBatch(*map(with_answers, (batch.z_edit, batch.x_out, batch.x_in)))


def padded_decoder(rows: Rows) -> Rows:
    """An encoder-decoder's rows with the decoder's side padded to the length of the encoder's."""
    more = (0, rows.inputs["input_ids"].shape[1] - rows.labels.shape[1])
    names = ("decoder_input_ids", "decoder_attention_mask")
    inputs = {**rows.inputs, **{name: pad(rows.inputs[name], more) for name in names}}
    return replace(rows, inputs=inputs, labels=pad(rows.labels, more, value=IGNORED_LABEL))


def slow_inputs(model, layer, rows: Rows) -> list[torch.Tensor]:
    """`[tokens, d_in]` of every row, run alone and without padding."""
    found = []
    handle = layer.register_forward_pre_hook(lambda module, args: found.append(args[0].reshape(-1, args[0].shape[-1])))
    for index in range(len(rows)):
        inputs = {}
        for side in ("", "decoder_"):
            if f"{side}input_ids" in rows.inputs:
                mask = rows.inputs[f"{side}attention_mask"][index].bool()
                inputs[f"{side}input_ids"] = rows.inputs[f"{side}input_ids"][index][mask][None]
        model(**inputs)
    handle.remove()
    return found


def outer_sum(lefts, rights) -> torch.Tensor:
    return sum(torch.outer(a, b) for a, b in zip(lefts, rights))


def expected_moments(model, layer, batches: list[EditBatch], decoding: bool) -> dict[str, tuple[int, torch.Tensor]]:
    tokens, answers, left, right = [], [], [], []
    for batch in batches:
        inputs = {name: slow_inputs(model, layer, getattr(batch, name)) for name in ("z_edit", "x_in", "x_out")}
        for rows in inputs.values():
            tokens += [token for row in rows for token in row]
            answers += [token for row in rows for token in row[-2:]]
        for i, edit in enumerate(inputs["z_edit"]):
            for j, rephrase in enumerate(inputs["x_in"]):
                if batch.z_edit.task[i] == batch.x_in.task[j]:
                    left, right = left + list(edit[-2:]), right + list(rephrase[-2:])
    found = {"all": (len(tokens), outer_sum(tokens, tokens))}
    if decoding:
        found["answers"] = len(answers), outer_sum(answers, answers)
        found["pairs"] = len(left), (outer_sum(left, right) + outer_sum(right, left)) / 2
        found["paired"] = 2 * len(left), outer_sum(left, left) + outer_sum(right, right)
    return found


@pytest.mark.parametrize("prefix", [0, 5])
def test_moments_are_the_slow_ones(family, prefix):
    model = tiny_model(family)
    layers = select_layers(model)
    batches = [batch_of(family, seed, prefix) for seed in (0, 1)]
    moments: dict[str, InputMoments] = {}
    for batch in batches:
        collect_moments(model, layers, batch, moments)
    for name, layer in layers.items():
        decoding = KINDS[family] == "causal" or "decoder" in name
        expected = expected_moments(model, layer, batches, decoding)
        for part in ("all", "answers", "pairs", "paired"):
            count, products = expected.get(part, (0, torch.zeros_like(moments[name].all.products)))
            found = getattr(moments[name], part)
            assert int(found.count) == count, (name, part)
            # Collected from float32 copies of the inputs.
            assert relative_error(found.products, products) < 1e-5, (name, part)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_pairs_are_left_out_where_nobody_asks_for_them():
    """Two matrices a layer are saved, and the rest is the same."""
    model = tiny_model("gpt2")
    layers = select_layers(model)
    full: dict[str, InputMoments] = {}
    lean: dict[str, InputMoments] = {}
    collect_moments(model, layers, batch_of("gpt2", 0), full)
    collect_moments(model, layers, batch_of("gpt2", 0), lean, pairs=False)
    for name, each in lean.items():
        assert each.pairs is None and each.paired is None
        assert torch.equal(each.second(), full[name].second())


def test_rephrases_of_other_tasks_are_no_pairs():
    """Several edits a task, two of them with the same answer, and a rephrase of none of them."""
    model = tiny_model("gpt2")
    batch = batch_of("gpt2", 0)
    labels = batch.x_in.labels.clone()
    labels[labels == 5 + 1] = 30
    batch = replace(batch, x_in=replace(batch.x_in, labels=labels))
    moments: dict[str, InputMoments] = {}
    layers = select_layers(model)
    collect_moments(model, layers, batch, moments)
    # Two rephrases of two tokens in each of the other two tasks.
    assert all(int(each.pairs.count) == 8 for each in moments.values())


def test_an_encoder_as_long_as_its_decoder_has_no_answers():
    """Lengths do not tell the two apart."""
    model = tiny_model("t5")
    layers = select_layers(model)
    short = batch_of("t5", 0)
    batch = EditBatch(*map(padded_decoder, (short.z_edit, short.x_out, short.x_in)))
    assert batch.z_edit.labels.shape == batch.z_edit.inputs["input_ids"].shape
    moments: dict[str, InputMoments] = {}
    collect_moments(model, layers, batch, moments)
    for name, each in moments.items():
        assert bool(each.answers.count) == ("decoder" in name), name


def test_an_editor_is_calibrated_with_them(family):
    model = tiny_model(family)
    editor = MendEditor.for_model(model, rank=2, precondition=0.1, rephrase_ridge=0.1)
    plain = MendEditor.for_model(model, rank=2, precondition=0.1)
    for each in (editor, plain):
        moments: dict[str, InputMoments] = {}
        collect_moments(model, each.modules_in(model), batch_of(family, 0), moments)
        each.calibrate(moments)
    for name, ours, other in zip(editor.layers, editor.preconditioners, plain.preconditioners):
        assert bool(ours.calibrated)
        decoding = KINDS[family] == "causal" or "decoder" in name
        assert (relative_error(ours.matrix, other.matrix) > ROUNDING) == decoding, name


@pytest.mark.filterwarnings(*REMARKS)
def test_preconditioning_needs_a_data_module(mend, edit_data, trainer, tmp_path):
    module = mend("llama", precondition=0.1)
    batch = first_batches(module, edit_data(), 1)[0]
    with pytest.raises(ConfigError, match="this fit has no data module. Pass an EditDataModule"):
        trainer(max_steps=1).fit(module, given([batch]))
    trainer(max_steps=1).fit(module, edit_data())
    assert module.editor.calibrated
    assert MendEditor.from_pretrained(module.editor.save_pretrained(tmp_path)).calibrated


@pytest.mark.filterwarnings(*REMARKS)
def test_fit_estimates_the_regression_on_rephrases(mend, edit_data, trainer):
    matrices = {}
    for ridge in (None, 0.1):
        module = mend("llama", precondition=0.1, rephrase_ridge=ridge)
        trainer(max_steps=1).fit(module, edit_data())
        matrices[ridge] = [each.matrix for each in module.editor.preconditioners]
    assert not any(torch.allclose(a, b) for a, b in zip(matrices[None], matrices[0.1]))
