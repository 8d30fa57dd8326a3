"""Rows of bytes on disk, by key: appended, memory-mapped, shared by any number of processes.

A process appends to files of its own and reads those of all, so no lock is needed, and one that is killed leaves
whole rows behind: what it was writing has no record in the index yet. (SQLite has one writer at a time, and copies what it
reads: rows of 100 to 500 KB took twice the time to read and seven times the time to write from two processes.)
"""

from __future__ import annotations

import os
import shutil
import struct
import uuid
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mend_lightning.errors import TrunkCacheWarning

# A cache leaves this share of the disk free: a run's checkpoints are worth more.
RESERVED_SHARE = 0.05
_ALIGNED = 64

# key, parent, offset, size, start, checksum of the row, checksum of what stands before it in the record
_RECORD = struct.Struct("<16s16sQQIII4x")
_CHECKED = _RECORD.size - 8
RECORD_BYTES = _RECORD.size
KEY_BYTES = 16
NO_PARENT = bytes(KEY_BYTES)


@dataclass
class _DataFile:
    """A data file, how much of its index was read, and the part of it that is mapped."""

    path: Path
    read: int = 0
    mapped: np.ndarray | None = None
    damaged: bool = False

    @property
    def index(self) -> Path:
        return self.path.with_suffix(".index")

    def bytes(self, entry: Entry) -> np.ndarray:
        """The entry's bytes, not checked; raises OSError where the file is gone."""
        end = entry.offset + entry.size
        if self.mapped is None or len(self.mapped) < end:
            # Read-only and shared: a private mapping larger than the memory is refused.
            self.mapped = np.memmap(self.path, np.uint8, "r")
        return self.mapped[entry.offset : end]


