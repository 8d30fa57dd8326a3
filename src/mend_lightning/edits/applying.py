"""Edits on a model for a while, in whatever form they come; and a model without those that are on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from mend_lightning.edits.edit import Edit
from mend_lightning.edits.stack import EditStack

# What can be put on a model for a while: an edit, several on top of each other, or `function(model)` that gives a context
# manager, such as `edit.applied`.
_Applied = Edit | Callable[[nn.Module], AbstractContextManager[Any]]
Edits = _Applied | Sequence[_Applied]


@contextmanager
def applying(edits: Edits, model: nn.Module) -> Iterator[None]:
    """The model under `edits` while the block runs."""
    with ExitStack() as stack:
        for edit in edits if isinstance(edits, Sequence) else [edits]:
            stack.enter_context(edit.applied(model) if isinstance(edit, Edit) else edit(model))
        yield


@contextmanager
def without(stack: EditStack) -> Iterator[Edits]:
    """The model without the edits that are on it, while the block runs.

    Gives what puts them back for a while, to be compared with the base: `with without(stack) as edits:
    answer_shifts(model, encoder, questions, edits)`.
    """
    names = [each.name for each in stack if each.enabled]

    @contextmanager
    def back(model: nn.Module) -> Iterator[None]:
        stack.enable(*names)
        try:
            yield
        finally:
            stack.disable(*names)

    stack.disable(*names)
    try:
        yield back
    finally:
        stack.enable(*names)
