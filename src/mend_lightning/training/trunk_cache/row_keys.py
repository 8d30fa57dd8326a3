"""Keys of rows: made of what the model reads of a row, so that padding and neighbours have no part in them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from mend_lightning.models.inputs.rows import Rows
from mend_lightning.training.trunk_cache.row_store import KEY_BYTES

MASK_OF = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def row_lengths(rows: Rows, name: str) -> list[int]:
    """Tokens of each row of the ids `name`, up to its last one that is attended to."""
    rows = rows.host
    mask = rows.inputs.get(MASK_OF[name])
    length = rows.inputs[name].shape[1]
    if mask is None:
        return [length] * len(rows)
    last = torch.arange(1, length + 1, device=mask.device) * mask.bool()
    return last.amax(1).tolist()


def row_texts(rows: Rows, names: Sequence[str]) -> list[list[np.ndarray]]:
    """What the model reads of each row: of each of `names`, the ids `[tokens]` int64 where they are attended to, and -1
    where they are not, without the padding behind."""
    columns, rows = [], rows.host
    for name in names:
        ids, mask = rows.inputs[name].long(), rows.inputs.get(MASK_OF[name])
        ids = ids if mask is None else ids.where(mask.bool(), -1)
        columns.append((ids.numpy(), row_lengths(rows, name)))
    return [[ids[i, : lengths[i]] for ids, lengths in columns] for i in range(len(rows))]


def row_key(text: Sequence[np.ndarray]) -> bytes:
    """The key of a row, of what `row_texts` gives.

    Example:
        >>> row_key([np.array([1, 2]), np.array([3])]) == row_key([np.array([1]), np.array([2, 3])])
        False
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for ids in text:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(ids).tobytes())
    return digest.digest()
