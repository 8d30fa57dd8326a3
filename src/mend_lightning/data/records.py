"""Reads edit records from any source and in any format: the one door to data files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from mend_lightning.data.columns import Columns, rename
from mend_lightning.data.readers import find_format, kilt, recognize
from mend_lightning.data.readers.fields import Format
from mend_lightning.data.record import Question, Record
from mend_lightning.data.sources import Row, find_data_file, read_rows
from mend_lightning.errors import EmptyDatasetError, RecordError

__all__ = ["Question", "Record", "find_data_file", "iterate_records", "parse_record", "read_records", "unusable"]

logger = logging.getLogger(__name__)


def read_records(
    name: str | Path, format: str = "auto", columns: Columns | None = None, require_rephrases: bool = True
) -> list[Record]:
    """Reads every usable record of a source.

    A record without alternatives or without rephrases cannot make an edit task and is left out, as in the
    original code; a warning counts them. Anything else that is wrong raises.

    Args:
        name: a file, a shipped set such as `world_facts/train`, or a `datasets` source; see `read_rows`.
        format: one of docs/data.md, or "auto": recognised by the first record's keys.
        columns: the file's own names for the format's keys, see `rename`; with "auto" the format is then "native".
        require_rephrases: False keeps records without rephrases, which are then edited and measured on the
            question itself.

    Raises:
        DataFileError: the file is missing or unreadable.
        RecordError: a line is not JSON, or a key is missing or of the wrong type.
        EmptyDatasetError: no record is left.

    Example:
        >>> read_records("world_facts/test")[0].prompt != ""
        True
    """
    kept: list[Record] = []
    dropped: Counter[str] = Counter()
    for record in iterate_records(name, format, columns):
        reason = unusable(record, require_rephrases)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(record)
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not kept:
        raise EmptyDatasetError(
            f"{name}: no usable record ({counts or 'the file is empty'}). A record needs at least one new answer and "
            "one rephrase (docs/data.md says under which keys)."
        )
    if dropped:
        logger.warning("%s: left out %d of %d records: %s", name, dropped.total(), len(kept) + dropped.total(), counts)
    return kept


def iterate_records(
    name: str | Path,
    format: str = "auto",
    columns: Columns | None = None,
    on_error: Callable[[Row, RecordError], None] | None = None,
    on_format: Callable[[Format], None] | None = None,
) -> Iterator[Record]:
    """Every record of a source, usable or not.

    Args:
        name, format, columns: as in `read_records`.
        on_error: takes what is wrong with a record instead of it being raised.
        on_format: is told the format once it is known.
    """
    chosen = None if format == "auto" and not columns else find_format("native" if format == "auto" else format)
    told = False
    for row in read_rows(name):
        try:
            data = row.load()
            if columns:
                # Columns are compared with the first record's; later ones may lack what is optional.
                data = rename(data, columns, row.where, strict=not told)
            chosen = chosen or recognize(data, row.where)
            if on_format and not told:
                on_format(chosen)
            told = True
            yield chosen.parse(data, row.where, row.line)
        except RecordError as error:
            if on_error is None:
                raise
            on_error(row, error)


def unusable(record: Record, require_rephrases: bool = True) -> str:
    """Why a record cannot make an edit task; "" where it can."""
    if not record.alternatives:
        return "without alternatives"
    # Generation data has its rephrases drawn.
    return "without rephrases" if require_rephrases and not record.rephrases and not record.text else ""


def parse_record(line: str, where: str = "record", number: int = 0) -> Record:
    """Parses one line of KILT/zsRE JSONL.

    Args:
        line: a JSON object with `input`, `alternatives`, `filtered_rephrases` (or `rephrases`), `output`
            (`[{"answer": …}]`), and optionally `prediction`, `subject`, `relation`, `kind`, `statements`.
        where: how errors name the line.

    Example:
        >>> parse_record('{"input": "Q?", "alternatives": ["B"], "filtered_rephrases": [], '
        ...              '"output": [{"answer": "A"}]}').answers
        ('A',)
    """
    return kilt.parse(Row(line, number, where, encoded=True).load(), where, number)
