"""Files that are whole whatever happens: a reader looks, the process is killed, the disk is full, the power goes.

What is replaced is a regular file or a folder of ours. Links are followed and stay, and devices, FIFOs and sockets are refused.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl

from mend_lightning.errors import OutputPathError

# Links that lead to links: as many as Linux follows.
_MOST_LINKS = 40
_KINDS = {
    stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


@contextmanager
def written(path: str | Path, suffix: str = "") -> Iterator[Path]:
    """Gives a temporary path beside `path`, which becomes `path` when the block ends well, after it is on the disk.

    Until then what was at `path` stays there, whole. The new file has its permissions; its other names (hard links) keep
    what they have.

    Args:
        path: of the file; its folder is made.
        suffix: how the temporary file's name ends. With one the file is locked (flock) until it has its name, so that
            those which killed processes left behind can be told from it.

    Raises:
        OutputPathError: see `output_file`; or the folder cannot be made or written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written(f"{folder}/a/b.txt") as temporary:
        ...         _ = temporary.write_text("x")
        ...     Path(f"{folder}/a/b.txt").read_text()
        'x'
    """
    target = output_file(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder: a rename within a file system is one step, and one across is a copy, which can be cut off.
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=suffix, dir=target.parent)
    except OSError as error:
        raise _refused(path, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as locked:
            if suffix and sys.platform != "win32":
                # Until the process ends, in whatever way. It waits, for who looks for unfinished files may hold it for a
                # moment; in a file system without locks none of them is removed.
                with suppress(OSError):
                    fcntl.flock(locked, fcntl.LOCK_EX)
            yield temporary
            if sys.platform == "win32":
                # Windows renames no open file; elsewhere it stays locked until it has its name.
                locked.close()
            _put(temporary, target, path)
    finally:
        temporary.unlink(missing_ok=True)


def output_file(path: str | Path) -> Path:
    """The file that writing to `path` makes or replaces: where its links lead, also to nothing yet, or `path` itself.

    Raises:
        OutputPathError: what is there is no regular file (a folder, device, FIFO or socket, an open stream such as
            /dev/stdout), or the links go round in a circle.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     os.symlink("b.txt", f"{folder}/a.txt")
        ...     output_file(f"{folder}/a.txt").name
        'b.txt'
    """
    place = _end_of_links(path)
    kind = _kind(place, path)
    # Links in there lead to what a process has open. Even where that is a file it must not be replaced, but written on.
    if place.is_relative_to("/proc"):
        kind = "a stream of a process"
    if kind not in (None, _KINDS[stat.S_IFREG]):
        raise OutputPathError(f"Cannot write {path}: it is {kind}. Give the path of a file.")
    output_folder(place.parent)
    return place


def output_folder(path: str | Path) -> Path:
    """The folder that writing to `path` makes or fills: where its links lead, also to nothing yet, or `path` itself.

    Raises:
        OutputPathError: what is there is no folder, or the links go round in a circle.
    """
    place = Path(os.path.realpath(Path(path).expanduser()))
    kind = _kind(place, path)
    if kind not in (None, _KINDS[stat.S_IFDIR]):
        raise OutputPathError(f"Cannot write to the folder {path}: it is {kind}. Give the path of a folder.")
    return place


def _end_of_links(path: str | Path) -> Path:
    """What `path` leads to, link by link; a link in /proc is not followed, and one in a circle is left for `_kind` to see."""
    place = Path(path)
    for _ in range(_MOST_LINKS):
        place = Path(os.path.realpath(place.parent), place.name)
        if place.is_relative_to("/proc") or not os.path.islink(place):
            break
        place = place.parent / os.readlink(place)
    return place


def _kind(place: Path, path: str | Path) -> str | None:
    """What is at `place`, to which `path` leads, in words; None: nothing."""
    try:
        return _KINDS.get(stat.S_IFMT(place.stat().st_mode), "no regular file")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _refused(path, error) from error


def _put(temporary: Path, target: Path, path: str | Path) -> None:
    """Gives a finished file its name."""
    # Looked at again: the work may have taken hours.
    if output_file(path) != target:
        raise OutputPathError(f"Cannot write {path}: it led to {target} before, and leads elsewhere now. Give another.")
    try:
        # A rename may reach the disk before what was written: after a power cut the file would be there, and empty. Opened
        # by its name, for some writers put a file of their own there.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; results are ordinary files.
        temporary.chmod(_permissions(target, 0o666))
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise _refused(path, error) from error


def sync_folder(folder: str | Path) -> None:
    """Waits until the names in `folder` are on the disk too, where the system can be asked for that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _permissions(path: Path, new: int) -> int:
    """Those of what is at `path`, or where nothing is, `new` less the umask."""
    return stat.S_IMODE(path.stat().st_mode) & 0o777 if path.exists() else new & ~umask()


