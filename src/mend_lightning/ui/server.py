"""Serves the page to this machine alone: no other host is asked for anything, and Ctrl-C ends it."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mend_lightning.errors import ConfigError, MendError, MissingPackageError
from mend_lightning.ui.session import Session

if TYPE_CHECKING:
    from fastapi import FastAPI

# Seconds that an open tab may hold up the end.
PATIENCE = 1
# Dark enough for white letters.
_BUTTON = {
    "background_fill": "#0f766e", "background_fill_hover": "#115e59", "background_fill_dark": "#0f766e",
    "background_fill_hover_dark": "#0d9488", "text_color": "white", "text_color_dark": "white",
}  # fmt: skip


def check_installed() -> None:
    """Raises MissingPackageError unless Gradio is there."""
    if find_spec("gradio") is None:
        raise MissingPackageError("The page needs Gradio, which is not installed: pip install 'mend-lightning[ui]'")


def listen(host: str, port: int) -> socket.socket:
    """A socket that browsers can reach the page at; port 0 takes one that is free.

    Raises:
        ConfigError: the address is not this machine's, or the port is taken.
    """
    try:
        if not 0 <= port <= 65_535:
            # The system would take it modulo 65,536.
            raise OverflowError("a port is a number from 0 to 65535")
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"The page cannot be opened at {host}, port {port}: {error}. Give another --port (0 takes a free one) or --host."
        ) from error


def is_local(host: str) -> bool:
    """Whether only this machine can reach `host`.

    Example:
        >>> is_local("127.0.0.1"), is_local("localhost"), is_local("0.0.0.0")
        (True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


async def serve(
    session: Session,
    listening: socket.socket,
    started: Callable[[Any], None] = lambda server: None,
    host: str = "localhost",
) -> None:
    """Serves a session's page until Ctrl-C, or until `server.should_exit` is set; closes the socket.

    Args:
        session: what the page shows; whoever made it closes it.
        listening: see `listen`.
        started: called with the server before it serves.
        host: the name that the address was given by.
    """
    import uvicorn

    # Built here and not before: outside of a running loop each of Gradio's components leaves one of its own open.
    own = listening.getsockname()[0]
    app = build_app(session, is_local(own), {host, own})
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=PATIENCE)
    server = uvicorn.Server(config)
    started(server)
    try:
        await server.serve(sockets=[listening])
    finally:
        # The loop ends only when the handlers do.
        session.stop()


def build_app(session: Session, local: bool = True, names: Collection[str] = ()) -> FastAPI:
    """The page and the edits' files as an ASGI application, which answers the page and nobody else (see `Guard`).

    Args:
        session: what the page shows.
        local: only this machine can reach it. Otherwise it is also answered by the machine's name and by any IP address.
        names: more names or addresses to be asked for by.
    """
    _set_environment(str(session.uploads))
    import gradio
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, PlainTextResponse

    from mend_lightning.ui.guard import UPLOAD_BYTES, Guard
    from mend_lightning.ui.page import CSS, build_page

    app = FastAPI(openapi_url=None)
    names = {"localhost", "127.0.0.1", "::1", *names, *([] if local else [socket.gethostname()])}
    app.add_middleware(Guard, names=names, any_address=not local, uploads=session.uploads)

    @app.get("/edits/{name}", response_model=None)
    def edit_file(name: str) -> Any:
        try:
            return FileResponse(session.save(name), filename=f"{name}.safetensors")
        except MendError as error:
            return PlainTextResponse(str(error), status_code=404)

    # Fonts by name, of the system: Gradio's own themes fetch theirs.
    fonts: dict[str, Any] = {
        "font": ["system-ui", "sans-serif"],
        "font_mono": ["ui-monospace", "Menlo", "Consolas", "monospace"],
    }
    buttons = {f"button_primary_{part}": value for part, value in _BUTTON.items()}
    theme = gradio.themes.Default(primary_hue="teal", neutral_hue="slate", **fonts).set(**buttons)
    page = build_page(session)
    # What Gradio's own launch sets. Without it a file that an event names is not checked for whether it was uploaded.
    page.has_launched = True
    return gradio.mount_gradio_app(
        app, page, "/", theme=theme, css_paths=[CSS], footer_links=[], run_history=False, ssr_mode=False,
        max_file_size=UPLOAD_BYTES,
    )  # fmt: skip


def _set_environment(folder: str) -> None:
    """Has Gradio report nothing, ask nobody for its newest version, not sum up how often a button was pressed, and keep
    uploads in `folder`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
    os.environ["GRADIO_TEMP_DIR"] = folder


def run(session: Session, listening: socket.socket, started: Callable[[Any], None], host: str) -> None:
    """`serve` in the main thread; returns after Ctrl-C."""
    try:
        asyncio.run(serve(session, listening, started, host))
    except KeyboardInterrupt:
        # Ctrl-C is how a page is ended.
        pass
