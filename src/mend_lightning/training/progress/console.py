"""The console that tables and progress are printed to, and counts in words."""

from __future__ import annotations

import sys

from rich.console import Console


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "edit"), counted(3, "edit")
        ('1 edit', '3 edits')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def quiet_where_nobody_watches() -> None:
    """Has transformers draw no progress bar where there is no terminal (CI, a pipe)."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def console() -> Console:
    """A console that is as wide as the terminal, and readable where there is none (CI, a pipe)."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)
