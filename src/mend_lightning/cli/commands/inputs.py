"""Edit files that a command is given, and the base model they were made for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mend_lightning.edits.edit import Edit
from mend_lightning.errors import BaseModelMismatchError, ConfigError
from mend_lightning.evaluation.report import quiet_where_nobody_watches
from mend_lightning.models.base import Dtype, load_base


def read_edits(paths: Sequence[str | Path]) -> list[Edit]:
    """The edits in these files, in order.

    Raises:
        ConfigError: no file is named, or one twice.
        StateDictError: a file cannot be read.
    """
    if not paths:
        raise ConfigError("Name at least one edit file (mend-lightning edit writes them).")
    twice = [path for i, path in enumerate(paths) if Path(path).resolve() in {Path(p).resolve() for p in paths[:i]}]
    if twice:
        raise ConfigError(f"The edit file {twice[0]} is named twice; it would count twice.")
    return [Edit.load(path) for path in paths]


def load_base_of(
    edits: Sequence[Edit], base: str | None, dtype: Dtype, trust_remote_code: bool, dense: bool = False
) -> tuple[nn.Module, Any]:
    """The base model that the edits were made for, or `base`, with its tokenizer.

    Args: as in `load_base`; dense: not quantised, even if the edits were made so.

    Raises:
        ConfigError: no base is given, and the edits name none.
        BaseModelMismatchError: no base is given, and the edits name several.
        ModelLoadError: it cannot be loaded.
    """
    quiet_where_nobody_watches()
    if base:
        return load_base(base, dtype, trust_remote_code=trust_remote_code)
    names = list(dict.fromkeys(edit.about.get("base") for edit in edits if edit.about.get("base")))
    if not names:
        raise ConfigError("The edits do not say which base model they are for. Give --base (a model id or folder).")
    if len(names) > 1:
        raise BaseModelMismatchError(
            f"The edits were made for several base models: {', '.join(names)}. Give edits of one, or --base if these are "
            "names of the same model."
        )
    options = next((edit.about["base_options"] for edit in edits if edit.about.get("base_options")), {})
    options = {name: value for name, value in options.items() if not (dense and name == "quantize")}
    return load_base(names[0], dtype, trust_remote_code=trust_remote_code, **options)
