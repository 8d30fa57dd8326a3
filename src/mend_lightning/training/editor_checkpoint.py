"""What a checkpoint of `MendModule` holds: the editor and how it was made, and where the random generators stood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mend_lightning.editors.editor import Editor
from mend_lightning.errors import BaseModelMismatchError, StateDictError
from mend_lightning.models.fingerprint import same_base
from mend_lightning.training.distributed.checkpoint_file import BASE_PREFIX
from mend_lightning.training.random_states import gathered_random_states


def keep_editor_only(checkpoint: dict[str, Any], editor: Editor) -> None:
    """Takes the frozen base out of a checkpoint, and puts in what makes the editor again. Every process must call it."""
    state = checkpoint["state_dict"].items()
    checkpoint["state_dict"] = {name: value for name, value in state if not name.startswith(BASE_PREFIX)}
    checkpoint["mend_lightning"] = editor.description()
    checkpoint["random_states"] = gathered_random_states()


def check_checkpoint(checkpoint: Mapping[str, Any], editor: Editor) -> None:
    """Raises where a checkpoint is not of this editor and base model, or lacks a part of the editor.

    Raises:
        StateDictError: MendModule did not write it, or an entry is missing.
        BaseModelMismatchError: it is of another editor or base model.

    Warns:
        UnverifiedBaseWarning: the base is quantised in another way now, or in one of the two only.
    """
    if "shards" in checkpoint:
        raise StateDictError(
            "This is a sharded checkpoint, whose tensors lie in a folder beside it. Read it with the plugin that knows them: "
            "Trainer(plugins=[mend_lightning.training.distributed.checkpoint_io.EditorCheckpointIO()]), or the command line."
        )
    saved = checkpoint.get("mend_lightning")
    if saved is None:
        raise StateDictError("This checkpoint was not written by MendModule: it has no 'mend_lightning' entry.")
    mine = editor.description()
    # Settings that came later have their defaults in an older checkpoint.
    defaults = editor.default_settings()
    saved = {"class": "MendEditor", **saved, "settings": {**defaults, **saved["settings"]}}
    mine["settings"] = {**defaults, **mine["settings"]}
    for name in ("class", "layers", "settings", "base_fingerprint"):
        pair = saved[name], mine[name]
        if not (same_base(*pair, "checkpoint") if name == "base_fingerprint" else pair[0] == pair[1]):
            raise BaseModelMismatchError(
                f"The checkpoint is of another editor or base model: its {name} is {saved[name]}, here it is "
                f"{mine[name]}. Use the config and base model it was trained with ({saved['base']})."
            )
    missing = [key for key in editor.state_dict() if f"editor.{key}" not in checkpoint["state_dict"]]
    if missing:
        raise StateDictError(f"The checkpoint lacks {len(missing)} entries of the editor, among them {missing[0]!r}.")
