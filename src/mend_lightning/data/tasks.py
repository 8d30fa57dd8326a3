"""From records to edit tasks: which alternative, which rephrases, which unrelated facts."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mend_lightning.data.records import Record
from mend_lightning.errors import ConfigError


@dataclass(frozen=True)
class EditTask:
    """One edit as text.

    Attributes:
        prompt: the edited question x_e.
        target: what the edited model shall answer, y_e = y_in.
        rephrases: other phrasings x_in.
        locality: unrelated facts x_out as (question, true answer); hard ones (the edit's relation,
            another subject) first.
        hard: how many of them are hard.
        answers: the true answers of the edited question.
        subject, relation: of the edited fact.
    """

    prompt: str
    target: str
    rephrases: tuple[str, ...]
    locality: tuple[tuple[str, str], ...]
    hard: int = 0
    answers: tuple[str, ...] = ()
    subject: str = ""
    relation: str = ""


class TaskSampler:
    """Draws edit tasks from records; the same (seed, epoch, index) always gives the same task.

    Args:
        records: what to draw edits and unrelated facts from.
        rephrases: rephrases a task (drawn without repetition while there are enough).
        locality: unrelated facts a task.
        hard_locality: how many of those have the edit's relation and another subject; where the records
            name no relation, they are drawn like the others.
        seed: of every draw.

    Example:
        >>> from mend_lightning.data.records import Record
        >>> records = [Record(f"Capital of {c}?", (c,), ("X",), ("…",), "", c, "capital") for c in "ABC"]
        >>> task = TaskSampler(records, locality=2, hard_locality=1).task(epoch=0, index=0)
        >>> task.target, len(task.locality), task.hard
        ('X', 2, 1)
    """

    def __init__(
        self, records: Sequence[Record], rephrases: int = 1, locality: int = 1, hard_locality: int = 0, seed: int = 0
    ) -> None:
        if locality and all(_same_fact(record, records[0]) for record in records):
            raise ConfigError("Locality examples need facts about at least two subjects; the records hold one.")
        self.records = list(records)
        self.rephrases, self.locality, self.hard_locality, self.seed = rephrases, locality, hard_locality, seed
        self._by_relation: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            self._by_relation[record.relation].append(record)

    def __len__(self) -> int:
        return len(self.records)

    def task(self, epoch: int, index: int) -> EditTask:
        """The task made of record `index` in `epoch`."""
        record = self.records[index]
        # A generator of its own for every task: no order of calls, and no number of workers, matters.
        draw = random.Random(f"{self.seed}/{epoch}/{index}")
        target = draw.choice(record.alternatives)
        rephrases = _draw(draw, record.rephrases, self.rephrases)
        hard = self._unrelated(draw, record, self.hard_locality, self._by_relation[record.relation] if record.relation else [])
        easy = self._unrelated(draw, record, self.locality - len(hard), self.records, taken=hard)
        locality = tuple((_phrasing(draw, other), other.answers[0]) for other in hard + easy)
        return EditTask(
            record.prompt, target, rephrases, locality, len(hard), record.answers, record.subject, record.relation
        )

    def _unrelated(
        self, draw: random.Random, record: Record, count: int, pool: Sequence[Record], taken: Sequence[Record] = ()
    ) -> list[Record]:
        """Up to `count` records of the pool about another subject, none twice."""
        found: list[Record] = []

        def consider(other: Record) -> None:
            if len(found) < count and not _same_fact(other, record) and other not in found and other not in taken:
                found.append(other)

        for _ in range(20 * count if pool else 0):
            consider(draw.choice(pool))
        if len(found) < count:
            # A pool with few others: luck did not find them all.
            for other in draw.sample(pool, len(pool)):
                consider(other)
        return found


def _same_fact(a: Record, b: Record) -> bool:
    return a.prompt == b.prompt or (bool(a.subject) and a.subject == b.subject)


def _phrasing(draw: random.Random, record: Record) -> str:
    return draw.choice((record.prompt, *record.rephrases))


def _draw(draw: random.Random, items: Sequence[str], count: int) -> tuple[str, ...]:
    chosen = draw.sample(items, min(count, len(items)))
    # Every task has equally many rows, so a short list is gone through again.
    return tuple(chosen[i % len(chosen)] for i in range(count))
