"""The parser of a run's keys: that of `fit` and its like, and of what reads the same keys without running (`plan`)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from mend_lightning.cli.main import known_keys, with_near_editor, with_near_key


class RunParser(LightningArgumentParser):
    """Says which key was probably meant when one is unknown; `--config` takes files and names of shipped configs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_argument("-c", "--config", action="config", help="YAML file, or the name of a shipped config.")

    def error(self, message: str, *rest: Any) -> None:
        super().error(with_near_editor(with_near_key(message, known_keys(self))), *rest)
