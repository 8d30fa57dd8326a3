"""Classes that configs of version 0.1 name by the module they were in, and where they are now.

A run writes the class paths of its settings into its config.yaml, and users write them by hand; both must still be read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

MOVED = {
    "mend_lightning.base.BaseModel": "mend_lightning.BaseModel",
    "mend_lightning.callback.MendCallback": "mend_lightning.MendCallback",
    "mend_lightning.data.module.EditData": "mend_lightning.EditData",
    "mend_lightning.data.module.EditDataModule": "mend_lightning.EditDataModule",
    "mend_lightning.module.MendModule": "mend_lightning.MendModule",
    "mend_lightning.parallel.checkpoint_io.EditorCheckpointIO": "mend_lightning.EditorCheckpointIO",
    "mend_lightning.parallel.strategy.ShardedBaseStrategy": "mend_lightning.ShardedBaseStrategy",
    "mend_lightning.parallel.strategy.ShardedStrategy": "mend_lightning.ShardedStrategy",
    "mend_lightning.progress.EditProgressBar": "mend_lightning.training.progress.progress_bar.EditProgressBar",
    "mend_lightning.run_callbacks.CurvePlot": "mend_lightning.training.run_callbacks.CurvePlot",
    "mend_lightning.run_callbacks.ResultsReport": "mend_lightning.training.run_callbacks.ResultsReport",
    "mend_lightning.run_callbacks.SaveEditor": "mend_lightning.training.run_callbacks.SaveEditor",
    "mend_lightning.run_callbacks.StartReport": "mend_lightning.training.run_callbacks.StartReport",
    "mend_lightning.trunk_in_training.TrunkReport": "mend_lightning.training.trunk_cache.trunk_report.TrunkReport",
}
_OLD_NAME = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, MOVED))})(?!\w)")


def with_current_names(value: Any) -> Any:
    """A value of a config, or an argument of the command line, with the names that the classes in it have now.

    Example:
        >>> with_current_names([{"class_path": "mend_lightning.parallel.strategy.ShardedStrategy"}, 2])
        [{'class_path': 'mend_lightning.ShardedStrategy'}, 2]
        >>> with_current_names("--trainer.callbacks+=mend_lightning.run_callbacks.SaveEditor")
        '--trainer.callbacks+=mend_lightning.training.run_callbacks.SaveEditor'
    """
    if isinstance(value, str):
        return _OLD_NAME.sub(lambda found: MOVED[found[0]], value)
    if isinstance(value, list):
        return [with_current_names(item) for item in value]
    if isinstance(value, dict):
        return {key: with_current_names(item) for key, item in value.items()}
    return value


def has_old_names(file: Path) -> bool:
    """Whether a config names a class by where it was in version 0.1."""
    return _OLD_NAME.search(file.read_text(encoding="utf-8")) is not None
