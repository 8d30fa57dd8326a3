"""Unrelated facts from elsewhere: Natural Questions beside zsRE, or any questions with true answers."""

from __future__ import annotations

import zlib
from pathlib import Path

from mend_lightning.data.record import Record
from mend_lightning.data.records import iterate_records
from mend_lightning.errors import EmptyDatasetError

# The mapping stands first: jsonargparse takes the first type that fits, and everything fits a text.
Locality = dict[str, str] | str | Path | None
# Of a single source: which splits get which tenths of its questions.
SHARES = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}


def read_locality(source: Locality, split: str) -> list[Record] | None:
    """The unrelated facts of a split.

    Args:
        source: any source of records with true answers (their new answers are not looked at); one for every split, or
            a source by split; None, or a split that is not named: the split's own records.
        split: "train", "validation" or "test". Of a single source, train gets eight tenths of the questions and the
            others one each, by a checksum of the question: evaluation asks nothing that training asked.

    Raises:
        EmptyDatasetError: nothing is left for this split.
    """
    name = source.get(split) if isinstance(source, dict) else source
    if name is None:
        return None
    records = [record for record in iterate_records(name) if record.can_be_asked]
    if not isinstance(source, dict):
        records = [record for record in records if share_of(record.prompt) in SHARES[split]]
    if not records:
        raise EmptyDatasetError(
            f"locality_data {name} has no question with a true answer for {split}. Give more questions, or a file for "
            "each split (locality_data: {train: …, validation: …, test: …})."
        )
    return records


def share_of(prompt: str) -> int:
    """Which tenth a question falls into, the same on every machine.

    Example:
        >>> share_of("who wrote hamlet")
        8
    """
    return zlib.crc32(prompt.encode()) % 10
