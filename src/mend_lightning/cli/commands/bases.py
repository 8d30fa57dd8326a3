"""The base model that a command needs: that of an editor, or that of edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mend_lightning.cli.commands.inputs import load_base_of
from mend_lightning.editors.editor import Editor
from mend_lightning.edits.edit import Edit
from mend_lightning.errors import ConfigError
from mend_lightning.evaluation.report import quiet_where_nobody_watches
from mend_lightning.models.base import Dtype, load_base
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.prompts import PromptFormat


def load_editor_and_base(
    folder: Path, base: str | None, dtype: Dtype, trust_remote_code: bool, confidence: float | None = None
) -> tuple[Editor, nn.Module, Any]:
    """A saved editor, its base model (or `base`) on the device that computes, and the tokenizer.

    Raises:
        StateDictError: the folder holds no editor.
        ConfigError: the editor names no base, or has no confidence that could be set.
        ModelLoadError: the base cannot be loaded.
    """
    editor = Editor.from_pretrained(folder)
    if not (base or editor.base_name):
        raise ConfigError(f"{folder} does not say which base model it is for. Give --base (a model id or folder).")
    if confidence is not None:
        editor.set_confidence(confidence)
    quiet_where_nobody_watches()
    # Another base is loaded as it asks to be; the editor's own as it was for training.
    options = {} if base else editor.base_options
    model, tokenizer = load_base(base or editor.base_name, dtype, trust_remote_code=trust_remote_code, **options)
    return editor, model.to(computing_device()), tokenizer


def load_asked_base(
    edits: Sequence[Edit], base: str | None, dtype: Dtype, trust_remote_code: bool
) -> tuple[nn.Module, Encoder]:
    """The base model of edits (or `base`) on the device that computes, and an encoder with the edits' prompt format.

    Raises:
        ConfigError: the edits were made with different prompt formats, or name no base.
        BaseModelMismatchError: they name several bases.
        ModelLoadError: the base cannot be loaded.
    """
    formats = [edit.about["prompt_format"] for edit in edits if edit.about.get("prompt_format")]
    if any(format != formats[0] for format in formats):
        raise ConfigError(
            "The edits were made with different prompt formats, so no question can be put to all of them: "
            f"{'; '.join(str(format) for format in formats)}. Apply edits of one format at a time."
        )
    model, tokenizer = load_base_of(edits, base, dtype, trust_remote_code)
    format = PromptFormat(**formats[0]) if formats else PromptFormat()
    return model.to(computing_device()), Encoder.for_model(model, tokenizer, format)


def computing_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
