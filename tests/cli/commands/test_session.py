"""`edit` as a conversation: end to end on a tiny base."""

from __future__ import annotations

import io

import pytest
import torch
from helpers.bases import state_copy
from helpers.commandline import call
from helpers.edit_commands import FLOAT, OTHER, QUESTION, TARGET, edit, typed
from helpers.edited import FACT

from mend_lightning import Edit, make_edit
from mend_lightning.cli.commands import session as session_module
from mend_lightning.cli.commands.session import repl
from mend_lightning.evaluation.safety import Limits

pytest_plugins = ["helpers.bases", "helpers.edit_commands"]


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
        assert repl(tiny.editor, tiny.model, tiny.tokenizer, out, read) == 0
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


def test_a_conversation_in_a_format(tiny, tmp_path):
    """Edits are made and questions are asked in it."""
    lines = iter([f"{QUESTION} => {TARGET}", OTHER])

    def read(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    out = tmp_path / "edit.safetensors"
    assert repl(tiny.editor, tiny.model, tiny.tokenizer, out, read, format="bare") == 0
    saved = Edit.load(out)
    assert (saved.about["format"], saved.about["prompt_format"]["prompt"]) == ("bare", "{input}")
    expected = make_edit(tiny.editor, tiny.model, tiny.tokenizer, FACT, format="bare")
    assert saved.about["probability"] == pytest.approx(expected.about["probability"], rel=1e-3)
