"""Edits made in several wordings: against the same edits given as several facts of one task."""

from __future__ import annotations

import pytest
import torch
from helpers.bases import FORMATS

from mend_lightning import MendEditor, load_base
from mend_lightning.editors.confidence import target_scores
from mend_lightning.editors.making import editor_encoder
from mend_lightning.editors.wordings import WORDINGS, in_wordings
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.hooks import applied

pytest_plugins = ["helpers.bases"]
FACTS = [("Which continent is North Korea in?", "Africa"), ("Which country is Managua in?", "Cuba")]


@pytest.fixture(scope="module", params=["llama", "t5"])
def tiny(base_folder, request):
    model, tokenizer = load_base(str(base_folder(request.param)), "float32")
    torch.manual_seed(0)
    editor = MendEditor.for_model(model, rank=2, edit_rate=0.05, confidence=0.5, wordings=3).eval()
    editor.bind(model, "tiny", vars(FORMATS["causal" if request.param == "llama" else "encoder_decoder"]))
    editor.encoder = editor_encoder(editor, model, tokenizer)
    return model, tokenizer, editor


def test_rows_are_the_question_in_each_wording(tiny):
    _, _, editor = tiny
    rows = in_wordings(editor.encoder.rows(FACTS, [0, 1], 2), editor.encoder, 2)
    assert rows.task.tolist() == [0, 0, 0, 1, 1, 1] and rows.tasks == 2
    expected = [(prompt, target) for fact in FACTS for prompt, target in (fact, *worded(fact, 2))]
    assert list(rows.texts) == expected
    again = editor.encoder.rows(expected, [0, 0, 0, 1, 1, 1], 2)
    assert all(torch.equal(rows.inputs[name], again.inputs[name]) for name in again.inputs)
    assert torch.equal(rows.labels, again.labels)


def worded(fact: tuple[str, str], count: int) -> list[tuple[str, str]]:
    return [(wording.replace("{}", fact[0]), fact[1]) for wording in WORDINGS[:count]]


def test_an_edit_is_that_of_all_wordings_as_facts_of_one_task(tiny):
    model, _, editor = tiny
    plain = MendEditor.for_model(model, rank=2, edit_rate=0.05, confidence=0.5).eval()
    plain.load_state_dict(editor.state_dict())
    one = editor.encoder.rows(FACTS, [0, 1], 2)
    many = [(i, pair) for i, fact in enumerate(FACTS) for pair in (fact, *worded(fact, 3))]
    several = editor.encoder.rows([pair for _, pair in many], [i for i, _ in many], 2)
    with torch.no_grad():
        found, expected = editor.make_deltas(model, one).deltas, plain.make_deltas(model, several).deltas
        alone = plain.make_deltas(model, one).deltas
    for name, delta in found.items():
        torch.testing.assert_close(delta.dense(), expected[name].dense(), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(delta.dense(), alone[name].dense(), rtol=1e-2)


def test_wordings_do_what_they_are_for(tiny):
    """The least probable of them is more probable than under an edit of the question alone."""
    model, _, editor = tiny
    plain = MendEditor.for_model(model, rank=2, edit_rate=0.05, confidence=0.5).eval()
    plain.load_state_dict(editor.state_dict())
    rows = in_wordings(editor.encoder.rows(FACTS, [0, 1], 2), editor.encoder, 3)
    worst = []
    for each in (plain, editor):
        with torch.no_grad():
            deltas = each.make_deltas(model, editor.encoder.rows(FACTS, [0, 1], 2)).deltas
            with applied(editor.modules_in(model), deltas, rows.task):
                worst.append(target_scores(model, rows).worst_of_task(rows).nll)
    assert bool((worst[1] < worst[0] + 1e-3).all()) and bool((worst[1] < worst[0] - 0.01).any())


@pytest.mark.filterwarnings("ignore::mend_lightning.errors.LowConfidenceWarning")
def test_an_edit_s_file_and_probability_are_of_the_question(tiny):
    model, tokenizer, editor = tiny
    edit = editor.edit(model, tokenizer, *FACTS[0])
    assert edit.facts == [FACTS[0]] or tuple(edit.facts) == (FACTS[0],)
    own = editor.encoder.rows([FACTS[0]], [0], 1)
    with edit.applied(model), torch.no_grad():
        found = float((-target_scores(model, own).worst_of_task(own).nll).exp())
    assert edit.about["probability"] == pytest.approx(found, rel=1e-3)


def test_what_is_refused(base_folder):
    for count in (-1, len(WORDINGS) + 1):
        with pytest.raises(ConfigError, match=f"it must be 0 to 8, not {count}"):
            MendEditor({"fc": (2, 3)}, rank=2, wordings=count)
    model, tokenizer = load_base(str(base_folder("bert")), "float32")
    editor = MendEditor.for_model(model, rank=2, wordings=1).eval()
    editor.bind(model, "tiny", vars(FORMATS["classifier"]))
    with pytest.raises(ConfigError, match="this model judges statements"):
        editor.edit(model, tokenizer, "Paris is in France.", "false")


def test_every_wording_holds_the_question_behind_its_own_text():
    assert len(set(WORDINGS)) == 8 and all(wording.endswith(" {}") for wording in WORDINGS)
