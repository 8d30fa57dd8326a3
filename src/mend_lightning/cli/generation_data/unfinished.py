"""A run that makes a data set batch by batch, and goes on where it was broken off."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mend_lightning.errors import OutputPathError

PARTIAL, ABOUT = "unfinished.jsonl", "about.json"


def is_finished(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `out` holds the set of these settings.

    Raises:
        OutputPathError: it holds another one.
    """
    if not (out / ABOUT).is_file():
        return False
    made = json.loads((out / ABOUT).read_text(encoding="utf-8")).get("settings", {})
    _check_same(made, settings, out)
    return True


def resume(path: Path, settings: Mapping[str, Any]) -> list[list[dict[str, str]]]:
    """The finished batches of an earlier run; a line that a killed run left half is cut off.

    Raises:
        OutputPathError: that run had other settings.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n") if path.is_file() else (b"", b"", b"")
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines:
        _check_same(lines[0], settings, path)
        os.truncate(path, len(whole) + 1)
    else:
        path.write_bytes(json.dumps(settings).encode() + b"\n")
    return lines[1:]


def _check_same(made: Mapping[str, Any], settings: Mapping[str, Any], where: Path) -> None:
    other = [f"{key}: {made.get(key)!r}, now {value!r}" for key, value in settings.items() if made.get(key) != value]
    if other:
        raise OutputPathError(
            f"{where} was made with other settings ({'; '.join(other)}). Give another folder, or remove it."
        )


def append(file: Any, batch: list[dict[str, str]]) -> None:
    """One batch is one line, on the disk before the next begins."""
    file.write(json.dumps(batch, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())
