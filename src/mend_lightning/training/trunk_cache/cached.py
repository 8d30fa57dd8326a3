"""`run_trunk` with a memory on disk: rows that were seen before do not run again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mend_lightning.errors import ConfigError, TrunkCacheWarning
from mend_lightning.models.forward.run_trunk import run_trunk, shares_prefixes
from mend_lightning.models.forward.trunk import TrunkOutputs
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.sharding.collectives import is_sharded, own_class
from mend_lightning.training.trunk_cache.assemble import from_disk, joined_outputs, put_computed, split_outputs, trimmed
from mend_lightning.training.trunk_cache.folder import open_store
from mend_lightning.training.trunk_cache.identity import autocast_dtype, trunk_identity
from mend_lightning.training.trunk_cache.observe import NotCacheable, TrunkShape, observe_trunk
from mend_lightning.training.trunk_cache.row_keys import row_key, row_texts
from mend_lightning.training.trunk_cache.stored_rows import StoredRows

SHARDED = (
    "trunk_cache cannot serve a base in shards: its processes run each block together, whichever rows they have. Leave "
    "trunk_cache out, or use --trainer.strategy ddp."
)


@dataclass
class CacheUse:
    """What a cache was good for, in this process.

    Attributes:
        rows: rows that were asked for.
        found: those of them that did not run.
    """

    rows: int = 0
    found: int = 0


@dataclass(frozen=True)
class _Opened:
    """A cache and what it is open for."""

    model: nn.Module
    layers: tuple[str, ...]
    autocast: str | None
    shape: TrunkShape
    rows: StoredRows


class CachedTrunk:
    """Takes the place of `run_trunk`: outputs of rows that were seen before, in this run or another, come from the disk.

    The first call opens the cache: it hashes the trunk's weights and runs the trunk on a few tokens to see what it
    returns. The base's weights must not change afterwards. Outputs are zero at padding, which nothing may read.

    Args:
        folder: of caches, one for each trunk; made where it is not there.
        tokenizer: the one that makes the rows; part of what a cache belongs to.

    Raises:
        OutputPathError: the folder cannot be used; of the first call as well.
        ConfigError: the model is sharded (of the call).

    Warns:
        TrunkCacheWarning: this model's trunk cannot be cached, and runs as without; or see `RowStore`.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=32)).eval()
        >>> ids = torch.arange(6).view(2, 3)
        >>> rows = Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, torch.tensor([0, 1]), 2)
        >>> layers = {"transformer.h.2.mlp.c_fc": model.transformer.h[2].mlp.c_fc}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trunk_of = CachedTrunk(folder)
        ...     for _ in range(2):
        ...         trunk = trunk_of(model, rows, layers)
        >>> trunk_of.use
        CacheUse(rows=4, found=2)
    """

    def __init__(self, folder: str | Path, tokenizer: Any = None) -> None:
        self.folder, self.tokenizer = Path(folder).expanduser(), tokenizer
        self.use = CacheUse()
        self._opened: _Opened | None = None
        self._refused = False

    def __call__(self, model: nn.Module, rows: Rows, layers: Mapping[str, nn.Module]) -> TrunkOutputs:
        """The trunk's outputs for `rows`; see `run_trunk`."""
        if self._refused:
            return run_trunk(model, rows, layers)
        opened = self._opened
        if opened is None or not _is_open_for(opened, model, layers, rows):
            opened = self._open(model, rows, layers)
        return run_trunk(model, rows, layers) if opened is None else self._outputs(opened, rows, layers)

    def size(self) -> int:
        """Bytes on disk of the cache in use, of all processes; 0 before the first call."""
        return self._opened.rows.store.size() if self._opened else 0

    def close(self) -> None:
        """Closes the files; the next call opens them again."""
        if self._opened is not None:
            self._opened.rows.store.close()
            self._opened = None

    def _open(self, model: nn.Module, rows: Rows, layers: Mapping[str, nn.Module]) -> _Opened | None:
        if is_sharded(model):
            raise ConfigError(SHARDED)
        try:
            shape = observe_trunk(model, layers, rows.inputs)
            if not shape.stacks:
                raise NotCacheable("a layer of the first block is edited, so nothing lies below")
            identity = trunk_identity(model, shape, self.tokenizer)
        except NotCacheable as reason:
            self._refused = True
            warnings.warn(
                f"trunk_cache has no effect: the trunk of {own_class(model).__name__} cannot be cached, for {reason}. It runs "
                "for every batch, as without.",
                TrunkCacheWarning,
                stacklevel=4,
            )
            return None
        self.close()
        stored = StoredRows(open_store(self.folder, identity), shape, shares_prefixes(model) and len(shape.stacks) == 1)
        self._opened = _Opened(model, tuple(layers), identity["autocast"], shape, stored)
        return self._opened

    def _outputs(self, opened: _Opened, rows: Rows, layers: Mapping[str, nn.Module]) -> TrunkOutputs:
        texts = row_texts(rows, opened.shape.inputs)
        keys = [row_key(text) for text in texts]
        found, missing = opened.rows.look_up(keys, texts)
        self.use.rows += len(keys)
        self.use.found += sum(key in found for key in keys)
        hidden = {name: from_disk(name, opened.shape, rows, keys, found) for name in opened.shape.stacks}
        more: dict[str, Any] = {}
        if missing:
            part = (
                rows
                if len(missing) == len(rows)
                else trimmed(rows.part(torch.tensor(missing, device=rows.task.device)))
            )
            computed, behind = split_outputs(run_trunk(opened.model, part, layers), opened.shape, part)
            new = [keys[i] for i in missing]
            opened.rows.add(new, [texts[i] for i in missing], computed)
            for name in hidden:
                put_computed(hidden[name], computed[name], keys, new)
            more = behind if part is rows else {}
        return joined_outputs(opened.model, opened.shape, rows, hidden, more)


def _is_open_for(opened: _Opened, model: nn.Module, layers: Mapping[str, nn.Module], rows: Rows) -> bool:
    autocast = autocast_dtype(next(iter(rows.inputs.values())).device.type)
    return opened.model is model and opened.layers == tuple(layers) and opened.autocast == autocast
