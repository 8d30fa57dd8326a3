"""Questions of general knowledge that an edit should leave alone; they travel with the package (CC0, see README.md)."""

from __future__ import annotations

import json
from importlib import resources
from typing import TypedDict


class NeutralQuestion(TypedDict):
    """A question, a usual right answer (for information: what counts is that the model's own stays), and its field."""

    question: str
    answer: str
    field: str


def neutral_records() -> list[NeutralQuestion]:
    """The whole set, with answers and fields."""
    text = resources.files("mend_lightning.evaluation.neutral").joinpath("questions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def neutral_questions() -> list[str]:
    """The questions alone.

    Example:
        >>> neutral_questions()[0]
        'What force keeps the planets in orbit around the Sun?'
    """
    return [record["question"] for record in neutral_records()]
