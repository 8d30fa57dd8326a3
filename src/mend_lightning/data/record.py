"""What every reader makes of a line: a fact, the ways to ask for it, and the questions it brings along."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question with its true answers, which a record brings along.

    Attributes:
        prompt: the question.
        answers: its true answers, never empty.
        kind: what the file calls it ("Reasoning", "neighborhood_prompts", …); "" where it has no name.
        hard: it is near the edited fact, so that an edit easily spills over to it.
    """

    prompt: str
    answers: tuple[str, ...]
    kind: str = ""
    hard: bool = False


@dataclass(frozen=True)
class Record:
    """One fact and the ways to ask for it.

    Attributes:
        prompt: the question as it stands in the file (`input`).
        answers: the true answers (`output`); may be empty where the file does not tell. Such a record is edited,
            and never asked as an unrelated fact.
        alternatives: what an edit may make the model say; each draw takes one of them.
        rephrases: other phrasings of the question (`filtered_rephrases`).
        prediction: what the base model said when the file was made; "" where the file does not tell.
        subject, relation: what the fact is about; "" where the file does not tell.
        line: line number in its file (of JSON lists and tables: the record's), from 1.
        locality: unrelated questions of its own, whose answers the edit must not change.
        portability: questions whose answers follow from the edited fact.
        kind: what the subject is ("country", "person", …); "" where the file does not tell.
        statements: texts that the answer completes ("The capital of France is"); empty where the file has none.
        keep: questions whose answers the edit must not touch, and which constrain it (`locality` only measures).
        text: the running text it was cut from, of generation data; rephrases are then the prompt with its beginning
            dropped, and as an unrelated fact it is this text.
    """

    prompt: str
    answers: tuple[str, ...]
    alternatives: tuple[str, ...]
    rephrases: tuple[str, ...]
    prediction: str = ""
    subject: str = ""
    relation: str = ""
    line: int = 0
    locality: tuple[Question, ...] = ()
    portability: tuple[Question, ...] = ()
    text: str = ""
    kind: str = ""
    statements: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    @property
    def can_be_asked(self) -> bool:
        """Whether it can serve as an unrelated fact: it has a true answer, or is a running text."""
        return bool(self.answers or self.text)
