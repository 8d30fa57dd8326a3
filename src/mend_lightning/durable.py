"""Files that are whole whatever happens: the process is killed, the disk is full, the power goes."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from mend_lightning.files import umask

# Names end with it, so that neither Lightning's search for `last*.ckpt` nor anybody's `*.ckpt` finds an unfinished file.
SUFFIX = ".unfinished"


@contextmanager
def durably_written(path: str | Path) -> Iterator[IO[bytes]]:
    """Gives a file to write to, which becomes `path` when the block ends well, after it is on the disk.

    Until then what was at `path` stays there, whole. The unfinished files of killed processes beside it are removed.

    Args:
        path: of the file; its folder is made.

    Raises:
        OSError: it cannot be written; `path` is as it was.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with durably_written(f"{folder}/a/b.txt") as file:
        ...         _ = file.write(b"x")
        ...     Path(f"{folder}/a/b.txt").read_text()
        'x'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent)
    # In the same folder: a rename within a file system is one step, and one across is a copy, which can be cut off.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SUFFIX, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _lock(file)
            yield file
            file.flush()
            # A rename may reach the disk before what was written: after a power cut the file would be there, and empty.
            os.fsync(file.fileno())
            # mkstemp makes files private; results are ordinary files.
            temporary.chmod(0o666 & ~umask())
            if fcntl is None:
                # Windows renames no open file; elsewhere it stays locked until it has its name.
                file.close()
            os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: str | Path) -> list[Path]:
    """Removes the files that killed processes left unfinished; returns them.

    Files being written now stay, and so does everything where the system has no locks to tell the two apart (Windows).
    """
    found = [path for path in Path(folder).glob(f".*{SUFFIX}") if not _is_being_written(path)]
    for path in found:
        path.unlink(missing_ok=True)
    return found


def sync_folder(folder: str | Path) -> None:
    """Waits until the names in `folder` are on the disk too, where the system can be asked for that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(file: IO[bytes]) -> None:
    """Says that somebody writes the file; the system takes the lock off when the process ends, in whatever way."""
    if fcntl is None:
        return
    try:
        # Waits: who looks for unfinished files may hold it for a moment.
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        # A file system without locks. Then nobody can tell a file that is being written from one that is left over, and
        # `_is_being_written` takes it for the first.
        return


def _is_being_written(path: Path) -> bool:
    if fcntl is None:
        return True
    try:
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            about = os.fstat(file.fileno())
    except OSError:
        # Locked, or finished or removed in this very moment.
        return True
    # An empty one may have been made a moment ago, and be locked in the next.
    return about.st_size == 0 and time.time() - about.st_mtime < 60
