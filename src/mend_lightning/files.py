"""Writing results so that a reader never sees half a file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mend_lightning.errors import OutputPathError


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it when the block ends well.

    Raises:
        OutputPathError: the folder cannot be made or written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written(f"{folder}/a/b.txt") as temporary:
        ...         _ = temporary.write_text("x")
        ...     Path(f"{folder}/a/b.txt").read_text()
        'x'
    """
    path = Path(path)
    if path.is_dir():
        raise OutputPathError(f"Cannot write {path}: it is a folder. Give the path of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise OutputPathError(f"Cannot write {path}: {error}. Give a path in a folder you may write to.") from error
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; results are ordinary files.
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    path = Path(path).expanduser().resolve()
    check_free_folder(path, replaces)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OutputPathError(f"Cannot write {path}: {error}. Give a path in a folder you may write to.") from error
    try:
        new = scratch / "new"
        new.mkdir()
        yield new
        _make_ordinary(new)
        # Once more: another process may have finished its own meanwhile.
        check_free_folder(path, replaces)
        _exchange(path, new, scratch / "old")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_free_folder(path: str | Path, replaces: str | None = None) -> None:
    """Raises OutputPathError where `written_folder` would not write: before the work starts."""
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise OutputPathError(f"Cannot write {path}: it is a file. Give the path of a folder.")
    if not path.exists() or not any(path.iterdir()):
        return
    if replaces is None:
        raise OutputPathError(
            f"{path} is there already and not empty. Give another folder, or overwrite it: overwrite=True (--overwrite)."
        )
    if not _is_earlier_result(path, replaces):
        raise OutputPathError(
            f"{path} is not overwritten: it holds no {replaces}, so it is not an earlier result of this command. "
            "Give another folder, or empty it yourself."
        )


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
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputPathError(
            f"Cannot write to the folder {folder}: {error}. Give one that you may write to."
        ) from error


def check_writable_file(path: str | Path) -> None:
    """Raises OutputPathError where `written` could not write: before the work starts."""
    path = Path(path)
    if path.is_dir():
        raise OutputPathError(f"Cannot write {path}: it is a folder. Give the path of a file.")
    check_writable(path.parent)


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
