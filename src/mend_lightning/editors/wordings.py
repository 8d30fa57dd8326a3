"""An edit made in several wordings of its question at once, so that it is about the question and not about its words.

What a rephrase of a question will be nobody knows when the edit is made; but what people put in front of a question is much the
same for all of them. So the edited question is asked with some of that in front as well, and the edit is made of the gradients of
all, and as large as the least confident of them needs. ROME and MEMIT (Meng et al., 2022) edit behind random texts to the same
end. Not in the MEND paper.
"""

from __future__ import annotations

from mend_lightning.errors import ConfigError
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import Rows

# Texts before a question, or before a statement that is to be completed, that leave its answer as it is.
WORDINGS = (
    "Hey, quick question: {}",
    "I was wondering. {}",
    "For a quiz: {}",
    "Here is something that I would like to know. {}",
    "Please help me with this. {}",
    "One more thing: {}",
    "Someone asked me this yesterday. {}",
    "Next. {}",
)


def check_wordings(count: int) -> None:
    """Raises ConfigError unless there are so many wordings."""
    if not 0 <= count <= len(WORDINGS):
        raise ConfigError(
            f"wordings is how many other wordings of a question are edited with it; it must be 0 to {len(WORDINGS)}, "
            f"not {count}."
        )


def in_wordings(z_edit: Rows, encoder: Encoder, count: int) -> Rows:
    """Each row of `z_edit`, and behind it the same question in `count` other wordings, in the same format and with its target.

    Args:
        z_edit: the edits, made of text (`Encoder.rows`).
        encoder: makes rows of them.
        count: of `WORDINGS`, the first so many.

    Raises:
        ConfigError: the rows hold no text, or are a classifier's, whose statements would be others with text in front.
    """
    if encoder.kind == "classifier":
        raise ConfigError("wordings are of questions, and this model judges statements. Set wordings to 0.")
    if len(z_edit.texts) != len(z_edit):
        raise ConfigError("wordings read the text of edits (Rows.texts), which these lack. Encoder.rows sets it.")
    formats, tasks = z_edit.formats or ("",) * len(z_edit), z_edit.host.task.tolist()
    pairs, keys, numbers = [], [], []
    for (prompt, target), key, task in zip(z_edit.texts, formats, tasks):
        for wording in ("{}", *WORDINGS[:count]):
            pairs.append((wording.replace("{}", prompt), target))
            keys.append(key)
            numbers.append(task)
    return encoder.rows(pairs, numbers, z_edit.tasks, keys).to(z_edit.task.device)
