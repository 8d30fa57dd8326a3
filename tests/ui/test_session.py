"""The page without the page: what a session does to the model, and that it leaves the base as it was."""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers.bases import FORMATS, assert_same_state, state_copy
from helpers.edited import CLAIM, FACT, dense_copy, tiny_edit
from helpers.models import KINDS
from helpers.tokenizers import CHAT_TEMPLATES

from mend_lightning import Edit, InContext, generate_answers, load_base, make_edit
from mend_lightning.editors.making import editor_encoder
from mend_lightning.errors import (
    BaseModelMismatchError,
    ConfigError,
    EditNameError,
    EmptyEditError,
    InputTooLongError,
    NoEffectWarning,
    StateDictError,
    StoppedError,
    TokenizerError,
)
from mend_lightning.ui.captured_warnings import captured_warnings
from mend_lightning.ui.comparison import MAX_CHARACTERS, MAX_QUESTIONS, questions_of
from mend_lightning.ui.session import Session

pytest_plugins = ["helpers.bases"]
OTHER = ("Which country is Managua in?", "Cuba")


@pytest.fixture
def opened(base_folder):
    """`opened(family)`: a session on a tiny base with a random editor; at the end the base must be what it was."""
    sessions = []

    def make(family: str = "llama") -> SimpleNamespace:
        made = tiny_edit(base_folder(family), family)
        session = Session(made.model, made.tokenizer, made.editor)
        sessions.append((session, state_copy(made.model)))
        # Of slow truth, and never under edits: a copy would take the hooks along.
        return SimpleNamespace(session=session, base=dense_copy(made.model, Edit({})), **vars(made))

    yield make
    for session, base in sessions:
        session.close()
        assert_same_state(state_copy(session.model), base)
        assert not any(module._forward_hooks for module in session.model.modules())


def answer_of(model, encoder, question: str) -> str:
    return generate_answers(model, encoder, [question])[0]


def probability(model, rows) -> float:
    """Of all labels of the one row, by hand."""
    with torch.no_grad():
        logits = model(**rows.inputs).logits[0].double()
    return float(
        torch.stack([row.softmax(-1)[label] for row, label in zip(logits, rows.labels[0]) if label >= 0]).prod()
    )


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_before_is_the_base_and_after_is_the_dense_model(family, opened):
    made = opened(family)
    name, _ = made.session.edit(*FACT)
    edit = made.session.edits[name].edit
    compared = made.session.compare(*FACT)
    dense = dense_copy(made.base, edit)
    assert compared.shift.old == answer_of(made.base, made.encoder, FACT[0])
    assert compared.shift.new == answer_of(dense, made.encoder, FACT[0])
    rows = made.encoder.rows([FACT], [0], 1)
    tokens = compared.answers[FACT[1]]
    for side, model in (("before", made.base), ("after", dense)):
        found = torch.tensor([getattr(token, side) for token in tokens], dtype=torch.float64).prod()
        assert float(found) == pytest.approx(probability(model, rows), rel=1e-3)
    assert compared.on == 1 and len(compared.first_tokens) >= 4


def test_an_edit_is_made_on_the_base_whatever_else_is_on(opened):
    made = opened()
    made.session.edit(*OTHER)
    name, _ = made.session.edit(*FACT)
    second = made.session.edits[name].edit
    assert [entry.enabled for entry in made.session.entries] == [True, True], "those that were on are on again"
    made.session.close()
    alone = make_edit(made.editor, made.model, made.tokenizer, [FACT])
    for layer, delta in alone.deltas.items():
        assert torch.equal(delta.dense(), second.deltas[layer].dense())
    assert second.about["on_top_of"] == []


def test_switches_decide_what_after_is(opened):
    session = opened().session
    name, _ = session.edit(*FACT)
    edited = session.compare(*FACT).shift
    session.set_enabled(name, False)
    off = session.compare(*FACT)
    assert (off.shift.new, off.shift.p_old_after, off.on) == (off.shift.old, off.shift.p_old_before, 0)
    session.set_enabled(name, True)
    assert session.compare(*FACT).shift == edited
    assert edited.p_new_after != edited.p_new_before
    seen = session.revision
    session.set_enabled(name, True)
    assert session.revision == seen, "nothing changed"
    session.remove(name)
    assert session.compare(*FACT).shift == off.shift and session.entries == ()


def test_several_edits_add_up(opened):
    made = opened()
    names = [made.session.edit(*fact)[0] for fact in (FACT, OTHER)]
    probe = made.session.probe([FACT[0], " ", OTHER[0]])
    dense = made.base
    for name in names:
        dense = dense_copy(dense, made.session.edits[name].edit)
    made.session.close()
    assert [shift.question for shift in probe.shifts] == [FACT[0], OTHER[0]]
    assert [shift.new for shift in probe.shifts] == generate_answers(dense, made.encoder, [FACT[0], OTHER[0]])
    assert [shift.old for shift in probe.shifts] == generate_answers(made.model, made.encoder, [FACT[0], OTHER[0]])
    assert probe.on == 2


