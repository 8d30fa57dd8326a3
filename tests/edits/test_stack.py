"""Edits that stay on a model, against weights that are really changed; and what is left when they are gone: nothing."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch
from helpers.bases import assert_same_state, state_copy
from helpers.edits import changed, compute_deltas, hooks, logits, random_edit
from helpers.models import KINDS, ROUNDING, make_rows, relative_error, spread_parameters, tiny_model
from torch import nn

from mend_lightning import EditStack, MendEditor
from mend_lightning.edits.stack_state import _dtype_beside


@pytest.fixture
def llama():
    return tiny_model("llama")


def test_a_stack_is_the_sum_of_its_edits(family):
    model, rows = tiny_model(family), make_rows(family, [0, 0, 0], 1)
    base, before = state_copy(model), logits(model, rows)
    edits = [random_edit(model, seed, dense=seed == 2) for seed in range(4)]
    stack = EditStack(model)
    names = [stack.add(edit) for edit in edits]
    assert relative_error(logits(changed(tiny_model(family), *edits), rows), before) > 0.1
    assert relative_error(logits(model, rows), logits(changed(tiny_model(family), *edits), rows)) < ROUNDING
    stack.disable(names[1], names[3])
    assert relative_error(logits(model, rows), logits(changed(tiny_model(family), edits[0], edits[2]), rows)) < ROUNDING
    stack.enable(names[3])
    stack.remove(names[0])
    stack.reorder([names[3], names[1], names[2]])
    assert stack.names == [names[3], names[1], names[2]]
    assert relative_error(logits(model, rows), logits(changed(tiny_model(family), *edits[2:]), rows)) < ROUNDING
    assert relative_error(logits(changed(tiny_model(family), stack.combined()), rows), logits(model, rows)) < ROUNDING
    stack.disable(*stack.names)
    assert torch.equal(logits(model, rows), before), "edits that are off change no bit"
    stack.clear()
    assert torch.equal(logits(model, rows), before) and hooks(model) == 0
    assert_same_state(state_copy(model), base)


def test_a_thousand_edits_in_random_order(llama):
    rows = make_rows("llama", [0, 0], 1)
    base, before = state_copy(llama), logits(llama, rows)
    stack, order, on = EditStack(llama), random.Random(0), {}
    edits = [random_edit(llama, seed, layers=2) for seed in range(1000)]
    waiting = list(range(1000))
    order.shuffle(waiting)
    while waiting or on:
        if waiting and (not on or order.random() < 0.6):
            seed = waiting.pop()
            on[stack.add(edits[seed])] = seed
        else:
            name = order.choice(list(on))
            assert stack.remove(name).facts == edits[on.pop(name)].facts
        if order.random() < 0.01:
            # Made in float64 anew: a sum that is kept up to date by adding and subtracting would drift.
            expected = logits(changed(copy.deepcopy(tiny_model("llama")), *(edits[seed] for seed in on.values())), rows)
            assert relative_error(logits(llama, rows), expected) < ROUNDING
    assert torch.equal(logits(llama, rows), before) and hooks(llama) == 0
    assert_same_state(state_copy(llama), base)


@pytest.mark.parametrize("how", ["greedy", "beams", "sampling", "no cache"])
@pytest.mark.parametrize("family", [name for name, kind in KINDS.items() if kind != "classifier"])
def test_generation(family, how):
    settings = {
        "greedy": {},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "sampling": {"do_sample": True, "num_return_sequences": 2},
        "no cache": {"use_cache": False},
    }[how]
    model, rows = tiny_model(family), make_rows(family, [0, 0, 0], 1)
    # Whole rows: a causal model's padding belongs on the left.
    ids = rows.inputs["input_ids"][:, :5]
    edits = [random_edit(model, seed) for seed in (1, 2)]
    start = {"decoder_start_token_id": 0} if KINDS[family] == "encoder_decoder" else {}

    def answers(model: nn.Module) -> list[list[int]]:
        torch.manual_seed(0)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, pad_token_id=0, **start, **settings).tolist()

    before = answers(model)
    expected = answers(changed(model, *edits))
    assert expected != before
    with EditStack(model) as stack:
        for edit in edits:
            stack.add(edit)
        assert answers(model) == expected
    assert answers(model) == before and hooks(model) == 0


def test_a_block_that_fails_leaves_nothing(llama):
    rows = make_rows("llama", [0], 1)
    before = logits(llama, rows)
    with pytest.raises(KeyboardInterrupt), EditStack(llama) as stack:
        stack.add(random_edit(llama, 1))
        raise KeyboardInterrupt
    assert hooks(llama) == 0 and torch.equal(logits(llama, rows), before) and not len(EditStack(llama))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupt_while_an_edit_is_added(llama, monkeypatch, at):
    """Ctrl-C comes between any two hooks: the edit is not there, those before it are."""
    rows, stack = make_rows("llama", [0], 1), EditStack(llama)
    first, second = random_edit(llama, 1, layers=2), random_edit(llama, 2, layers=6)
    stack.add(first, "first")
    expected, count = logits(llama, rows), hooks(llama)
    calls, register = [], nn.Module.register_forward_hook

    def interrupted(module, hook, **settings):
        handle = register(module, hook, **settings)
        calls.append(module)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return handle

    monkeypatch.setattr(nn.Module, "register_forward_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stack.add(second, "second")
    monkeypatch.undo()
    assert stack.names == ["first"] and hooks(llama) == count
    assert torch.equal(logits(llama, rows), expected)
    stack.add(second, "second")
    assert relative_error(logits(llama, rows), logits(changed(tiny_model("llama"), first, second), rows)) < ROUNDING
    stack.clear()
    assert hooks(llama) == 0


def test_threads(llama):
    """Several threads add, ask and remove at once; each sees a whole state, and nothing is left."""
    rows, stack, failures = make_rows("llama", [0], 1), EditStack(llama), []
    before = logits(llama, rows)

    def work(number: int) -> None:
        try:
            for turn in range(15):
                seed = 100 * number + turn
                name = stack.add(random_edit(llama, seed), f"{number}.{turn}")
                with random_edit(llama, seed + 50).applied(llama):
                    assert logits(llama, rows).isfinite().all()
                stack.disable(name)
                assert not stack[name].enabled
                stack.remove(name)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert hooks(llama) == 0 and not len(stack) and torch.equal(logits(llama, rows), before)


def test_a_pass_waits_for_a_change_that_is_under_way(llama):
    """The first pass after a change adds edits up, and must not see half of it."""
    rows, stack, seen = make_rows("llama", [0], 1), EditStack(llama), []
    before = logits(llama, rows)
    stack.add(random_edit(llama, 1), "one")
    asking = threading.Thread(target=lambda: seen.append(logits(llama, rows)))
    with stack._state.lock:
        asking.start()
        asking.join(0.5)
        assert not seen, "it did not wait"
        stack.remove("one")
    asking.join()
    assert torch.equal(seen[0], before)


@pytest.mark.parametrize("count", [2, 30])
@pytest.mark.parametrize("first", ["inference mode", "autocast"])
def test_the_first_pass_decides_nothing(llama, first, count):
    """What the edits of a layer add up to is kept from the first pass on, in whatever mode that ran."""
    rows, stack = make_rows("llama", [0, 0], 1), EditStack(llama)
    edits = [random_edit(llama, seed, layers=3) for seed in range(count)]
    for edit in edits:
        stack.add(edit)
    with torch.inference_mode() if first == "inference mode" else torch.autocast("cpu", torch.bfloat16):
        llama(**rows.inputs)
    expected = changed(tiny_model("llama"), *edits)
    assert relative_error(logits(llama, rows), logits(expected, rows)) < ROUNDING
    gradients = []
    for model in (llama, expected):
        embedded = model.get_input_embeddings()(rows.inputs["input_ids"]).requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(embedded.grad)
    assert relative_error(*gradients) < ROUNDING


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
def test_layers_that_peft_wraps_meanwhile(llama):
    peft = pytest.importorskip("peft")
    rows, edit = make_rows("llama", [0, 0], 1), random_edit(llama, 0)
    before, stack = logits(llama, rows), EditStack(llama)
    stack.add(edit)
    edited = logits(llama, rows)
    peft.get_peft_model(llama, peft.LoraConfig(target_modules=list(edit.deltas), r=2))
    assert relative_error(logits(llama, rows), edited) < ROUNDING, "a new LoRA is zero"
    stack.clear()
    assert torch.equal(logits(llama, rows), before) and hooks(llama) == 0
    stack.add(edit)
    assert relative_error(logits(llama, rows), edited) < ROUNDING, "once, not twice"
    stack.clear()
    assert hooks(llama) == 0


def test_the_stack_belongs_to_the_model(llama):
    rows = make_rows("llama", [0], 1)
    before, edit = logits(llama, rows), random_edit(llama, 1)
    EditStack(llama).add(edit, "one")
    # That stack object is gone; its edit is not.
    assert relative_error(logits(llama, rows), logits(changed(tiny_model("llama"), edit), rows)) < ROUNDING
    again = EditStack(llama)
    assert again.names == ["one"] and "one" in again and len(again) == 1 and again["one"].edit.facts == edit.facts
    other = copy.deepcopy(llama)
    assert relative_error(logits(other, rows), logits(llama, rows)) < ROUNDING, "a copy of an edited model is edited"
    again.clear()
    assert torch.equal(logits(llama, rows), before)
    assert EditStack(other).names == ["one"]
    EditStack(other).remove("one")
    assert relative_error(logits(other, rows), before) < ROUNDING and hooks(other) == 0


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_editing_an_edited_model(family):
    """An editor that is used on a stack makes what it makes on a model whose weights were changed."""
    model, rows = tiny_model(family), make_rows(family, [0], 1)
    editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=0.05), 0.02).eval()
    edit = random_edit(model, 1)
    alone = compute_deltas(model, editor, rows)
    with EditStack(model) as stack:
        stack.add(edit)
        made = compute_deltas(model, editor, rows)
    expected = compute_deltas(changed(tiny_model(family), edit), editor, rows)
    for name, delta in expected.items():
        assert relative_error(made[name].dense(), delta.dense()) < ROUNDING
        assert relative_error(alone[name].dense(), delta.dense()) > 1e-2


def test_edits_move_with_the_model(llama):
    """To another dtype here; a device is told apart in the same way."""
    rows = make_rows("llama", [0], 1)
    with EditStack(llama) as stack:
        stack.add(random_edit(llama, 1))
        expected = logits(llama, rows)
        llama.float()
        assert relative_error(logits(llama, rows).double(), expected) < ROUNDING
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(logits(llama, rows).double(), expected) < 0.1


def test_a_block_takes_off_what_was_added_in_it(llama):
    rows, stack = make_rows("llama", [0], 1), EditStack(llama)
    stack.add(random_edit(llama, 1), "before")
    expected = logits(llama, rows)
    with EditStack(llama) as inner:
        inner.add(random_edit(llama, 2), "outer")
        with inner:
            inner.add(random_edit(llama, 3), "innermost")
        assert inner.names == ["before", "outer"]
    assert stack.names == ["before"] and torch.equal(logits(llama, rows), expected)


def test_a_part_of_an_edited_model_is_another_model(llama):
    EditStack(llama).add(random_edit(llama, 1), "whole")
    assert not len(EditStack(llama.model)) and EditStack(llama).names == ["whole"]


@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_beside_a_bfloat16_layer(family, count):
    """Edits are computed in bfloat16, as the layer is: as near to the truth in float64 as weights rounded once to bfloat16."""
    model, truth, rows = tiny_model(family), tiny_model(family), make_rows(family, [0, 0, 0], 1)
    edits = [random_edit(model, seed) for seed in range(count)]
    expected = logits(changed(truth, *edits), rows)
    rounded = logits(changed(truth, *edits).bfloat16(), rows).double()
    assert relative_error(expected, logits(truth, rows)) > 0.1
    model.bfloat16()
    with EditStack(model) as stack:
        for edit in edits:
            stack.add(edit, force=True)
        assert relative_error(logits(model, rows).double(), expected) < 3 * relative_error(rounded, expected)


def test_what_edits_are_computed_in():
    half, x = torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(1, 2)
    assert _dtype_beside(half, half) == torch.bfloat16
    for other in (x, x.half(), x.double()):
        assert _dtype_beside(other, other) == torch.float32
    assert _dtype_beside(x, half) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert _dtype_beside(half, half) == torch.float32
