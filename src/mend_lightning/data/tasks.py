"""From records to edit tasks: which alternative, which rephrases, which unrelated facts."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from mend_lightning.data.neighbors import Names, find_subject, joined_names, listed_names, names_of, neighbors
from mend_lightning.data.record import Question, Record
from mend_lightning.data.running_text import as_question, drop_prefix
from mend_lightning.errors import ConfigError


@dataclass(frozen=True)
class EditTask:
    """One edit as text.

    Attributes:
        prompt: the edited question x_e.
        target: what the edited model shall answer, y_e = y_in.
        rephrases: other phrasings x_in.
        locality: unrelated facts x_out as (question, true answer); hard ones (the record's own that are near the
            edited fact, or facts of its relation and another subject) first.
        hard: how many of them are hard.
        answers: the true answers of the edited question.
        subject, relation: of the edited fact.
        prediction: what the base model said when the file was made; "" where it does not tell.
        portability: questions whose answers follow from the edit.
        format: the format that the question is asked in (`Encoder.asking`); "" is the data's own.
        rephrase_formats, locality_formats: likewise of each rephrase and each unrelated fact; empty: all in the data's own.
        keep: questions that constrain the edit: the record's own, then neighbors (`data.neighbors`).
    """

    prompt: str
    target: str
    rephrases: tuple[str, ...]
    locality: tuple[tuple[str, str], ...]
    hard: int = 0
    answers: tuple[str, ...] = ()
    subject: str = ""
    relation: str = ""
    prediction: str = ""
    portability: tuple[Question, ...] = ()
    format: str = ""
    rephrase_formats: tuple[str, ...] = ()
    locality_formats: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()


class Formats(Protocol):
    """Says in which format each row of a task is asked (`FormatDraw`)."""

    def drawn(
        self, task: EditTask, others: Sequence[Sequence[str]], draw: random.Random, statements: Sequence[str] = ()
    ) -> EditTask: ...


class TaskSampler:
    """Draws edit tasks from records; the same (seed, epoch, index) always gives the same task.

    A record's own locality examples are taken first (a draw of them where they are more than asked for), then
    others' facts.

    Args:
        records: what to draw edits and unrelated facts from.
        rephrases: rephrases a task (drawn without repetition while there are enough; of generation data: the prompt
            with its beginning dropped; of a record without any: its question).
        locality: unrelated facts a task.
        hard_locality: how many of those have the edit's relation and another subject; where the records
            name no relation, they are drawn like the others.
        seed: of every draw.
        unrelated: facts to draw the unrelated ones from instead of the records; hard ones are of the records still.
        formats: draws the format of every row; None: all are asked in the data's own.
        contrasts: neighbors of each edited question that constrain its edit; none is about a subject of its unrelated facts.
        names: kind -> names that neighbors are made with; None: the records' subjects and the shipped list.

    Example:
        >>> records = [Record(f"Capital of {c}?", (c,), ("X",), ("…",), "", c, "capital") for c in "ABC"]
        >>> task = TaskSampler(records, locality=2, hard_locality=1).task(epoch=0, index=0)
        >>> task.target, len(task.locality), task.hard
        ('X', 2, 1)
    """

    def __init__(
        self,
        records: Sequence[Record],
        rephrases: int = 1,
        locality: int = 1,
        hard_locality: int = 0,
        seed: int = 0,
        unrelated: Sequence[Record] | None = None,
        formats: Formats | None = None,
        contrasts: int = 0,
        names: Names | None = None,
    ) -> None:
        self.records, self.formats = list(records), formats
        self.rephrases, self.locality, self.hard_locality, self.seed = rephrases, locality, hard_locality, seed
        known = [record for record in records if record.can_be_asked]
        self._pool = known if unrelated is None else list(unrelated)
        if any(len(record.locality) < locality for record in records):
            _check_pool(self._pool, records, unrelated is not None)
        self.contrasts = contrasts
        self.names = joined_names(names_of(records), listed_names()) if names is None and contrasts else names or {}
        self._order: tuple[tuple[int, int], list[int]] | None = None
        self._by_relation: dict[str, list[Record]] = defaultdict(list)
        for record in known:
            self._by_relation[record.relation].append(record)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def pool(self) -> Sequence[Record]:
        """The facts that unrelated ones are drawn from."""
        return self._pool

    def group(self, epoch: int, index: int, edits_at_once: int, limit: int | None = None) -> tuple[EditTask, ...]:
        """Edits that are made at once; what is drawn as unrelated to one of them, none of the others edits.

        Records are put together anew each epoch, and not as they stand in the file, where neighbours often share a subject.

        Args:
            epoch, index: of the group.
            edits_at_once: edits a group.
            limit: only the first so many records are edited; None: all.

        Raises:
            ConfigError: the edits leave no unrelated fact over.
        """
        if edits_at_once == 1:
            return (self.task(epoch, index),)
        key = (epoch, limit or len(self))
        if self._order is None or self._order[0] != key:
            shuffle = random.Random(f"{self.seed}/{epoch}/groups")
            self._order = key, shuffle.sample(range(key[1]), key[1])
        chosen = self._order[1][index * edits_at_once : (index + 1) * edits_at_once]
        tasks = tuple(self.task(epoch, i, [self.records[other] for other in chosen]) for i in chosen)
        if self.locality and not any(task.locality for task in tasks):
            raise ConfigError(
                f"{edits_at_once} edits at once leave no unrelated fact over: the set has {len(self)} records. Lower "
                "edits_at_once, or set locality_data."
            )
        return tasks

    def task(self, epoch: int, index: int, edited: Sequence[Record] = (), formats: Formats | None = None) -> EditTask:
        """The task made of record `index` in `epoch`.

        Args:
            epoch, index: of the task.
            edited: other records that its unrelated facts must avoid.
            formats: in place of the sampler's.
        """
        record = self.records[index]
        edited = edited or (record,)
        # Generators of its own for every task: no order of calls, and no number of workers, matters.
        key = f"{self.seed}/{epoch}/{index}"
        draw = random.Random(key)
        target = draw.choice(record.alternatives)
        rephrases = self._rephrases(draw, record, key)
        own = self._own(record, key)
        near = sum(question.hard for question in own)
        pool = self._by_relation[record.relation] if record.relation else []
        hard = self._unrelated(draw, edited, min(self.hard_locality - near, self.locality - len(own)), pool)
        easy = self._unrelated(draw, edited, self.locality - len(own) - len(hard), self._pool, taken=hard)
        asked = [(question.prompt, question.answers[0]) for question in own]
        hard_asked, easy_asked = ([as_unrelated(draw, other) for other in others] for others in (hard, easy))
        locality = (*asked[:near], *hard_asked, *asked[near:], *easy_asked)
        task = EditTask(
            record.prompt, target, rephrases, locality, near + len(hard), record.answers, record.subject,
            record.relation, record.prediction, record.portability,
        )  # fmt: skip
        formats = formats or self.formats
        if formats is None:
            return self._constrained(task, record, edited, key)
        none: list[tuple[str, ...]] = [()]
        others = [
            *none * near, *(each.statements for each in hard), *none * (len(own) - near),
            *(each.statements for each in easy),
        ]  # fmt: skip
        # A generator of their own: without formats the same task is drawn.
        drawn = formats.drawn(task, others, random.Random(f"{key}/formats"), record.statements)
        return self._constrained(drawn, record, edited, key)

    def _constrained(self, task: EditTask, record: Record, edited: Sequence[Record], key: str) -> EditTask:
        """The task with what its edit must not touch: the record's own, and neighbors, about nothing that is measured."""
        if not self.contrasts:
            return replace(task, keep=record.keep)
        subject = record.subject or find_subject(task.prompt, self.names) or ""
        avoided = [question for question, _ in task.locality] + [other.prompt for other in edited]
        kind = record.kind or record.relation
        near = neighbors(task.prompt, subject, self.names, self.contrasts, avoided, kind, key)
        return replace(task, keep=(*record.keep, *near))

    def _rephrases(self, draw: random.Random, record: Record, key: str) -> tuple[str, ...]:
        if record.rephrases:
            return _draw(draw, record.rephrases, self.rephrases)
        if not record.text:
            return (record.prompt,) * self.rephrases
        prefixes = random.Random(f"{key}/prefix")
        return tuple(drop_prefix(prefixes, record.prompt) for _ in range(self.rephrases))

    def _own(self, record: Record, key: str) -> list[Question]:
        """The record's own locality examples, at most as many as asked for, hard ones first."""
        count = min(self.locality, len(record.locality))
        chosen = random.Random(f"{key}/own").sample(record.locality, count)
        return sorted(chosen, key=lambda question: not question.hard)

    def _unrelated(
        self,
        draw: random.Random,
        edited: Sequence[Record],
        count: int,
        pool: Sequence[Record],
        taken: Sequence[Record] = (),
    ) -> list[Record]:
        """Up to `count` records of the pool about other subjects than the edited ones, none twice."""
        found: list[Record] = []

        def consider(other: Record) -> None:
            new = len(found) < count and other not in found and other not in taken
            if new and not any(_same_fact(other, record) for record in edited):
                found.append(other)

        for _ in range(20 * count if pool else 0):
            consider(draw.choice(pool))
        if len(found) < count:
            # A pool with few others: luck did not find them all.
            for other in draw.sample(pool, len(pool)):
                consider(other)
        return found


def _check_pool(pool: Sequence[Record], records: Sequence[Record], elsewhere: bool) -> None:
    """Raises where there is nothing unrelated to some record."""
    if not pool:
        raise ConfigError(
            "Locality examples need true answers; these records hold none. Give locality_data (a file of questions and "
            "answers), or records with locality examples of their own."
        )
    if not elsewhere and all(_same_fact(record, records[0]) for record in records):
        raise ConfigError("Locality examples need facts about at least two subjects; the records hold one.")


def _same_fact(a: Record, b: Record) -> bool:
    return a.prompt == b.prompt or (bool(a.subject) and a.subject == b.subject)


def as_unrelated(draw: random.Random, record: Record) -> tuple[str, str]:
    """A record as an unrelated fact: any phrasing of its question and the true answer, or its paragraph."""
    if record.text:
        return as_question(record.text)
    return draw.choice((record.prompt, *record.rephrases)), record.answers[0]


def _draw(draw: random.Random, items: Sequence[str], count: int) -> tuple[str, ...]:
    chosen = draw.sample(items, min(count, len(items)))
    # Every task has equally many rows, so a short list is gone through again.
    return tuple(chosen[i % len(chosen)] for i in range(count))
