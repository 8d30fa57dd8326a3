"""Tasks from running text: what is left of a prompt without its beginning, and a paragraph as question and answer."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Sequence

from mend_lightning.data.record import Record
from mend_lightning.errors import ConfigError, NoStopWarning
from mend_lightning.models.inputs.prompts import RUNNING_TEXT, PromptFormat

_RUNNING = (RUNNING_TEXT.target, RUNNING_TEXT.stop)
_WORD = re.compile(r"\S+\s*")


def drop_prefix(draw: random.Random, prompt: str) -> str:
    """A prompt without its first words, up to half of them, none included.

    The original (`data_classes/wiki.py`) drops tokens; here it is words, so that a rephrase stays text.

    Example:
        >>> drop_prefix(random.Random(3), "The cat sat on the mat")
        'cat sat on the mat'
    """
    words = _WORD.findall(prompt)
    return "".join(words[draw.randint(0, len(words) // 2) :])


def as_question(paragraph: str) -> tuple[str, str]:
    """A paragraph's first word, and the rest with the blank before it: together they are the paragraph.

    A causal model predicts everything but the first token, as in the original; blanks before the first word are lost.

    Example:
        >>> as_question("The cat sat.")
        ('The', ' cat sat.')
    """
    first = paragraph.split(maxsplit=1)[0]
    return first, paragraph.lstrip()[len(first) :]


def check_running_text(records: Sequence[Record], format: PromptFormat, several: bool = False) -> None:
    """Raises ConfigError where generation data meets a format that puts blanks or a stop around its targets.

    Generation data has no question that could be asked in `several` formats.

    Warns where answers of other data have nothing that ends them.
    """
    if format.stop is None and not any(record.text for record in records):
        warnings.warn(
            "data.stop is null: nothing ends an answer, in training neither. That is meant for running text; for questions give a "
            'stop text, or "" for the end-of-sequence token. (A text that YAML reads as nothing, such as "#", arrives as null.)',
            NoStopWarning,
            stacklevel=2,
        )
    if several and any(record.text for record in records):
        raise ConfigError("Generation data is running text, which is asked in no other format. Leave data.formats out.")
    if any(record.text for record in records) and (format.target, format.stop) != _RUNNING:
        raise ConfigError(
            "Generation data is running text: its targets bring their own blanks, and nothing ends them. Set "
            f'data.target to "{{target}}" and data.stop to null (they are {format.target!r} and {format.stop!r}).'
        )
