"""In which format each row of an edit task is asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mend_lightning.data.tasks import EditTask, TaskSampler
from mend_lightning.models.inputs.encoder import ModelKind
from mend_lightning.models.inputs.formats import OWN, FormatSpec, NamedFormat, named_formats, prompt_formats
from mend_lightning.models.inputs.prompts import PromptFormat


@dataclass(frozen=True)
class FormatDraw:
    """Draws a format for the edit, for each of its rephrases and for each unrelated fact of a task.

    The edit's is any of them. The rephrases go through all formats in a drawn order, and so do the unrelated facts, each
    through an order of its own: where an edit was made says nothing about where it is asked. A fact without a statement is
    not asked by one; where no format is left for it, it is asked in the data's own.

    Attributes:
        formats: to draw from.
        training: of the texts of a format those for training are drawn; else it is the first, which training never sees
            where there are several.

    Example:
        >>> from mend_lightning.models.inputs.formats import named_formats
        >>> task = EditTask("Capital of France?", "Rome", ("France's capital?",), (("Capital of Peru?", "Lima"),))
        >>> drawn = FormatDraw(named_formats(["chat"])).drawn(task, [()], random.Random(0))
        >>> drawn.format, drawn.rephrase_formats, drawn.locality_formats
        ('chat', ('chat',), ('chat',))
    """

    formats: tuple[NamedFormat, ...]
    training: bool = False

    def drawn(
        self, task: EditTask, others: Sequence[Sequence[str]], draw: random.Random, statements: Sequence[str] = ()
    ) -> EditTask:
        """The task with the formats that its rows are asked in, and with statements where these are completed.

        Args:
            task: as it is drawn without formats.
            others: of each unrelated fact, its statements.
            draw: of everything here.
            statements: of the edited fact.
        """
        (format,) = self._dealt(draw, [bool(statements)])
        prompt = draw.choice(statements) if format.completes else task.prompt
        # Another statement than the edited one, where there is another.
        left = [text for text in statements if text != prompt] or statements
        dealt = self._dealt(draw, [bool(left)] * len(task.rephrases))
        rephrases = [draw.choice(left) if of.completes else text for of, text in zip(dealt, task.rephrases)]
        found = self._dealt(draw, [bool(each) for each in others])
        locality = [
            (draw.choice(each) if of.completes else text, answer)
            for of, each, (text, answer) in zip(found, others, task.locality)
        ]
        keys = [tuple(self._key(draw, each) for each in some) for some in ((format,), dealt, found)]
        return replace(
            task, prompt=prompt, rephrases=tuple(rephrases), locality=tuple(locality), format=keys[0][0],
            rephrase_formats=keys[1], locality_formats=keys[2],
        )  # fmt: skip

    def _dealt(self, draw: random.Random, complete: Sequence[bool]) -> list[NamedFormat]:
        """A format for each row: all of them in turn, in a drawn order. `complete`: which rows have statements."""
        found: list[NamedFormat] = []
        deck: list[NamedFormat] = []
        for possible in complete:
            suited = [each for each in deck if possible or not each.completes]
            if not suited:
                deck = draw.sample(self.formats, len(self.formats))
                suited = [each for each in deck if possible or not each.completes]
            found.append(suited[0] if suited else OWN)
            deck = [each for each in deck if each is not found[-1]]
        return found

    def _key(self, draw: random.Random, format: NamedFormat) -> str:
        return draw.choice(format.training_keys) if self.training else format.name


@dataclass(frozen=True)
class DataFormats:
    """The formats that a set of data is asked in.

    Attributes:
        own: `data.prompt`, `data.target` and `data.stop`.
        training, evaluation: beside it; empty: it alone.
    """

    own: PromptFormat
    training: tuple[NamedFormat, ...] = ()
    evaluation: tuple[NamedFormat, ...] = ()

    @classmethod
    def of(
        cls, own: PromptFormat, formats: Sequence[FormatSpec] | None, eval_formats: Sequence[FormatSpec] | None
    ) -> DataFormats:
        """Of the settings `formats` and `eval_formats`, which is as the former where it is None."""
        training = named_formats(formats) if formats is not None else ()
        found = cls(own, training, named_formats(eval_formats) if eval_formats is not None else training)
        named_formats(found.all or (OWN,))
        return found

    @property
    def all(self) -> tuple[NamedFormat, ...]:
        """Each once."""
        return tuple(dict.fromkeys((*self.training, *self.evaluation)))

    def draw(self, split: str) -> FormatDraw | None:
        """How the tasks of a split are asked: training and validation mix, a test asks in the first of its formats.

        What else a test asks in has a table of its own (`evaluation/format_table.py`).
        """
        mixed = self.training if split == "train" else self.evaluation
        chosen = mixed[:1] if split == "test" else mixed
        return FormatDraw(chosen, training=split == "train") if chosen else None

    def prompt_formats(self, tokenizer: Any, kind: ModelKind) -> dict[str, PromptFormat]:
        """The text of every format, for `Encoder.formats`; see `formats.prompt_formats`."""
        # A fact for which no format is left is asked in the data's own.
        return prompt_formats((*self.all, OWN), self.own, tokenizer, kind) if self.all else {}

    def tasks(self, sampler: TaskSampler, first: int) -> dict[int, dict[str, EditTask]]:
        """Edits in each of the evaluation's formats: all rows of a task in one of them.

        A format that completes statements is left out where no record has any; where some have, the others are passed over, so
        that all formats are measured on the same edits.

        Args:
            sampler: of the records.
            first: so many of them, at most.

        Returns:
            Number of a record -> name of a format -> the task; empty where there are fewer than two formats.
        """
        complete = [bool(record.statements) for record in sampler.records]
        formats = [each for each in self.evaluation if not each.completes or any(complete)]
        needs = any(each.completes for each in formats)
        if len(formats) < 2:
            return {}
        suited = [index for index, possible in enumerate(complete) if possible or not needs][:first]
        return {index: {each.name: _asked_in(each, sampler, index) for each in formats} for index in suited}


def _asked_in(format: NamedFormat, sampler: TaskSampler, index: int) -> EditTask:
    """A task in one format, without the unrelated facts that have no statement where it asks by statements."""
    task = sampler.task(0, index, formats=FormatDraw((format,)))
    kept = [i for i, key in enumerate(task.locality_formats) if key == format.name]
    return replace(
        task, locality=tuple(task.locality[i] for i in kept), hard=sum(i < task.hard for i in kept),
        locality_formats=(format.name,) * len(kept),
    )  # fmt: skip
