"""What serves the page: the command, its address, its end; and what of it can be seen without a browser."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import torch
from helpers.commandline import assert_says, call
from helpers.edited import FACT, tiny_edit

from mend_lightning import Edit, LowRankDelta
from mend_lightning.edits.stack_state import StackedEdit
from mend_lightning.errors import ConfigError, StoppedError
from mend_lightning.evaluation.shifts import Shift, TokenShift
from mend_lightning.ui import server, views
from mend_lightning.ui.comparison import Comparison, Probe
from mend_lightning.ui.server import address, is_local, listen, serve
from mend_lightning.ui.session import Session

if find_spec("gradio") is not None:
    from mend_lightning.ui.guard import EVENT_BYTES, UPLOAD_BYTES, Guard

pytest_plugins = ["helpers.bases"]
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")
HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.fixture
def editor_folder(base_folder, tmp_path):
    return tiny_edit(base_folder("llama"), "llama").editor.save_pretrained(tmp_path / "editor")


@pytest.fixture
def session(base_folder, monkeypatch, tmp_path):
    """With one edit, named "a name"."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = tiny_edit(base_folder("llama"), "llama")
    with Session(made.model, made.tokenizer, made.editor) as session:
        session.edits.add(made.edit, "a name")
        yield session


@contextmanager
def served(session, host: str = "127.0.0.1", port: int = 0):
    """Serves a session's page as the command does; gives its URL."""
    with listen(host, port) as listening:
        servers = []
        thread = threading.Thread(target=lambda: asyncio.run(serve(session, listening, servers.append, host)))
        thread.start()
        try:
            # Waits until the page is there.
            assert asked(address(listening)).status == 200
            yield address(listening)
        finally:
            servers[0].should_exit = True
            thread.join(20)
    with pytest.raises(StoppedError):
        session.probe(["What the page had under way ends with it?"])


@pytest.fixture
def url(session):
    """Of a page with one edit, named "a name"."""
    with served(session) as url:
        yield url


