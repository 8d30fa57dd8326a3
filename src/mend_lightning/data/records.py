"""Reads edit records from JSONL in the KILT/zsRE style of De Cao et al. (EMNLP 2021)."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mend_lightning.errors import DataFileError, EmptyDatasetError, RecordError

logger = logging.getLogger(__name__)

# Files that travel with the package, by the name they can be asked for.
SHIPPED = "world_facts"
REQUIRED_KEYS = ("input", "alternatives", "output")


@dataclass(frozen=True)
class Record:
    """One fact and the ways to ask for it.

    Attributes:
        prompt: the question as it stands in the file (`input`).
        answers: the true answers (`output`).
        alternatives: what an edit may make the model say instead.
        rephrases: other phrasings of the question (`filtered_rephrases`).
        prediction: what the base model said when the file was made; "" where the file does not tell.
        subject, relation: what the fact is about; "" where the file does not tell.
        line: line number in its file, from 1.
    """

    prompt: str
    answers: tuple[str, ...]
    alternatives: tuple[str, ...]
    rephrases: tuple[str, ...]
    prediction: str = ""
    subject: str = ""
    relation: str = ""
    line: int = 0


def find_data_file(name: str | Path) -> Path:
    """The path of a data file: a path as it is, or a shipped one by name (`world_facts/test`).

    Raises:
        DataFileError: neither exists.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    folder = Path(str(resources.files("mend_lightning.data")))
    shipped = folder / f"{name}.jsonl"
    if shipped.is_file():
        return shipped
    names = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.glob("*/*.jsonl"))
    raise DataFileError(
        f"Data file {str(name)!r} does not exist (looked in {Path.cwd()}). Give the path of a JSONL file, or "
        f"one of the shipped sets: {', '.join(names)}."
    )


def read_records(name: str | Path) -> list[Record]:
    """Reads every usable record of a file.

    A record without alternatives or without rephrases cannot make an edit task and is left out, as in the
    original code; a warning counts them. Anything else that is wrong raises.

    Args:
        name: a path, or a shipped set such as `world_facts/train`.

    Raises:
        DataFileError: the file is missing or unreadable.
        RecordError: a line is not JSON, or a key is missing or of the wrong type.
        EmptyDatasetError: no record is left.

    Example:
        >>> read_records("world_facts/test")[0].prompt != ""
        True
    """
    path = find_data_file(name)
    kept, dropped = [], Counter()
    for record in _iterate(path):
        reason = _unusable(record)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(record)
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not kept:
        raise EmptyDatasetError(
            f"{path}: no usable record ({counts or 'the file is empty'}). A record needs at least one entry in "
            "'alternatives' and one in 'filtered_rephrases'."
        )
    if dropped:
        logger.warning("%s: left out %d of %d records: %s", path, sum(dropped.values()), len(kept) + sum(dropped.values()), counts)
    return kept


def _iterate(path: Path) -> Iterator[Record]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield parse_record(line, f"{path}, line {number}", number)
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"Data file {path} cannot be read as UTF-8 text: {error}") from error


def _unusable(record: Record) -> str:
    if not record.alternatives:
        return "without alternatives"
    return "" if record.rephrases else "without rephrases"


def parse_record(line: str, where: str = "record", number: int = 0) -> Record:
    """Parses one line.

    Args:
        line: a JSON object with `input`, `alternatives`, `filtered_rephrases` (or `rephrases`), `output`
            (`[{"answer": …}]`), and optionally `prediction`, `subject`, `relation`.
        where: how errors name the line.

    Example:
        >>> parse_record('{"input": "Q?", "alternatives": ["B"], "filtered_rephrases": [], '
        ...              '"output": [{"answer": "A"}]}').answers
        ('A',)
    """
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"{where}: not valid JSON ({error}). Expected one JSON object a line.") from error
    if not isinstance(data, dict):
        raise RecordError(f"{where}: expected a JSON object, got {type(data).__name__}.")
    missing = [key for key in REQUIRED_KEYS if key not in data]
    if "filtered_rephrases" not in data and "rephrases" not in data:
        missing.append("filtered_rephrases")
    if missing:
        raise RecordError(f"{where}: missing key(s) {', '.join(missing)}. The record has: {', '.join(data)}.")
    return Record(
        prompt=_text(data["input"], "input", where),
        answers=_answers(data["output"], where),
        alternatives=_texts(data["alternatives"], "alternatives", where),
        rephrases=_texts(data.get("filtered_rephrases", data.get("rephrases")), "filtered_rephrases", where),
        prediction=_text(data.get("prediction") or "", "prediction", where),
        subject=_text(data.get("subject") or "", "subject", where),
        relation=_text(data.get("relation") or "", "relation", where),
        line=number,
    )


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: {key!r} must be text, got {value!r}.")
    return value.strip()


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise RecordError(f"{where}: {key!r} must be a list of texts, got {value!r}.")
    return tuple(text for text in (_text(item, key, where) for item in value) if text)


def _answers(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RecordError(f"{where}: 'output' must be a list like [{{\"answer\": \"Paris\"}}], got {value!r}.")
    # KILT's outputs may hold provenance alone, without an answer.
    answers = _texts([item["answer"] for item in value if item.get("answer")], "output", where)
    if not answers:
        raise RecordError(f"{where}: 'output' holds no answer. Expected a list like [{{\"answer\": \"Paris\"}}].")
    return answers
