"""Questions with their true answers alone (Natural Questions): locality examples, not edits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mend_lightning.data.readers import kilt
from mend_lightning.data.readers.fields import Format, flat_texts, require, text
from mend_lightning.data.record import Record
from mend_lightning.errors import RecordError


def parse(data: Mapping[str, Any], where: str = "record", line: int = 0) -> Record:
    """`question` (or `prompt`) with `answer` (or `answers`; text or list), or KILT's `input` and `output`."""
    if "input" in data:
        require(data, ("input", "output"), where)
        prompt, answers = text(data["input"], "input", where), kilt.answers(data["output"], where)
    else:
        require(data, ("question|prompt", "answer|answers"), where)
        key = "question" if "question" in data else "prompt"
        prompt = text(data[key], key, where)
        answers = flat_texts(data.get("answer", data.get("answers")), "answer", where)
    if not answers:
        raise RecordError(f"{where}: 'answer' holds no text.")
    return Record(prompt=prompt, answers=answers, alternatives=(), rephrases=(), line=line)


def _matches(data: Mapping[str, Any]) -> bool:
    edits = {"alternatives", "filtered_rephrases", "rephrases", "target", "targets", "target_new"}
    if "question" in data:
        return True
    asks = {"input", "output"} <= data.keys() or ("prompt" in data and bool({"answer", "answers"} & data.keys()))
    return asks and not edits & data.keys()


FORMAT = Format("nq", "questions and true answers for locality_data, JSONL", "question, answer", _matches, parse)
