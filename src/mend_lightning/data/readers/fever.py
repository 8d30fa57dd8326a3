"""Fact checking in De Cao's form of FEVER: is the claim supported or refuted?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mend_lightning.data.readers.fields import Format, optional_text, require, text, texts
from mend_lightning.data.readers.kilt import REQUIRED_KEYS, answers
from mend_lightning.data.record import Record
from mend_lightning.errors import RecordError

CLASSES = ("SUPPORTS", "REFUTES")


def parse(data: Mapping[str, Any], where: str = "record", line: int = 0) -> Record:
    """KILT's keys with the classes SUPPORTS and REFUTES; `prediction` is required, `logit` is not read.

    An edit's label is the base model's prediction, or with probability 1/2 its opposite, `alternatives[0]`: so does
    the original code (`data_classes/fever.py`, `collate_fn`). `TaskSampler` draws one of `Record.alternatives`, so
    these two are they. Unrelated claims have the true label (`output`), there as here.
    """
    require(data, (*REQUIRED_KEYS, "prediction"), where)
    prediction = _class(data["prediction"], "prediction", where)
    opposite = [_class(name, "alternatives", where) for name in texts(data["alternatives"], "alternatives", where)][:1]
    return Record(
        prompt=text(data["input"], "input", where),
        answers=tuple(_class(name, "output", where) for name in answers(data["output"], where)),
        # Without an opposite there is nothing to draw from: the record is left out, as in the original.
        alternatives=(prediction, *opposite) if opposite else (),
        rephrases=texts(data.get("filtered_rephrases", data.get("rephrases")), "filtered_rephrases", where),
        prediction=prediction,
        subject=optional_text(data, "subject", where),
        relation=optional_text(data, "relation", where),
        line=line,
    )


def _class(value: Any, key: str, where: str) -> str:
    if value not in CLASSES:
        raise RecordError(f"{where}: {key!r} must be {' or '.join(CLASSES)}, got {value!r}.")
    return value


FORMAT = Format(
    "fever",
    "De Cao's fact checking (FEVER), JSONL; the label is flipped with probability 1/2",
    "input, output, prediction, alternatives, filtered_rephrases",
    lambda data: "input" in data and data.get("prediction") in CLASSES,
    parse,
)
