"""The editor that a run trains or measures: loaded from a folder, or built for the base's layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mend_lightning.editors.editor import Editor, EditorFactory
from mend_lightning.editors.saving import read_description
from mend_lightning.models.layers import layer_shape, select_layers


def new_editor(
    model: nn.Module, algorithm: EditorFactory, layers: Sequence[str] | None, last_blocks: int | None
) -> Editor:
    """An editor of the layers that are named, or of the paper's choice (see `select_layers`)."""
    chosen = select_layers(model, layers, last_blocks)
    return algorithm({name: layer_shape(layer) for name, layer in chosen.items()})


def saved_editor(model: nn.Module, folder: str | Path, algorithm: EditorFactory | None) -> Editor:
    """The editor in `folder`, in training mode, as a new one is: Lightning switches it off for evaluation, and never on.

    Args:
        model: the base model.
        folder: what `fit` or `save_pretrained` wrote.
        algorithm: makes an editor of the class that the folder must hold, which may be anybody's own; None: any of this
            package's.

    Raises:
        StateDictError: the folder holds no editor, a damaged one, or one of another class.
        BaseModelMismatchError: the editor was trained for another base.
    """
    editor = _class_made_by(algorithm, folder).from_pretrained(folder).train()
    editor.check_base(model)
    return editor


def _class_made_by(algorithm: EditorFactory | None, folder: str | Path) -> type[Editor]:
    if algorithm is None:
        return Editor
    layers = {name: tuple(shape) for name, shape in read_description(folder)["layers"]}
    with torch.device("meta"):
        return type(algorithm(layers))