def test_what_moved_is_sorted_and_leaves_the_edited_question_out(opened):
    session = opened().session
    session.edit(*FACT)
    questions = [FACT[0], *(f"Which country is number {i} in?" for i in range(18)), OTHER[0], OTHER[0], ""]
    done = []
    moved = session.moved(questions, lambda *counts: done.append(counts))
    assert sorted(shift.question for shift in moved.shifts) == sorted(set(questions) - {FACT[0], ""})
    keys = [(shift.changed, shift.size) for shift in moved.shifts]
    assert keys == sorted(keys, reverse=True) and keys[0] != keys[-1]
    assert done == [(16, 19), (19, 19)]
    assert moved.revision == session.revision


def test_a_file_goes_out_and_in(opened, tmp_path):
    made = opened()
    name, _ = made.session.edit(*FACT)
    after = made.session.compare(*FACT).shift
    path = made.session.save(name)
    copy = tmp_path / "again.safetensors"
    copy.write_bytes(path.read_bytes())
    assert Edit.load(copy).about == made.session.edits[name].edit.about
    made.session.remove(name)
    assert made.session.add(copy) == ("again", [])
    assert made.session.compare(*FACT).shift == after
    made.session.edits.remove("again")
    odd = made.session.edits.add(Edit.load(copy), "../up and\\down")
    assert made.session.save(odd).parent == path.parent
    # A question in Japanese: three bytes a letter, and nine in a URL.
    made.session.edits.remove(odd)
    long = made.session.edits.add(Edit.load(copy), "日" * 60)
    assert Edit.load(made.session.save(long)).facts == [FACT] and made.session.save(long) != path
    made.session.close()
    assert not path.exists(), "the session's files end with it"


def test_what_to_look_at_is_told(opened):
    session = opened().session
    session.edit(*FACT)
    _, messages = session.edit(FACT[0].lower(), "Africa")
    assert any("same question" in message and "Oceania" in message and "Africa" in message for message in messages)
    session.editor.confidence = 0.999999
    session.editor.settings["confidence"] = 0.999999
    _, messages = session.edit("Which continent is nowhere in?", "Atlantis and more")
    assert any("Look at its answers" in message for message in messages), messages


def test_what_is_wrong_is_named_and_changes_nothing(opened, base_folder, tmp_path):
    made = opened()
    session = made.session
    name, _ = session.edit(*FACT)
    (tmp_path / "text.safetensors").write_text("no edit")
    foreign = tiny_edit(base_folder("gpt2"), "gpt2").edit.save(tmp_path / "foreign.safetensors")
    before = session.entries, session.revision
    for error, called in (
        (EmptyEditError, lambda: session.edit(" ", "Oceania")),
        (EmptyEditError, lambda: session.edit(FACT[0], "\n")),
        (EmptyEditError, lambda: session.compare("")),
        (EmptyEditError, lambda: session.probe(["", " "])),
        (EmptyEditError, lambda: session.moved([FACT[0]])),
        (StateDictError, lambda: session.add(tmp_path / "text.safetensors")),
        (StateDictError, lambda: session.add(tmp_path / "missing.safetensors")),
        (BaseModelMismatchError, lambda: session.add(foreign)),
        (EditNameError, lambda: session.add(made.edit.save(tmp_path / f"{name}.safetensors"))),
        (EditNameError, lambda: session.remove("another")),
        (EditNameError, lambda: session.set_enabled("another", True)),
        (EditNameError, lambda: session.save("another")),
    ):
        with pytest.raises(error):
            called()
    assert (session.entries, session.revision) == before
    assert session.compare(*FACT).on == 1


