"""Edits that keep off questions, from text to file: what is given, what is found, what is refused."""

from __future__ import annotations

import json

import pytest
from helpers.bases import FORMATS

from mend_lightning import Edit, MendEditor, load_base, make_edit
from mend_lightning.data.neighbors import listed_names
from mend_lightning.editors import FineTuning
from mend_lightning.editors.constraints import kept_inputs
from mend_lightning.editors.making import editor_encoder
from mend_lightning.errors import ConfigError

pytest_plugins = ["helpers.bases"]
FACT = ("Which continent is North Korea in?", "Africa")


@pytest.fixture(scope="module")
def tiny(base_folder):
    return load_base(str(base_folder("llama")), "float32")


def bound(model, editor_class=MendEditor, **settings) -> MendEditor:
    editor = editor_class.for_model(model, **settings)
    editor.bind(model, "tiny", vars(FORMATS["causal"]))
    return editor


def test_a_kept_question_sees_nothing_of_the_edit(tiny):
    model, tokenizer = tiny
    last = [name for name in bound(model, rank=2).layers][-1]
    editor = bound(model, layers=[last], rank=2, edit_rate=0.1)
    keep = ["Which country is Managua in?", "Which continent is Peru in?"]
    free, kept = make_edit(editor, model, tokenizer, FACT), make_edit(editor, model, tokenizer, FACT, keep=keep)
    assert kept.about["keep"] == keep and "contrasts" not in kept.about and "keep" not in free.about
    rows = editor_encoder(editor, model, tokenizer).rows([(question, "x") for question in keep], [0, 0], 1)
    inputs = kept_inputs(model, editor.modules_in(model), rows)[last]
    seen = [float((edit.deltas[last].output(inputs)).norm()) for edit in (free, kept)]
    assert seen[1] < 0.03 * seen[0]


def test_neighbors_are_in_the_metadata_and_survive_the_file(tiny, tmp_path):
    model, tokenizer = tiny
    editor = bound(model, rank=2, edit_rate=0.1, contrasts=3)
    edit = editor.edit(model, tokenizer, *FACT)
    contrasts = edit.about["contrasts"]
    assert len(contrasts) == 3 and all("North Korea" not in question for question in contrasts)
    assert all(question.startswith("Which continent is ") and question.endswith(" in?") for question in contrasts)
    assert Edit.load(edit.save(tmp_path / "edit.safetensors")).about["contrasts"] == contrasts
    assert "contrasts" not in editor.edit(model, tokenizer, *FACT, contrasts=0).about
    assert len(editor.edit(model, tokenizer, *FACT, contrasts=1).about["contrasts"]) == 1


def test_a_subject_that_no_list_knows_can_be_given(tiny):
    model, tokenizer = tiny
    editor = bound(model, rank=2, edit_rate=0.1, contrasts=2)
    asked = ("which river is in qorvath?", "Asia")
    assert "contrasts" not in editor.edit(model, tokenizer, *asked).about
    contrasts = editor.edit(model, tokenizer, *asked, subject="qorvath").about["contrasts"]
    assert len(contrasts) == 2 and all(question.startswith("which river is in ") for question in contrasts)


def test_names_of_the_training_facts_come_first_and_are_saved(tiny, tmp_path):
    model, tokenizer = tiny
    editor = bound(model, rank=2, edit_rate=0.1, contrasts=2)
    editor.names = {"realm": ("North Korea", "Ruritania", "Graustark")}
    loaded = MendEditor.from_pretrained(editor.save_pretrained(tmp_path))
    assert loaded.names == editor.names
    contrasts = loaded.edit(model, tokenizer, *FACT).about["contrasts"]
    assert sorted(contrasts) == ["Which continent is Graustark in?", "Which continent is Ruritania in?"]


def test_an_editor_without_names_has_no_key_for_them(tiny, tmp_path):
    folder = bound(tiny[0], rank=2).save_pretrained(tmp_path)
    assert "names" not in json.loads((folder / "editor.json").read_text())
    assert MendEditor.from_pretrained(folder).names == {}


def test_what_is_refused(tiny):
    model, tokenizer = tiny
    tuning, editor = bound(model, FineTuning, max_steps=1), bound(model, rank=2)
    for settings in ({"keep": ["Why?"]}, {"contrasts": 1}):
        with pytest.raises(ConfigError, match="FineTuning cannot keep its edits off questions"):
            make_edit(tuning, model, tokenizer, FACT, **settings)
    with pytest.raises(ConfigError, match="'South Korea' does not stand in the prompt"):
        editor.edit(model, tokenizer, *FACT, contrasts=1, subject="South Korea")
    with pytest.raises(ConfigError, match="2 subjects are given for 1 fact"):
        make_edit(editor, model, tokenizer, FACT, contrasts=1, subjects=["a", "b"])
    for made in (
        lambda: bound(model, rank=2, contrasts=-1),
        lambda: editor.edit(model, tokenizer, *FACT, contrasts=-1),
    ):
        with pytest.raises(ConfigError, match="contrasts is a number of questions; it must be 0 or more, not -1"):
            made()
    with pytest.raises(ConfigError, match="is to be edited and to be kept"):
        editor.edit(model, tokenizer, *FACT, keep=[FACT[0].lower()])
    with pytest.raises(ConfigError, match="A subject is what contrasts are made with"):
        editor.edit(model, tokenizer, *FACT, subject="North Korea")


def test_no_neighbor_is_kept_twice_or_is_edited(tiny):
    model, tokenizer = tiny
    editor = bound(model, rank=2, edit_rate=0.1)
    facts = [("Which continent is Peru in?", "Asia"), ("Which continent is Chile in?", "Asia")]
    edit = make_edit(editor, model, tokenizer, facts, keep=["Where is Japan?"], contrasts=6)
    contrasts = edit.about["contrasts"]
    assert len(set(contrasts)) == len(contrasts) == 12
    assert not any(name in question for question in contrasts for name in ("Peru", "Chile", "Japan"))
    assert any(name in contrasts[0] for name in listed_names()["country"])
