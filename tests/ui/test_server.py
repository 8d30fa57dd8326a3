"""What serves the page: the command, its address, its end; and what of it can be seen without a browser."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest
import torch
from helpers.commandline import assert_says, call
from helpers.edited import FACT, tiny_edit

from mend_lightning import Edit, LowRankDelta
from mend_lightning.edits.stack_state import StackedEdit
from mend_lightning.errors import ConfigError, StoppedError
from mend_lightning.evaluation.shifts import Shift, TokenShift
from mend_lightning.ui import views
from mend_lightning.ui.comparison import Comparison, Probe
from mend_lightning.ui.server import address, is_local, listen, serve
from mend_lightning.ui.session import Session

pytest_plugins = ["helpers.bases"]
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")
HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.fixture
def editor_folder(base_folder, tmp_path):
    return tiny_edit(base_folder("llama"), "llama").editor.save_pretrained(tmp_path / "editor")


@pytest.fixture
def url(base_folder, monkeypatch, tmp_path):
    """Of a page with one edit, named "a name"."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = tiny_edit(base_folder("llama"), "llama")
    with Session(made.model, made.tokenizer, made.editor) as session, listen("127.0.0.1", 0) as listening:
        session.edits.add(made.edit, "a name")
        servers = []
        thread = threading.Thread(target=lambda: asyncio.run(serve(session, listening, servers.append)))
        thread.start()
        yield address(listening)
        servers[0].should_exit = True
        thread.join(20)
        with pytest.raises(StoppedError):
            session.probe(["What the page had under way ends with it?"])


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@needs_gradio
def test_only_this_machine_is_answered(url):
    assert status(url) == 200
    assert status(url, Host="localhost") == 200
    assert status(url, Host="evil.example") == 400, "a name that somebody points to 127.0.0.1"
    with urllib.request.urlopen(url, timeout=20) as answer:
        page = answer.read().decode()
    assert "mend-lightning" in page and "fonts.googleapis" not in page and "fonts.gstatic" not in page


@needs_gradio
def test_edits_are_files_of_their_name(url, tmp_path):
    with urllib.request.urlopen(f"{url}edits/a%20name", timeout=20) as answer:
        (tmp_path / "edit.safetensors").write_bytes(answer.read())
        assert "a%20name.safetensors" in answer.headers["content-disposition"]
    assert Edit.load(tmp_path / "edit.safetensors").facts == [FACT]
    assert status(f"{url}edits/another") == 404
    assert status(f"{url}edits/..%2F..%2Fetc%2Fpasswd") == 404


@needs_gradio
def test_the_command_serves_until_ctrl_c(editor_folder, tmp_path, monkeypatch):
    # A proxy must not come between the page and this machine.
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = []

    def look_and_interrupt(url: str) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(url, timeout=30) as answer:
                found.append((url, answer.status, len(list(tmp_path.glob("mend-lightning-ui-*")))))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("webbrowser.open", lambda url: threading.Thread(target=look_and_interrupt, args=[url]).start())
    result = call("ui", "--editor", editor_folder, "--dtype", "float32", "--open_browser", "true")
    assert (result.code, result.err) == (0, "")
    assert re.fullmatch(r"The page is at (http://127.0.0.1:\d+/) .*Stopped. .* not downloaded are gone.", result.out)
    assert [each[1:] for each in found] == [(200, 1)] and found[0][0] in result.out
    assert not list(tmp_path.glob("mend-lightning-ui-*"))


@needs_gradio
def test_a_port_that_is_taken_is_named(editor_folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = call("ui", "--editor", editor_folder, "--port", port)
        assert result.code == 1
        assert_says(result.err, f"cannot be opened at 127.0.0.1, port {port}: .* Give another --port")
    for host, port in (("192.0.2.1", 0), ("127.0.0.1", 70_000), ("127.0.0.1", -1)):
        with pytest.raises(ConfigError, match="Give another --port"):
            listen(host, port)


def test_without_gradio_the_command_says_what_to_install(editor_folder, monkeypatch):
    monkeypatch.setattr("mend_lightning.ui.server.find_spec", lambda name: None)
    result = call("ui", "--editor", editor_folder)
    assert result.code == 1
    assert_says(result.err, r"pip install 'mend-lightning\[ui\]'")


def test_addresses():
    with listen("localhost", 0) as listening:
        assert address(listening).startswith(("http://127.0.0.1:", "http://[::1]:"))
        assert is_local(listening.getsockname()[0])
    assert [is_local(host) for host in ("::1", "127.8.8.8", "0.0.0.0", "::", "10.0.0.1", "a.example")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_whatever_was_written_is_escaped():
    shift = Shift(HOSTILE, "", HOSTILE, f"new {HOSTILE}", 0.9, 0.1, 0.0, 0.8, 1.0)
    tokens = [TokenShift(HOSTILE, 1, 0.0, 1.0)]
    edit = Edit(
        {"fc": LowRankDelta(torch.ones(1, 1, 2), torch.ones(1, 1, 2))},
        {"edits": [{"prompt": HOSTILE, "target": HOSTILE}], "probability": 0.5},
    )
    shown = [
        views.header(HOSTILE, HOSTILE, 2),
        views.notices([HOSTILE], "error"),
        views.hint(HOSTILE),
        views.comparison(Comparison(shift, HOSTILE, {HOSTILE: tokens}, tokens, 1)),
        views.shifts_table(Probe([shift], 1, 0)),
        views.edit_details(StackedEdit(HOSTILE, edit)),
    ]
    for html in shown:
        assert "<script" not in html and "\"'&" not in html, html


def test_what_a_comparison_shows():
    tokens = [TokenShift(" Za", 1, 0.25, 0.5), TokenShift("\n", 2, 0.5, 1.0)]
    shift = Shift("Where?", "", "Paris", "Za", 0.9, 0.0, 0.125, 0.5, 1.0)
    html = views.comparison(Comparison(shift, "za", {"Za": tokens}, tokens, 2))
    before, after = html.split('<section class="card after">')
    assert "Paris" in before and '<b class="whole">12 %</b>' in before and "25 %" in before
    assert "with 2 edits on" in after and '<b class="whole">50 %</b>' in after and 'class="answer reached"' in after
    assert "·Za" in html and "⏎" in html
    other = Comparison(shift, "Rome", {"Za": tokens}, tokens, 2)
    assert 'class="answer other"' in views.comparison(other)
    silent = Comparison(Shift("Where?", "", "", "", 0.9, 0.9, 0.9, 0.9, 0.0), "", {}, tokens, 0)
    assert views.comparison(silent).count("no answer") == 2


def test_a_long_table_says_what_it_leaves_out():
    shifts = [Shift(f"{i}?", "", "a", "b", 0.9, 0.1, 0.0, 0.8, 1.0) for i in range(5)]
    html = views.shifts_table(Probe(shifts, 0, 0), most=3)
    assert html.count("<tr>") == 4 and "The 3 that moved farthest are shown." in html
    assert "5 of 5 answers changed, with no edit on." in html