def asked(url: str, method: str = "GET", path: str = "", body: bytes | None = None, **headers: str) -> SimpleNamespace:
    """What the server answers. Of headers that are named with an underscore it stands for a hyphen."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, f"/{path}", body, headers)
        answer = connection.getresponse()
        return SimpleNamespace(
            status=answer.status, headers=answer.headers, text=answer.read().decode(errors="replace")
        )
    finally:
        connection.close()


def status(url: str, **headers: str) -> int:
    return asked(url, path=urlsplit(url).path.removeprefix("/"), **headers).status


def event(url: str, handler: str, *data, **headers: str) -> SimpleNamespace:
    """Sends what a tab of the browser sends where a handler of the page is to run."""
    config = json.loads(re.search(r"window\.gradio_config = (.*?);</script>", asked(url).text)[1])
    (number,) = (each["id"] for each in config["dependencies"] if each["api_name"] == handler)
    body = json.dumps({"data": data, "fn_index": number, "session_hash": "x", "event_data": None, "trigger_id": 1})
    return asked(url, "POST", "gradio_api/queue/join", body.encode(), **{"Content-Type": "application/json", **headers})


def outcome(url: str) -> dict:
    """What came out of the last event, as a tab of the browser hears it."""
    with urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash=x", timeout=20) as stream:
        messages = (json.loads(line.removeprefix(b"data: ")) for line in stream if line.startswith(b"data: "))
        return next(message for message in messages if message["msg"] == "process_completed")


@needs_gradio
def test_only_this_machine_is_answered(url):
    assert status(url) == 200
    assert status(url, Host="localhost") == 200
    assert status(url, Host="evil.example") == 400, "a name that somebody points to 127.0.0.1"
    with urllib.request.urlopen(url, timeout=20) as answer:
        page = answer.read().decode()
    assert "mend-lightning" in page and "fonts.googleapis" not in page and "fonts.gstatic" not in page


@needs_gradio
def test_an_event_does_what_it_does_in_the_page(url):
    """What the tests of refusals below send would work, were it not for what they change in it."""
    assert event(url, "measure", "What is it?", 0).status == 200
    assert "1 answers changed" in unescape(outcome(url)["output"]["data"][0])


FILE = {"meta": {"_type": "gradio.FileData"}}


@needs_gradio
@pytest.mark.parametrize("guarded", [True, False], ids=["guard", "gradio's own check"])
def test_no_file_of_this_machine_is_handed_out(session, tmp_path, monkeypatch, guarded):
    """The check of Gradio itself is behind the guard: either is enough."""
    secret, fifo = tmp_path / "secret.txt", tmp_path / "fifo"
    secret.write_text("what nobody else may read")
    os.mkfifo(fifo)
    if not guarded:
        monkeypatch.setattr(Guard, "_check", lambda *_: None)
        monkeypatch.setattr(Guard, "_checked_event", lambda self, body: body)
    with served(session) as url:
        for path in (secret, fifo, "/etc/hostname", "/dev/zero", f"{session.uploads}/../../secret.txt"):
            for payload in ({"path": str(path), **FILE}, {"path": str(path), "url": "x", **FILE}):
                answer = event(url, "measure", payload, 0)
                if guarded:
                    assert answer.status == 403 and "names no file but one that was uploaded" in answer.text
                else:
                    assert answer.status == 200 and not outcome(url)["success"]
        assert asked(url, path=f"gradio_api/file={secret}").status == (404 if guarded else 403)
        assert status(url) == 200, "nothing blocks"
    found = [path.read_bytes() for path in Path(session.folder.name).rglob("*") if path.is_file()]
    assert not any(b"nobody else" in content for content in found)


@needs_gradio
@pytest.mark.parametrize(
    "data",
    [
        [["a"], 0],
        [{"a": {"path": "/etc/hostname", **FILE}}, 0],
        [{"path": None}, 0],
        [{"path": "a\0b"}, 0],
        [{"path": "http://a/b", **FILE}, 0],
    ],
    ids=["list", "nested", "none", "nul", "address"],
)
def test_events_are_texts_and_numbers(url, data):
    assert event(url, "measure", *data).status == 403


@needs_gradio
def test_what_is_no_event_is_refused(url):
    file = json.dumps({"path": "/etc/hostname", **FILE})
    bodies = {
        "": 400,
        "[]": 400,
        '{"data": 1}': 400,
        "[" * 100_000: 400,
        "\udcff": 400,
        '{"data": {"a": 1}}': 400,
        "{}": 400,
    }
    # Where a key is given twice the last one counts, here as behind.
    bodies |= {f'{{"data": [], "event_data": {file}}}': 403, f'{{"data": [], "data": [{file}]}}': 403}
    for body, expected in bodies.items():
        sent = body.encode(errors="surrogateescape")
        answer = asked(url, "POST", "gradio_api/queue/join", sent, **{"Content-Type": "application/json"})
        assert answer.status == expected, body[:40]


# What the page asks for; test_ui_browser.py has the proof that it is enough.
REACHABLE = {
    "GET /", "GET /assets/x", "GET /static/x", "GET /theme.css", "GET /favicon.ico", "GET /manifest.json", "GET /edits/x",
    "GET /gradio_api/app_id", "GET /gradio_api/queue/data", "GET /gradio_api/heartbeat/x", "POST /gradio_api/queue/join",
    "POST /gradio_api/upload",
}  # fmt: skip


@needs_gradio
def test_of_what_gradio_serves_the_page_alone_is_reachable(session):
    """Each route of Gradio's, also those that a later version may have."""
    routes = asyncio.run(gradio_routes(session))
    assert REACHABLE <= routes and len(routes) > 80
    more = {
        "GET /?deep%5Flink=x",
        "GET /?a=b&deep_link",
        "GET /assets/../../gradio/routes.py",
        "GET /edits/x/y",
        "POST /",
        "PUT /gradio_api/upload",
        "GET //",
        "get /",
    }
    assert {route for route in routes | more if asyncio.run(passed_on(*route.split(" ")))} == REACHABLE


