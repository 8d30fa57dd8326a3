"""Edits that are on a model for as long as it is tested."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from mend_lightning.edit import Edit

# Either the path of a saved edit, or a (prompt, target) pair that an editor makes one of.
PatchEntry = str | Path | tuple[str, str]


def saved_edits(entries: Sequence[PatchEntry]) -> list[Path]:
    """The entries that are paths.

    Example:
        >>> saved_edits(["a.safetensors", ("Capital of Peru?", "Cusco")])
        [PosixPath('a.safetensors')]
    """
    return [Path(entry) for entry in entries if isinstance(entry, (str, Path))]


def facts_to_edit(entries: Sequence[PatchEntry]) -> list[tuple[str, str]]:
    """The entries that are (prompt, target) pairs."""
    return [tuple(entry) for entry in entries if not isinstance(entry, (str, Path))]


class Patch:
    """Edits on a model, off again as one."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def put_on(self, model: nn.Module, edits: Sequence[Edit], force: bool = False) -> None:
        """Applies the edits until `take_off`; all of them or, where one does not fit, none."""
        self.take_off()
        with ExitStack() as stack:
            for edit in edits:
                stack.enter_context(edit.applied(model, force))
            self._stack = stack.pop_all()

    def take_off(self) -> None:
        """Takes off what is on; nothing where nothing is."""
        self._stack.close()
        self._stack = ExitStack()
