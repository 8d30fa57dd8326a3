"""Edit files that a command is given, and the base model they were made for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mend_lightning.editors.editor import Editor
from mend_lightning.edits.edit import Edit
from mend_lightning.errors import BaseModelMismatchError, ConfigError, DataFileError, RecordError
from mend_lightning.models.architecture import Dtype
from mend_lightning.models.base import load_base
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.formats import in_format
from mend_lightning.models.inputs.prompts import PromptFormat
from mend_lightning.training.progress.console import quiet_where_nobody_watches


def read_edits(paths: Sequence[str | Path]) -> list[Edit]:
    """The edits in these files, in order.

    Raises:
        ConfigError: no file is named, or one twice.
        StateDictError: a file cannot be read.
    """
    if not paths:
        raise ConfigError("Name at least one edit file (mend-lightning edit writes them).")
    twice = [path for i, path in enumerate(paths) if Path(path).resolve() in {Path(p).resolve() for p in paths[:i]}]
    if twice:
        raise ConfigError(f"The edit file {twice[0]} is named twice; it would count twice.")
    return [Edit.load(path) for path in paths]


def load_base_of(
    edits: Sequence[Edit], base: str | None, dtype: Dtype, trust_remote_code: bool, dense: bool = False
) -> tuple[nn.Module, Any]:
    """The base model that the edits were made for, or `base`, with its tokenizer.

    Args: as in `load_base`; dense: not quantised, even if the edits were made so.

    Raises:
        ConfigError: no base is given, and the edits name none.
        BaseModelMismatchError: no base is given, and the edits name several.
        ModelLoadError: it cannot be loaded.
    """
    quiet_where_nobody_watches()
    if base:
        return load_base(base, dtype, trust_remote_code=trust_remote_code)
    names = list(dict.fromkeys(name for edit in edits if (name := edit.about.get("base"))))
    if not names:
        raise ConfigError("The edits do not say which base model they are for. Give --base (a model id or folder).")
    if len(names) > 1:
        raise BaseModelMismatchError(
            f"The edits were made for several base models: {', '.join(names)}. Give edits of one, or --base if these are "
            "names of the same model."
        )
    options: dict[str, Any] = next((found for edit in edits if (found := edit.about.get("base_options"))), {})
    options = {name: value for name, value in options.items() if not (dense and name == "quantize")}
    return load_base(names[0], dtype, trust_remote_code=trust_remote_code, **options)


def load_editor_and_base(
    folder: Path,
    base: str | None,
    dtype: Dtype,
    trust_remote_code: bool,
    confidence: float | None = None,
    inner_steps: int | None = None,
    wordings: int | None = None,
) -> tuple[Editor, nn.Module, Any]:
    """A saved editor, its base model (or `base`) on the device that computes, and the tokenizer.

    Raises:
        StateDictError: the folder holds no editor.
        ConfigError: the editor names no base, or has no confidence, inner steps or wordings that could be set.
        ModelLoadError: the base cannot be loaded.
    """
    editor = Editor.from_pretrained(folder)
    if not (base or editor.base_name):
        raise ConfigError(f"{folder} does not say which base model it is for. Give --base (a model id or folder).")
    if confidence is not None:
        editor.set_confidence(confidence)
    editor.set_steps(inner_steps, wordings)
    quiet_where_nobody_watches()
    # Another base is loaded as it asks to be; the editor's own as it was for training.
    options: dict[str, Any] = {} if base else editor.base_options
    model, tokenizer = load_base(base or editor.base_name, dtype, trust_remote_code=trust_remote_code, **options)
    return editor, model.to(computing_device()), tokenizer


def load_asked_base(
    edits: Sequence[Edit], base: str | None, dtype: Dtype, trust_remote_code: bool, format: str | None = None
) -> tuple[nn.Module, Encoder]:
    """The base model of edits (or `base`) on the device that computes, and an encoder with the edits' prompt format.

    Args: as in `load_base_of`; format: the name of one to ask in, in place of the one that the edits were made in.

    Raises:
        ConfigError: the edits were made with different prompt formats, or name no base; or the model cannot be asked so.
        BaseModelMismatchError: they name several bases.
        ModelLoadError: the base cannot be loaded.
    """
    made = [edit.about for edit in edits if edit.about.get("prompt_format")]
    # Of a format that is named, what the editors were trained with is the own one; another is made of it.
    formats = [about.get("own_format" if format else "prompt_format") or about["prompt_format"] for about in made]
    if any(each != formats[0] for each in formats):
        raise ConfigError(
            "The edits were made with different prompt formats, so no question can be put to all of them: "
            f"{'; '.join(map(str, formats))}. Apply edits of one format at a time, or say by --format how to ask."
        )
    model, tokenizer = load_base_of(edits, base, dtype, trust_remote_code)
    encoder = Encoder.for_model(model, tokenizer, PromptFormat(**formats[0]) if formats else PromptFormat())
    return model.to(computing_device()), in_format(encoder, format)


def computing_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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
