"""What is asked, and what came out: questions before and after the edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mend_lightning.errors import EmptyEditError, InputTooLongError
from mend_lightning.evaluation.shifts import Shift, TokenShift

# What the page runs at once. A text of this length is some two thousand words; far longer ones run for minutes, or take all
# of the memory.
MAX_CHARACTERS, MAX_QUESTIONS = 10_000, 1_000


@dataclass(frozen=True)
class Comparison:
    """One question before and after the edits.

    Attributes:
        shift: the answers and their probabilities.
        wanted: the new answer that was asked for; "" where none was.
        answers: answer -> its tokens, of the answer before, the wanted one and the answer after, each once.
        first_tokens: the likeliest first tokens of the answer.
        on: how many edits were switched on.
    """

    shift: Shift
    wanted: str
    answers: dict[str, list[TokenShift]]
    first_tokens: list[TokenShift]
    on: int


@dataclass(frozen=True)
class Probe:
    """Several questions before and after the edits.

    Attributes:
        shifts: one a question.
        on: how many edits were switched on.
        revision: of the edits (`Session.revision`).
    """

    shifts: list[Shift]
    on: int
    revision: int


def questions_of(lines: Sequence[str]) -> list[str]:
    """Lines as questions: stripped, blank ones left out.

    Raises:
        EmptyEditError: nothing is left.
        InputTooLongError: there are too many, or one is too long.

    Example:
        >>> questions_of([" Where is Lyon? ", ""])
        ['Where is Lyon?']
    """
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise EmptyEditError("There is no question. Type one, or several with one a line.")
    if len(questions) > MAX_QUESTIONS:
        raise InputTooLongError(f"{len(questions):,} questions are too many at once. Ask at most {MAX_QUESTIONS:,}.")
    for question in questions:
        check_length(question, "A question")
    return questions


def check_length(text: str, name: str) -> None:
    """Raises InputTooLongError where `text`, which is called `name`, is too long to be run."""
    if len(text) > MAX_CHARACTERS:
        raise InputTooLongError(
            f"{name} has {len(text):,} characters, too many to run. Shorten it to {MAX_CHARACTERS:,}."
        )
