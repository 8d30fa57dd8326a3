"""KnowEdit and the other files of EasyEdit (Zhang et al., 2024): JSON lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mend_lightning.data.readers.fields import Format, flat_texts, questions, require
from mend_lightning.data.record import Question, Record
from mend_lightning.errors import RecordError


def parse(data: Mapping[str, Any], where: str = "record", line: int = 0) -> Record:
    """`prompt` (WikiBio: `text`), `target_new` (`labels`), and optionally `subject` (`concept`), `ground_truth`,
    `rephrase_prompt` or `rephrase` (text or list), `locality` and `portability`
    (`{"Relation_Specificity": [{"prompt": …, "ground_truth": …}], …}`).

    A `ground_truth` may be text, a list, or lists of lists of names for one answer; the first is the one measured by.
    All of `locality` counts as hard: it is about the edited subject, or about the same relation.
    """
    require(data, ("prompt|text", "target_new|labels"), where)
    subject = flat_texts(data.get("subject", data.get("concept")), "subject", where)
    prompts = flat_texts(data.get("prompt", data.get("text")), "prompt", where)
    rephrases = [flat_texts(data.get(key), key, where) for key in ("rephrase_prompt", "rephrase")]
    if not prompts:
        raise RecordError(f"{where}: 'prompt' is empty.")
    return Record(
        prompt=prompts[0],
        answers=flat_texts(data.get("ground_truth"), "ground_truth", where),
        # `labels` and `target_new` may be lists of names of one answer; an edit writes the first.
        alternatives=flat_texts(data.get("target_new", data.get("labels")), "target_new", where)[:1],
        rephrases=tuple(dict.fromkeys(rephrase for found in rephrases for rephrase in found)),
        subject=subject[0] if subject else "",
        line=line,
        locality=_named_questions(data.get("locality"), "locality", where, hard=True),
        portability=_named_questions(data.get("portability"), "portability", where),
    )


def _named_questions(value: Any, key: str, where: str, hard: bool = False) -> tuple[Question, ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        example = '{"Reasoning": [{"prompt": "…", "ground_truth": "…"}]}'
        raise RecordError(f"{where}: {key!r} must be an object like {example}, got {value!r}.")
    found = [questions(each, f"{key}.{kind}", where, ["ground_truth"], kind, hard) for kind, each in value.items()]
    return tuple(question for of_kind in found for question in of_kind)


FORMAT = Format(
    "knowedit",
    "KnowEdit and EasyEdit, a JSON list; with portability",
    "prompt, target_new, rephrase_prompt or rephrase, locality, portability",
    lambda data: {"prompt", "target_new"} <= data.keys() or {"text", "labels"} <= data.keys(),
    parse,
)
