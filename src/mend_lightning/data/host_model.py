"""Where the tasks of an `EditDataModule` are used that is not its Trainer's data module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mend_lightning.data.neighbors import Names, joined_names, listed_names


@dataclass(frozen=True)
class HostModel:
    """A model that the tasks are for, and this process among those that use it.

    Attributes:
        model: what is edited.
        tokenizer: its tokenizer, where the data has none.
        rank, world_size: this process among all.
        even: every process evaluates equally many batches, for they share the model.
        editor: the editor that the tasks are for.
    """

    model: nn.Module
    tokenizer: Any = None
    rank: int = 0
    world_size: int = 1
    even: bool = False
    editor: Any = None


def editor_of(host: HostModel | None, trainer: Any) -> Any:
    """The editor that tasks are for: the host's, or the Trainer's module's; None: they are for none yet."""
    if host is not None:
        return host.editor
    return getattr(trainer.lightning_module, "editor", None) if trainer is not None else None


def contrasts_of(editor: Any) -> tuple[int, Names | None]:
    """How many neighbors constrain an edit of this editor, and the names that it makes them with; None: it has none yet."""
    count = 0 if editor is None else editor.settings.get("contrasts", 0)
    return count, joined_names(editor.names, listed_names()) if count and editor.names else None
