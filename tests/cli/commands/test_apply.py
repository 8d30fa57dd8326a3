"""`apply` and `show`: end to end on a tiny base."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from helpers.commandline import assert_says, call
from helpers.edit_commands import FLOAT, OTHER, QUESTION, TARGET, typed
from helpers.edited import CLAIM, Plainly, dense_copy, tiny_edit
from matplotlib.image import imread

from mend_lightning import Edit

pytest_plugins = ["helpers.bases", "helpers.edit_commands"]


def test_apply_asks_base_and_edited_model(tiny):
    result = call("apply", tiny.path, *FLOAT, "--ask", QUESTION, "--ask", OTHER, "--json", "true")
    assert (result.code, result.err) == (0, "")
    lines = [json.loads(f"{{{part}") for part in result.out.split("{")[1:]]
    assert [line["question"] for line in lines] == [QUESTION, OTHER]
    base = Plainly("llama", tiny.model, tiny.tokenizer)
    edited = Plainly("llama", dense_copy(tiny.model, tiny.edit), tiny.tokenizer)
    for line in lines:
        assert (line["old"], line["new"]) == (base.answer(line["question"]), edited.answer(line["question"]))
        assert line["p_old_before"] == pytest.approx(base.probability(line["question"], line["old"]), rel=1e-3)
        assert line["p_new_after"] == pytest.approx(edited.probability(line["question"], line["new"]), rel=1e-3)
        assert line["changed"] == (line["old"] != line["new"])


def test_apply_several_edits(tiny, tmp_path):
    """They add up, in whatever folders files of one name lie."""
    (tmp_path / "other").mkdir()
    other = replace(tiny.edit, about={**tiny.edit.about, "edits": [{"prompt": OTHER, "target": "Cuba"}]})
    path = other.save(tmp_path / "other" / tiny.path.name)
    result = call("apply", tiny.path, path, *FLOAT, "--ask", QUESTION, "--json", "true")
    assert (result.code, result.err) == (0, "")
    twice = Plainly("llama", dense_copy(dense_copy(tiny.model, tiny.edit), tiny.edit), tiny.tokenizer)
    line = json.loads(result.out)
    assert line["p_old_after"] == pytest.approx(twice.probability(QUESTION, line["old"]), rel=1e-3)


def test_apply_questions_of_a_file_and_a_picture(tiny, tmp_path):
    lines = [OTHER, "", json.dumps({"prompt": QUESTION}), json.dumps({"question": "Who?"})]
    (tmp_path / "questions").write_text("\n".join(lines))
    picture = tmp_path / "shifts.png"
    result = call("apply", tiny.path, *FLOAT, "--questions", tmp_path / "questions", "--ask", "Why?", "--plot", picture)
    assert (result.code, result.err) == (0, "")
    places = [result.out.index(text) for text in ("Why?", OTHER, QUESTION, "Who?", f"Written: {picture}")]
    assert places == sorted(places) and imread(picture).shape[1] > 1000


def test_apply_questions_from_a_pipe(tiny, monkeypatch):
    typed(monkeypatch, QUESTION, "", OTHER)
    result = call("apply", tiny.path, *FLOAT)
    assert (result.code, result.err) == (0, "")
    assert QUESTION in result.out and OTHER in result.out and "Base and edited model" in result.out
    typed(monkeypatch)
    assert_says(call("apply", tiny.path, *FLOAT).err, "No question was asked. Give --ask or --questions, or type some.")


def test_apply_in_the_words_of_the_edit(tiny, tmp_path):
    about = {**tiny.claims.edit.about, "edits": [{"prompt": CLAIM[0], "target": "false"}]}
    path = replace(tiny.claims.edit, about=about).save(tmp_path / "claim.safetensors")
    line = json.loads(call("apply", path, *FLOAT, "--ask", CLAIM[0], "--json", "true").out)
    assert {line["old"], line["new"]} <= {"true", "false"}


def test_apply_to_another_base(tiny, tmp_path):
    with torch.no_grad():
        changed = tiny_edit(tiny.edit.about["base"], "llama").model
        changed.model.layers[3].mlp.down_proj.weight += 0.5
    changed.save_pretrained(tmp_path / "other")
    tiny.tokenizer.save_pretrained(tmp_path / "other")
    asked = ["apply", tiny.path, *FLOAT, "--ask", QUESTION, "--base", tmp_path / "other"]
    assert_says(
        call(*asked).err,
        r"same shapes and other weights .model.layers.3.mlp.down_proj: \w+, not \w+; 1 of 9 layers differ.*\(--force\)",
    )
    assert call(*asked, "--force", "true").code == 0


@pytest.mark.parametrize(
    "content, text",
    [
        (None, "questions file .* cannot be read: .*No such file"),
        ("\n \n", "holds no question. Expected one a line"),
        ('Who?\n{"prompt": ', "line 2: begins like a JSON object and is none"),
        ('{"target": "x"}', 'line 1: expected text under "prompt"'),
        ('{"prompt": " "}', 'line 1: expected text under "prompt"'),
    ],
)
def test_bad_question_files(content, text, tiny, tmp_path):
    if content is not None:
        (tmp_path / "questions").write_text(content)
    result = call("apply", tiny.path, "--questions", tmp_path / "questions")
    assert result.code == 1
    assert_says(result.err, text)


@pytest.mark.parametrize("command", ["apply", "show"])
def test_bad_edit_files(command, tiny, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "cut").write_bytes(tiny.path.read_bytes()[:-9])
    for name in ("nowhere", "empty", "cut"):
        assert_says(call(command, tmp_path / name).err, f"{name} cannot be read as a saved edit")
    assert_says(call(command).err, "Name at least one edit file")
    assert_says(call(command, tiny.path, tiny.path).err, "is named twice")


def test_questions_that_begin_with_a_bracket(tiny):
    asked = ["[France] capital?", "[b]Who?[/b]", "[sic] Who? [1]"]
    options = [option for question in asked for option in ("--ask", question)]
    result = call("apply", tiny.path, *FLOAT, *options, "--json", "true")
    assert (result.code, result.err) == (0, "")
    assert re.findall(r'"question": "(.*?)"', result.out) == asked


def test_apply_refuses(tiny):
    assert_says(call("apply", tiny.path, "--ask", " ").err, "A question is empty")
    assert_says(call("apply", tiny.path, tiny.claims.path, "--ask", "a").err, "different prompt formats")


def test_show_one_edit(tiny):
    result = call("show", tiny.path)
    assert (result.code, result.err) == (0, "")
    about = tiny.edit.about
    for text in (
        f"{QUESTION} → {TARGET}",
        about["base_fingerprint"],
        "MendEditor",
        about["date"],
        "torch",
        "model.layers.3.mlp.down_proj",
    ):
        assert text in result.out, text
    found = json.loads(call("show", tiny.path, "--json", "true").out)
    assert found["bytes"] == tiny.path.stat().st_size and found["facts"] == [{"prompt": QUESTION, "target": TARGET}]
    assert found["probability"] == about["probability"] and found["check"] is None and found["base"] == about["base"]
    weights = {name: module.weight for name, module in tiny.edit.layers_in(tiny.model).items()}
    assert {layer["name"] for layer in found["layers"]} == set(weights)
    for layer in found["layers"]:
        dense = tiny.edit.deltas[layer["name"]].dense()[0]
        assert layer["shape"] == list(dense.T.shape) and layer["rank"] == tiny.edit.deltas[layer["name"]].rank
        assert layer["norm"] == pytest.approx(float(dense.norm()), rel=1e-4)
        assert layer["relative_norm"] == pytest.approx(float(dense.norm() / weights[layer["name"]].norm()), rel=1e-3)


def test_show_measures_on_a_base_that_is_named(tiny, tmp_path):
    """A file that says nothing but its factors."""
    path = Edit(tiny.edit.deltas).save(tmp_path / "bare.safetensors")
    bare = json.loads(call("show", path, "--json", "true").out)
    assert (
        {layer["relative_norm"] for layer in bare["layers"]} == {None} and bare["facts"] == [] and bare["base"] is None
    )
    assert "(the file does not say)" in call("show", path).out
    found = json.loads(call("show", path, "--json", "true", "--base", tiny.edit.about["base"], *FLOAT).out)
    expected = tiny.edit.relative_norm(tiny.model)
    for layer in found["layers"]:
        assert layer["relative_norm"] == pytest.approx(expected[layer["name"]], rel=1e-4)


def test_show_loads_no_base(tiny, monkeypatch):
    monkeypatch.setattr("mend_lightning.cli.commands.inputs.load_base", lambda *_, **__: 1 / 0)
    assert call("show", tiny.path).code == 0


def test_show_several_edits(tiny):
    result = call("show", tiny.path, tiny.claims.path)
    assert (result.code, result.err) == (0, "")
    assert "oceania" in result.out and "claim" in result.out and result.out.startswith("Edits ")
    assert "Layers" not in result.out
    both = call("show", tiny.path, tiny.claims.path, "--json", "true").out
    assert both.count('"file"') == 2
