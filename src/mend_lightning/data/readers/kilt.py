"""Question answering in the KILT/zsRE style of De Cao et al. (EMNLP 2021), one JSON object a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mend_lightning.data.readers.fields import Format, flat_texts, optional_text, require, text, texts
from mend_lightning.data.record import Record
from mend_lightning.errors import RecordError

REQUIRED_KEYS = ("input", "alternatives", "output", "filtered_rephrases|rephrases")


def parse(data: Mapping[str, Any], where: str = "record", line: int = 0) -> Record:
    """`input`, `alternatives`, `filtered_rephrases` (or `rephrases`), `output` (`[{"answer": …}]`), and optionally
    `prediction`, `subject`, `relation`, `kind` (of the subject), `statements` (texts that an answer
    completes) and `keep` (questions that constrain the edit)."""
    require(data, REQUIRED_KEYS, where)
    prompt = text(data["input"], "input", where)
    rephrases = texts(data.get("filtered_rephrases", data.get("rephrases")), "filtered_rephrases", where)
    return Record(
        prompt=prompt,
        answers=answers(data["output"], where),
        alternatives=texts(data["alternatives"], "alternatives", where),
        # The question itself is among the published rephrases here and there; the original drops it, too (zsre.py).
        rephrases=tuple(rephrase for rephrase in rephrases if rephrase != prompt),
        prediction=optional_text(data, "prediction", where),
        subject=optional_text(data, "subject", where),
        relation=optional_text(data, "relation", where),
        line=line,
        kind=optional_text(data, "kind", where),
        statements=texts(data.get("statements") or [], "statements", where),
        keep=flat_texts(data.get("keep"), "keep", where),
    )


def answers(value: Any, where: str) -> tuple[str, ...]:
    """The answers of KILT's `output`."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RecordError(f'{where}: \'output\' must be a list like [{{"answer": "Paris"}}], got {value!r}.')
    # KILT's outputs may hold provenance alone, without an answer.
    found = texts([item["answer"] for item in value if item.get("answer")], "output", where)
    if not found:
        raise RecordError(f'{where}: \'output\' holds no answer. Expected a list like [{{"answer": "Paris"}}].')
    return found


FORMAT = Format(
    "kilt",
    "De Cao's question answering (zsRE), JSONL",
    "input, output, alternatives, filtered_rephrases",
    lambda data: "input" in data and "output" in data,
    parse,
)
