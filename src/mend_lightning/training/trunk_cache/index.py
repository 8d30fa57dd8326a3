"""The index of a trunk cache's rows: fixed-size records, appended, each with a checksum of its own.

A record is written after the row it points to, so an index that was cut off anywhere says nothing that is not there.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

# key, parent, offset, size, start, checksum of the row, checksum of what stands before it in the record
_RECORD = struct.Struct("<16s16sQQIII4x")
_CHECKED = _RECORD.size - 8
RECORD_BYTES = _RECORD.size
KEY_BYTES = 16
NO_PARENT = bytes(KEY_BYTES)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a row's hidden states lie.

    Attributes:
        file: number of the data file among the store's.
        offset, size: of the bytes in it.
        checksum: CRC-32 of them.
        parent: key of the row that the first `start` tokens are read from; `NO_PARENT`: all tokens are here.
        start: number of tokens that are the parent's.
    """

    file: int
    offset: int
    size: int
    checksum: int
    parent: bytes = NO_PARENT
    start: int = 0


def packed(key: bytes, entry: Entry) -> bytes:
    """The record of one row.

    Example:
        >>> record = packed(b"k" * 16, Entry(0, 64, 10, 7))
        >>> len(record), unpacked(record, file=0)
        (64, ([(b'kkkkkkkkkkkkkkkk', Entry(file=0, offset=64, size=10, checksum=7, parent=b'\\x00...', start=0))], 64))
    """
    values = (key, entry.parent, entry.offset, entry.size, entry.start, entry.checksum)
    return _RECORD.pack(*values, zlib.crc32(_RECORD.pack(*values, 0)[:_CHECKED]))


def unpacked(data: bytes, file: int) -> tuple[list[tuple[bytes, Entry]], int]:
    """(key, entry) of the whole and sound records that `data` begins with, and how many bytes they are.

    Args:
        data: what lies in an index file.
        file: number of the data file that it belongs to.
    """
    rows: list[tuple[bytes, Entry]] = []
    for position in range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
        record = data[position : position + RECORD_BYTES]
        key, parent, offset, size, start, checksum, own = _RECORD.unpack(record)
        if zlib.crc32(record[:_CHECKED]) != own:
            break
        rows.append((key, Entry(file, offset, size, checksum, parent, start)))
    return rows, len(rows) * RECORD_BYTES
