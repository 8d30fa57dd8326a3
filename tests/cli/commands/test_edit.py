"""`edit` with its check and its separate files: end to end on a tiny base."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
from helpers.commandline import assert_says, call
from helpers.edit_commands import FLOAT, OTHER, QUESTION, TARGET, edit, typed
from helpers.edited import CLAIM, Plainly, dense_copy
from helpers.tokenizers import CHAT_TEMPLATES

from mend_lightning import Edit, PromptFormat
from mend_lightning.cli.commands.edit import NOT_SAFE
from mend_lightning.cli.commands.inputs import read_facts, read_questions
from mend_lightning.cli.commands.output import verdict
from mend_lightning.models.inputs.format_texts import PASSAGES

pytest_plugins = ["helpers.bases", "helpers.edit_commands"]


def test_check_of_an_edit_that_is_not_safe(tiny, shipped, tmp_path):
    out = tmp_path / "edit.safetensors"
    asked = ["--prompt", QUESTION, "--target", TARGET, "--rephrase", "Where?", "--rephrase", "When?", "--out", out]
    result = edit(tiny, *asked, "--check", "true")
    assert (result.code, result.err) == (NOT_SAFE, "") and NOT_SAFE == 3
    assert "Not safe to keep. 0 of 3 edited questions and rephrases get the new answer" in result.out
    check = Edit.load(out).about["check"]
    assert check["safe"] is False and check["others"] == "neutral" and check["failed"] == [QUESTION, "Where?", "When?"]
    assert check["questions"] == {"edited": 1, "rephrase": 2, "neutral": 3}
    assert "not safe to keep (success 0.00" in call("show", out).out


def test_check_of_an_edit_that_is_safe(tiny, shipped, tmp_path):
    """The new answer is the base's own, and the edit does next to nothing."""
    out = tmp_path / "edit.safetensors"
    asked = ["--prompt", QUESTION, "--target", "Asia", "--out", out, "--check", "true"]
    result = edit(tiny, *asked, editor="weak")
    assert (result.code, result.err) == (0, "")
    assert "Asking 178 neutral questions" in result.out
    assert "Safe to keep." in result.out and "shipped neutral questions" in result.out and "No rephrase" in result.out
    assert Edit.load(out).about["check"]["safe"] is True
    result = edit(tiny, *asked, "--neighbour", OTHER, "--unrelated+", "Who?", editor="weak")
    check = Edit.load(out).about["check"]
    assert result.code == 0 and check["others"] == "given" and "Asking" not in result.out
    assert check["questions"] == {"edited": 1, "unrelated": 1, "neighbour": 1}
    assert "neighbour" in result.out and OTHER in result.out


def test_without_a_check_there_is_none(tiny, tmp_path):
    result = edit(tiny, "--prompt", QUESTION, "--target", TARGET, "--out", tmp_path / "edit.safetensors")
    assert result.code == 0 and "safe" not in result.out.replace("safetensors", "")
    assert "check" not in Edit.load(tmp_path / "edit.safetensors").about


def test_check_of_a_classifier_needs_statements(tiny, tmp_path):
    asked = ["--prompt", CLAIM[0], "--target", CLAIM[1], "--out", tmp_path / "edit.safetensors", "--check", "true"]
    assert_says(edit(tiny, *asked, editor="claims").err, "no statements that a classifier could judge")
    result = edit(tiny, *asked, "--unrelated", "Paris is a city.", editor="claims")
    assert result.code in (0, NOT_SAFE) and result.err == ""


