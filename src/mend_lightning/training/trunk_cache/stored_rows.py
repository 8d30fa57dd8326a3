"""Hidden states of rows in a `RowStore`: their bytes, and beginnings that many rows share, kept once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mend_lightning.models.forward.run_trunk import SHORTEST_PREFIX
from mend_lightning.training.trunk_cache.observe import TrunkShape
from mend_lightning.training.trunk_cache.row_keys import row_key
from mend_lightning.training.trunk_cache.row_store import NO_PARENT, RowStore

# What the model reads of a row, see `row_texts`.
Text = Sequence[np.ndarray]


class StoredRows:
    """Rows' hidden states on disk, without padding.

    Args:
        store: where their bytes are.
        shape: of the trunk.
        share_beginnings: the states of a token depend on those before it alone (a causal model), so that a few-shot
            example before every question is kept once.
    """

    def __init__(self, store: RowStore, shape: TrunkShape, share_beginnings: bool) -> None:
        self.store, self._shape, self._share = store, shape, share_beginnings
        # (stack, where its ids are in a text, bytes a token)
        self._stacks = [
            (name, shape.inputs.index(stack.positions), stack.width * stack.dtype.itemsize)
            for name, stack in shape.stacks.items()
        ]

    def look_up(
        self, keys: Sequence[bytes], texts: Sequence[Text]
    ) -> tuple[dict[bytes, dict[str, np.ndarray]], list[int]]:
        """What is there of the rows.

        Returns:
            key -> stack -> `[tokens, bytes]` uint8; and the numbers of the rows that are not there, each key's once.
        """
        if any(key not in self.store for key in keys):
            self.store.refresh()
        found: dict[bytes, dict[str, np.ndarray]] = {}
        missing: dict[bytes, int] = {}
        beginnings: dict[bytes, np.ndarray | None] = {}
        for row, key in enumerate(keys):
            if key not in found and key not in missing:
                data = self._read(key, texts[row], beginnings)
                if data is None:
                    missing[key] = row
                else:
                    found[key] = data
        return found, list(missing.values())

    def _read(self, key: bytes, text: Text, beginnings: dict[bytes, np.ndarray | None]) -> dict[str, np.ndarray] | None:
        entry, data = self.store.entry(key), self.store.read(key)
        if data is None or entry is None:
            return None
        if entry.start:
            # Read once a batch: it is the same for most rows.
            if entry.parent not in beginnings:
                beginnings[entry.parent] = self.store.read(entry.parent)
            beginning = beginnings[entry.parent]
            if beginning is None:
                return None
            data = np.concatenate([beginning, data])
        sizes = [len(text[ids]) * each for _, ids, each in self._stacks]
        if len(data) != sum(sizes):
            return None
        parts = np.split(data, np.cumsum(sizes)[:-1])
        return {name: part.reshape(-1, each) for (name, _, each), part in zip(self._stacks, parts)}

    def add(self, keys: Sequence[bytes], texts: Sequence[Text], hidden: Mapping[str, Tensor]) -> None:
        """Keeps rows that were computed: `hidden[stack]` is `[rows, length, width]`, the tokens of each row before its padding."""
        if not self.store.growing:
            return
        raw = {name: states.detach().cpu().contiguous().view(torch.uint8).numpy() for name, states in hidden.items()}
        parents = self._parents(texts, raw)
        rows = []
        for row, (key, text, (parent, start)) in enumerate(zip(keys, texts, parents)):
            parts = [raw[name][row, start : len(text[ids])].reshape(-1) for name, ids, _ in self._stacks]
            rows.append((key, parts[0] if len(parts) == 1 else np.concatenate(parts), parent, start))
        self.store.append(rows)

    def _parents(self, texts: Sequence[Text], raw: Mapping[str, np.ndarray]) -> list[tuple[bytes, int]]:
        """The stored beginning of each row, and its length; where rows that have none begin alike, it is stored first."""
        if not self._share:
            return [(NO_PARENT, 0)] * len(texts)
        parents = [self._parent(text) for text in texts]
        orphans = [row for row, (_, start) in enumerate(parents) if not start]
        length = _common([texts[row][0] for row in orphans])
        if len(orphans) < 2 or length < SHORTEST_PREFIX:
            return parents
        beginning = row_key([texts[orphans[0]][0][:length]])
        data = raw[self._stacks[0][0]][orphans[0], :length].reshape(-1)
        if beginning in self.store or self.store.append([(beginning, data, NO_PARENT, 0)]):
            parents = [parent if parent[1] else (beginning, length) for parent in parents]
        return parents

    def _parent(self, text: Text) -> tuple[bytes, int]:
        for start in self.store.starts:
            if start < len(text[0]):
                key = row_key([text[0][:start]])
                entry = self.store.entry(key)
                # One that is whole, so that reading a row takes two reads at most.
                if entry is not None and not entry.start:
                    return key, start
        return NO_PARENT, 0


def _common(rows: Sequence[np.ndarray]) -> int:
    """How many leading ids all rows share; at least one is left to every row.

    Example:
        >>> _common([np.array([5, 6, 7]), np.array([5, 6, 8, 9])])
        2
    """
    if not rows:
        return 0
    length = min(map(len, rows)) - 1
    same = np.stack([row[:length] for row in rows])
    return int((same == same[0]).all(0).cumprod().sum())
