"""Where the tasks of an `EditDataModule` are used that is not its Trainer's data module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


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
