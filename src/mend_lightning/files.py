"""Writing results so that a reader never sees half a file."""

from __future__ import annotations

import json
import os
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
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
        raise OutputPathError(f"Cannot write to the folder {folder}: {error}. Give one that you may write to.") from error


def _umask() -> int:
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