def test_separate_edits(tiny, tmp_path, shipped):
    lines = [
        {"prompt": QUESTION, "target": "Africa"},
        {"prompt": OTHER, "target": "Cuba"},
        {"prompt": OTHER, "target": "cuba!"},
    ]
    file, out = tmp_path / "facts.jsonl", tmp_path / "new" / "edits"
    file.write_text("\n".join(map(json.dumps, lines)))
    result = edit(tiny, "--edits", file, "--separate", "true", "--out", out, "--check", "true")
    assert (result.code, result.err) == (NOT_SAFE, "")
    names = [
        "which-continent-is-north-korea-in-africa",
        "which-country-is-managua-in-cuba",
        "which-country-is-managua-in-cuba-2",
    ]
    assert {path.name for path in out.iterdir()} == {f"{name}.safetensors" for name in names}
    for name, line in zip(names, lines):
        saved = Edit.load(out / f"{name}.safetensors")
        assert saved.about["edits"] == [line] and saved.about["on_top_of"] == [] and "check" in saved.about


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--separate", "true", "--prompt", "a", "--target", "b"], "Give --edits FILE"),
        (["--interactive", "true", "--prompt", "a"], "asks for the facts itself"),
        (["--interactive", "true", "--check", "true"], "In a conversation, type :check"),
        (["--prompt", "a", "--target", " "], "--target is empty"),
        (["--prompt", "", "--target", "b"], "--prompt is empty"),
        (["--prompt", "a", "--target", "b", "--out", "/"], "it is a folder"),
        (["--prompt", "a", "--target", "b", "--out", "/dev/null/edit"], "Cannot write to the folder"),
        ([], "needs --prompt and --target"),
    ],
)
def test_what_edit_refuses(arguments, text, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed(monkeypatch)
    result = edit(tiny, *arguments)
    assert result.code == 1
    assert_says(result.err, text)
    assert list(tmp_path.iterdir()) == []


def test_where_an_edit_cannot_be_written_shows_at_once(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()

    def load(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("mend_lightning.cli.commands.edit.load_editor_and_base", load)
    monkeypatch.setattr("mend_lightning.cli.commands.apply.load_asked_base", load)
    result = edit(tiny, "--prompt", "a", "--target", "b", "--out", tmp_path / "file" / "edit")
    assert_says(result.err, "Cannot write to the folder")
    result = call("apply", tiny.path, "--ask", "a", "--plot", tmp_path / "file" / "plot")
    assert_says(result.err, "Cannot write to the folder")


def test_switches_without_a_value(tiny, shipped, tmp_path):
    """`--check` and `--json` as in other programs."""
    made = edit(tiny, "--prompt", QUESTION, "--target", "Africa", "--check", "--out", tmp_path / "edit")
    assert "check" in Edit.load(tmp_path / "edit").about and made.code in (0, NOT_SAFE)
    assert json.loads(call("show", tmp_path / "edit", "--json").out)["check"]


def test_lines_end_where_json_says(tmp_path):
    """Windows line ends, and separators that are letters to JSON and line ends to str.splitlines."""
    lines = [{"prompt": "Where is\u2028Lyon?", "target": "Italy"}, {"prompt": "Where\x85?", "target": "Spain"}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in lines)
    (tmp_path / "facts").write_bytes(text.encode())
    expected = [(line["prompt"], line["target"]) for line in lines]
    assert read_facts(tmp_path / "facts") == expected
    assert read_questions(tmp_path / "facts") == [prompt for prompt, _ in expected]


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("Asia", "Cuba", "changed as asked"),
        ("Cuba", "Cuba", "as asked, as before"),
        ("Asia", "Asia", "not what was asked"),
    ],
)
def test_verdicts(old, new, said):
    """An edit to what the base says anyway changes nothing, and must not look as if it did."""
    for kind in ("edited", "rephrase"):
        assert said in verdict(kind, OTHER, old, new, {OTHER: "Cuba"})


def test_one_unsafe_edit_of_several(tiny, tmp_path):
    """The first gets the answer that the base gives anyway."""
    lines = [{"prompt": QUESTION, "target": "Asia"}, {"prompt": QUESTION, "target": "Africa"}]
    for name, some, code in (("both", lines, NOT_SAFE), ("first", lines[:1], 0)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, some)))
        asked = ["--edits", tmp_path / name, "--separate", "true", "--out", tmp_path / "edits", "--check", "true"]
        assert edit(tiny, *asked, "--unrelated", OTHER, editor="weak").code == code


def test_separate_edits_where_nothing_can_be_written(tiny, tmp_path):
    (tmp_path / "facts.jsonl").write_text(json.dumps({"prompt": "a", "target": "b"}))
    (tmp_path / "file").touch()
    result = edit(tiny, "--edits", tmp_path / "facts.jsonl", "--separate", "true", "--out", tmp_path / "file" / "edits")
    assert_says(result.err, "Cannot write to the folder")


def test_an_edit_is_kept_off_questions(tiny, shipped, tmp_path):
    out = tmp_path / "edit.safetensors"
    asked = ["--prompt", QUESTION, "--target", TARGET, "--out", out]
    result = edit(tiny, *asked, "--keep+", OTHER, "--contrasts", "2")
    assert (result.code, result.err) == (0, "")
    about = Edit.load(out).about
    assert about["keep"] == [OTHER] and len(about["contrasts"]) == 2
    assert "The edit is kept off 2 questions of the same wording" in result.out and OTHER in result.out
    shown = call("show", out).out
    assert OTHER in shown and about["contrasts"][1] in shown
    edit(tiny, *asked, "--subject", "continent", "--contrasts", "1")
    (contrast,) = Edit.load(out).about["contrasts"]
    assert contrast.startswith("Which ") and contrast.endswith(" is North Korea in?")
    result = edit(tiny, *asked, "--keep+", OTHER, "--check", "true")
    assert Edit.load(out).about["check"]["questions"] == {"edited": 1, "neighbour": 1}


