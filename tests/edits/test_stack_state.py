"""What a stack lets on a model, and what it says: names, collisions, edits that need each other, other bases."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.edits import hooks, logits, random_edit
from helpers.models import make_rows, relative_error, tiny_model
from torch import nn

from mend_lightning import CollidingEditWarning, EditStack, combined, merge
from mend_lightning.edits.stack import slug
from mend_lightning.edits.stack_state import active_ids
from mend_lightning.errors import BaseModelMismatchError, ConfigError, DependentEditWarning, EditNameError


@pytest.fixture
def llama():
    return tiny_model("llama")


def test_names(llama, tmp_path):
    stack = EditStack(llama)
    path = random_edit(llama, 1, prompt="Where is Lyon?").save(tmp_path / "lyon.v2.safetensors")
    assert stack.add(path) == "lyon.v2"
    assert stack.add(random_edit(llama, 2, prompt="Where is Rome?")) == "where-is-rome-answer-2"
    assert stack.add(random_edit(llama, 2, prompt="Where's  Rome?"), None) == "where-s-rome-answer-2"
    with pytest.raises(EditNameError, match="There is an edit 'lyon.v2' on this model already. Give another name"):
        stack.add(path)
    with pytest.raises(EditNameError, match="name must not be empty"):
        stack.add(random_edit(llama, 3), "")
    with pytest.raises(EditNameError, match=r"no edit 'lyon' on this model; there are \['lyon.v2', "):
        stack.remove("lyon")
    with pytest.raises(EditNameError, match="no edit 'x'"):
        stack.enable("lyon.v2", "x")
    with pytest.raises(EditNameError, match="must have each of"):
        stack.reorder(["lyon.v2"])
    assert len(stack) == 3 and all(each.enabled for each in stack)
    assert repr(stack).startswith("EditStack(LlamaForCausalLM: lyon.v2, where")
    stack.clear()
    assert slug("…") == "edit"


def test_the_same_edit_without_a_name_twice(llama):
    stack = EditStack(llama)
    with pytest.warns(CollidingEditWarning):
        names = [stack.add(random_edit(llama, 1)) for _ in range(3)]
    assert names == ["question-1-answer-1", "question-1-answer-1-2", "question-1-answer-1-3"]


def test_colliding_prompts_are_both_shown(llama):
    stack = EditStack(llama)
    stack.add(random_edit(llama, 1, prompt="Who leads France?"), "old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack.add(random_edit(llama, 2, prompt="Who leads Spain?"), "spain")
    with pytest.warns(
        CollidingEditWarning, match="'old' has 'Who leads France.' -> 'answer 1', 'new' has 'who leads France'"
    ):
        stack.add(random_edit(llama, 3, prompt="who leads France"), "new")
    stack.remove("new")
    stack.disable("old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack.add(random_edit(llama, 4, prompt="Who leads France?"), "newer")


def test_edits_made_on_top_of_others(llama):
    stack = EditStack(llama)
    first = random_edit(llama, 1)
    with pytest.warns(
        DependentEditWarning, match="'later' was made on top of 1 edit.* not on this model .id1.*Add those"
    ):
        stack.add(random_edit(llama, 2, on_top_of=["id1"]), "later")
    stack.remove("later")
    stack.add(first, "first")
    assert active_ids(llama) == ["id1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack.add(random_edit(llama, 2, on_top_of=["id1"]), "later")
    with pytest.warns(DependentEditWarning, match="later: made on top of 'first', which is removed now"):
        stack.remove("first")


def test_edits_that_hold_what_training_added(llama):
    stack = EditStack(llama)
    enn = {"editor": "EnnEditor", "holds_resting": True}
    stack.add(random_edit(llama, 1, **enn), "one")
    with pytest.raises(ConfigError, match="'two' and 'one' both hold what EnnEditor's training adds.* added twice"):
        stack.add(random_edit(llama, 2, **enn), "two")
    stack.add(random_edit(llama, 3), "mend")
    stack.remove("one")
    assert stack.add(random_edit(llama, 2, **enn), "two") == "two"


def test_another_base(llama):
    stack, rows = EditStack(llama), make_rows("llama", [0], 1)
    edit = random_edit(tiny_model("gpt2"), 1)
    with pytest.raises(BaseModelMismatchError, match="which LlamaForCausalLM does not have"):
        stack.add(edit, force=True)
    edit = random_edit(llama, 1)
    before = logits(llama, rows)
    with torch.no_grad():
        for name in edit.deltas:
            llama.get_submodule(name).weight.mul_(1.5)
    with pytest.raises(BaseModelMismatchError, match="other weights .*force=True"):
        stack.add(edit)
    assert not len(stack) and hooks(llama) == 0
    stack.add(edit, force=True)
    assert relative_error(logits(llama, rows), before) > 0.1
    with edit.applied(llama, force=True):
        pass
    stack.clear()


def test_combined_edits_stand_for_their_parts(llama):
    first, second = random_edit(llama, 1), random_edit(llama, 2)
    with EditStack(llama) as stack:
        stack.add(combined([first, second]), "both")
        assert active_ids(llama) == ["id1", "id2"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stack.add(random_edit(llama, 3, on_top_of=["id2"]), "later")
        with pytest.warns(DependentEditWarning, match="later: made on top of 'both'"):
            stack.remove("both")


def test_edits_that_must_not_be_added_up(llama):
    enn = [random_edit(llama, seed, editor="EnnEditor", holds_resting=True) for seed in (1, 2)]
    for add_up in (combined, lambda edits: merge(edits, llama)):
        with pytest.raises(ConfigError, match="2 of the edits hold what EnnEditor's training adds to the base model"):
            add_up(enn)
    assert combined([enn[0], random_edit(llama, 3)]).about["holds_resting"] is True


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_wrapped_model(llama):
    edit = random_edit(llama, 1)
    with pytest.raises(BaseModelMismatchError, match="Give the model inside: its .module"):
        EditStack(nn.DataParallel(llama)).add(edit)
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(BaseModelMismatchError, match="This is a PEFT model: give its get_base_model"):
        EditStack(wrapped).add(edit)
    with EditStack(wrapped.get_base_model()) as stack:
        stack.add(edit)
