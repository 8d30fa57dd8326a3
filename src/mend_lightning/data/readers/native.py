"""The format for files of one's own: explicit keys, all but two of them optional."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from mend_lightning.data.readers.fields import Format, flat_texts, optional_text, questions, require, text
from mend_lightning.data.record import Record
from mend_lightning.errors import RecordError

KEYS = (
    "prompt", "target", "targets", "rephrases", "answer", "answers", "locality", "portability", "prediction", "subject",
    "relation", "statements", "id", "kind", "keep",
)  # fmt: skip


ANSWER_KEYS = ("target", "targets", "answer", "answers")


def parse(data: Mapping[str, Any], where: str = "record", line: int = 0) -> Record:
    """`prompt`; `target` or `targets` (an edit takes one of them); and optionally `rephrases`, `answers` (or `answer`;
    the true ones), `locality` (`[{"prompt": …, "target": …, "hard": true}]`), `portability` (`[{"prompt": …,
    "target": …, "kind": …}]`), `prediction`, `subject`, `relation`, `kind` (of the subject), `statements`,
    `keep` (questions that constrain the edit). Lists of texts may be a single text."""
    _check_spelling(data, where)
    require(data, ("prompt", "target|targets"), where)
    prompt = text(data["prompt"], "prompt", where)
    if not prompt:
        raise RecordError(f"{where}: 'prompt' is empty.")
    return Record(
        prompt=prompt,
        answers=_either(data, "answers", "answer", where),
        alternatives=_either(data, "targets", "target", where),
        rephrases=flat_texts(data.get("rephrases"), "rephrases", where),
        prediction=optional_text(data, "prediction", where),
        subject=optional_text(data, "subject", where),
        relation=optional_text(data, "relation", where),
        line=line,
        locality=questions(data.get("locality"), "locality", where, ANSWER_KEYS),
        portability=questions(data.get("portability"), "portability", where, ANSWER_KEYS),
        kind=optional_text(data, "kind", where),
        keep=flat_texts(data.get("keep"), "keep", where),
        statements=flat_texts(data.get("statements"), "statements", where),
    )


def _either(data: Mapping[str, Any], several: str, one: str, where: str) -> tuple[str, ...]:
    return flat_texts([data.get(one), data.get(several)], several if several in data else one, where)


def _check_spelling(data: Mapping[str, Any], where: str) -> None:
    """An optional key with a letter wrong would be passed over in silence."""
    for name in data:
        near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.85)
        if name not in KEYS and near:
            raise RecordError(f"{where}: unknown key {name!r}. Did you mean {near[0]!r}? Keys: {', '.join(KEYS)}.")


FORMAT = Format(
    "native",
    "files of your own, JSONL, CSV, Parquet, …",
    "prompt, target or targets, rephrases, answers, locality, portability, subject, relation, kind, keep",
    lambda data: "prompt" in data and ("target" in data or "targets" in data),
    parse,
)
