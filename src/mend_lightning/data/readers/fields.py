"""Checked access to the keys of one record: errors name the place, the key and the value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mend_lightning.data.record import Question, Record
from mend_lightning.errors import RecordError


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        name: what `format` is set to.
        about: one line for lists of formats.
        keys: the keys a record has, for messages.
        matches: whether a record (a file's first) is of this format.
        parse: `(data, where, line) -> Record`; raises `RecordError`.
    """

    name: str
    about: str
    keys: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Mapping[str, Any], str, int], Record]


def require(data: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """Raises where a key is missing; "a|b" stands for either."""
    missing = [key.split("|")[0] for key in keys if not any(name in data for name in key.split("|"))]
    if missing:
        raise RecordError(f"{where}: missing key(s) {', '.join(missing)}. The record has: {', '.join(data)}.")


def text(value: Any, key: str, where: str) -> str:
    """A text without blanks around it."""
    if not isinstance(value, str):
        raise RecordError(f"{where}: {key!r} must be text, got {value!r}.")
    return value.strip()


def optional_text(data: Mapping[str, Any], key: str, where: str) -> str:
    """A text, or "" where the key is missing or null."""
    return text(data.get(key) or "", key, where)


def texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    """A list of texts; empty ones are passed over."""
    if not isinstance(value, list):
        raise RecordError(f"{where}: {key!r} must be a list of texts, got {value!r}.")
    return tuple(item for item in (text(item, key, where) for item in value) if item)


def flat_texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    """A text, a list of texts, or lists of lists, as one list without repetitions; null is empty.

    Example:
        >>> flat_texts([["Berlin", "DE-BE"], ["Berlin"]], "ground_truth", "line 1")
        ('Berlin', 'DE-BE')
    """
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple(dict.fromkeys(item for part in value for item in flat_texts(part, key, where)))
    item = text(value, key, where)
    return (item,) if item else ()


def questions(
    value: Any, key: str, where: str, answer_keys: Sequence[str], kind: str = "", hard: bool = False
) -> tuple[Question, ...]:
    """A list of objects with a prompt and answers; those without an answer are passed over.

    Args:
        value: `[{"prompt": …, <one of answer_keys>: text or (nested) list}]`, optionally with "kind" and "hard".
        kind, hard: of those that do not say.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        example = f'[{{"prompt": "…", "{answer_keys[0]}": "…"}}]'
        raise RecordError(f"{where}: {key!r} must be a list like {example}, got {value!r}.")
    found = []
    for item in value:
        require(item, ["prompt", "|".join(answer_keys)], f"{where}, in {key!r}")
        name = next(name for name in answer_keys if name in item)
        answers = flat_texts(item[name], f"{key}.{name}", where)
        prompts = flat_texts(item["prompt"], f"{key}.prompt", where)
        if prompts and answers:
            found.append(Question(prompts[0], answers, str(item.get("kind") or kind), bool(item.get("hard", hard))))
    return tuple(found)
