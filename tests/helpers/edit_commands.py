"""A tiny base with edits and editors as files, for tests of the commands around edits.

A pytest plugin (`pytest_plugins = ["helpers.edit_commands"]`) with helpers that tests import, which is why pytest must not want to
rewrite it: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch

from helpers.commandline import call
from helpers.edited import FACT, tiny_edit

QUESTION, TARGET = FACT
OTHER = "Which country is Managua in?"
FLOAT = ("--dtype", "float32")


@pytest.fixture(scope="module")
def tiny(base_folder, tmp_path_factory) -> SimpleNamespace:
    """An edit of a tiny llama, the editor that made it, one that changes next to nothing, and one of a classifier."""
    folder = tmp_path_factory.mktemp("edits")
    made = tiny_edit(base_folder("llama"), "llama")
    made.editor.save_pretrained(folder / "editor")
    with torch.no_grad():
        made.editor.edit_rates.fill_(1e-6)
    made.editor.save_pretrained(folder / "weak")
    made.path = made.edit.save(folder / "oceania.safetensors")
    made.claims = tiny_edit(base_folder("bert"), "bert")
    made.claims.editor.save_pretrained(folder / "claims")
    made.claims.path = made.claims.edit.save(folder / "claim.safetensors")
    made.folder = folder
    return made


@pytest.fixture
def shipped(monkeypatch) -> list[str]:
    """A short set in place of the neutral questions."""
    questions = ["Which continent is Cuba in?", OTHER, "Who?"]
    monkeypatch.setattr("mend_lightning.evaluation.safety.neutral_questions", lambda: questions)
    return questions


def edit(tiny, *arguments, editor: str = "editor") -> SimpleNamespace:
    return call("edit", "--editor", tiny.folder / editor, *FLOAT, *arguments)


def typed(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
