"""The facts that `mend-lightning edit` is given, and the questions that `apply` is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mend_lightning.errors import ConfigError, DataFileError, RecordError


def given_facts(prompt: str | None, target: str | None, edits: Path | None) -> list[tuple[str, str]]:
    """(prompt, target) pairs: of the command line, or of a file.

    Raises:
        ConfigError: neither or both are given, or one of the texts is empty.
    """
    if edits is not None:
        if prompt is not None or target is not None:
            raise ConfigError("Give either --edits FILE, or --prompt and --target, not both.")
        return read_facts(edits)
    if prompt is None or target is None:
        raise ConfigError("An edit needs --prompt and --target (or --edits FILE with several of them).")
    for option, text in (("--prompt", prompt), ("--target", target)):
        if not text.strip():
            raise ConfigError(f"{option} is empty. An edit needs a question and a new answer.")
    return [(prompt, target)]


def read_facts(path: Path) -> list[tuple[str, str]]:
    """(prompt, target) pairs of a JSONL file.

    Raises:
        DataFileError: the file cannot be read.
        RecordError: a line is not an object with text under `prompt` and `target`, or there is no line.
    """
    facts = []
    for number, line in _lines(path, "edits"):
        try:
            data = json.loads(line)
            fact = data["prompt"], data["target"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RecordError(
                f'{path}, line {number}: expected {{"prompt": "…", "target": "…"}}, got {line[:80]!r} ({error}).'
            ) from error
        if not all(isinstance(text, str) and text.strip() for text in fact):
            raise RecordError(f"{path}, line {number}: prompt and target must be non-empty texts, got {fact!r}.")
        facts.append(fact)
    if not facts:
        raise RecordError(f'{path} holds no edit. Expected lines like {{"prompt": "…", "target": "…"}}.')
    return facts


def read_questions(path: Path) -> list[str]:
    """Questions of a file: a line each, as text or as a JSON object with the question under `prompt` (or `question`).

    Raises:
        DataFileError: the file cannot be read.
        RecordError: a line is an object without a question, or there is no line.
    """
    questions = [_question(line, f"{path}, line {number}") for number, line in _lines(path, "questions")]
    if not questions:
        raise RecordError(f'{path} holds no question. Expected one a line, as text or as {{"prompt": "…"}}.')
    return questions


def _question(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line.strip()
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"{where}: begins like a JSON object and is none ({error}): {line[:80]!r}.") from error
    question = data.get("prompt", data.get("question"))
    if not isinstance(question, str) or not question.strip():
        raise RecordError(f'{where}: expected text under "prompt" (or "question"), got {line[:80]!r}.')
    return question


def _lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank."""
    try:
        # Not splitlines: a JSON text may hold other separators of lines (U+2028, U+0085).
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"The {what} file {path} cannot be read: {error}") from error
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