def test_an_interrupt_while_the_base_is_asked_leaves_the_switches(opened, monkeypatch):
    session = opened().session
    name, _ = session.edit(*FACT)

    def interrupted(*arguments, **options):
        assert not session.edits[name].enabled
        raise KeyboardInterrupt

    monkeypatch.setattr("mend_lightning.ui.session.answer_shifts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.probe([FACT[0]])
    assert session.edits[name].enabled and session.entries[0].enabled


def test_readers_see_the_switches_while_the_base_is_asked(opened, monkeypatch):
    session = opened().session
    session.edit(*FACT)
    seen = []
    monkeypatch.setattr(
        "mend_lightning.ui.session.answer_shifts", lambda *a, **k: seen.append(session.entries[0].enabled) or []
    )
    session.probe([FACT[0]])
    assert seen == [True]


def test_a_probe_ends_soon_when_the_session_is_stopped(opened):
    session = opened().session
    name, _ = session.edit(*FACT)
    done = []

    def stop(*counts):
        done.append(counts)
        session.stop()

    with pytest.raises(StoppedError):
        session.probe([f"Which country is number {i} in?" for i in range(40)], stop)
    assert done == [(16, 40)] and session.edits[name].enabled


def test_two_threads_take_turns(opened):
    """Each sees a model of its own switches' making: answers of the base before, of the whole stack after."""
    session = opened().session
    name, _ = session.edit(*FACT)
    on = session.compare(*FACT).shift
    session.set_enabled(name, False)
    off = session.compare(*FACT).shift
    found = []

    def switch():
        for i in range(6):
            session.set_enabled(name, i % 2 == 0)

    def ask():
        for _ in range(4):
            found.extend(session.probe([FACT[0]]).shifts)

    threads = [threading.Thread(target=target) for target in (switch, ask, ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bare = {(on.old, on.new, on.p_old_after), (off.old, off.new, off.p_old_after)}
    assert len(found) == 8 and {(shift.old, shift.new, shift.p_old_after) for shift in found} <= bare


def test_a_classifier_answers_in_the_words_of_the_edit(opened):
    session = opened("bert").session
    session.edit(CLAIM[0], "false")
    compared = session.compare(CLAIM[0], "false")
    assert {compared.shift.old, compared.shift.new} <= {"true", "false"} and "false" in compared.answers
    with pytest.raises(TokenizerError, match="no class"):
        session.compare(CLAIM[0], "Zagreb")


def test_an_editor_without_edits_is_refused(base_folder):
    model, tokenizer = load_base(str(base_folder("llama")), "float32")
    editor = InContext.for_model(model)
    editor.bind(model, "llama", vars(FORMATS[KINDS["llama"]]))
    with pytest.raises(ConfigError, match="InContext changes no weight"):
        Session(model, tokenizer, editor)


def test_warnings_of_others_are_shown_as_ever():
    with pytest.warns(DeprecationWarning, match="old"), warnings.catch_warnings():
        warnings.simplefilter("always")
        with captured_warnings() as messages:
            warnings.warn("old", DeprecationWarning, stacklevel=1)
            warnings.warn("nothing", NoEffectWarning, stacklevel=1)
    assert messages == ["nothing"]
    with pytest.raises(DeprecationWarning), captured_warnings():
        warnings.warn("old", DeprecationWarning, stacklevel=1)


def test_questions_of_nothing():
    with pytest.raises(EmptyEditError, match="no question"):
        questions_of(["", "  "])


def test_what_is_too_long_is_refused_before_the_model_runs(opened, monkeypatch):
    """One question of a million characters would take all of the memory, and with it the edits that are not saved."""
    made = opened()
    session, long = made.session, "x" * (MAX_CHARACTERS + 1)
    monkeypatch.setattr(type(made.model), "forward", lambda *_, **__: 1 / 0)
    calls = {
        "The question has": lambda: session.edit(long, "a"),
        "The new answer has": lambda: session.edit("a", long),
        "A question has": lambda: session.compare(long),
        f"The new answer has {MAX_CHARACTERS + 1:,} characters, too many": lambda: session.compare("a", long),
        "has 10,001 characters": lambda: session.probe(["a", long]),
        "1,001 questions are too many at once": lambda: session.moved([str(i) for i in range(MAX_QUESTIONS + 1)]),
    }
    for message, call in calls.items():
        with pytest.raises(InputTooLongError, match=message):
            call()
    assert len(questions_of([long[1:]] * MAX_QUESTIONS)) == MAX_QUESTIONS and session.revision == 0


def test_a_session_in_a_format_edits_and_asks_in_it(base_folder):
    made = tiny_edit(base_folder("llama"), "llama")
    made.tokenizer.chat_template = CHAT_TEMPLATES["plain"]
    with Session(made.model, made.tokenizer, made.editor, "chat") as session:
        name, _ = session.edit(*FACT)
        edit = session.edits[name].edit
        assert edit.about["format"] == "chat"
        encoder = editor_encoder(made.editor, made.model, made.tokenizer, format="chat")
        shift = session.compare(FACT[0]).shift
    base = dense_copy(made.model, Edit({}))
    assert shift.old == answer_of(base, encoder, FACT[0])
    assert shift.new == answer_of(dense_copy(made.model, edit), encoder, FACT[0])
    own = editor_encoder(made.editor, made.model, made.tokenizer)
    assert (shift.old, shift.new) != tuple(
        answer_of(each, own, FACT[0]) for each in (base, dense_copy(made.model, edit))
    )
