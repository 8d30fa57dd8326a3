"""Batches of edits without end, from an EditDataModule, at a place that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mend_lightning.data.order import ResumableLoader
from mend_lightning.models.inputs.rows import EditBatch


class Feed:
    """Epoch after epoch of a loader.

    Args:
        loader: of the training edits.
        place: where to go on, from `state_dict`.
    """

    def __init__(self, loader: ResumableLoader, place: dict[str, int] | None = None) -> None:
        self._loader, self._batches = loader, None
        if place:
            loader.load_state_dict(place)

    def next(self) -> EditBatch:
        """The next batch, of the next epoch where this one is over."""
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = next(self._batches, None)
        if batch is None:
            self._loader.sampler.set_epoch(self._loader.sampler.epoch + 1)
            self._batches: Iterator[Any] | None = iter(self._loader)
            batch = next(self._batches)
        return batch

    def state_dict(self) -> dict[str, int]:
        """The place behind the last batch, as builtins."""
        return self._loader.state_dict()
