"""What a checkpoint of somebody's training holds of an editor, as tensors and builtins."""

from __future__ import annotations

from typing import Any

from mend_lightning.editors.editor import Editor
from mend_lightning.training.checks import check_checkpoint


def editor_state(editor: Editor) -> dict[str, Any]:
    """The editor's tensors, copied to the CPU, and what it is."""
    tensors = {name: value.detach().cpu().clone() for name, value in editor.state_dict().items()}
    return {"tensors": tensors, "description": editor.description()}


def load_editor_state(editor: Editor, state: dict[str, Any]) -> None:
    """Loads what `editor_state` gave into an editor of the same class, layers and settings.

    Raises:
        BaseModelMismatchError: it has others.
        StateDictError: a tensor is missing.
    """
    # The base's weights have moved since, so that its fingerprint says nothing.
    about = {**state["description"], "base_fingerprint": editor.base_fingerprint}
    tensors = {f"editor.{name}": value for name, value in state["tensors"].items()}
    check_checkpoint({"mend_lightning": about, "state_dict": tensors}, editor)
    editor.load_state_dict(state["tensors"])
