"""`zsre_mend_eval.json`: zsRE questions, each with a rephrase and a Natural Questions locality example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mend_lightning.data.readers.fields import Format, flat_texts, optional_text, require, text
from mend_lightning.data.record import Question, Record

REQUIRED_KEYS = ("src", "alt", "answers", "rephrase", "loc", "loc_ans")


def parse(data: Mapping[str, Any], where: str = "record", line: int = 0) -> Record:
    """`src`, `alt`, `answers`, `rephrase`, `loc`, `loc_ans`, and optionally `pred`, `subject`; `cond` is not read.

    The edit's target is `alt`, as in MEND and EasyEdit (which leave out records whose `alt` is empty, as happens here);
    ROME edits towards the true `answers[0]`. `loc` keeps its text, which begins with "nq question: " and ends without
    a question mark; ROME puts a "?" behind it, some of EasyEdit's scripts cut "nq question: " off.
    """
    require(data, REQUIRED_KEYS, where)
    locality = Question(text(data["loc"], "loc", where), flat_texts(data["loc_ans"], "loc_ans", where), "loc")
    return Record(
        prompt=text(data["src"], "src", where),
        answers=flat_texts(data["answers"], "answers", where),
        alternatives=flat_texts(data["alt"], "alt", where),
        rephrases=flat_texts(data["rephrase"], "rephrase", where),
        prediction=optional_text(data, "pred", where),
        subject=optional_text(data, "subject", where),
        line=line,
        locality=(locality,) if locality.prompt and locality.answers else (),
    )


FORMAT = Format(
    "zsre_mend_eval",
    "zsre_mend_eval.json of MEND and ROME, a JSON list",
    ", ".join(REQUIRED_KEYS),
    lambda data: {"src", "alt", "loc"} <= data.keys(),
    parse,
)
