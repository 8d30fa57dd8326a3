"""Editors as folders: editor.safetensors and editor.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mend_lightning.errors import StateDictError
from mend_lightning.files import write_json, written

Saved = TypeVar("Saved")
WEIGHTS, DESCRIPTION = "editor.safetensors", "editor.json"
FORMAT = 1
KEYS = ("layers", "settings", "base", "base_options", "base_fingerprint", "prompt_format")


def save_editor(description: Mapping[str, Any], state: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Writes `editor.safetensors` and `editor.json`, each in one move; returns the folder.

    Args:
        description: what `Editor.description` gives.
        state: the editor's state dict: its own, of a checkpoint, or gathered from several processes.
        folder: where to.
    """
    folder = Path(folder)
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with written(folder / WEIGHTS) as temporary:
        save_file(state, temporary)
    write_json(folder / DESCRIPTION, {"format": FORMAT, **description})
    return folder


def read_editor(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the state dict that `save_editor` wrote.

    Raises:
        StateDictError: a file is missing, truncated, or holds NaN.
    """
    description = read_description(folder)
    path = Path(folder) / WEIGHTS
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StateDictError(f"{path} cannot be read as safetensors: {error}") from error
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise StateDictError(
            f"{path} holds NaN or infinite values in {len(broken)} tensor(s), among them {broken[0]!r}: its training "
            "diverged. Take the editor of an earlier checkpoint."
        )
    return description, state


def class_named(
    description: Mapping[str, Any], classes: Mapping[str, type], wanted: type[Saved], folder: str | Path
) -> type[Saved]:
    """The class that a description names: `wanted`, or a subclass of it among `classes`. A file must not import code.

    Raises:
        StateDictError: it is none of them.
    """
    # Editors saved before there were several are MEND's.
    name = description.get("class", "MendEditor")
    found = wanted if name == wanted.__name__ else classes.get(name)
    if found is None or not issubclass(found, wanted):
        raise StateDictError(
            f"{folder} holds an editor of class {name!r}, not {wanted.__name__!r}. Load it with {name}.from_pretrained"
            f"{'' if found is None else ', or Editor.from_pretrained'}; on the command line set model.algorithm to that class."
        )
    return found


def read_description(folder: str | Path) -> dict[str, Any]:
    """The contents of `editor.json`.

    Raises:
        StateDictError: it is missing, no JSON, of another format, or incomplete.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise StateDictError(
            f"{folder} is not a saved editor: it has no {DESCRIPTION}. Give the folder that `fit` or save_pretrained wrote."
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StateDictError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        raise StateDictError(f"{path} has format {found!r}; this version reads format {FORMAT}.")
    missing = [key for key in KEYS if key not in description]
    if missing:
        raise StateDictError(f"{path} lacks {', '.join(missing)}; it was not written by save_pretrained.")
    return description
