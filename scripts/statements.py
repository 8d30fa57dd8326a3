"""Statements that are true or false, in several wordings, and edit records of them (FEVER's kind).

Two sources: world_facts, which is shipped, and a JSONL file in the format of Leap-of-Thought (`phrase`, `answer`).
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statement_tables import PHRASE, PLURAL_VERBS, PLURALS, SAME_VERBS, STATEMENTS, WORDINGS
from world_facts_tables import QUESTIONS

from mend_lightning.data.records import Record, read_records
from mend_lightning.errors import DataFileError, RecordError

SPLITS = ("train", "validation", "test")
LABELS = ("REFUTES", "SUPPORTS")
# Wordings of a statement that a model is trained on, the first among them; the others are kept to ask it at the end.
LEARNED = 5
SHARES = {"test": 0.25, "validation": 0.1}


@dataclass(frozen=True)
class Statement:
    """One statement.

    Attributes:
        subject: what it is about; relation: what kind of thing it says.
        wordings: ways to say it, the first of which is the statement itself.
        true: whether it holds.
        split: where the subject's statements belong in the editor's training.
    """

    subject: str
    relation: str
    wordings: tuple[str, ...]
    true: bool
    split: str

    @property
    def label(self) -> str:
        return LABELS[self.true]

    @property
    def learned(self) -> tuple[str, ...]:
        return self.wordings[:LEARNED]

    @property
    def unseen(self) -> tuple[str, ...]:
        return self.wordings[LEARNED:]

    def record(self) -> dict[str, Any]:
        """An edit record: the label is to be turned round."""
        return {
            "subject": self.subject,
            "relation": self.relation,
            "input": self.wordings[0],
            "prediction": self.label,
            "alternatives": [LABELS[not self.true]],
            "filtered_rephrases": list(self.learned[1:]),
            "output": [{"answer": self.label}],
        }


def world_statements(split: str) -> list[Statement]:
    """A true and a false statement of every fact of a split of world_facts.

    `capital_of` is left out: it says what `capital` says, of another subject.
    """
    statements = []
    for record in read_records(f"world_facts/{split}"):
        if record.relation in STATEMENTS:
            false = random.Random(record.prompt).choice(record.alternatives)
            statements += [_world_statement(record, said, said != false, split) for said in (record.answers[0], false)]
    return statements


def _world_statement(record: Record, said: str, true: bool, split: str) -> Statement:
    subject = subject_as_asked(record)
    wordings = [capital(text.format(s=subject, a=said)) for text in STATEMENTS[record.relation]]
    return Statement(record.subject, record.relation, shuffled(wordings), true, split)


def subject_as_asked(record: Record) -> str:
    """The subject as it stands within a question: some countries have an article there."""
    forms = (record.subject, f"the {record.subject}")
    texts = QUESTIONS[record.relation]
    return next(form for form in forms if record.prompt in [capital(text.format(form)) for text in texts])


def thought_statements(paths: Sequence[Path]) -> list[Statement]:
    """The statements of Leap-of-Thought files, each once; those that are called both true and false are left out.

    Raises:
        DataFileError: a file cannot be read.
        RecordError: a line is not an object with `phrase` (as "A wine is a drink.") and `answer` (0 or 1).
    """
    answers: dict[str, set[bool]] = defaultdict(set)
    for path in paths:
        for number, line in enumerate(_lines(path), start=1):
            phrase, true = _phrase(line, f"{path}, line {number}")
            answers[phrase].add(true)
    return [_thought_statement(phrase, *given) for phrase, given in answers.items() if len(given) == 1]


def _lines(path: Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"The statements file {path} cannot be read: {error}") from error


def _phrase(line: str, where: str) -> tuple[str, bool]:
    try:
        data = json.loads(line)
        phrase, true = data["phrase"], bool((0, 1).index(data["answer"]))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        expected = '{"phrase": "…", "answer": 0 or 1}'
        raise RecordError(f"{where}: expected {expected}, got {line[:80]!r} ({error}).") from error
    if re.fullmatch(PHRASE, phrase) is None:
        raise RecordError(f"{where}: {phrase!r} has no form known here; expected one like 'A wine is a drink.'")
    return phrase, true


def _thought_statement(phrase: str, true: bool) -> Statement:
    subject, verb, rest = re.fullmatch(PHRASE, phrase).group("s", "v", "o")
    parts = {
        "s": subject, "S": plural(subject), "v": verb, "V": PLURAL_VERBS[verb], "w": SAME_VERBS[verb], "o": rest.strip(),
    }  # fmt: skip
    original, *others = (capital(text.format(**parts)) for text in WORDINGS)
    return Statement(subject, verb, (original, *shuffled(others)), true, split_of(subject))


def plural(noun: str) -> str:
    """The plural of a noun.

    Example:
        >>> plural("cherry"), plural("finch"), plural("wine")
        ('cherries', 'finches', 'wines')
    """
    return next(re.sub(end, ends, noun) for end, ends in PLURALS if re.search(end, noun))


def split_of(subject: str) -> str:
    """Drawn by the subject alone, whatever else is in its file."""
    draw = random.Random(f"split {subject}").random()
    if draw < SHARES["test"]:
        return "test"
    return "validation" if draw < SHARES["test"] + SHARES["validation"] else "train"


def shuffled(wordings: list[str]) -> tuple[str, ...]:
    """Another order for every statement, so that no wording is missing in training altogether."""
    return tuple(random.Random(wordings[0]).sample(wordings, len(wordings)))


def capital(text: str) -> str:
    return text[0].upper() + text[1:]
