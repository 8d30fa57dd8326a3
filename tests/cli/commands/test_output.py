"""Tables of answers: every column says what it holds."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mend_lightning.cli.commands.output import before_after_table, shift_table
from mend_lightning.evaluation.shifts import Shift

QUESTION = "In which country is the city of Lyon?"
SHIFT = Shift(QUESTION, "neighbour", "France", "Italy", 0.94, 0.004, 0.01, 0.87, 2.0)


def shown(table, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def cells(text: str) -> list[list[str]]:
    """The rows of a table, cell by cell, a row that takes several lines put together."""
    rows: list[list[str]] = []
    started = False
    for line in text.splitlines():
        if not line.startswith(("│", "┃")):
            started = False
            continue
        parts = [part.strip() for part in line.replace("┃", "│").split("│")[1:-1]]
        rows = (
            [*rows[:-1], [" ".join(filter(None, pair)) for pair in zip(rows[-1], parts)]] if started else [*rows, parts]
        )
        started = True
    return rows


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("targets, said", [({QUESTION: "Italy"}, "changed"), (None, "changed")])
def test_shifts(targets, said, width):
    text = shown(shift_table([SHIFT], targets), width)
    assert cells(text) == [
        ["", "question", "old answer", "new answer", ""],
        ["near neighbour", QUESTION, "France 0.94→0.00", "Italy 0.01→0.87", said],
    ]
    assert "Below an answer: its probability, base→edited model." in text


def test_answers_without_probabilities():
    table = before_after_table([("edited", QUESTION)], ["France"], ["Italy"], {QUESTION: "Italy"})
    assert cells(shown(table, 100)) == [
        ["", "question", "old answer", "new answer", ""],
        ["edited", QUESTION, "France", "Italy", "changed as asked"],
    ]
