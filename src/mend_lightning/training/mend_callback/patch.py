"""Edits that are on a model for as long as it is tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from mend_lightning.edits.edit import Edit

# Either the path of a saved edit, or a (prompt, target) pair that an editor makes one of.
PatchEntry = str | Path | tuple[str, str]


class Patch:
    """Edits on a model, off again as one.

    Args:
        entries: paths of saved edits, and facts.
        force: apply saved edits to other weights than they were made for.

    Example:
        >>> Patch(["a.safetensors", ("Capital of Peru?", "Cusco")]).facts
        [('Capital of Peru?', 'Cusco')]
    """

    def __init__(self, entries: Sequence[PatchEntry], force: bool = False) -> None:
        self._paths = [Path(entry) for entry in entries if isinstance(entry, (str, Path))]
        facts = [entry for entry in entries if not isinstance(entry, (str, Path))]
        self.facts = [(prompt, target) for prompt, target in facts]
        self._force = force
        self._saved: list[Edit] = []
        self._stack = ExitStack()

    def load(self) -> None:
        """Reads the saved edits."""
        self._saved = [Edit.load(path) for path in self._paths]

    def put_on(self, model: nn.Module, make: Callable[[Sequence[tuple[str, str]]], Edit]) -> None:
        """Applies the edits until `take_off`; all of them or, where one does not fit, none.

        Args:
            model: the host's.
            make: makes one edit of the facts.
        """
        self.take_off()
        made = [make(self.facts)] if self.facts else []
        with torch.inference_mode(False), ExitStack() as stack:
            for edit in (*self._saved, *made):
                stack.enter_context(edit.applied(model, self._force))
            self._stack = stack.pop_all()

    def take_off(self) -> None:
        """Takes off what is on; nothing where nothing is."""
        self._stack.close()
        self._stack = ExitStack()
