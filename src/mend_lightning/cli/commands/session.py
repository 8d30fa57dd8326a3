"""`mend-lightning edit` as a conversation: edits and questions as they are typed, each answer beside the base's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.markup import escape
from torch import nn

from mend_lightning.cli.commands.output import print_check, shift_table
from mend_lightning.editors.editor import Editor
from mend_lightning.editors.making import editor_encoder, make_edit
from mend_lightning.edits.applying import without
from mend_lightning.edits.stack import EditStack, numbered
from mend_lightning.errors import ConfigError, MendError
from mend_lightning.evaluation.safety import check_edit
from mend_lightning.evaluation.shifts import answer_shifts
from mend_lightning.training.progress.console import console

PROMPT = "> "
ARROW = "=>"
HELP = """\
QUESTION => NEW ANSWER   makes an edit, on top of those before it
=> NEW ANSWER            the same for the question asked last
QUESTION                 asks the base and the edited model
:list                    the edits          :undo           takes the last one off
:off NAME, :on NAME      switches one       :check          is what there is safe to keep?
:save PATH               saves the enabled edits as one file
:quit, Ctrl-D            leaves; what is not saved then goes to a new file
:discard                 leaves without saving"""


def repl(
    editor: Editor,
    model: nn.Module,
    tokenizer: Any,
    out: Path,
    read: Callable[[str], str] = input,
    format: str | None = None,
) -> int:
    """Reads lines until the end of the input, Ctrl-C or `:quit`; afterwards the model is the base again.

    Args:
        editor: a trained editor, which makes the edits.
        model: the base model; tokenizer: its tokenizer.
        out: edits that are not saved at the end go to this file, or where it exists to one with a number.
        read: gives the next line for a prompt; raises EOFError at the end.
        format: how edits are made and questions asked; None: as the editor was trained.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: the editor changes no weight, or the model cannot be asked in that format.
        OutputPathError: what was not saved cannot be written.
    """
    if not editor.changes_weights:
        raise ConfigError(f"{type(editor).__name__} changes no weight, so its edits do not build on each other.")
    if sys.stdin.isatty() and find_spec("readline") is not None:
        # Arrow keys and history, where the system has them.
        import_module("readline")
    with EditStack(model) as stack:
        session = Session(editor, model, tokenizer, stack, format)
        _say(HELP, markup=False)
        try:
            _handle_lines(session, read)
        except (EOFError, KeyboardInterrupt):
            _say("")
        finally:
            # After an error too, of whatever kind: the edits took their time.
            session.leave(out)
    return 0


def _handle_lines(session: Session, read: Callable[[str], str]) -> None:
    while session.open:
        line = read(PROMPT).strip()
        try:
            session.handle_line(line)
        except MendError as error:
            _say(f"[red]{escape(str(error))}[/]")


class Session:
    """Edits on a model, and what was said about them."""

    def __init__(
        self, editor: Editor, model: nn.Module, tokenizer: Any, stack: EditStack, format: str | None = None
    ) -> None:
        self.editor, self.model, self.tokenizer, self.stack, self.format = editor, model, tokenizer, stack, format
        self.encoder = editor_encoder(editor, model, tokenizer, format=format)
        self.open, self.saved = True, True
        self._question = ""
        self._commands: dict[str, Callable[[str], None]] = {
            "list": self._list, "undo": self._undo, "on": self._on, "off": self._off, "check": self._check,
            "save": self._save, "help": lambda _: _say(HELP, markup=False), "quit": self._quit, "discard": self._discard,
        }  # fmt: skip

    def handle_line(self, line: str) -> None:
        """Does what one line says."""
        question, arrow, target = (part.strip() for part in line.partition(ARROW))
        if line.startswith(":"):
            self._command(line)
        elif arrow:
            self._edit(question or self._question, target)
        elif line:
            self._ask(line)

    def leave(self, out: Path) -> None:
        """Saves what is not saved, and says where."""
        if self.saved or not len(self.stack):
            return
        path = free_path(out)
        self._enabled_or_all().save(path)
        _say(f"Not saved until now: {_listed(self.stack)}. Saved to {escape(str(path))}.")

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        if name not in self._commands:
            raise ConfigError(f"There is no :{name}. Commands: {', '.join(f':{known}' for known in self._commands)}.")
        self._commands[name](argument.strip())

    def _ask(self, question: str, kind: str = "", targets: dict[str, str] | None = None) -> None:
        self._question = question
        like = targets[question] if targets else (self._last_target() or None)
        with without(self.stack) as edits:
            shifts = answer_shifts(self.model, self.encoder, [question], edits, [kind], like)
        if any(each.enabled for each in self.stack):
            console().print(shift_table(shifts, targets))
        else:
            _say(f"{escape(shifts[0].old)} (probability {shifts[0].p_old_before:.2f})")

    def _edit(self, question: str, target: str) -> None:
        if not question or not target:
            raise ConfigError("An edit needs a question and a new answer: QUESTION => NEW ANSWER.")
        edit = make_edit(self.editor, self.model, self.tokenizer, (question, target), format=self.format)
        name = self.stack.add(edit)
        self.saved = False
        _say(f"Edit {name}: probability of the new answer {edit.about['probability']:.2f}.")
        self._ask(question, "edited", {question: target})

    def _list(self, _: str) -> None:
        if not len(self.stack):
            _say("No edit yet.")
        for each in self.stack:
            facts = "; ".join(f"{prompt} {ARROW} {target}" for prompt, target in each.edit.facts)
            _say(f"{each.name}{'' if each.enabled else ' (off)'}: {escape(facts)}")

    def _undo(self, _: str) -> None:
        if not len(self.stack):
            raise ConfigError("There is no edit to undo.")
        name = self.stack.names[-1]
        self.stack.remove(name)
        self.saved = not len(self.stack)
        _say(f"{name} is undone.")

    def _on(self, name: str) -> None:
        self.stack.enable(name)
        self.saved = False

    def _off(self, name: str) -> None:
        self.stack.disable(name)
        self.saved = False

    def _check(self, _: str) -> None:
        edit = self._enabled()
        with without(self.stack):
            print_check(check_edit(self.model, self.encoder, edit))

    def _save(self, path: str) -> None:
        if not path:
            raise ConfigError("Give the path of a file: :save PATH.")
        # No shell has done it here.
        self._enabled().save(Path(path).expanduser())
        self.saved = True
        _say(f"Saved to {escape(path)}.")

    def _quit(self, _: str) -> None:
        self.open = False

    def _discard(self, _: str) -> None:
        self.open, self.saved = False, True

    def _enabled(self) -> Any:
        if not any(each.enabled for each in self.stack):
            raise ConfigError("There is no edit, or none is switched on.")
        return self.stack.combined()

    def _enabled_or_all(self) -> Any:
        """At the end nothing may be lost: edits that are all switched off are saved as well."""
        if not any(each.enabled for each in self.stack):
            self.stack.enable(*self.stack.names)
        return self.stack.combined()

    def _last_target(self) -> str:
        facts = [fact for each in self.stack for fact in each.edit.facts]
        return facts[-1][1] if facts else ""


def free_path(path: Path) -> Path:
    """The path, or with a number where there is a file already.

    Example:
        >>> free_path(Path("no such file.safetensors")).name
        'no such file.safetensors'
    """
    paths = (path.with_name(f"{stem}{path.suffix}") for stem in numbered(path.stem))
    return next(each for each in paths if not each.exists())


def _listed(stack: EditStack) -> str:
    return ", ".join(stack.names)


def _say(text: str, markup: bool = True) -> None:
    console().print(text, highlight=False, markup=markup)