@needs_gradio
def test_what_was_looked_at_is_what_is_passed_on():
    """A reader behind the guard could take the other one of two keys of one name."""
    (body,) = asyncio.run(passed_on("POST", "/gradio_api/queue/join", b'{"data": [{"path": "a"}], "data": [1]}'))
    assert body == b'{"data": [1]}'


async def gradio_routes(session) -> set[str]:
    return set(filled(server.build_app(session).routes))


async def passed_on(method: str, path: str, sent: bytes = b'{"data": []}') -> list[bytes]:
    """The body that the guard lets through of such a request, or none."""
    reached = []

    async def behind(scope, receive, send) -> None:
        reached.append((await receive())["body"])

    async def receive() -> dict:
        return {"type": "http.request", "body": sent}

    async def send(message: dict) -> None:
        pass

    headers = [(b"host", b"localhost"), (b"content-length", b"%d" % len(sent))]
    path, _, query = path.partition("?")
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": query.encode()}
    await Guard(behind, {"localhost"}, False, Path("nowhere"))(scope, receive, send)
    return reached


def filled(routes) -> list[str]:
    """Method and path of each route, with x where anything may stand."""
    found = []
    for route in routes:
        if hasattr(route, "methods"):
            found += [f"{method} {re.sub(r'{.*?}', 'x', route.path)}" for method in route.methods]
        else:
            # Of an app that is mounted, or of a router that is included.
            found += filled(getattr(route, "original_router", route).routes)
    return found