class RowStore:
    """Rows of bytes by key, in a folder that other processes may read and write as well.

    Args:
        folder: an existing one, of this store alone.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     RowStore(folder).append([(b"k" * 16, b"abc", bytes(16), 0)])
        ...     bytes(RowStore(folder).read(b"k" * 16))
        True
        b'abc'
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._entries: dict[bytes, Entry] = {}
        self._files: list[_DataFile] = []
        self._known: set[str] = set()
        self._own: tuple[int, int, int] | None = None
        self._own_end = 0
        self.growing = True
        # Lengths of beginnings that rows share with a parent, longest first.
        self.starts: list[int] = []
        self.refresh()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def entry(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def refresh(self) -> None:
        """Reads what other processes have added since."""
        for path in sorted(self.folder.glob("*.index")):
            if path.stem not in self._known:
                self._known.add(path.stem)
                self._files.append(_DataFile(path.with_suffix(".rows")))
        own = self._own[0] if self._own else None
        for number, file in enumerate(self._files):
            if number != own and not file.damaged:
                self._read_index(number, file)

    def _read_index(self, number: int, file: _DataFile) -> None:
        try:
            if file.index.stat().st_size - file.read < RECORD_BYTES:
                return
            with file.index.open("rb") as index:
                index.seek(file.read)
                data = index.read()
            size = file.path.stat().st_size
        except OSError:
            # Somebody deletes the cache; what is not there is computed.
            return
        rows, read = unpacked(data, number)
        file.read += read
        for key, entry in rows:
            if entry.offset + entry.size <= size:
                self._enter(key, entry)
        # The last record may still be on its way to the disk; one that others follow is not.
        if len(data) - read >= 2 * RECORD_BYTES:
            file.damaged = True
            self._warn_of_damage(file.index)

    def _enter(self, key: bytes, entry: Entry) -> None:
        self._entries.setdefault(key, entry)
        if entry.start and entry.start not in self.starts:
            self.starts = sorted([*self.starts, entry.start], reverse=True)

    def read(self, key: bytes) -> np.ndarray | None:
        """A row's bytes `[size]` uint8, read-only and on disk still; None if it is not there, or not as it was written."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        file = self._files[entry.file]
        try:
            data = file.bytes(entry)
        except (OSError, ValueError):
            data = np.empty(0, np.uint8)
        if len(data) == entry.size and zlib.crc32(data.data) == entry.checksum:
            return data
        del self._entries[key]
        self._warn_of_damage(file.path)
        return None

    def _warn_of_damage(self, path: Path) -> None:
        # One text a file, which Python shows once.
        warnings.warn(
            f"The trunk cache's file {path} is damaged or gone; rows that cannot be read are computed anew. If it is an old "
            f"one, delete the folder {self.folder}: it is filled again.",
            TrunkCacheWarning,
            stacklevel=4,
        )

    def append(self, rows: Sequence[tuple[bytes, bytes | np.ndarray, bytes, int]]) -> bool:
        """Adds rows (key, bytes, parent's key, start); returns whether they are on disk, False once the disk is full.

        Warns:
            TrunkCacheWarning: the disk is full, or cannot be written to any more: the store stops growing.
        """
        if not self.growing or not rows:
            return False
        sizes = [len(data) for _, data, _, _ in rows]
        try:
            self._check_space(sum(sizes) + len(sizes) * (RECORD_BYTES + _ALIGNED))
            number, data_file, index_file = self._own or self._open_own()
            entries, offset = [], self._own_end
            for (_, data, parent, start), size in zip(rows, sizes):
                entries.append(Entry(number, offset, size, zlib.crc32(_view(data)), parent, start))
                offset += -(-size // _ALIGNED) * _ALIGNED
            for entry, (_, data, _, _) in zip(entries, rows):
                _write_at(data_file, data, entry.offset)
            # In one piece behind the rows.
            _append(index_file, b"".join(packed(key, entry) for entry, (key, *_) in zip(entries, rows)))
        except OSError as error:
            self._stop_growing(error)
            return False
        self._own_end = offset
        for entry, (key, *_) in zip(entries, rows):
            self._enter(key, entry)
        return True

    def _open_own(self) -> tuple[int, int, int]:
        """Number, data file and index of this process; their name is no other's."""
        name = uuid.uuid4().hex[:16]
        path = self.folder / f"{name}.rows"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptors = os.open(path, flags, 0o666), os.open(path.with_suffix(".index"), flags | os.O_APPEND, 0o666)
        self._known.add(name)
        self._files.append(_DataFile(path))
        self._own = (len(self._files) - 1, *descriptors)
        return self._own

    def _check_space(self, size: int) -> None:
        disk = shutil.disk_usage(self.folder)
        if disk.free - size < RESERVED_SHARE * disk.total:
            raise OSError(f"{disk.free / 2**30:.1f} GiB are free, and {RESERVED_SHARE:.0%} of the disk stay so")

    def _stop_growing(self, error: OSError) -> None:
        self.growing = False
        warnings.warn(
            f"The trunk cache {self.folder} ({self.size() / 2**20:,.0f} MB, {len(self):,} rows) grows no further: {error}. Rows "
            "that it lacks are computed in every epoch. Make room on the disk, or give a folder on another one.",
            TrunkCacheWarning,
            stacklevel=4,
        )

    def size(self) -> int:
        """Bytes on disk, of all processes."""
        size = 0
        for path in self.folder.glob("*"):
            with suppress(FileNotFoundError):
                size += path.stat().st_size
        return size

    def close(self) -> None:
        """Closes the files; the store can be read on, and what is appended then goes to new ones."""
        if self._own is not None:
            for descriptor in self._own[1:]:
                os.close(descriptor)
            # From now on they are files like all others.
            self._files[self._own[0]].read = self._files[self._own[0]].index.stat().st_size
            self._own, self._own_end = None, 0


def _view(data: bytes | np.ndarray) -> memoryview:
    return memoryview(data) if isinstance(data, bytes) else data.data


def _write_at(file: int, data: bytes | np.ndarray, offset: int) -> None:
    left = _view(data)
    while len(left):
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written


def _append(file: int, data: bytes) -> None:
    left = memoryview(data)
    while len(left):
        left = left[os.write(file, left) :]


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
