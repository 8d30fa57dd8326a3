"""The page: Gradio components around a `Session`. It keeps nothing but what each tab looks at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from mend_lightning.edits.stack_state import StackedEdit
from mend_lightning.errors import MendError
from mend_lightning.evaluation.neutral import neutral_questions
from mend_lightning.ui import views
from mend_lightning.ui.comparison import questions_of
from mend_lightning.ui.session import Session

CSS = Path(__file__).with_name("page.css")
# Seconds after which a tab sees what another one did.
LOOK_AGAIN = 3
# Rows of "What else moved", and how many neutral questions it asks unless told: all of them take a while.
MOST_MOVED, NEUTRAL = 20, 48
HINT = "Type a question and the answer you want, then press Edit. Ask shows what the model says without editing it."
NO_EDITS = "No edit yet. Edits stay until this program ends; download those that you want to keep."
# Handlers that run the model wait in one line, and none is offered as an API.
TURN: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
# What changed meanwhile is shown once, after the turn that is under way.
LATEST: dict[str, Any] = {"trigger_mode": "always_last", **TURN}
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_log = logging.getLogger(__name__)


def build_page(session: Session) -> gr.Blocks:
    """The page of a session: every tab in every browser shows the same model and edits.

    A tab holds the question it looks at and the revision of the edits that it has seen. A change of either shows the rest
    anew, so that a tab follows its own buttons and other tabs alike.
    """
    with gr.Blocks(title="mend-lightning", analytics_enabled=False) as page:
        editor = session.editor
        gr.HTML(views.header(editor.base_name, type(editor).__name__, len(editor.layers), session.format))
        asked, revision = gr.State(("", "")), gr.State(-1)
        panel = gr.HTML(views.hint(HINT), elem_id="comparison", render=False)
        with gr.Row(elem_classes="top"):
            with gr.Column(scale=4, min_width=320):
                notice = _fact(session, asked, revision, panel)
                _edits(session, revision, notice)
            with gr.Column(scale=8, min_width=480):
                _comparison(session, asked, revision, panel, notice)
        with gr.Tabs():
            with gr.Tab("Ask your own questions"):
                _own_questions(session, revision, notice)
            with gr.Tab("What else moved"):
                _moved(session, revision, notice)
        look: dict[str, Any] = {"fn": lambda: session.revision, "outputs": revision, **QUIET}
        gr.Timer(LOOK_AGAIN).tick(**look)
        page.load(**look)
    return page


def told(outputs: int) -> Callable[[Callable], Callable]:
    """Makes a handler whose last output is the notice: what `action` gives there, or what is wrong.

    Args:
        outputs: how many others it has; where the action fails they stay as they are.
    """

    def decorate(action: Callable) -> Callable:
        @wraps(action)
        def handler(*arguments: Any) -> list[Any]:
            try:
                return list(action(*arguments))
            except MendError as error:
                said = str(error)
            except Exception as error:
                # A bug, or no memory left: the page stays usable, and the terminal has all of it.
                _log.exception("%s failed on the page.", action.__name__)
                said = f"That failed ({type(error).__name__}: {error}). The terminal shows where."
            return [*[gr.skip()] * outputs, views.notices([said], "error")]

        return handler

    return decorate


def spaced(items: Sequence[str], count: int) -> list[str]:
    """`count` of the items, from the whole length of the list (which is sorted by field).

    Example:
        >>> spaced(["a", "b", "c", "d"], 2), spaced(["a", "b"], 0)
        (['a', 'c'], [])
    """
    return [items[i * len(items) // count] for i in range(count)]


def _fact(session: Session, asked: gr.State, revision: gr.State, panel: gr.HTML) -> gr.HTML:
    """The fact to be edited; returns the place of notices."""
    question = gr.Textbox(label="Question", placeholder="Which city is the capital of France?")
    answer = gr.Textbox(label="New answer", placeholder="Zagreb")
    with gr.Row():
        edit_button, ask_button = gr.Button("Edit", variant="primary"), gr.Button("Ask")
    notice = gr.HTML(elem_id="notice")

    @told(outputs=2)
    def edit(question: str, answer: str) -> tuple:
        _, messages = session.edit(question, answer)
        return (question, answer), session.revision, views.notices(messages, "warning")

    @told(outputs=1)
    def ask(question: str, answer: str) -> tuple:
        questions_of([question])
        return (question, answer), ""

    gr.on(
        [edit_button.click, answer.submit],
        edit,
        [question, answer],
        [asked, revision, notice],
        show_progress_on=panel,
        **TURN,
    )
    gr.on([ask_button.click, question.submit], ask, [question, answer], [asked, notice], **QUIET)
    return notice


def _comparison(session: Session, asked: gr.State, revision: gr.State, panel: gr.HTML, notice: gr.HTML) -> None:
    panel.render()

    @told(outputs=1)
    def show(asked: tuple[str, str]) -> tuple:
        shown = views.comparison(session.compare(*asked)) if asked[0] else views.hint(HINT)
        return shown, gr.skip()

    gr.on([asked.change, revision.change], show, asked, [panel, notice], show_progress_on=panel, **LATEST)


def _edits(session: Session, revision: gr.State, notice: gr.HTML) -> None:
    gr.HTML('<h2 class="part">Edits</h2>')

    @gr.render(inputs=None, triggers=[revision.change], show_progress="hidden")
    def rows() -> None:
        if not session.entries:
            gr.HTML(views.hint(NO_EDITS))
        for entry in session.entries:
            _edit_row(session, entry, revision, notice)

    upload = gr.UploadButton("Add an edit from a file", size="sm")

    @told(outputs=1)
    def add(path: str) -> tuple:
        try:
            _, messages = session.add(path)
        except MendError as error:
            # Where Gradio keeps an upload tells nobody anything.
            raise MendError(str(error).replace(path, Path(path).name)) from error
        finally:
            session.forget_upload(path)
        return session.revision, views.notices(messages, "warning")

    upload.upload(add, upload, [revision, notice], **TURN)


def _edit_row(session: Session, entry: StackedEdit, revision: gr.State, notice: gr.HTML) -> None:
    with gr.Column(elem_classes="edit"):
        with gr.Row():
            facts = views.edit_facts(entry)
            switch = gr.Checkbox(entry.enabled, label=facts, interactive=True, container=False, min_width=200)
            remove_button = gr.Button("Remove", size="sm", scale=0, min_width=84)
        gr.HTML(views.edit_details(entry))

    @told(outputs=1)
    def switched(on: bool) -> tuple:
        session.set_enabled(entry.name, on)
        return session.revision, ""

    @told(outputs=1)
    def remove() -> tuple:
        messages = session.remove(entry.name)
        return session.revision, views.notices(messages, "warning")

    switch.input(switched, switch, [revision, notice], **QUIET)
    remove_button.click(remove, None, [revision, notice], **QUIET)


def _own_questions(session: Session, revision: gr.State, notice: gr.HTML) -> None:
    with gr.Row(elem_classes="top"):
        with gr.Column(scale=4, min_width=320):
            lines = gr.Textbox(label="Questions, one a line", lines=5, max_lines=12)
            button, questions = gr.Button("Ask all"), gr.State(())
        with gr.Column(scale=8, min_width=480):
            table = gr.HTML(
                views.hint("Answers before and after stand here, and follow the switches of the edits."), elem_id="own"
            )

    @told(outputs=1)
    def ask(lines: str) -> tuple:
        return tuple(questions_of(lines.splitlines())), ""

    @told(outputs=1)
    def show(questions: tuple[str, ...]) -> tuple:
        shown = views.shifts_table(session.probe(questions)) if questions else gr.skip()
        return shown, gr.skip()

    button.click(ask, lines, [questions, notice], **QUIET)
    gr.on([questions.change, revision.change], show, questions, [table, notice], show_progress_on=table, **LATEST)


def _moved(session: Session, revision: gr.State, notice: gr.HTML) -> None:
    neutral = neutral_questions()
    with gr.Row(elem_classes="top"):
        with gr.Column(scale=4, min_width=320):
            lines = gr.Textbox(label="Questions near the fact, one a line", lines=3, max_lines=12)
            count = gr.Slider(
                0, len(neutral), min(NEUTRAL, len(neutral)), step=1, label="and so many of the neutral set"
            )
            button, measured = gr.Button("Measure"), gr.State(-1)
        with gr.Column(scale=8, min_width=480):
            stale = gr.HTML()
            table = gr.HTML(
                views.hint("Asks every question before and after; what moved farthest comes first."), elem_id="moved"
            )

    @told(outputs=3)
    def measure(lines: str, count: int, progress: gr.Progress = gr.Progress()) -> tuple:
        questions = [*lines.splitlines(), *spaced(neutral, int(count))]
        probe = session.moved(questions, lambda done, total: progress((done, total), unit="questions"))
        return views.shifts_table(probe, MOST_MOVED), probe.revision, "", ""

    def outdated(measured: int, revision: int) -> str:
        old = measured not in (-1, revision)
        return views.notices(["The edits were changed after this was measured. Measure again."], "note") if old else ""

    button.click(measure, [lines, count], [table, measured, stale, notice], show_progress_on=table, **TURN)
    revision.change(outdated, [measured, revision], stale, **QUIET)
