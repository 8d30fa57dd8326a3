"""`edit` with its check, its conversation and its separate files; `apply` and `show`: end to end on a tiny base."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bases import state_copy
from commandline import assert_says, call
from edited import CLAIM, FACT, Plainly, dense_copy, tiny_edit
from matplotlib.image import imread

from mend_lightning import Edit
from mend_lightning.commands import session as session_module
from mend_lightning.commands.answers_table import verdict
from mend_lightning.commands.edit import NOT_SAFE
from mend_lightning.commands.facts import read_facts, read_questions
from mend_lightning.commands.session import converse
from mend_lightning.effects.safety import Limits

pytest_plugins = ["bases"]
QUESTION, TARGET = FACT
OTHER = "Which country is Managua in?"
FLOAT = ("--dtype", "float32")


@pytest.fixture(scope="module")
def tiny(base_folder, tmp_path_factory) -> SimpleNamespace:
    """An edit of a tiny llama, the editor that made it, one that changes next to nothing, and one of a classifier."""
    folder = tmp_path_factory.mktemp("edits")
    made = tiny_edit(base_folder("llama"), "llama")
    made.editor.save_pretrained(folder / "editor")
    with torch.no_grad():
        made.editor.edit_rates.fill_(1e-6)
    made.editor.save_pretrained(folder / "weak")
    made.path = made.edit.save(folder / "oceania.safetensors")
    made.claims = tiny_edit(base_folder("bert"), "bert")
    made.claims.editor.save_pretrained(folder / "claims")
    made.claims.path = made.claims.edit.save(folder / "claim.safetensors")
    made.folder = folder
    return made


@pytest.fixture
def shipped(monkeypatch) -> list[str]:
    """A short set in place of the neutral questions."""
    questions = ["Which continent is Cuba in?", OTHER, "Who?"]
    monkeypatch.setattr("mend_lightning.effects.safety.neutral_questions", lambda: questions)
    return questions


def edit(tiny, *arguments, editor: str = "editor") -> SimpleNamespace:
    return call("edit", "--editor", tiny.folder / editor, *FLOAT, *arguments)


def typed(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


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
    assert "near neighbour" in result.out and OTHER in result.out


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

    monkeypatch.setattr("mend_lightning.commands.edit.load_editor_and_base", load)
    monkeypatch.setattr("mend_lightning.commands.apply.load_asked_base", load)
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


def test_a_conversation(tiny, tmp_path, monkeypatch):
    """Piped: two edits, the second on top of the first, one undone, the other saved."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "edit.safetensors"
    typed(
        monkeypatch, ":list", QUESTION, f"=> {TARGET}", ":undo", ":undo", f"{OTHER} => Cuba", f"{QUESTION} => Africa", OTHER,
        ":list", ":nonsense", "=>", ":save", f":save {out}", ":quit", "never read",
    )  # fmt: skip
    result = edit(tiny, "--interactive", "true")
    assert (result.code, result.err) == (0, "")
    first, second = "which-country-is-managua-in-cuba", "which-continent-is-north-korea-in-africa"
    said = [
        "No edit yet.", "Asia (probability 0.", "Edit which-continent-is-north-korea-in-oceania: probability", "is undone.",
        "There is no edit to undo.", f"Edit {first}: probability", f"Edit {second}: probability", "Base and edited model",
        f"{first}: {OTHER} => Cuba {second}: {QUESTION} => Africa", "There is no :nonsense. Commands: :list, :undo",
        "An edit needs a question and a new answer: QUESTION => NEW ANSWER.", "Give the path of a file: :save PATH.", "Saved to",
    ]  # fmt: skip
    place = 0
    for text in said:
        place = result.out.find(text, place)
        assert place >= 0, f"{text!r} is not there, or not in its turn: {result.out}"
    assert "never read" not in result.out and "Not saved" not in result.out
    saved = Edit.load(out)
    assert saved.facts == [(OTHER, "Cuba"), (QUESTION, "Africa")]
    ids = [each["id"] for each in saved.about["combined"]]
    assert [each["on_top_of"] for each in saved.about["combined"]] == [[], ids[:1]]


def talk(tiny, out, lines, end=EOFError) -> str:
    """A conversation with an injected input, which raises `end` after the last line."""
    left = iter(lines)

    def read(_: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise end from None

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "_say", lambda text, markup=True: said.write(f"{text}\n"))
        assert converse(tiny.editor, tiny.model, tiny.tokenizer, out, read) == 0
    return said.getvalue()


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_nothing_is_lost_when_a_conversation_ends(end, tiny, tmp_path):
    base = state_copy(tiny.model)
    out = tmp_path / "edit.safetensors"
    out.write_text("somebody's file")
    said = talk(tiny, out, [f"{QUESTION} => {TARGET}"], end)
    kept = tmp_path / "edit-2.safetensors"
    assert f"Not saved until now: which-continent-is-north-korea-in-oceania. Saved to {kept}." in said
    assert Edit.load(kept).facts == [FACT] and out.read_text() == "somebody's file"
    assert not any(module._forward_hooks for module in tiny.model.modules()), "the model is the base again"
    assert all(torch.equal(value, base[name]) for name, value in tiny.model.state_dict().items())


