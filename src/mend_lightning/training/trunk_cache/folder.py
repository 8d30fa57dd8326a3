"""Folders of trunk caches: one folder a user names, and in it one for each trunk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mend_lightning.errors import OutputPathError, TrunkCacheError
from mend_lightning.files import check_writable, write_json
from mend_lightning.training.trunk_cache.identity import folder_name
from mend_lightning.training.trunk_cache.row_store import RowStore

# In the folder that the user names, and in that of each trunk.
MARK = "trunk_caches.json"
ABOUT = "trunk.json"
_MARK = {"what": "hidden states below edited layers, kept by mend-lightning (trunk_cache); may be deleted", "format": 1}


def check_folder(folder: str | Path) -> None:
    """Checks, before a model loads, that caches can be kept in `folder`.

    Raises:
        OutputPathError: it is a file, cannot be written to, or holds other things.
        TrunkCacheError: it is of another version of this package.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputPathError(f"trunk_cache {folder} is a file. Give the path of a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise OutputPathError(
            f"trunk_cache {folder} holds other things: it has no {MARK}. Give a new or an empty folder; it may grow large, and "
            "is yours to delete."
        )
    check_writable(folder)
    if (folder / MARK).is_file():
        _check(folder / MARK, _MARK, folder)


def open_store(folder: str | Path, identity: Mapping[str, Any]) -> RowStore:
    """The store of one trunk's outputs in `folder`; made where it is not there yet.

    Args:
        folder: of caches.
        identity: what they belong to, `trunk_identity(...)`.

    Raises:
        OutputPathError, TrunkCacheError: as `check_folder`; or what lies there says that it is of another trunk.
    """
    check_folder(folder)
    folder = Path(folder).expanduser()
    own = folder / folder_name(identity)
    # Both are written whole, and by whichever process the same: several may start at once.
    for path, content in ((folder / MARK, _MARK), (own / ABOUT, dict(identity))):
        if path.is_file():
            _check(path, content, path.parent)
        else:
            write_json(path, content)
    return RowStore(own)


def _check(path: Path, expected: Mapping[str, Any], delete: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrunkCacheError(
            f"{path} cannot be read: {error}. If it is damaged, delete the folder {delete}: it is filled again."
        ) from error
    if found != expected:
        raise TrunkCacheError(
            f"{path} says that the cache is of something else or of another version: expected {expected}, found {found}. Delete "
            f"the folder {delete} (it is filled again), or give another one."
        )
