"""The parser of a run's keys: that of `fit` and its like, and of what reads the same keys without running (`plan`)."""

from __future__ import annotations

import difflib
import re
from typing import Any, Never

from lightning.pytorch.cli import LightningArgumentParser


class RunParser(LightningArgumentParser):
    """Says which key was probably meant when one is unknown; `--config` takes files and names of shipped configs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_argument("-c", "--config", action="config", help="YAML file, or the name of a shipped config.")

    def error(self, message: str, *rest: Any) -> Never:
        super().error(with_near_editor(with_near_key(message, known_keys(self))), *rest)


def known_keys(parser: Any) -> list[str]:
    """Every key a config of this parser may have, subcommands included."""
    keys: list[str] = []
    for action in parser._actions:
        choices = getattr(action, "_name_parser_map", None)
        if choices:
            for subparser in choices.values():
                keys += known_keys(subparser)
        elif action.dest:
            keys.append(action.dest)
    return sorted(set(keys))


def with_near_key(message: str, keys: list[str]) -> str:
    """Adds "Did you mean …?" to a parser's message about an unknown key.

    Example:
        >>> with_near_key('Key "model.rnk" is not expected', ["model.rank", "model.lr"])
        'Key "model.rnk" is not expected\\nDid you mean \\'model.rank\\'?'
    """
    if "Did you mean" in message:
        # The part of the config that the key is in has said it already.
        return message
    unknown = re.findall(r"""(?i:key|option|arguments?:?)\s+['"]?-{0,2}([\w.]+)['"]?""", message)
    parts = {part for key in keys for part in (key, key.rpartition(".")[2])}
    for name in unknown:
        near = difflib.get_close_matches(name, sorted(parts), n=1, cutoff=0.6)
        if name not in parts and near:
            full = next((key for key in keys if key == near[0] or key.endswith(f".{near[0]}")), near[0])
            return f"{message}\nDid you mean {full!r}?"
    return message


def with_near_editor(message: str) -> str:
    """Adds the editors' names to a parser's message about one that there is not.

    Example:
        >>> message = "Parser key \\"model.algorithm\\": Given value: {'class_path': 'MendEdtor'}"
        >>> with_near_editor(message).splitlines()[1][:25]
        "Did you mean 'MendEditor'"
    """
    from mend_lightning import editors

    if '"model.algorithm"' not in message:
        return message
    names = [name for name in editors.__all__ if name not in ("Editor", "EditorFactory")]
    for path in re.findall(r"'class_path': '([\w.]+)'", message):
        name = path.rpartition(".")[2]
        if name not in editors.__all__:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            return f"{message}\n{hint}The editors: {', '.join(names)}."
    return message