def test_a_line_that_is_no_text_and_an_error_of_another_kind(tiny, tmp_path, monkeypatch):
    out = tmp_path / "edit.safetensors"
    said = talk(tiny, out, [f"{QUESTION} => {TARGET}", "Where is \udcff?", ":discard"])
    assert "not valid Unicode" in said and not out.exists()
    with pytest.raises(OSError, match="the terminal is gone"):
        talk(tiny, out, [f"{QUESTION} => {TARGET}"], OSError("the terminal is gone"))
    assert Edit.load(out).facts == [FACT], "what was made before the error is kept"


def test_brackets_in_paths(tiny, tmp_path):
    path = tmp_path / "[red]x"
    out = edit(tiny, "--prompt", QUESTION, "--target", TARGET, "--out", path).out
    assert "[red]x" in out.replace(" ", "")
    assert "[red]p" in call("apply", path, *FLOAT, "--ask", OTHER, "--plot", tmp_path / "[red]p").out.replace(" ", "")
    assert "[red]x-2" in talk(tiny, path, [f"{QUESTION} => {TARGET}"]).replace("\\", "")


def test_save_finds_the_home_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    talk(tiny, tmp_path / "edit.safetensors", [f"{QUESTION} => {TARGET}", ":save ~/kept.safetensors"])
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert Edit.load(tmp_path / "home" / "kept.safetensors").facts == [FACT]


def test_an_interrupt_while_the_model_works(tiny, tmp_path, monkeypatch):
    """Ctrl-C in the middle of a question, when the edits are off for a moment: they are saved all the same."""
    calls = []

    def interrupted(*arguments, **settings):
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(session_module, "answer_shifts", interrupted)
    talk(tiny, tmp_path / "edit.safetensors", [f"{QUESTION} => {TARGET}", "never read"])
    assert len(calls) == 1 and Edit.load(tmp_path / "edit.safetensors").facts == [FACT]
    assert not any(module._forward_hooks for module in tiny.model.modules())


@pytest.mark.parametrize(
    "lines, files",
    [
        ([f"{QUESTION} => {TARGET}", ":discard"], []),
        ([f"{QUESTION} => {TARGET}", ":undo"], []),
        ([QUESTION], []),
        ([f"{QUESTION} => {TARGET}", ":off which-continent-is-north-korea-in-oceania"], ["edit.safetensors"]),
    ],
)
def test_what_is_saved_at_the_end(lines, files, tiny, tmp_path):
    talk(tiny, tmp_path / "edit.safetensors", lines)
    assert [path.name for path in tmp_path.iterdir()] == files


def test_switching_edits_in_a_conversation(tiny, tmp_path):
    name, out = "which-continent-is-north-korea-in-oceania", tmp_path / "edit.safetensors"
    said = talk(
        tiny,
        out,
        [
            f"{QUESTION} => {TARGET}",
            f":off {name}",
            ":list",
            f":save {out}",
            ":check",
            ":on nobody",
            f":on {name}",
            f":save {out}",
        ],
    )
    assert f"{name} (off): " in said and said.count("none is switched on") == 2 and "There is no edit 'nobody'" in said
    assert Edit.load(out).facts == [FACT] and "Not saved" not in said


def test_a_check_in_a_conversation(tiny, tmp_path, shipped):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "print_check", seen.append)
        talk(tiny, tmp_path / "edit.safetensors", [f"{QUESTION} => {TARGET}", ":check", ":discard"])
    (check,) = seen
    assert check.limits == Limits() and [each.question for each in check.shifts] == [QUESTION, *shipped]


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
    assert_says(call(*asked).err, r"same shapes and other weights .model.layers.3.mlp.down_proj: \w+, not \w+; 1 of 9 layers differ.*\(--force\)")
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
    monkeypatch.setattr("mend_lightning.commands.edit_files.load_base", lambda *_, **__: 1 / 0)
    assert call("show", tiny.path).code == 0


def test_show_several_edits(tiny):
    result = call("show", tiny.path, tiny.claims.path)
    assert (result.code, result.err) == (0, "")
    assert "oceania" in result.out and "claim" in result.out and result.out.startswith("Edits ")
    assert "Layers" not in result.out
    both = call("show", tiny.path, tiny.claims.path, "--json", "true").out
    assert both.count('"file"') == 2
