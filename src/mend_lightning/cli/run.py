"""`fit`, `validate`, `test` and `predict`: LightningCLI with MendModule and EditDataModule."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mend_lightning import __version__
from mend_lightning.cli.config.files import DEFAULT_ROOT
from mend_lightning.errors import ConfigError
from mend_lightning.files import check_writable

# What --ckpt_path may say instead of a file.
CHECKPOINT_NAMES = ("last", "hpc")
BEST_UNKNOWN = (
    "--ckpt_path best: which checkpoint is the best is known to the process that trained alone. Its editor is in the run's "
    "folder: --model.editor RUN/editor. To resume training: --ckpt_path last, or a file."
)


def run_trainer(arguments: list[str], configs: Sequence[Path] = ()) -> Any:
    """Runs LightningCLI with MendModule and EditDataModule.

    Args:
        arguments: of the command line, its configs resolved (`resolved_configs`).
        configs: the files they come from: named at the head of what `--print_config` and `fit` write.
    """
    # Lightning is imported here: `mend-lightning --help` and the other commands need none of it.
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from mend_lightning.cli.run_parser import RunParser
    from mend_lightning.cli.trainer_settings import (
        default_loggers,
        note_sigterm_only,
        refusals_named,
        shows_progress,
        terminated_is_no_success,
        usable_strategy,
        with_checkpoint_io,
    )
    from mend_lightning.data.datamodule import EditDataModule
    from mend_lightning.training.distributed.checkpoint_file import check_checkpoint_path
    from mend_lightning.training.distributed.processes import end_with_first_process, lost_processes_named
    from mend_lightning.training.module import MendModule
    from mend_lightning.training.progress.progress_bar import EditProgressBar
    from mend_lightning.training.run_callbacks import CurvePlot, ResultsReport, SaveEditor, StartReport
    from mend_lightning.training.training_change import TrainingChange
    from mend_lightning.training.trunk_cache.trunk_report import TrunkReport

    class MendCLI(LightningCLI):
        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            header = [f"mend-lightning {__version__}", *(f"from {path}" for path in configs)]
            kwargs.setdefault("dump_header", header)
            return RunParser(**kwargs)

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            # Of the one that runs: a parser takes long to build, and the others' would not be asked.
            return {command: LightningCLI.subcommands()[command] for command in arguments[:1]}

        def instantiate_classes(self) -> None:
            with refusals_named():
                super().instantiate_classes()

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            trainer_config = self.config_init[self.subcommand]["trainer"]
            root = trainer_config.get("default_root_dir") or "."
            check_writable(root)
            if trainer_config.get("logger") in (None, True):
                kwargs["logger"] = default_loggers(root)
            strategy = kwargs["strategy"] = usable_strategy(trainer_config.get("strategy"))
            kwargs["plugins"] = with_checkpoint_io(trainer_config.get("plugins"), strategy)
            if shows_progress(trainer_config):
                # Behind StartReport, whose lines come before the bar; before the others, whose lines come after it.
                self.trainer_defaults["callbacks"].insert(1, EditProgressBar())
            trainer = super().instantiate_trainer(**kwargs)
            note_sigterm_only(trainer)
            for callback in trainer.checkpoint_callbacks:
                # One place for all runs in this folder, so that `--ckpt_path last` finds the last one.
                if isinstance(callback, ModelCheckpoint):
                    callback.dirpath = callback.dirpath or str(Path(root, "checkpoints"))
            return trainer

        def _parse_ckpt_path(self) -> None:
            # Lightning's reads hyperparameters from the checkpoint, of which ours have none, and fails in its own words.
            path = str(self.config[self.config.subcommand].get("ckpt_path") or "")
            if path == "best":
                raise ConfigError(BEST_UNKNOWN)
            if path and path not in CHECKPOINT_NAMES and "://" not in path:
                check_checkpoint_path(path)

        def before_test(self) -> None:
            # ResultsReport prints the table, with the protocol; Lightning's own would repeat the bare numbers.
            self.config_init["test"]["verbose"] = False

    _quiet()
    end_with_first_process()
    with lost_processes_named(), terminated_is_no_success():
        return MendCLI(
            MendModule,
            EditDataModule,
            args=arguments,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                # Edits need gradients in validation and test too.
                "inference_mode": False,
                "default_root_dir": DEFAULT_ROOT,
                # The last line of `fit` is the last one's.
                "callbacks": [
                    StartReport(),
                    TrunkReport(),
                    SaveEditor(),
                    CurvePlot(),
                    ResultsReport(),
                    TrainingChange(),
                ],
            },
        )


def _quiet() -> None:
    """Hides remarks of Lightning that do not apply here or that StartReport says better; warnings are shown."""
    for message in (
        ".*does not have many workers.*",  # collating takes milliseconds a batch
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*LightningCLI's args parameter is intended.*",  # this is the command line
        ".*in eval mode at the start of training.*",  # the base is frozen: that is the point
        ".*configure_optimizers` returned `None`.*",  # an editor that needs no training; SaveEditor says so
        ".*LeafSpec.*",  # Lightning calls what torch has deprecated
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Here, for report needs torch, and `--help` does not.
    from mend_lightning.training.progress.console import quiet_where_nobody_watches

    quiet_where_nobody_watches()