def _refused(path: str | Path, error: OSError) -> OutputPathError:
    return OutputPathError(f"Cannot write {path}: {error}. Give a path in a folder you may write to.")


@contextmanager
def written_folder(path: str | Path, replaces: str | None = None) -> Iterator[Path]:
    """Gives an empty temporary folder beside `path`, which becomes `path` when the block ends well.

    Args:
        path: a folder that is not there yet, or an empty one.
        replaces: name of a file that marks a folder of an earlier result: such a folder is replaced, as a whole. With "*/"
            before the name everything in `path` must be such a folder. No other one is replaced: what else lies there is
            not ours.

    Raises:
        OutputPathError: something is at `path` that must not be replaced, or the folder beside it cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_folder(f"{folder}/a/b") as temporary:
        ...         _ = (temporary / "c.txt").write_text("x")
        ...     Path(f"{folder}/a/b/c.txt").read_text()
        'x'
    """
    # Its real place: a link stays a link, and the rename stays within one file system.
    path = check_free_folder(path, replaces)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _refused(path, error) from error
    try:
        new = scratch / "new"
        new.mkdir()
        yield new
        _make_ordinary(new)
        new.chmod(_permissions(path, 0o777))
        # Once more: another process may have finished its own meanwhile.
        check_free_folder(path, replaces)
        _exchange(path, new, scratch / "old")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_free_folder(path: str | Path, replaces: str | None = None) -> Path:
    """The folder that `written_folder` would make; raises OutputPathError where it would not: before the work starts."""
    place = output_folder(path)
    check_writable(place.parent)
    if os.path.ismount(place):
        raise OutputPathError(f"Cannot write {path}: what is mounted there cannot be renamed. Give a folder in it.")
    if not place.exists() or not any(place.iterdir()):
        return place
    if replaces is None:
        raise OutputPathError(
            f"{path} is there already and not empty. Give another folder, or overwrite it: overwrite=True (--overwrite)."
        )
    if not _is_earlier_result(place, replaces):
        raise OutputPathError(
            f"{path} is not overwritten: it holds no {replaces}, so it is not an earlier result of this command. "
            "Give another folder, or empty it yourself."
        )
    return place


def _is_earlier_result(path: Path, replaces: str) -> bool:
    of_each, _, mark = replaces.rpartition("/")
    return all((folder / mark).is_file() for folder in (path.iterdir() if of_each else [path]))


def _make_ordinary(folder: Path) -> None:
    """Safetensors are written for the owner alone; results are ordinary files and folders."""
    mask = umask()
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _exchange(path: Path, new: Path, old: Path) -> None:
    """`new` becomes `path`; what was there becomes `old`, and comes back if that fails."""
    try:
        if path.exists():
            path.rename(old)
        new.rename(path)
    except OSError as error:
        raise OutputPathError(f"Cannot put the finished folder at {path}: {error}. Give another one.") from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)


def check_writable(folder: str | Path) -> None:
    """Makes `folder` and tries it out: before the work starts, not when its results are to be saved.

    Raises:
        OutputPathError: it cannot be made or written to.
    """
    place = output_folder(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OutputPathError(
            f"Cannot write to the folder {folder}: {error}. Give one that you may write to."
        ) from error


def check_writable_file(path: str | Path) -> None:
    """Raises OutputPathError where `written` could not write: before the work starts."""
    check_writable(output_file(path).parent)


def umask() -> int:
    """The process's, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, data: Any) -> None:
    """Writes `data` as indented JSON."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: str | Path, rows: Iterator[Any] | list[Any]) -> None:
    """Writes one JSON object a line."""
    with written(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
