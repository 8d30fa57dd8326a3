"""The neighbors of facts that constrain an edit, and what of `keep`, `contrasts` and subjects does not go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mend_lightning.data.neighbors import find_subject, joined_names, listed_names, neighbors
from mend_lightning.edits.stack_state import question_key
from mend_lightning.errors import ConfigError


class ConstrainingEditor(Protocol):
    """What is asked here of an editor: every `Editor` has it."""

    constrains: bool
    settings: dict[str, Any]
    names: dict[str, tuple[str, ...]]


def neighbors_of(
    editor: ConstrainingEditor,
    facts: Sequence[tuple[str, str]],
    keep: Sequence[str] = (),
    contrasts: int | None = None,
    subjects: Sequence[str] = (),
) -> list[str]:
    """The neighbors that constrain an edit of `facts`; arguments and errors as in `make_edit`."""
    count = editor.settings.get("contrasts", 0) if contrasts is None else contrasts
    if (keep or count) and not editor.constrains:
        raise ConfigError(
            f"{type(editor).__name__} cannot keep its edits off questions. Leave out keep and contrasts, or use MendEditor."
        )
    if count < 0:
        raise ConfigError(f"contrasts is a number of questions; it must be 0 or more, not {count}.")
    edited = {question_key(prompt) for prompt, _ in facts}
    both = next((question for question in keep if question_key(question) in edited), None)
    if both is not None:
        raise ConfigError(f"The question {both!r} is to be edited and to be kept. Leave it out of one of the two.")
    if subjects and not count:
        raise ConfigError(
            "A subject is what contrasts are made with, and this edit has none. Set contrasts, 8 for example."
        )
    if subjects and len(subjects) != len(facts):
        raise ConfigError(f"{len(subjects)} subjects are given for {len(facts)} facts. Give one for each, or none.")
    if not count:
        return []
    names, avoided = joined_names(editor.names, listed_names()), [*keep, *(prompt for prompt, _ in facts)]
    found: list[str] = []
    for (prompt, _), given in zip(facts, subjects or [""] * len(facts)):
        if given and given not in prompt:
            raise ConfigError(
                f"The subject {given!r} does not stand in the prompt {prompt!r}. Write it as it does there."
            )
        subject = given or find_subject(prompt, names) or ""
        found += neighbors(prompt, subject, names, count, [*avoided, *found])
    return found
