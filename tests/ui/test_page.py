"""The page in a real browser: a tiny model behind it, served on loopback, and no request to anywhere else."""

from __future__ import annotations

import asyncio
import gc
import http.server
import shutil
import socket
import tempfile
import threading
from importlib.util import find_spec
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from helpers.bases import FORMATS, assert_same_state, state_copy

from mend_lightning import Edit, MendEditor, generate_answers, load_base
from mend_lightning.ui.comparison import MAX_CHARACTERS
from mend_lightning.ui.server import listen, serve
from mend_lightning.ui.session import Session

pytest_plugins = ["helpers.bases"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ([] if BROWSER else ["chromium"])
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.timeout(120),
]
SWITCHES = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
# What the editor below can do to the tiny base, and what it cannot.
QUESTION, ANSWER, TOO_FAR = "Which continent is North Korea in?", "Africa", "Oceania"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=BROWSER, args=SWITCHES)
        yield launched
        launched.close()


@pytest.fixture
def outside(monkeypatch) -> list:
    """Addresses off this machine that Python connected to."""
    found, connect = [], socket.socket.connect

    def watched(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
            found.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    return found


@pytest.fixture
def served(base_folder, outside, monkeypatch, tmp_path):
    """A session and the URL of its page; at the end the base is what it was, and no one else was asked for anything."""
    monkeypatch.setattr("mend_lightning.ui.page.LOOK_AGAIN", 0.5)
    # Gradio remembers the first upload folder of a process, and would make it again after its session.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, tokenizer = load_base(str(base_folder("llama")), "float32")
    editor = MendEditor.for_model(model, rank=4, edit_rate=0.3, confidence=0.8)
    editor.bind(model, "tiny-llama", vars(FORMATS["causal"]))
    base, servers, listening = state_copy(model), [], listen("127.0.0.1", 0)
    session = Session(model, tokenizer, editor)
    thread = threading.Thread(target=lambda: asyncio.run(serve(session, listening, servers.append)))
    thread.start()
    port = listening.getsockname()[1]
    yield SimpleNamespace(session=session, url=f"http://127.0.0.1:{port}/", port=port)
    servers[0].should_exit = True
    thread.join(20)
    assert not thread.is_alive()
    session.close()
    assert_same_state(state_copy(model), base)
    assert not any(module._forward_hooks for module in model.modules())
    assert outside == []
    gc.collect()


@pytest.fixture
def tab(browser, served):
    """`tab()`: the page in a browser that has not seen it; what it asked for, and what it complained of, is looked at."""
    asked, complaints = [], []
    context = browser.new_context(accept_downloads=True)
    context.on("request", lambda request: asked.append(request.url))

    def opened():
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.goto(served.url)
        return page

    opened.complaints = complaints
    yield opened
    context.close()
    assert asked and {urlsplit(url).hostname or "" for url in asked if not url.startswith("data:")} == {"127.0.0.1"}
    assert complaints == []


def said(page, side: str):
    """The answer in large letters, before or after."""
    return page.locator(f"#comparison .answer[data-side={side}]")


def edit(page, question: str = QUESTION, answer: str = ANSWER) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_label("New answer").fill(answer)
    page.get_by_role("button", name="Edit", exact=True).click()


def switch(page, question: str = QUESTION, answer: str = ANSWER):
    return page.get_by_label(f"{question} → {answer}", exact=True)


def shows(locator, text: str, exact: bool = True) -> None:
    """Waits until the text is there."""
    from playwright.sync_api import expect

    (expect(locator).to_have_text if exact else expect(locator).to_contain_text)(text)


def test_a_fact_is_edited_switched_off_and_downloaded(served, tab, tmp_path):
    page = tab()
    (base,) = generate_answers(served.session.model, served.session.encoder, [QUESTION])
    shows(page.locator("#comparison"), "press Edit", exact=False)
    edit(page)
    shows(said(page, "after"), ANSWER)
    shows(said(page, "before"), base)
    assert "with 1 edit on" in page.locator(".card.after").inner_text()
    tokens = {side: page.locator(f".card.{side} .chip").all_inner_texts() for side in ("before", "after")}
    assert tokens["before"] != tokens["after"] and any("A" in text and "%" in text for text in tokens["after"])

    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    (name,) = served.session.edits.names
    assert download.value.suggested_filename == f"{name}.safetensors"
    download.value.save_as(tmp_path / "kept.safetensors")
    kept = Edit.load(tmp_path / "kept.safetensors")
    assert kept.about == served.session.edits[name].edit.about and kept.facts == [(QUESTION, ANSWER)]

    switch(page).uncheck()
    shows(said(page, "after"), base)
    for part in (".whole", ".chip", ".bar i"):
        sides = [page.locator(f".card.{side} {part}").all_inner_texts() for side in ("before", "after")]
        assert sides[0] and sides[0] == sides[1], "the probabilities as well"
    switch(page).check()
    shows(said(page, "after"), ANSWER)

    page.get_by_role("button", name="Remove").click()
    shows(said(page, "after"), base)
    shows(page.get_by_text("No edit yet."), "download those", exact=False)
    page.locator("input[type=file]").set_input_files(tmp_path / "kept.safetensors")
    shows(said(page, "after"), ANSWER)
    # Gradio makes an empty one as well, and leaves it.
    assert not [path for path in served.session.uploads.rglob("*") if path.is_file() and path.stat().st_size], (
        "it was read, and goes"
    )


def test_what_is_wrong_is_said(served, tab, tmp_path):
    page = tab()
    notice = page.locator("#notice")
    edit(page, "", ANSWER)
    shows(notice.get_by_role("alert"), "The question is empty", exact=False)
    edit(page, QUESTION, " ")
    shows(notice.get_by_role("alert"), "The new answer is empty", exact=False)
    page.get_by_role("button", name="Ask all").click()
    shows(notice.get_by_role("alert"), "There is no question", exact=False)
    (tmp_path / "holiday.txt").write_text("no edit")
    page.locator("input[type=file]").set_input_files(tmp_path / "holiday.txt")
    shows(notice.get_by_role("alert"), "holiday.txt cannot be read as a saved edit", exact=False)
    assert "/holiday.txt" not in notice.inner_text() and served.session.entries == ()

    edit(page, QUESTION, TOO_FAR)
    shows(notice.get_by_role("alert"), "Look at its answers before you keep it", exact=False)
    edit(page, QUESTION.lower(), ANSWER)
    shows(notice.get_by_role("alert"), "Two edits answer the same question", exact=False)
    assert "Traceback" not in page.content()


def test_a_bug_is_a_message_and_the_page_still_works(served, tab, monkeypatch, caplog):
    page = tab()
    monkeypatch.setattr(served.session, "edit", lambda *fact: 1 / 0)
    edit(page)
    shows(page.locator("#notice").get_by_role("alert"), "ZeroDivisionError", exact=False)
    assert "Traceback" not in page.content() and "division by zero" in caplog.text
    monkeypatch.undo()
    edit(page)
    shows(said(page, "after"), ANSWER)


def test_what_is_typed_is_text(served, tab):
    page = tab()
    question = "<img src=x onerror=alert(1)> ${alert(2)} {{value}} <b>Who</b>?"
    answer = "<script>alert(3)</script>`${4}`"
    edit(page, question, answer)
    shows(page.locator(".asked"), question)
    shows(page.locator(".edit label"), f"{question} → {answer}", exact=False)
    page.get_by_label("Questions, one a line").fill(question)
    page.get_by_role("button", name="Ask all").click()
    shows(page.locator("#own td").first, question)
    assert page.locator(".asked *, #own td:first-child *, #comparison img, #comparison script").count() == 0


def test_two_tabs_are_one_model(served, tab):
    one, two = tab(), tab()
    edit(one)
    shows(said(one, "after"), ANSWER)
    # The other tab looks again by itself.
    switch(two).uncheck()
    before = said(one, "before").inner_text()
    shows(said(one, "after"), before)
    served.session.remove(served.session.entries[0].name)
    shows(two.get_by_text("No edit yet."), "download those", exact=False)


def test_own_questions_and_what_else_moved(served, tab):
    page = tab()
    edit(page)
    questions = ["Which country is Managua in?", "What continent is North Korea on?"]
    page.get_by_label("Questions, one a line").fill("\n\n".join(questions))
    page.get_by_role("button", name="Ask all").click()
    shows(page.locator("#own .caption"), "with 1 edit on", exact=False)
    rows = page.locator("#own tbody tr").all()
    found = [[cell.inner_text() for cell in row.locator("td").all()[:3]] for row in rows]
    expected = served.session.probe(questions).shifts
    assert found == [[shift.question, shift.old, shift.new] for shift in expected]

    page.get_by_role("tab", name="What else moved").click()
    page.get_by_label("Questions near the fact").fill("\n".join(questions))
    page.get_by_label("and so many of the neutral set").first.fill("3")
    page.get_by_role("button", name="Measure").click()
    shows(page.locator("#moved .caption"), "of 5 answers changed", exact=False)
    asked = page.locator("#moved td:first-child").all_inner_texts()
    assert len(asked) == 5 and set(questions) <= set(asked)
    switch(page).uncheck()
    shows(page.get_by_role("status").filter(has_text="Measure again"), "Measure again", exact=False)
    shows(page.locator("#own .caption"), "0 of 2 answers changed, with no edit on.")


def test_what_is_too_long_or_too_large_is_said(served, tab, tmp_path, monkeypatch):
    page = tab()
    notice = page.locator("#notice")
    edit(page, "x" * (MAX_CHARACTERS + 1), ANSWER)
    shows(notice.get_by_role("alert"), f"The question has {MAX_CHARACTERS + 1:,} characters", exact=False)
    edit(page)
    shows(said(page, "after"), ANSWER)
    # As it is asked for by what does not keep to the limit that the page itself knows.
    monkeypatch.setattr("mend_lightning.ui.guard.UPLOAD_BYTES", 10)
    (tmp_path / "large").write_bytes(b"x" * 1000)
    page.locator("input[type=file]").set_input_files(tmp_path / "large")
    page.get_by_text("An edit's file has at most 10 bytes").wait_for()
    (said_by_browser,) = tab.complaints
    assert "413" in said_by_browser
    tab.complaints.clear()


@pytest.fixture
def stranger(served):
    """The URL of another page of this machine, with the page in a frame and a link to it."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f'<iframe src="{served.url}"></iframe><a href="{served.url}">Look</a>'.encode())

        def log_message(self, *arguments) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{other.server_port}/"
        other.shutdown()
        thread.join(20)


# What a page of somebody else's may try. Answers of "no-cors" cannot be read, but what they ask for would be done.
TRY = """async ([url, event]) => {
    const file = new FormData(), found = [];
    file.append("files", new Blob(["x"]), "a.txt");
    const json = {"Content-Type": "application/json"};
    for (const [path, options] of [
        ["", {}], ["config", {}], ["edits/a", {}], ["gradio_api/app_id", {credentials: "include"}],
        ["gradio_api/queue/join", {method: "POST", headers: json, body: event}],
        ["gradio_api/queue/join", {method: "POST", body: event}],
        ["gradio_api/queue/join", {method: "POST", body: event, mode: "no-cors"}],
        ["gradio_api/upload", {method: "POST", body: file}],
        ["gradio_api/upload", {method: "POST", body: file, mode: "no-cors"}],
    ]) {
        const answer = await fetch(url + path, options).then((answer) => answer.text(), () => null);
        if (answer) found.push([path, answer]);
    }
    return found;
}"""


def test_another_page_sees_and_does_nothing(served, stranger, browser):
    context = browser.new_context()
    page = context.new_page()
    page.goto(served.url)
    edits = page.evaluate("window.gradio_config.dependencies.filter((each) => each.api_name == 'edit')[0].id")
    event = f'{{"data": ["{QUESTION}", "{ANSWER}"], "fn_index": {edits}, "session_hash": "x", "event_data": null}}'
    page.goto(stranger)
    assert page.evaluate(TRY, [served.url, event]) == []
    # Chromium shows an error of its own where a page may not be in a frame.
    assert [frame.url for frame in page.frames[1:]] == ["chrome-error://chromewebdata/"]
    page.get_by_role("link", name="Look").click()
    page.get_by_role("heading", name="mend-lightning").wait_for()
    assert len(page.evaluate(TRY, [served.url, event])) > 4, "from the page itself it would work"
    context.close()
    assert [path.name for path in served.session.uploads.rglob("*.txt")] == ["a.txt"]
