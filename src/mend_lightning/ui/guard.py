"""What the page's server answers: what the page itself asks for, from this page, in sizes that make sense.

Behind the page is Gradio, a server for the public: it offers far more than one page needs, to other sites too, and takes
requests that name files of this machine. None of that gets past here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What the page asks for, seen in a browser: itself, what it is made of, whether the server is still there, its events.
EVENT, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"
_USED = re.compile(
    r"GET (/|/(theme\.css|favicon\.ico|manifest\.json)|/(assets|static)/(?!.*\.\.).+|/edits/[^/]+"
    r"|/gradio_api/(app_id|queue/data|heartbeat/\w+))"
    rf"|POST ({EVENT}|{UPLOAD})"
)
# An event holds what was typed. An upload is an edit; all that lie on the disk at a time together are as large as one may be.
EVENT_BYTES, UPLOAD_BYTES = 1 << 20, 1 << 30
_HEADERS = {
    # Gradio's scripts stand in the page and build code of text; from elsewhere nothing comes.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; "
    "base-uri 'self'; form-action 'self'; object-src 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
}


class Guard:
    """ASGI middleware that refuses everything but what the page does.

    Args:
        app: what answers the rest.
        names: by which this machine may be asked for. Another site whose name points here would be let in by the browser (DNS
            rebinding).
        any_address: it may also be asked for by any IP address, which cannot be made to point here.
        uploads: folder of the files that were uploaded, and of nothing else.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], any_address: bool, uploads: Path) -> None:
        self.app, self.names, self.any_address = app, {name.lower() for name in names}, any_address
        self.uploads = Path(os.path.realpath(uploads))
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, _with_headers(send))
        else:
            # The page uses no WebSocket.
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope, Headers(scope=scope))
            if scope["path"] == EVENT:
                receive = _again(self._checked_event(await _body(scope, receive)), receive)
            elif scope["path"] == UPLOAD:
                await self._upload(scope, receive, send)
                return
        except HTTPException as refused:
            # In the form that the page shows to whoever sits before it.
            answer = (
                JSONResponse({"detail": refused.detail})
                if scope["path"] == EVENT
                else PlainTextResponse(refused.detail)
            )
            answer.status_code = refused.status_code
            await answer(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_mine(hosts[0]):
            raise HTTPException(
                400, "Invalid host header. To be asked for by another name: mend-lightning ui --host NAME"
            )
        # A deep link would show the page with what a file says.
        linked = "deep_link" in parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if linked or not _USED.fullmatch(f"{scope['method']} {scope['path']}"):
            raise HTTPException(404, "The page does not use this.")
        if not _is_from_here(scope, headers, hosts[0]):
            raise HTTPException(403, "Another page asked for this. Only the page itself is answered.")

    def _is_mine(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            return self.any_address and bool(ip_address(name))
        except ValueError:
            return False

    def _checked_event(self, body: bytes) -> bytes:
        """An event of texts, numbers and uploaded files, written anew: what was looked at here is what is read behind."""
        try:
            event = json.loads(body)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict) or not isinstance(event.get("data"), list):
            raise HTTPException(400, "This is no event of the page.")
        values = [*event["data"], *(value for key, value in event.items() if key != "data")]
        if not all(value is None or isinstance(value, str | int | float) or self._is_upload(value) for value in values):
            raise HTTPException(403, "An event of the page names no file but one that was uploaded.")
        return json.dumps(event).encode()

    def _is_upload(self, value: Any) -> bool:
        path = value.get("path") if isinstance(value, dict) else None
        if not isinstance(path, str) or "\0" in path:
            return False
        place = Path(os.path.realpath(path))
        return place.is_relative_to(self.uploads) and place.is_file()

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = _length(scope)
        if not self._under_way:
            _remove_unfinished(self.uploads)
        if _bytes_in(self.uploads) + self._under_way + length > UPLOAD_BYTES:
            raise HTTPException(
                413, f"An edit's file has at most {UPLOAD_BYTES:,} bytes, and those on their way together."
            )
        self._under_way += length
        try:
            await self.app(scope, receive, send)
        finally:
            self._under_way -= length


def _is_from_here(scope: Scope, headers: Headers, host: str) -> bool:
    """Whether the page asks, a program, or a person who typed or followed the page's address."""
    site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
    opened = scope["path"] == "/" and (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == (
        "navigate",
        "document",
    )
    return (site in ("same-origin", "none") or opened) and (
        origin is None or urlsplit(origin).netloc.lower() == host.lower()
    )


def _length(scope: Scope) -> int:
    """How long a request's body is, which browsers say before they send it."""
    headers = Headers(scope=scope)
    lengths = headers.getlist("content-length")
    if len(lengths) != 1 or not lengths[0].isdecimal() or "transfer-encoding" in headers:
        raise HTTPException(411, "The length must be given.")
    return int(lengths[0])


async def _body(scope: Scope, receive: Receive) -> bytes:
    if _length(scope) > EVENT_BYTES:
        raise HTTPException(413, f"An event of the page has at most {EVENT_BYTES:,} bytes.")
    parts, more = [], True
    while more:
        message = await receive()
        more = message.get("more_body", False)
        parts.append(message.get("body", b""))
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, and then what comes after it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return first.pop() if first else await receive()

    return received


def _with_headers(send: Send) -> Send:
    """Adds what keeps other sites from showing the page or reading its answers."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            for name in [name for name in headers.keys() if name.startswith("access-control-")]:
                del headers[name]
            headers.update(_HEADERS)
        await send(message)

    return sent


def _bytes_in(uploads: Path) -> int:
    total = 0
    for path in uploads.rglob("*"):
        # The page removes what it has read.
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _remove_unfinished(uploads: Path) -> None:
    """What broken uploads left: finished ones lie in folders of their own."""
    for path in uploads.glob("*"):
        if path.is_file():
            path.unlink(missing_ok=True)
