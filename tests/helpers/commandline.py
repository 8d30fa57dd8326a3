"""Runs the command line inside the test's process, and reads what it said."""

from __future__ import annotations

import contextlib
import io
import re
from types import SimpleNamespace

from mend_lightning.cli.main import main


def call(*arguments) -> SimpleNamespace:
    """Runs the command line in this process; what it returned and printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    # Tables wrap their cells and errors their lines; what is looked for is the words.
    return SimpleNamespace(code=code, out=" ".join(out.getvalue().split()), err=" ".join(err.getvalue().split()))


def assert_says(error: str, text: str) -> None:
    """The text is in the error, and no traceback."""
    assert re.search(text, error), error
    assert "error: " in error and "Traceback" not in error