SITE, OWN = {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-origin"}


@needs_gradio
def test_other_pages_are_refused(url):
    """In every browser: new ones say where a request comes from, older ones name the origin of those that send anything."""
    port = urlsplit(url).port
    foreign = [
        f"http://localhost:{port + 1}",
        f"http://localhost:{port}",
        f"http://127.0.0.1:{port + 1}",
        "https://evil.example",
        "null",
        "file://",
    ]
    strangers = [
        SITE,
        {"Sec-Fetch-Site": "same-site"},
        *({"Origin": origin, **more} for origin in foreign for more in ({}, SITE, OWN)),
    ]
    for stranger in strangers:
        answers = [event(url, "measure", "What?", 0, **stranger)]
        answers += [event(url, "measure", "What?", 0, **{**stranger, "Content-Type": "text/plain"})]
        answers += [asked(url, "POST", "gradio_api/upload", b"x", **stranger)]
        answers += [
            asked(url, path=path, **stranger) for path in ("", "edits/a%20name", "theme.css", "gradio_api/app_id")
        ]
        preflight = {
            **stranger,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        for answer in answers:
            assert answer.status == 403 and "Another page asked for this" in answer.text, stranger
        answers += [
            asked(url, "OPTIONS", path, **preflight) for path in ("", "gradio_api/queue/join", "gradio_api/upload")
        ]
        assert {answer.status for answer in answers} == {403, 404}
        assert not [name for answer in answers for name in answer.headers if name.lower().startswith("access-control")]


@needs_gradio
def test_the_page_and_programs_are_answered(url):
    port = urlsplit(url).port
    for own in ({}, OWN, {"Origin": f"http://127.0.0.1:{port}", **OWN}, {"Sec-Fetch-Site": "none"}):
        answer = event(url, "measure", "What?", 0, **own)
        assert answer.status == 200 and outcome(url)["success"]
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    by_name = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert event(url, "measure", "What?", 0, **by_name).status == 200
    # A person who follows a link to the page from another one.
    link = {**SITE, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert asked(url, **link).status == 200
    assert asked(url, path="edits/a%20name", **link).status == 403
    assert asked(url, **{**link, "Sec-Fetch-Dest": "iframe"}).status == 403


@needs_gradio
def test_no_other_page_may_show_it(url):
    for path, expected in (("", 200), ("nowhere", 404), ("assets/nowhere.js", 404), ("edits/a%20name", 200)):
        answer = asked(url, path=path)
        assert answer.status == expected and answer.headers["X-Frame-Options"] == "DENY"
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


@needs_gradio
@pytest.mark.parametrize(
    "host, named", [("0.0.0.0", "192.0.2.7"), ("localhost", "localhost"), ("127.8.8.8", "127.8.8.8"), ("::1", "[::1]")]
)
def test_whatever_the_address_the_rules_are_the_same(session, host, named):
    with served(session, host) as url:
        port = urlsplit(url).port
        own = {"Host": f"{named}:{port}", "Origin": f"http://{named}:{port}"}
        assert event(url, "measure", "What?", 0, **own).status == 200
        assert event(url, "measure", "What?", 0, **{**own, "Origin": "http://evil.example"}).status == 403
        assert event(url, "measure", {"path": "/etc/hostname", **FILE}, 0, **own).status == 403
        for name in (
            "evil.example",
            "localhost.evil.example",
            "192.0.2.7.evil.example",
            "",
            "[::1",
            "127.0.0.1@evil.example",
        ):
            assert asked(url, Host=f"{name}:{port}").status == 400, name
        everybody = host == "0.0.0.0"
        for name in ("192.0.2.7", "[2001:db8::1]", socket.gethostname()):
            assert asked(url, Host=f"{name}:{port}").status == (200 if everybody else 400), name


@needs_gradio
def test_what_is_too_large_is_refused_before_it_is_read(url, session, monkeypatch):
    assert event(url, "measure", "x" * EVENT_BYTES, 0).status == 413
    for path, length in (("queue/join", EVENT_BYTES + 1), ("upload", UPLOAD_BYTES + 1)):
        assert announced(url, f"/gradio_api/{path}", {"Content-Length": str(length)}) == 413
        for headers in (
            {},
            {"Transfer-Encoding": "chunked"},
            {"Transfer-Encoding": "chunked", "Content-Length": "5"},
            {"Content-Length": "many"},
        ):
            assert announced(url, f"/gradio_api/{path}", headers) in (400, 411)
    monkeypatch.setattr("mend_lightning.ui.guard.UPLOAD_BYTES", 1000)
    assert uploaded(url, b"x" * 500).status == 200
    assert uploaded(url, b"y" * 500).status == 413, "together they are too many"
    (kept,) = (path for path in session.uploads.rglob("*") if path.is_file())
    # What an upload that broke off leaves, it leaves for good.
    (session.uploads / "tmpbroken").write_bytes(b"z" * 1000)
    session.forget_upload(kept)
    assert uploaded(url, b"y" * 500).status == 200 and not (session.uploads / "tmpbroken").exists()


def announced(url: str, path: str, headers: dict[str, str]) -> int:
    """Sends the head of a request and nothing of its body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        connection.putrequest("POST", path)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


def uploaded(url: str, content: bytes, **headers: str) -> SimpleNamespace:
    """Uploads a file as the page does."""
    part = (
        b'--mark\r\nContent-Disposition: form-data; name="files"; filename="a.safetensors"\r\n\r\n'
        + content
        + b"\r\n--mark--\r\n"
    )
    kind = {"Content-Type": "multipart/form-data; boundary=mark"}
    return asked(url, "POST", "gradio_api/upload", part, **{**kind, **headers})


@needs_gradio
def test_an_upload_is_added_and_goes(url, session, tmp_path):
    session.save("a name")
    content = next(Path(session.folder.name).glob("*.safetensors")).read_bytes()
    session.remove("a name")
    (path,) = json.loads(uploaded(url, content).text)
    assert Path(path).read_bytes() == content
    assert asked(url, path=f"gradio_api/file={path}").status == 404
    assert event(url, "add", {"path": path, "orig_name": "a.safetensors", **FILE}).status == 200
    assert outcome(url)["success"] and [entry.edit.facts for entry in session.entries] == [[FACT]]
    assert not Path(path).exists()
    assert event(url, "add", {"path": path, **FILE}).status == 403
    (tmp_path / "mine.safetensors").write_bytes(content)
    session.forget_upload(tmp_path / "mine.safetensors")
    assert (tmp_path / "mine.safetensors").exists(), "nothing but uploads is deleted"


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