@pytest.mark.filterwarnings("ignore::mend_lightning.errors.LowConfidenceWarning")
def test_an_edit_is_made_in_more_steps_and_wordings_than_the_editor_was_trained_with(tiny, tmp_path):
    asked = ["--prompt", QUESTION, "--target", TARGET, "--confidence", "0.9"]
    edits = []
    for number, more in enumerate(([], ["--wordings", "2"], ["--wordings", "2", "--inner_steps", "3"])):
        assert edit(tiny, *asked, *more, "--out", tmp_path / f"{number}.safetensors").code == 0
        edits.append(Edit.load(tmp_path / f"{number}.safetensors"))
    ranks = [max(delta.rank for delta in each.deltas.values()) for each in edits]
    assert ranks[0] < ranks[1] < ranks[2]
    assert_says(edit(tiny, *asked, "--wordings", "9").err, "it must be 0 to 8, not 9")
    assert_says(edit(tiny, *asked, "--inner_steps", "0").err, "must be 1 or more, not 0")


def test_a_subject_must_be_of_the_fact(tiny, tmp_path):
    asked = ["--prompt", QUESTION, "--target", TARGET, "--out", tmp_path / "edit.safetensors", "--contrasts", "1"]
    assert_says(edit(tiny, *asked, "--subject", "Peru").err, "'Peru' does not stand in the prompt")
    file = tmp_path / "facts.jsonl"
    file.write_text(json.dumps({"prompt": QUESTION, "target": TARGET}))
    result = edit(tiny, "--edits", file, "--subject", "Peru", "--out", tmp_path / "edit.safetensors")
    assert_says(result.err, "--subject is of a single fact")


@pytest.fixture
def chatting_base(base_folder, tmp_path):
    """The tiny llama's folder with a chat template."""
    folder = shutil.copytree(base_folder("llama"), tmp_path / "chatting")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES["plain"])
    return folder


def test_a_chat_model_is_edited_and_asked_as_its_users_talk_to_it(tiny, chatting_base, tmp_path):
    out = tmp_path / "edit.safetensors"
    asked = ["--prompt", QUESTION, "--target", TARGET, "--rephrase", "Where?", "--out", out, "--base", chatting_base]
    result = edit(tiny, *asked, "--format", "chat")
    assert (result.code, result.err) == (0, "")
    saved = Edit.load(out)
    form = {"prompt": "user: {input}\nassistant:", "target": " {target}", "stop": "\n"}
    assert saved.about["format"] == "chat" and saved.about["prompt_format"] == form
    assert "asked as │ chat" in call("show", out).out
    # Asked again, by default in the edit's format, and in others.
    base = Plainly("llama", tiny.model, tiny.tokenizer)
    edited = Plainly("llama", dense_copy(tiny.model, saved), tiny.tokenizer)
    own = base.format
    forms = {None: PromptFormat(**form), "own": own, "chat": PromptFormat(**form), "passage": None}
    for name, expected in forms.items():
        options = ["--format", name] if name else []
        line = json.loads(
            call("apply", out, *FLOAT, "--base", chatting_base, "--ask", QUESTION, "--json", "true", *options).out
        )
        expected = expected or replace(own, prompt=f"{PASSAGES[0]}\n\n{own.prompt}")
        base.format = edited.format = expected
        assert (line["old"], line["new"]) == (base.answer(QUESTION), edited.answer(QUESTION))
        assert line["kl"] > 0
        if name is None:
            # A cell of the table breaks long answers into lines.
            assert line["old"] in result.out and line["new"][:8] in result.out
            continued = edited.tokenizer(expected.question(QUESTION) + expected.answer(TARGET) + "\n")["input_ids"]
            ids = continued[len(edited.tokenizer(expected.question(QUESTION))["input_ids"]) :]
            probability = math.prod(float(edited.distribution(QUESTION, ids[:i])[id]) for i, id in enumerate(ids))
            assert saved.about["probability"] == pytest.approx(probability, rel=1e-3)


def test_edits_of_different_formats_are_asked_in_one_that_is_named(tiny, chatting_base, tmp_path):
    out = tmp_path / "edit.safetensors"
    edit(tiny, "--prompt", OTHER, "--target", TARGET, "--out", out, "--base", chatting_base, "--format", "chat")
    asked = ["apply", tiny.path, out, *FLOAT, "--base", chatting_base, "--ask", QUESTION]
    assert_says(
        call(*asked).err, "different prompt formats, so no question can be put to all of them.*say by --format how"
    )
    result = call(*asked, "--format", "chat")
    assert (result.code, result.err) == (0, "")


def test_formats_that_a_model_does_not_have(tiny, tmp_path):
    asked = ["--prompt", QUESTION, "--target", TARGET, "--out", tmp_path / "edit.safetensors"]
    assert_says(edit(tiny, *asked, "--format", "chat").err, "has no chat template.*instruction-tuned")
    assert_says(edit(tiny, *asked, "--format", "chatty").err, "no format 'chatty'. Did you mean 'chat'")
    assert not (tmp_path / "edit.safetensors").exists()
