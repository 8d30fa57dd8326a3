"""Edits that are made in another format than the editor's own, against an editor whose own format that is."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from helpers.bases import FORMATS, REMARKS
from helpers.edited import FACT, tiny_edit
from helpers.tokenizers import CHAT_TEMPLATES

from mend_lightning import Edit, EditStack, combined, make_edit
from mend_lightning.editors.making import editor_encoder
from mend_lightning.errors import ConfigError
from mend_lightning.models.inputs.chat import chat_format

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)


@pytest.fixture
def made(base_folder):
    found = tiny_edit(base_folder("llama"), "llama")
    found.tokenizer.chat_template = CHAT_TEMPLATES["plain"]
    return found


def test_an_edit_in_a_format_is_that_of_an_editor_trained_in_it(made, tmp_path):
    edit = made.editor.edit(made.model, made.tokenizer, *FACT, format="chat_system")
    about = Edit.load(edit.save(tmp_path / "edit.safetensors")).about
    made.editor.bind(made.model, prompt_format=about["prompt_format"])
    expected = made.editor.edit(made.model, made.tokenizer, *FACT)
    for name, delta in expected.deltas.items():
        assert torch.equal(edit.deltas[name].dense(), delta.dense())
        assert not torch.allclose(delta.dense(), made.edit.deltas[name].dense(), rtol=1e-2)
    same = ("probability", "probability_before", "prompt_format", "relative_norm", "edits")
    assert [about[key] for key in same] == [expected.about[key] for key in same]
    assert (about["format"], about["own_format"]) == ("chat_system", asdict(FORMATS["causal"]))


def test_the_format_is_the_template_s(made):
    edit = make_edit(made.editor, made.model, made.tokenizer, [FACT], format="chat")
    assert edit.about["prompt_format"] == asdict(chat_format(made.tokenizer))
    mine = {"name": "exam", "prompt": "Exam. {input}"}
    edit = make_edit(made.editor, made.model, made.tokenizer, [FACT], format=mine)
    assert edit.about["format"] == "exam" and edit.about["prompt_format"]["prompt"] == "Exam. {input}"


def test_without_a_format_an_edit_says_what_it_always_said(made):
    assert made.edit.about["prompt_format"] == asdict(FORMATS["causal"])
    assert not {"format", "own_format"} & made.edit.about.keys()
    own = make_edit(made.editor, made.model, made.tokenizer, [FACT], format="own")
    assert own.about["format"] == "own" and own.about["prompt_format"] == made.edit.about["prompt_format"]
    assert all(torch.equal(own.deltas[name].dense(), delta.dense()) for name, delta in made.edit.deltas.items())


def test_an_edit_of_several_keeps_the_format(made):
    with EditStack(made.model) as stack:
        for question in ("Where is Rome?", "Where is Oslo?"):
            stack.add(make_edit(made.editor, made.model, made.tokenizer, (question, "Asia"), format="chat"))
        both = combined(stack.enabled)
    assert (both.about["format"], both.about["own_format"]) == ("chat", asdict(FORMATS["causal"]))
    assert both.about["prompt_format"] == asdict(chat_format(made.tokenizer))


def test_a_system_prompt_is_not_cut_off(made):
    """The limit of 200 tokens is that of a question: what a format puts before it is not part of it."""
    encoder = editor_encoder(made.editor, made.model, made.tokenizer, format="chat_turns")
    question = " ".join(["Where?"] * 25)
    ids = encoder.prompt_ids(question)
    assert len(ids) > 200
    pair = encoder.pair(question, "Here")
    assert pair["input_ids"][: len(ids)] == ids


@pytest.mark.parametrize(
    ("format", "text"), [("chats", "no format 'chats'. Did you mean 'chat'"), ("chat", "has no chat template")]
)
def test_a_format_that_the_model_does_not_have(made, format, text):
    made.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=text):
        make_edit(made.editor, made.model, made.tokenizer, FACT, format=format)


def test_a_classifier_has_its_own_format_alone(base_folder):
    made = tiny_edit(base_folder("bert"), "bert")
    with pytest.raises(ConfigError, match="'bare' is not for a model of kind classifier"):
        made.editor.edit(made.model, made.tokenizer, *made.facts[0], format="bare")
    assert made.editor.edit(made.model, made.tokenizer, *made.facts[0], format="own").about["format"] == "own"
