"""Settings of the command line's Trainer: what they stand for, and in a line why some cannot be."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mend_lightning.errors import ConfigError, MendError
from mend_lightning.training.distributed.checkpoint_io import EditorCheckpointIO

USABLE = ("auto", "ddp", "fsdp", "fsdp2")


def usable_strategy(given: Any) -> Any:
    """The strategy that is meant; one that is no name is itself.

    Raises:
        ConfigError: it is a name, of none that an editor can be trained with.

    Example:
        >>> usable_strategy("ddp"), usable_strategy("fsdp")
        ('ddp', 'fsdp1')
        >>> usable_strategy("ddpp")
        Traceback (most recent call last):
        ...
        mend_lightning.errors.ConfigError: There is no strategy 'ddpp'. Did you mean 'ddp'? Usable: auto, ddp, fsdp, fsdp2.
    """
    if not isinstance(given, str):
        return given
    usable, name = f"Usable: {', '.join(USABLE)}.", given.lower()
    if name.startswith("deepspeed"):
        raise ConfigError(
            f"Strategy {given!r} cannot shard this model: the base is loaded and sharded by MendModule, not by DeepSpeed. "
            f"{usable}"
        )
    if "spawn" in name:
        raise ConfigError(
            f"Strategy {given!r} copies a run that is set up already into new processes, which a command line's cannot be. "
            f"Use {name.replace('_spawn', '')!r}, where each process sets up its own."
        )
    if name not in {"auto", *StrategyRegistry.available_strategies()}:
        near = difflib.get_close_matches(name, USABLE, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"There is no strategy {given!r}. {hint}{usable}")
    # Lightning's own "fsdp" would gather the frozen base for every checkpoint, and shard the editor's float32 with it.
    return "fsdp1" if name == "fsdp" else given


def default_loggers(root: str) -> list[Any]:
    """CSV always (curves.png is drawn from it), TensorBoard if it is installed."""
    loggers: list[Any] = [CSVLogger(root, name="logs")]
    if find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(root, name="tensorboard"))
    return loggers


def shows_progress(settings: Mapping[str, Any]) -> bool:
    """Whether the Trainer of these settings wants our progress bar: it is not switched off, and they bring none.

    Example:
        >>> from lightning.pytorch.callbacks import RichProgressBar
        >>> shows_progress({}), shows_progress({"callbacks": [RichProgressBar()]})
        (True, False)
    """
    if settings.get("enable_progress_bar") is False or settings.get("barebones"):
        return False
    given = settings.get("callbacks") or []
    given = given if isinstance(given, (list, tuple)) else [given]
    return not any(isinstance(callback, ProgressBar) for callback in given)


def with_checkpoint_io(plugins: Any, strategy: Any) -> list[Any]:
    """The Trainer's plugins as a list, with EditorCheckpointIO unless a plugin or the strategy brings a CheckpointIO."""
    given = [] if plugins is None else list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
    if (
        any(isinstance(plugin, CheckpointIO) for plugin in given)
        or getattr(strategy, "_checkpoint_io", None) is not None
    ):
        return given
    return [*given, EditorCheckpointIO()]


@contextmanager
def refusals_named() -> Iterator[None]:
    """Turns what Lightning and jsonargparse raise while they make a Trainer of its settings into a ConfigError.

    Example:
        >>> with refusals_named():
        ...     raise ValueError("Does not validate\\nErrors:\\n  - Expected a <class 'str'>\\n  - size=2: no.\\nGiven …")
        Traceback (most recent call last):
        ...
        mend_lightning.errors.ConfigError: The run cannot be set up: size=2: no.
    """
    try:
        yield
    except MendError:
        raise
    except (ValueError, MisconfigurationException) as error:
        raise ConfigError(f"The run cannot be set up: {_said(str(error))}") from error


def note_sigterm_only(trainer: Trainer) -> None:
    """Has SIGTERM noted and passed on to the processes that this one started; the run ends after the step it is in.

    Lightning's own handler (2.6) also sends a tensor to all processes, from whatever place the signal found it at: where
    another one was waiting in some other collective, both waited for ever.
    """
    connector: Any = trainer._signal_connector

    def note(signum: int, frame: Any) -> None:
        launcher = trainer.strategy.launcher
        if not connector.received_sigterm and launcher is not None:
            launcher.kill(signum)
        connector.received_sigterm = True

    connector._sigterm_notifier_fn = note


@contextmanager
def terminated_is_no_success() -> Iterator[None]:
    """Ends with 143 (128 + SIGTERM) where a signal ended the run: Lightning's SystemExit would say that all went well.

    What started it (`fit && test`, an agent of torchrun, a scheduler) would take the run for finished.
    """
    try:
        yield
    except SIGTERMException as end:
        raise SystemExit(128 + signal.SIGTERM) from end


def _said(text: str) -> str:
    """The error of a class's own constructor, which jsonargparse lists among those of the other types a setting may have."""
    own = [line.strip()[2:] for line in text.splitlines() if line.startswith("  - ") and "Expected a" not in line]
    return " ".join(own) or text
