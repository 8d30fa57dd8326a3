"""One checkpoint file: written so that it is whole or not there, read without running code."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

if sys.platform != "win32":
    import fcntl

import torch

from mend_lightning.errors import CheckpointNotFoundError, OutputPathError, StateDictError
from mend_lightning.files import output_file, written

# The base is not in checkpoints: it is frozen, and may be larger than one process can hold.
BASE_PREFIX, EDITOR_PREFIX = "base_model.", "editor."
# Names end with it, so that neither Lightning's search for `last*.ckpt` nor anybody's `*.ckpt` finds an unfinished file.
SUFFIX = ".unfinished"


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Writes a checkpoint; at any moment `path` is the old file or the new one, whole.

    The unfinished files of killed processes beside it are removed.

    Raises:
        OutputPathError: it cannot be written. What was at `path` is still there.
    """
    remove_unfinished(output_file(path).parent)
    try:
        # Lightning's own (`_atomic_save`) goes through fsspec, which writes to the system's folder for temporary files and
        # moves: onto another disk, a copy into the old file's place, which a kill cuts off. And it never waits for the disk.
        with written(path, SUFFIX) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
    except OutputPathError:
        raise
    except (OSError, RuntimeError) as error:
        # torch raises RuntimeError where its own writer cannot write, and while it puts away what the system has refused.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OutputPathError(
            f"Cannot write the checkpoint {path}: {_reason(cause)}. An earlier one of that name is as it was. "
            "Make room, or give a folder that you may write to."
        ) from error


def remove_unfinished(folder: str | Path) -> list[Path]:
    """Removes the files that killed processes left unfinished; returns them.

    Files being written now stay, and so does everything where the system has no locks to tell the two apart (Windows).
    """
    found = [path for path in Path(folder).glob(f".*{SUFFIX}") if not _is_being_written(path)]
    for path in found:
        path.unlink(missing_ok=True)
    return found


def _is_being_written(path: Path) -> bool:
    if sys.platform == "win32":
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


def read_checkpoint(path: str | Path, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """Reads a checkpoint file.

    Args:
        path: of the file.
        map_location: see `torch.load`.
        weights_only: False lets the file run any code; for files of your own that hold other objects than tensors.

    Raises:
        CheckpointNotFoundError: there is no such file.
        StateDictError: it is cut off, or no checkpoint.
    """
    path = Path(path)
    check_checkpoint_path(path)
    try:
        _check_sums(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=weights_only)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError, BadZipFile) as error:
        raise StateDictError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as a checkpoint: it is cut off, damaged, or another "
            f"kind of file ({_reason(error)}). Take another checkpoint, or copy this one again."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise StateDictError(
            f"{path} is no checkpoint of a Trainer: it has no 'state_dict'. Give a file that `fit` wrote; a saved editor "
            "(a folder) goes to --model.editor."
        )
    return checkpoint


def editor_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The editor's part of a checkpoint's state dict, under the editor's own names.

    Example:
        >>> editor_state({"state_dict": {"editor.edit_rates": 1}})
        {'edit_rates': 1}
    """
    state = checkpoint["state_dict"].items()
    return {name.removeprefix(EDITOR_PREFIX): value for name, value in state if name.startswith(EDITOR_PREFIX)}


def check_checkpoint_path(path: str | Path) -> None:
    """Raises CheckpointNotFoundError or StateDictError where `path` cannot be a checkpoint: before the work starts."""
    path = Path(path)
    if path.is_dir():
        raise StateDictError(
            f"{path} is a folder. A checkpoint is a file: give one that `fit` wrote, FOLDER/last.ckpt."
        )
    if not path.exists():
        raise CheckpointNotFoundError(f"There is no checkpoint {path}. {_others_beside(path)}")


def _others_beside(path: Path) -> str:
    folder = path.absolute().parent
    found = sorted(other.name for other in folder.glob("*.ckpt")) if folder.is_dir() else []
    if found:
        return f"{folder} has: {', '.join(found[:10])}."
    return f"{folder} has none. Give the path of a file that `fit` wrote (RUN/checkpoints/last.ckpt)."


def _check_sums(path: Path) -> None:
    """Compares what the file holds with the sums that are in it: torch writes them and does not look at them again."""
    if not is_zipfile(path) or not torch.serialization.get_crc32_options():
        return
    with ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise BadZipFile(f"{damaged} is not what was written")


def _reason(error: Exception) -> str:
    """The line of torch's long messages that says what was found."""
    lines = str(error).splitlines() or [""]
    line = next((line for line in lines if "WeightsUnpickler error" in line), lines[0]).strip().rstrip(".")
    return f"{type(error).__name__}: {shorten(line, 120)}" if line else type(error).__name__
