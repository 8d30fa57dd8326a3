"""Generation data: a prompt from a running text, and the tokens that the model shall continue it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mend_lightning.data.readers.fields import Format, flat_texts, optional_text, require
from mend_lightning.data.record import Record
from mend_lightning.errors import RecordError

REQUIRED_KEYS = ("prompt", "target", "paragraph")


def parse(data: Mapping[str, Any], where: str = "record", line: int = 0) -> Record:
    """`prompt`, `target`, `paragraph` (the whole text that the prompt begins), and optionally `rephrases`.

    `make-generation-data` writes this. Blanks are kept: a continuation that starts a new word starts with one.
    Without `rephrases` a rephrase is the prompt without up to the first half of it, drawn anew in every epoch (the
    original: `data_classes/wiki.py`). Unrelated inputs are other records' paragraphs.
    """
    require(data, REQUIRED_KEYS, where)
    for key in REQUIRED_KEYS:
        if not isinstance(data[key], str) or not data[key].strip():
            raise RecordError(f"{where}: {key!r} must be a text that is not empty, got {data[key]!r}.")
    return Record(
        prompt=data["prompt"],
        answers=(),
        alternatives=(data["target"],),
        rephrases=flat_texts(data.get("rephrases"), "rephrases", where),
        subject=optional_text(data, "subject", where),
        line=line,
        text=data["paragraph"],
    )


FORMAT = Format(
    "wikitext",
    "generation data, JSONL; `mend-lightning make-generation-data` makes it",
    ", ".join(REQUIRED_KEYS),
    lambda data: set(REQUIRED_KEYS) <= data.keys(),
    parse,
)
