"""How large training batches are: measured on the data, or the most that the settings allow."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from mend_lightning.data.batch import EditBatch, collate_tasks
from mend_lightning.data.buckets import Key, TaskLengths, bucketed
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.sources import find_data_file, split_name
from mend_lightning.data.tasks import TaskSampler
from mend_lightning.errors import DataFileError, TruncationWarning
from mend_lightning.models.inputs.encoder import Encoder, ModelKind
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows
from mend_lightning.training.memory.activations import BatchCounts, RowCounts
from mend_lightning.training.step import LocalityPositions, locality_positions_of

# Batches that are looked at: a step takes as much memory as the largest of them.
BATCHES = 24


def batch_counts(batch: EditBatch, positions: LocalityPositions) -> BatchCounts:
    """The size of one batch."""
    locality = len(locality_positions_of(batch.x_out, positions))
    return BatchCounts(batch.tasks, row_counts(batch.z_edit), row_counts(batch.x_in), row_counts(batch.x_out), locality)


def row_counts(rows: Rows) -> RowCounts:
    """The size of one of a batch's sets."""
    mask, decoder = rows.inputs["attention_mask"], rows.inputs.get("decoder_input_ids")
    labels = int((rows.labels != IGNORED_LABEL).sum())
    length = 0 if decoder is None else decoder.shape[1]
    return RowCounts(len(rows), mask.shape[1], int(mask.sum()), labels, length)


def largest(found: Sequence[BatchCounts]) -> BatchCounts:
    """Each size's largest value over several batches.

    Example:
        >>> rows = [RowCounts(2, 5, 9, 4), RowCounts(2, 6, 8, 3)]
        >>> largest([BatchCounts(2, each, each, each, 7) for each in rows]).z_edit
        RowCounts(rows=2, length=6, tokens=9, labels=4, decoder_length=0)
    """
    sets = [[getattr(each, name) for each in found] for name in ("z_edit", "x_in", "x_out")]
    edits, rephrases, unrelated = (
        RowCounts(*(max(sizes) for sizes in zip(*(vars(rows).values() for rows in rows_of)))) for rows_of in sets
    )
    tasks, locality = max(each.tasks for each in found), max(each.locality for each in found)
    return BatchCounts(tasks, edits, rephrases, unrelated, locality)


def measured_counts(data: EditDataModule, encoder: Encoder, positions: LocalityPositions) -> BatchCounts | None:
    """The largest of the first training batches; None where the data's files are not on this machine."""
    if not _all_here(data):
        return None
    sampler, size = data.sampler("train"), data.batch_size
    count = min(BATCHES, len(sampler) // (size * data.edits_at_once))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        batches = (_batch(data, sampler, encoder, keys) for keys in _orders(data, sampler, encoder, count))
        found = [batch_counts(batch, positions) for batch in batches]
    return largest(found) if found else None


def _orders(data: EditDataModule, sampler: TaskSampler, encoder: Encoder, count: int) -> list[list[Key]]:
    """Tasks of the first `count` batches, together as training would put them."""
    size = data.batch_size
    keys = [(0, index) for index in range(count * size)]
    if data.bucket_by_length:
        return bucketed(keys, TaskLengths(sampler, encoder, data.edits_at_once)(keys), size)
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def _batch(data: EditDataModule, sampler: TaskSampler, encoder: Encoder, keys: Sequence[Key]) -> EditBatch:
    many = data.edits_at_once
    groups = [sampler.group(*key, many) for key in keys]
    return collate_tasks([task for group in groups for task in group], encoder, many)


def _all_here(data: EditDataModule) -> bool:
    elsewhere = data.locality_data
    sources = [data.files["train"], elsewhere.get("train") if isinstance(elsewhere, dict) else elsewhere]
    try:
        for source in sources:
            if source is not None:
                find_data_file(split_name(source)[0])
    except DataFileError:
        return False
    return True


def most_counts(data: EditDataModule, kind: ModelKind, positions: LocalityPositions) -> BatchCounts:
    """The largest batch that the settings allow: every row as long as `max_length`, and of a decoder as well.

    A causal row's labels can be all but one of its tokens; where a target is short, this counts too many.
    """
    rephrases, locality, *_ = data._draws["train"]
    edits, length = data.batch_size * data.edits_at_once, data.max_length
    decoder = length if kind == "encoder_decoder" else 0
    labels = {"classifier": 1, "encoder_decoder": length}.get(kind, length - 1)

    def rows(count: int) -> RowCounts:
        return RowCounts(count, length, count * length, count * labels, decoder)

    # A classifier's logits are one position a row.
    out = edits * locality
    looked_at = out * (labels if positions == "answer" or kind == "classifier" else length)
    return BatchCounts(data.batch_size, rows(edits), rows(edits * rephrases), rows(out), looked_at)
