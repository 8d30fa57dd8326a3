"""What the page does, without the page: one model, its edits, and what they change."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from torch import nn

from mend_lightning.editors.editor import Editor
from mend_lightning.editors.making import make_edit, ready
from mend_lightning.edits.applying import without
from mend_lightning.edits.stack import EditStack
from mend_lightning.edits.stack_state import StackedEdit
from mend_lightning.errors import ConfigError, EmptyEditError, StoppedError
from mend_lightning.evaluation.shifts import answer_shifts, next_token_shifts, token_shifts
from mend_lightning.ui.captured_warnings import captured_warnings
from mend_lightning.ui.comparison import Comparison, Probe, check_length, questions_of

# Likeliest first tokens of the base's answer and of the edited model's, each.
TOP = 4
# Questions in one pass: small enough for a laptop's memory and for a progress bar that moves.
BATCH = 16


class Session:
    """A base model with an editor and a stack of edits, for one person who tries things.

    Every method that runs the model waits for its turn: threads (browser tabs) share the model, its edits and their
    switches. "Before" is the base without any edit, "after" the model with those that are switched on. An edit is made on
    the base, so that each stands alone and its file needs no other.

    Args:
        model: the base model, in eval mode.
        tokenizer: its tokenizer.
        editor: a trained editor of the model.
        format: how edits are made and questions asked, by name (docs/data.md); None: as the editor was trained.

    Attributes:
        entries: the edits with their switches, oldest first.
        revision: a number that grows whenever they change.
        folder: holds what is downloaded, until the session is closed.
        uploads: a folder in it, for files of edits that are to be added; it may not be there yet.

    Raises:
        BaseModelMismatchError: the editor is for another base.
        ConfigError: its edits change no weight, or the model cannot be asked in that format.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, editor: Editor, format: str | None = None) -> None:
        if not editor.changes_weights:
            raise ConfigError(
                f"{type(editor).__name__} changes no weight: there is no edit to switch or to download. Take another editor; "
                "`mend-lightning edit` shows what this one does."
            )
        self.model, self.tokenizer, self.editor, self.format = model, tokenizer, editor, format
        with ready(editor, model, tokenizer, format) as encoder:
            self.encoder = encoder
        self.edits = EditStack(model)
        self.revision = 0
        # What readers see, who do not wait: while the base is asked, the stack itself has all edits off.
        self.entries: tuple[StackedEdit, ...] = tuple(self.edits)
        self._lock = threading.RLock()
        self._stopped = False
        self.folder = tempfile.TemporaryDirectory(prefix="mend-lightning-ui-")
        self.uploads = Path(self.folder.name, "uploads")
        self._last: tuple[tuple[int, str, str], Comparison] | None = None

    def edit(self, question: str, answer: str) -> tuple[str, list[str]]:
        """Makes an edit and switches it on.

        Returns:
            Its name, and what to look at before it is kept (low confidence, an edit of the same question).

        Raises:
            EmptyEditError: question or answer is empty.
            InputTooLongError: question or answer is too long.
        """
        question, answer = question.strip(), answer.strip()
        for text, name in ((question, "question"), (answer, "new answer")):
            if not text:
                raise EmptyEditError(f"The {name} is empty. An edit needs a question and the answer it shall have.")
            check_length(text, f"The {name}")
        with self._lock, captured_warnings() as messages:
            with without(self.edits):
                edit = make_edit(self.editor, self.model, self.tokenizer, [(question, answer)], format=self.format)
            name = self.edits.add(edit)
            self._changed()
        return name, messages

    def add(self, path: str | Path) -> tuple[str, list[str]]:
        """Puts a saved edit on the model; returns as `edit` does."""
        with self._lock, captured_warnings() as messages:
            name = self.edits.add(path)
            self._changed()
        return name, messages

    def forget_upload(self, path: str | Path) -> None:
        """Deletes an uploaded file, of which the edit has been read; no other file."""
        path = Path(path).resolve()
        if path.is_relative_to(self.uploads.resolve()):
            path.unlink(missing_ok=True)

    def remove(self, name: str) -> list[str]:
        """Takes an edit off the model; returns what to look at now."""
        with self._lock, captured_warnings() as messages:
            self.edits.remove(name)
            self._changed()
        return messages

    def set_enabled(self, name: str, enabled: bool) -> None:
        """Switches an edit on or off."""
        with self._lock:
            if self.edits[name].enabled != enabled:
                (self.edits.enable if enabled else self.edits.disable)(name)
                self._changed()

    def save(self, name: str) -> Path:
        """Writes an edit to a file that lives as long as the session; returns its path."""
        # By its hash: a name may hold what a file's may not, and be longer. The browser is told the name itself.
        mark = sha256(name.encode()).hexdigest()[:16]
        return self.edits[name].edit.save(Path(self.folder.name, f"{mark}.safetensors"))

    def compare(self, question: str, wanted: str = "") -> Comparison:
        """One question before and after, down to the tokens.

        Args:
            question: without the prompt format's text around it.
            wanted: an answer to look at beside those that the model gives.

        Raises:
            EmptyEditError: there is no question.
            InputTooLongError: the question or the wanted answer is too long.
            TokenizerError: a classifier has no class of the wanted name.
        """
        question, wanted = questions_of([question])[0], wanted.strip()
        if wanted:
            check_length(wanted, "The new answer")
            self.encoder.pair(question, wanted)
        with self._lock:
            key = (self.revision, question, wanted)
            if self._last is None or self._last[0] != key:
                self._last = key, self._compared(question, wanted)
            return self._last[1]

    def probe(self, questions: Sequence[str], progress: Callable[[int, int], Any] | None = None) -> Probe:
        """Every question before and after, in their order.

        Args:
            questions: without the prompt format's text around them; blank ones are left out.
            progress: called with how many are done, and how many there are.

        Raises:
            EmptyEditError: there is no question.
            InputTooLongError: there are too many questions, or one is too long.
            StoppedError: the session was stopped meanwhile.
        """
        questions, shifts = questions_of(questions), []
        with self._lock, without(self.edits) as edits:
            about = len(self._on()), self.revision
            for start in range(0, len(questions), BATCH):
                if self._stopped:
                    raise StoppedError("The page was closed before all questions were asked.")
                shifts += answer_shifts(self.model, self.encoder, questions[start : start + BATCH], edits)
                if progress is not None:
                    progress(len(shifts), len(questions))
        return Probe(shifts, *about)

    def moved(self, questions: Sequence[str], progress: Callable[[int, int], Any] | None = None) -> Probe:
        """As `probe`, those that moved farthest first; without the questions that the edits are about."""
        with self._lock:
            edited = {prompt for entry in self._on() for prompt, _ in entry.edit.facts}
            others = [question for question in dict.fromkeys(questions) if question.strip() not in edited]
            probe = self.probe(others, progress)
        return replace(probe, shifts=sorted(probe.shifts, key=lambda shift: (shift.changed, shift.size), reverse=True))

    def stop(self) -> None:
        """Has a probe that is under way end soon, so that `close` need not wait for all of it."""
        self._stopped = True

    def close(self) -> None:
        """Takes every edit off the model, which is the base again, and deletes the session's files."""
        self.stop()
        with self._lock:
            self.edits.clear()
            self._changed()
            self.folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _compared(self, question: str, wanted: str) -> Comparison:
        with without(self.edits) as edits:
            (shift,) = answer_shifts(self.model, self.encoder, [question], edits, like=wanted or None)
            texts = dict.fromkeys(text for text in (shift.old, wanted, shift.new) if text)
            answers = {text: token_shifts(self.model, self.encoder, question, text, edits) for text in texts}
            first_tokens = next_token_shifts(self.model, self.encoder, question, edits, TOP)
        return Comparison(shift, wanted, answers, first_tokens, len(self._on()))

    def _changed(self) -> None:
        self.entries = tuple(self.edits)
        self.revision += 1

    def _on(self) -> list[StackedEdit]:
        return [entry for entry in self.entries if entry.enabled]
