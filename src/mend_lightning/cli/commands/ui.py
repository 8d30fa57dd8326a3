"""`mend-lightning ui`: a local page to edit a model and look at what the edits do."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from rich.markup import escape

from mend_lightning.cli.commands.inputs import load_editor_and_base
from mend_lightning.models.architecture import Dtype
from mend_lightning.training.progress.console import console
from mend_lightning.ui.server import address, check_installed, is_local, listen, run
from mend_lightning.ui.session import Session


def ui_command(
    editor: Path = Path("runs/quickstart/editor"),
    base: str | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    host: str = "127.0.0.1",
    port: int = 0,
    open_browser: bool = False,
    format: str | None = None,
) -> None:
    """Opens a local page: edit facts, see before and after, what else moved, switch edits on and off, download them.

    Needs the extra `ui` (pip install 'mend-lightning[ui]'). The page loads nothing from other hosts. Ctrl-C ends it.

    Args:
        editor: folder of a trained editor.
        base: base model (id, folder); default: the one the editor was trained on.
        dtype: of the base model.
        trust_remote_code: run code that comes with the base model. Only for models you trust.
        host: address to listen at; the default can be reached from this machine alone.
        port: 0 takes a free one.
        open_browser: open the page in the browser.
        format: how edits are made and questions asked: own, bare, statement, chat (through the model's chat template),
            chat_system, chat_turns or passage (docs/data.md); default: as the editor was trained.
    """
    check_installed()
    # First the address, then the model: a port that is taken shows at once.
    with listen(host, port) as listening:
        trained, model, tokenizer = load_editor_and_base(editor, base, dtype, trust_remote_code)
        with Session(model, tokenizer, trained, format) as session:
            run(session, listening, lambda server: _say_where(host, address(listening), open_browser), host)
        console().print("Stopped. Edits that were not downloaded are gone.", highlight=False)


def _say_where(host: str, url: str, open_browser: bool) -> None:
    if not is_local(host):
        console().print(f"[red]{escape(host)} can be reached from other machines, and the page has no password.[/]")
    console().print(f"The page is at {url} (Ctrl-C ends it).", highlight=False)
    if open_browser:
        webbrowser.open(url)
