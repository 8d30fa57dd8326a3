"""Replaying the trunk against running every block; recording and replaying leave the model as it was."""

from __future__ import annotations

import pytest
import torch
from helpers.blocks import DECODER_ONLY, OUTSIDE, blocks_of, logits_twice, modules_named, norm_of
from helpers.models import make_batch, make_rows, relative_error, spread_parameters, tiny_model
from helpers.reference import ReferenceMend
from torch import nn

from mend_lightning.editors import MendEditor
from mend_lightning.models.forward import run_trunk as prefix
from mend_lightning.models.forward.logits import run_model
from mend_lightning.models.forward.run_trunk import common_prefix, run_trunk
from mend_lightning.models.forward.trunk import TrunkOutputs, replayed, take_rows
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.layers import default_layers, find_stacks, match_layers
from mend_lightning.training import step
from mend_lightning.training.step import edit_step


def without_replay(monkeypatch) -> None:
    monkeypatch.setattr(step, "run_trunk", lambda model, rows, layers: TrunkOutputs(len(rows)))


def losses_and_gradients(model: nn.Module, editor: MendEditor, batch):
    editor.zero_grad()
    output = edit_step(model, editor, batch)
    output.total(0.1).backward()
    return [output.edit, output.locality, output.inner, *(parameter.grad for parameter in editor.parameters())]


@pytest.mark.parametrize("common", [0, 4])
def test_steps_are_the_same(family, common, monkeypatch):
    model, batch = tiny_model(family), make_batch(family, prefix=common)
    editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=0.01), 0.02).eval()
    replay = losses_and_gradients(model, editor, batch)
    without_replay(monkeypatch)
    for actual, expected in zip(replay, losses_and_gradients(model, editor, batch)):
        assert relative_error(actual, expected) < 2e-5


@pytest.mark.parametrize("part", [slice(None), slice(1, 3)], ids=["all", "some"])
@pytest.mark.parametrize("trunk_blocks", [1, 2])
def test_logits_are_the_same(family, trunk_blocks, part):
    model, rows = tiny_model(family), make_rows(family, [0, 1, 1, 2], 3)
    blocks = len(next(iter(find_stacks(model).values())))
    layers = modules_named(model, default_layers(model, last_blocks=blocks - trunk_blocks))
    again, plain, ran = logits_twice(model, rows, layers, part)
    assert relative_error(again, plain) < 1e-12
    # In an encoder-decoder the decoder sees an edited encoder, and runs.
    assert ran == len(blocks_of(model)) - trunk_blocks


def test_rows_by_index():
    model, rows = tiny_model("llama"), make_rows("llama", [0, 1, 2], 3)
    layers, index = modules_named(model, default_layers(model)), torch.tensor([2, 0, 0])
    expected = run_model(model, rows)[index]
    with replayed(run_trunk(model, rows, layers), index):
        assert relative_error(run_model(model, rows.part(index)), expected) < 1e-12


@pytest.mark.parametrize("common", [3, 4, 6])
def test_common_beginnings_run_once(causal_family, common, monkeypatch):
    model, rows = tiny_model(causal_family), make_rows(causal_family, [0, 1, 2, 2], 3, prefix=common)
    common = common_prefix(rows)
    layers, lengths = modules_named(model, default_layers(model)), []
    norm_of(blocks_of(model)[0]).register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[:2]))
    run_trunk(model, rows, layers)
    length = rows.labels.shape[1]
    expected = [(4, length)] if common < prefix.SHORTEST_PREFIX else [(1, common), (4, length - common)]
    assert [tuple(shape) for shape in lengths] == expected
    again, plain, _ = logits_twice(model, rows, layers)
    assert relative_error(again, plain) < 1e-12


