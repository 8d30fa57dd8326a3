"""Editors as folders: editor.safetensors and editor.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mend_lightning.errors import StateDictError
from mend_lightning.files import write_json, written

if TYPE_CHECKING:
    from mend_lightning.editors.editor import Editor

WEIGHTS, DESCRIPTION = "editor.safetensors", "editor.json"
FORMAT = 1
KEYS = ("layers", "settings", "base", "base_options", "base_fingerprint", "prompt_format")


def save_editor(editor: Editor, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> Path:
    """Writes `editor.safetensors` and `editor.json`, each in one move; returns the folder.

    Args:
        editor: what is described.
        folder: where to.
        state: of an editor like it, in place of its own: of a checkpoint, or gathered from several processes.
    """
    folder = Path(folder)
    state = editor.state_dict() if state is None else state
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with written(folder / WEIGHTS) as temporary:
        save_file(state, temporary)
    write_json(folder / DESCRIPTION, {"format": FORMAT, **editor.description()})
    return folder


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


def load_editor(editor_class: type[Editor], folder: str | Path) -> Editor:
    """Reads what `save_editor` wrote: an editor of `editor_class`, or of one of this package's subclasses of it.

    Raises:
        StateDictError: a file is missing, truncated, holds NaN, or the two do not fit together.
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
    layers = {name: tuple(shape) for name, shape in description["layers"]}
    editor = _class_of(description, editor_class, folder)(layers, **description["settings"])
    editor.base_name, editor.base_fingerprint = description["base"], description["base_fingerprint"]
    editor.prompt_format, editor.base_options = description["prompt_format"], description["base_options"]
    try:
        editor.load_state_dict(state)
    except RuntimeError as error:
        raise StateDictError(f"{path} does not fit its {DESCRIPTION}: {error}") from error
    return editor.eval()


def _class_of(description: dict[str, Any], wanted: type[Editor], folder: str | Path) -> type[Editor]:
    """The class that a description names. Only classes of this package, and `wanted`: a file must not import code."""
    # Editors saved before there were several are MEND's.
    name = description.get("class", "MendEditor")
    if name == wanted.__name__:
        return wanted
    from mend_lightning import editors

    found = getattr(editors, name, None) if name in editors.__all__ else None
    if found is None or not issubclass(found, wanted):
        raise StateDictError(
            f"{folder} holds an editor of class {name!r}, not {wanted.__name__!r}. Load it with {name}.from_pretrained"
            f"{'' if found is None else ', or Editor.from_pretrained'}; on the command line set model.algorithm to that class."
        )
    return found
