"""Rows on disk: several writers, what a killed process leaves, damage, and a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest

from mend_lightning.errors import OutputPathError, TrunkCacheError, TrunkCacheWarning
from mend_lightning.training.trunk_cache.folder import ABOUT, MARK, check_folder, open_store
from mend_lightning.training.trunk_cache.row_store import NO_PARENT, RECORD_BYTES, Entry, RowStore, packed, unpacked


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def text(number: int) -> bytes:
    """Of another length each, none of them aligned."""
    return bytes([number % 256]) * (70 * number + 3)


def put(store: RowStore, *numbers: int) -> bool:
    return store.append([(key(number), text(number), NO_PARENT, 0) for number in numbers])


def assert_holds(store: RowStore, *numbers: int) -> None:
    assert {number for number in range(100) if key(number) in store} == set(numbers)
    assert [bytes(store.read(key(number))) for number in numbers] == [text(number) for number in numbers]


def test_what_was_written_is_read_now_and_later(tmp_path):
    store = RowStore(tmp_path)
    assert put(store, 1, 2) and put(store, 3)
    assert_holds(store, 1, 2, 3)
    assert put(store, 4)
    assert_holds(RowStore(tmp_path), 1, 2, 3, 4)
    assert store.read(key(9)) is None


def test_a_store_that_nothing_is_put_into_leaves_no_file(tmp_path):
    store = RowStore(tmp_path)
    assert not store.append([])
    assert not list(tmp_path.iterdir())


def test_two_writers_and_a_reader_at_once(tmp_path):
    """The same row from both is whichever was seen first; a file of its own for each."""
    first, second, reader = (RowStore(tmp_path) for _ in range(3))
    for number in range(1, 9):
        put((first, second)[number % 2], number)
    put(first, 20)
    put(second, 20)
    assert_holds(first, 2, 4, 6, 8, 20)
    for store in (reader, first, second):
        store.refresh()
        assert_holds(store, *range(1, 9), 20)
    put(second, 30)
    reader.refresh()
    assert_holds(reader, *range(1, 9), 20, 30)
    assert len(list(tmp_path.glob("*.rows"))) == len(list(tmp_path.glob("*.index"))) == 2


def test_a_closed_store_continues_with_new_files(tmp_path):
    store = RowStore(tmp_path)
    put(store, 1, 2)
    store.close()
    put(store, 3)
    store.refresh()
    assert_holds(store, 1, 2, 3)
    assert_holds(RowStore(tmp_path), 1, 2, 3)


def test_an_index_cut_off_anywhere_holds_whole_rows(tmp_path):
    """What a process that was killed leaves; the next one adds to it."""
    put(RowStore(tmp_path / "."), 1, 2, 3)
    (index,) = tmp_path.glob("*.index")
    whole = index.read_bytes()
    for length in range(0, len(whole) + 1, 7):
        index.write_bytes(whole[:length])
        assert_holds(RowStore(tmp_path), *range(1, 1 + length // RECORD_BYTES))
    index.write_bytes(whole[:-1])
    put(RowStore(tmp_path), 3, 4)
    assert_holds(RowStore(tmp_path), 1, 2, 3, 4)


def test_a_record_that_is_still_being_written_is_read_later(tmp_path):
    writer, reader = RowStore(tmp_path), RowStore(tmp_path)
    put(writer, 1, 2)
    (index,) = tmp_path.glob("*.index")
    whole = index.read_bytes()
    index.write_bytes(whole[:-20] + bytes(20))
    reader.refresh()
    assert_holds(reader, 1)
    index.write_bytes(whole)
    reader.refresh()
    assert_holds(reader, 1, 2)


def test_data_that_never_reached_the_disk(tmp_path):
    """After a loss of power the index may be ahead of the rows: cut off, or zero."""
    put(RowStore(tmp_path), 1, 2, 3)
    (data,) = tmp_path.glob("*.rows")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    assert_holds(RowStore(tmp_path), 1, 2)
    data.write_bytes(whole[:-50] + bytes(50))
    store = RowStore(tmp_path)
    with pytest.warns(TrunkCacheWarning, match=r"\.rows is damaged or gone; rows .* computed anew.*delete the folder"):
        assert store.read(key(3)) is None
    assert_holds(store, 1, 2)
    put(store, 3)
    assert_holds(store, 1, 2, 3)


def test_a_damaged_index_is_said_and_what_lies_before_counts(tmp_path):
    put(RowStore(tmp_path), 1, 2, 3, 4)
    (index,) = tmp_path.glob("*.index")
    whole = bytearray(index.read_bytes())
    whole[RECORD_BYTES + 40] ^= 1
    index.write_bytes(whole)
    with pytest.warns(TrunkCacheWarning, match=r"\.index is damaged"):
        store = RowStore(tmp_path)
    assert_holds(store, 1)


def test_a_folder_deleted_during_the_run(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    put(RowStore(folder), 1)
    store = RowStore(folder)
    shutil.rmtree(folder)
    with pytest.warns(TrunkCacheWarning, match="damaged or gone"):
        assert store.read(key(1)) is None
    with pytest.warns(TrunkCacheWarning, match="grows no further"):
        assert not put(store, 2)
    store.refresh()
    assert_holds(store)


def test_a_disk_that_fills_up_keeps_what_is_whole(tmp_path, monkeypatch):
    """The write that fails has written a part of its row by then."""
    store, real, left = RowStore(tmp_path), os.pwrite, [400]

    def pwrite(file: int, data: bytes, offset: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(file, data[: left[0]], offset)
        left[0] -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert put(store, 1, 2)
    with pytest.warns(TrunkCacheWarning, match=r"grows no further: .*No space left.*Make room on the disk"):
        assert not put(store, 3)
    # Once: training continues without another word.
    assert not put(store, 4)
    for found in (store, RowStore(tmp_path)):
        assert_holds(found, 1, 2)


def test_a_share_of_the_disk_stays_free(tmp_path, monkeypatch):
    store, usage = RowStore(tmp_path), shutil.disk_usage(tmp_path)
    put(store, 1)
    scarce = type(usage)(total=10**6, used=10**6 - 50_100, free=50_100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: scarce)
    with pytest.warns(TrunkCacheWarning, match="5% of the disk stay so"):
        assert not put(store, 2)
    assert_holds(store, 1)


def test_records_of_the_index():
    entries = [(key(1), Entry(3, 2**40, 2**33, 2**32 - 1)), (key(2), Entry(3, 64, 5, 0, key(1), 7))]
    data = b"".join(packed(*entry) for entry in entries)
    assert unpacked(data, 3) == (entries, len(data))
    for position in range(RECORD_BYTES):
        broken = bytearray(data)
        broken[position] ^= 0x10
        # The last four bytes are padding.
        assert unpacked(bytes(broken), 3)[0] == (entries if position >= RECORD_BYTES - 4 else [])


IDENTITY = {"format": 1, "weights": "abc"}


def test_folders_of_two_trunks(tmp_path):
    put(open_store(tmp_path / "caches", IDENTITY), 1)
    put(open_store(tmp_path / "caches", {**IDENTITY, "weights": "abd"}), 2)
    assert_holds(open_store(tmp_path / "caches", IDENTITY), 1)
    (about,) = (path for path in (tmp_path / "caches").glob(f"*/{ABOUT}") if "abc" in path.read_text())
    assert json.loads(about.read_text()) == IDENTITY


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputPathError, match="file is a file. Give the path of a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(OutputPathError, match=f"holds other things: it has no {MARK}. Give a new or an empty folder"):
        check_folder(tmp_path)
    with pytest.raises(OutputPathError, match="Give one that you may write to"):
        check_folder(tmp_path / "file" / "inside")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_marks_that_are_damaged_or_of_another_version(tmp_path):
    folder = tmp_path / "caches"
    open_store(folder, IDENTITY)
    (about,) = folder.glob(f"*/{ABOUT}")
    about.write_text(json.dumps({**IDENTITY, "weights": "of another"}))
    with pytest.raises(
        TrunkCacheError, match="of something else or of another version: expected .*abc.*, found .*of another"
    ):
        open_store(folder, IDENTITY)
    about.write_text('{"format"')
    with pytest.raises(TrunkCacheError, match=f"cannot be read: .* delete the folder {about.parent}"):
        open_store(folder, IDENTITY)
    (folder / MARK).write_text(json.dumps({"format": 99}))
    with pytest.raises(TrunkCacheError, match="another version"):
        check_folder(folder)