def test_common_beginning_leaves_a_token_to_every_row():
    """Also to a row that is nothing but the common beginning, and padding is no beginning."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 8, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    rows = Rows({"input_ids": ids, "attention_mask": mask}, ids, torch.tensor([0, 1]), 2)
    assert common_prefix(rows) == 3
    padded = Rows({"input_ids": ids * 0, "attention_mask": mask * 0 + mask[1]}, ids, torch.tensor([0, 1]), 2)
    assert common_prefix(padded) == 3


def test_common_beginning_under_edits_in_block_zero(causal_family):
    model, rows = tiny_model(causal_family), make_rows(causal_family, [0, 1, 2], 3, prefix=5)
    layers = modules_named(model, [name for name in default_layers(model, last_blocks=4) if ".0." in name])
    assert not run_trunk(model, rows, layers).stacks
    again, plain, _ = logits_twice(model, rows, layers)
    assert torch.equal(again, plain)


def test_edits_in_block_zero(family):
    """Nothing is left to replay: where the encoder is edited, the decoder runs too."""
    model, rows = tiny_model(family), make_rows(family, [0, 1, 2], 3)
    layers = modules_named(model, default_layers(model, last_blocks=9))
    assert not run_trunk(model, rows, layers).stacks
    again, plain, ran = logits_twice(model, rows, layers)
    assert torch.equal(again, plain)
    assert ran == len(blocks_of(model))


def test_decoder_only_edits_replay_the_whole_encoder(encoder_decoder_family):
    model, rows = tiny_model(encoder_decoder_family), make_rows(encoder_decoder_family, [0, 1, 2, 2], 3)
    layers = modules_named(model, match_layers(model, DECODER_ONLY[encoder_decoder_family]))
    again, plain, ran = logits_twice(model, rows, layers)
    assert relative_error(again, plain) < 1e-12
    assert ran == 1


@pytest.mark.parametrize("family", list(OUTSIDE))
def test_layers_outside_any_block_replay_all_blocks(family):
    model, rows = tiny_model(family), make_rows(family, [0, 1, 2], 3)
    again, plain, ran = logits_twice(model, rows, modules_named(model, OUTSIDE[family]))
    assert relative_error(again, plain) < 1e-12
    assert ran == 0


@pytest.mark.parametrize("family", list(OUTSIDE))
def test_step_on_layers_outside_any_block(family):
    """The head of a language model runs on gathered positions, which are no rows of tokens."""
    model, batch = tiny_model(family), make_batch(family, prefix=4)
    editor = spread_parameters(MendEditor.for_model(model, OUTSIDE[family], rank=4, edit_rate=0.01), 0.02).eval()
    expected = ReferenceMend(editor).step(model, batch, training=False)
    actual = edit_step(model, editor, batch)
    assert actual.edit.tolist() == pytest.approx(torch.stack(expected.edit).tolist(), rel=1e-5)
    assert actual.locality.tolist() == pytest.approx(torch.stack(expected.locality).tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_restored(family, fails):
    model, rows = tiny_model(family), make_rows(family, [0, 1], 2)
    trunk = run_trunk(model, rows, modules_named(model, default_layers(model)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    try:
        with replayed(trunk, slice(None)):
            assert any("forward" in block.__dict__ for block in blocks_of(model))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_trunk_pass_that_fails_leaves_no_hook():
    model, rows = tiny_model("llama"), make_rows("llama", [0, 1], 2)
    rows.inputs["input_ids"][0, 0] = 10_000
    with pytest.raises(IndexError):
        run_trunk(model, rows, modules_named(model, default_layers(model)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_forward_of_the_users_comes_back():
    """Other libraries put a `forward` of their own into an instance."""
    model, rows = tiny_model("llama"), make_rows("llama", [0, 1], 2)
    block, calls = model.model.layers[0], []
    plain = block.forward

    def own(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    block.forward = own
    trunk = run_trunk(model, rows, modules_named(model, default_layers(model)))
    with replayed(trunk, slice(None)):
        run_model(model, rows)
    assert block.__dict__["forward"] is own
    assert len(calls) == 1


def test_rows_that_do_not_fit_restore_the_model():
    model, rows = tiny_model("llama"), make_rows("llama", [0, 1], 2)
    trunk = run_trunk(model, rows, modules_named(model, default_layers(model)))
    with pytest.raises(IndexError):
        with replayed(trunk, torch.tensor([7])):
            pass
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_take_rows_of_whatever_a_block_returns():
    value = (torch.arange(3), [torch.arange(6).view(3, 2), None], torch.ones(4, 3), torch.tensor(5), "kept")
    taken = take_rows(value, 3, slice(1, 3))
    assert taken[0].tolist() == [1, 2]
    assert taken[1][0].tolist() == [[2, 3], [4, 5]]
    assert taken[1][1] is None
    assert taken[2].shape == (4, 3)
    assert (taken[3].item(), taken[4]) == (5, "kept")
