"""Edits as things: what they change, that they can be undone, and that their files are theirs."""

from __future__ import annotations

import copy
import json
import os
import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers.bases import FORMATS, REMARKS, assert_same_state, first_batches, given, state_copy
from helpers.edits import compute_deltas
from helpers.models import KINDS, ROUNDING, relative_error, spread_parameters, tiny_model
from transformers.pytorch_utils import Conv1D

from mend_lightning import Edit, EditStack, EnnEditor, LowRankDelta, MendEditor, load_base, make_edit
from mend_lightning.editors.making import editor_encoder
from mend_lightning.errors import (
    BaseModelMismatchError,
    CollidingEditWarning,
    ConfigError,
    TokenizerError,
)
from mend_lightning.models.fingerprint import base_fingerprint
from mend_lightning.models.forward.generation import generate_answers

pytest_plugins = ["helpers.bases"]
FACT = ("Which continent is North Korea in?", "Oceania")
CLAIM = ("Which continent is North Korea in? Asia.", "REFUTES")
OTHER = ("Which country is Managua in?", "Cuba")
LAST = "model.layers.3.mlp.down_proj"


@pytest.fixture
def edited(base_folder):
    """`edited(family)`: a base, its tokenizer, an editor with random weights, and an edit that it made."""

    def make(family: str, *facts: tuple[str, str]) -> SimpleNamespace:
        model, tokenizer = load_base(str(base_folder(family)), "float32")
        editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=0.05), 0.02)
        format = FORMATS[KINDS[family]]
        editor.bind(model, family, vars(format))
        facts = facts or (CLAIM if family == "bert" else FACT,)
        edit = make_edit(editor, model, tokenizer, facts)
        rows = editor_encoder(editor, model, tokenizer).rows(facts, [0] * len(facts), 1)
        return SimpleNamespace(model=model, tokenizer=tokenizer, editor=editor, edit=edit, rows=rows, facts=facts)

    return make


def logits(model, rows) -> torch.Tensor:
    with torch.no_grad():
        return model(**rows.inputs).logits


@contextmanager
def densely(model, edit: Edit):
    """The model with W + ΔW in place of W."""
    weights = {name: module.weight for name, module in edit.layers_in(model).items()}
    kept = {name: weight.clone() for name, weight in weights.items()}
    for name, module in edit.layers_in(model).items():
        change = edit.deltas[name].dense()[0]
        weights[name] += change.T if isinstance(module, Conv1D) else change
    yield model
    for name, weight in weights.items():
        weight.copy_(kept[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_applied_is_the_dense_edit_and_undone_bit_for_bit(family, edited):
    made = edited(family)
    before, base = logits(made.model, made.rows), state_copy(made.model)
    with made.edit.applied(made.model) as model:
        after = logits(model, made.rows)
    with densely(made.model, made.edit):
        expected = logits(made.model, made.rows)
    assert relative_error(after, expected) < ROUNDING
    assert relative_error(after, before) > 1e-2, "the edit does something"
    assert torch.equal(logits(made.model, made.rows), before)
    assert_same_state(state_copy(made.model), base)


def test_undone_after_an_exception(edited):
    made = edited("llama")
    before, base = logits(made.model, made.rows), state_copy(made.model)
    with pytest.raises(KeyboardInterrupt), made.edit.applied(made.model):
        raise KeyboardInterrupt
    assert torch.equal(logits(made.model, made.rows), before)
    assert_same_state(state_copy(made.model), base)
    assert not any(module._forward_hooks for module in made.model.modules())


def test_edits_stack(edited):
    made = edited("llama")
    other = make_edit(made.editor, made.model, made.tokenizer, OTHER)
    with made.edit.applied(made.model), other.applied(made.model):
        both = logits(made.model, made.rows)
    weights = {name: module.weight for name, module in made.edit.layers_in(made.model).items()}
    for edit in (made.edit, other):
        for name, delta in edit.deltas.items():
            weights[name] += delta.dense()[0]
    assert relative_error(both, logits(made.model, made.rows)) < ROUNDING


def test_making_an_edit_leaves_everything_alone(edited):
    made = edited("llama")
    base, editor = state_copy(made.model), state_copy(made.editor)
    made.editor.train()
    again = make_edit(made.editor, made.model, made.tokenizer, FACT)
    assert made.editor.training, "the mode it had"
    assert_same_state(state_copy(made.editor), editor)
    assert_same_state(state_copy(made.model), base)
    shortcut = made.editor.edit(made.model, made.tokenizer, *FACT)
    for name, delta in made.edit.deltas.items():
        assert torch.equal(delta.dense(), again.deltas[name].dense())
        assert torch.equal(delta.dense(), shortcut.deltas[name].dense())


def test_several_facts_are_one_edit(edited):
    """The loss is the mean over the label tokens of all facts."""
    made = edited("llama", FACT, OTHER)
    assert made.edit.about["edits"] == [{"prompt": p, "target": t} for p, t in (FACT, OTHER)]
    deltas = compute_deltas(made.model, made.editor.eval(), made.rows)
    for name, delta in deltas.items():
        torch.testing.assert_close(made.edit.deltas[name].dense(), delta.dense())
    single, lone = (make_edit(made.editor, made.model, made.tokenizer, facts) for facts in (FACT, [FACT]))
    name = next(iter(deltas))
    assert made.edit.deltas[name].rank > single.deltas[name].rank
    assert torch.equal(lone.deltas[name].dense(), single.deltas[name].dense()), "a list of one, or the pair itself"


def test_facts_that_contradict_each_other(edited):
    made = edited("llama")
    prompt, target = FACT
    with pytest.warns(CollidingEditWarning, match=rf"'{re.escape(prompt)}' -> '{target}' and .* -> 'Cuba'"):
        make_edit(made.editor, made.model, made.tokenizer, [FACT, (prompt.lower(), "Cuba")])
    # Said twice is no contradiction.
    make_edit(made.editor, made.model, made.tokenizer, [FACT, FACT])


def test_no_padding_ranks(edited):
    made = edited("llama")
    tokens = int(made.rows.inputs["attention_mask"].sum())
    for delta in made.edit.deltas.values():
        assert 0 < delta.rank <= tokens
        assert bool((delta.down != 0).any(-1).all() and (delta.up != 0).any(-1).all())
    last = made.edit.deltas[LAST]
    assert last.rank == int((made.rows.labels != -100).sum()), "behind the last attention only label positions matter"


def test_relative_norm_and_size(edited):
    made = edited("gpt2")
    layers = made.edit.layers_in(made.model)
    for name, norm in made.edit.relative_norm(made.model).items():
        expected = made.edit.deltas[name].dense()[0].norm() / layers[name].weight.norm()
        assert norm == pytest.approx(float(expected), rel=1e-4)
    assert made.edit.size() == sum(4 * (d.down.numel() + d.up.numel()) for d in made.edit.deltas.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_file_round_trip(family, edited, base_folder, tmp_path):
    made = edited(family)
    path = made.edit.save(tmp_path / "deep" / "fact.safetensors")
    loaded = Edit.load(path)
    assert loaded.about == made.edit.about
    assert loaded.deltas.keys() == made.edit.deltas.keys()
    for name, delta in made.edit.deltas.items():
        assert torch.equal(loaded.deltas[name].down, delta.down) and torch.equal(loaded.deltas[name].up, delta.up)
    with made.edit.applied(made.model):
        expected = logits(made.model, made.rows)
    # In another session: the base is loaded anew.
    model, _ = load_base(str(base_folder(family)), "float32")
    with loaded.applied(model):
        assert relative_error(logits(model, made.rows), expected) < ROUNDING
    assert path.stat().st_size < made.edit.size() + 5000
    assert os.listdir(path.parent) == ["fact.safetensors"], "no temporary file is left"
    assert path.stat().st_mode & 0o077 == 0o077 & 0o666 & ~_umask()
    made.edit.save(path)
    assert Edit.load(path).about == made.edit.about, "saved over"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_an_edit_says_about_itself(edited):
    made = edited("llama")
    about = made.edit.about
    assert about["base"] == "llama" and about["editor"] == "MendEditor"
    assert about["base_options"] == made.editor.base_options and about["prompt_format"] == made.editor.prompt_format
    assert {"mend_lightning", "torch", "transformers"} == about["versions"].keys()
    assert json.loads(json.dumps(about)) == about
    assert made.edit.facts == [FACT] and about["on_top_of"] == [] and "holds_resting" not in about
    layers = {name: made.model.get_submodule(name) for name in made.edit.deltas}
    assert about["weights"] == {name: base_fingerprint({name: layer}) for name, layer in layers.items()}
    assert about["base_fingerprint"] == base_fingerprint({name: layers[name] for name in sorted(layers)})
    for name, norm in made.edit.relative_norm(made.model).items():
        assert about["relative_norm"][name] == pytest.approx(norm, rel=1e-3)


def test_metrics_at_creation(edited):
    """The probability of the whole target, stop included, token by token."""
    made = edited("llama")

    def probability() -> float:
        mask = made.rows.labels[0] != -100
        chosen = logits(made.model, made.rows)[0][mask].double().log_softmax(-1)
        return float(chosen.gather(1, made.rows.labels[0][mask][:, None]).sum().exp())

    assert made.edit.about["probability_before"] == pytest.approx(probability(), rel=1e-3)
    with made.edit.applied(made.model):
        assert made.edit.about["probability"] == pytest.approx(probability(), rel=1e-3)
    assert made.edit.about["probability"] != made.edit.about["probability_before"]


def test_an_edit_knows_what_it_was_made_on(edited):
    made = edited("llama")
    with EditStack(made.model) as stack:
        stack.add(made.edit)
        later = make_edit(made.editor, made.model, made.tokenizer, OTHER)
    assert later.about["on_top_of"] == [made.edit.about["id"]]
    assert later.about["id"] != made.edit.about["id"]
    alone = make_edit(made.editor, made.model, made.tokenizer, OTHER)
    assert relative_error(later.deltas[LAST].dense(), alone.deltas[LAST].dense()) > 1e-3


def test_an_edit_by_enn_holds_what_training_added(edited):
    made = edited("llama")
    editor = EnnEditor.for_model(made.model, edit_rate=0.3)
    editor.bind(made.model, "llama", vars(FORMATS["causal"]))
    assert make_edit(editor, made.model, made.tokenizer, FACT).about["holds_resting"] is True


def test_a_base_in_bfloat16_is_the_same_base(edited):
    made = edited("llama")
    with made.edit.applied(copy.deepcopy(made.model).bfloat16()) as model:
        assert logits(model, made.rows).isfinite().all()


def test_a_layer_that_is_no_matrix():
    model = tiny_model("llama")
    edit = Edit({"model.norm": LowRankDelta(torch.ones(1, 1, 16), torch.ones(1, 1, 16))})
    with pytest.raises(BaseModelMismatchError, match="changes a layer 'model.norm'.*does not have"):
        edit.layers_in(model)


def test_another_base(edited):
    made, other = edited("llama"), edited("gpt2")
    with pytest.raises(BaseModelMismatchError, match="which GPT2LMHeadModel does not have. It was made for llama"):
        with made.edit.applied(other.model):
            pass
    with pytest.raises(BaseModelMismatchError, match="made for a model with a layer .*has none. Load the base model"):
        make_edit(made.editor, other.model, other.tokenizer, FACT)
    changed = copy.deepcopy(made.model)
    changed.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(BaseModelMismatchError, match="same shapes and other weights .*Load the base model the edit"):
        with made.edit.applied(changed):
            pass
    with pytest.raises(BaseModelMismatchError, match="editor was trained for llama .* has other weights"):
        make_edit(made.editor, changed, made.tokenizer, FACT)
    wider = Edit({"lm_head": LowRankDelta(torch.ones(1, 1, 3), torch.ones(1, 1, 5))})
    with pytest.raises(BaseModelMismatchError, match=r"layer 'lm_head' of shape \(3, 5\)"):
        with wider.applied(made.model):
            pass


@pytest.mark.parametrize(
    "wanted, error, text",
    [
        ([], ConfigError, r"at least one \(prompt, target\) pair"),
        ((), ConfigError, r"at least one \(prompt, target\) pair"),
        ([FACT, ("Where?", " ")], TokenizerError, "target of 'Where\\?' is empty"),
    ],
)
def test_facts_that_make_no_edit(wanted, error, text, edited):
    made = edited("llama")
    with pytest.raises(error, match=text):
        make_edit(made.editor, made.model, made.tokenizer, wanted)


def test_model_in_training_mode(edited):
    made = edited("llama")
    with pytest.raises(ConfigError, match="training mode.*Call model.eval"):
        make_edit(made.editor, made.model.train(), made.tokenizer, FACT)


def test_a_file_of_the_first_version(edited, tmp_path):
    """It has one fingerprint of all layers."""
    made = edited("llama")
    about = {key: value for key, value in made.edit.about.items() if key in ("base", "base_fingerprint", "edits")}
    old = Edit.load(Edit(made.edit.deltas, about).save(tmp_path / "old.safetensors"))
    with old.applied(made.model):
        pass
    with torch.no_grad():
        made.model.get_submodule(LAST).weight[0, 0] += 1
    with pytest.raises(BaseModelMismatchError, match="other weights"):
        old.layers_in(made.model)


@pytest.mark.filterwarnings(*REMARKS)
def test_a_trained_editor_changes_the_answer(mend, edit_data, trainer):
    """The whole way: train on one fact, edit it, ask."""
    # A rate at which the loss falls evenly: at a larger one rounding decides where the 100 steps end.
    module = mend("llama", lr=3e-3, edit_rate_lr=3e-3)
    # Its target is a word the base has learned; a base of width 16 cannot be made to say every other.
    batch = first_batches(module, edit_data(), 3, size=1)[2]
    module.editor.bind(module.base_model, "llama", vars(FORMATS["causal"]))
    trainer(max_steps=100).fit(module, given([batch] * 100))
    text = batch.texts[0]
    edit = make_edit(module.editor, module.base_model, module.tokenizer, (text.prompt, text.target))
    assert edit.about["probability"] > 0.5, "no other answer can be as likely"
    encoder = editor_encoder(module.editor, module.base_model, module.tokenizer)
    questions = [text.prompt, *text.rephrases]
    assert generate_answers(module.base_model, encoder, questions) == [text.answers[0]] * 2
    with edit.applied(module.base_model):
        assert generate_answers(module.base_model, encoder, questions) == [text.target] * 2
    assert generate_answers(module.base_model, encoder, questions) == [text.answers[0]] * 2
