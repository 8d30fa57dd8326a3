"""In-context editing: the new fact is told in the prompt, and the model stays as it is."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mend_lightning.editors.editor import Editor
from mend_lightning.errors import ConfigError, TokenizerError
from mend_lightning.models.forward.generation import generate_answers
from mend_lightning.models.forward.head import HeadStates, states_at
from mend_lightning.models.forward.hooks import Delta
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import TrunkOutputs, replayed
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.positions import Positions
from mend_lightning.models.inputs.prompts import PromptFormat
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows

Place = Literal["before", "line", "question"]


class InContext(Editor):
    """Prefixes every question that is asked with "New fact: …". Nothing is trained, and no weight changes.

    The facts of all edits of a task come before each of its questions, the unrelated ones too: whether the model
    tells them apart is what is measured. Prompts get longer, so every answer costs more; nothing is cut (`max_length`
    does not hold for them), and a model with a limit of its own must have room.

    Measured on SmolLM2-135M-Instruct (32 validation edits of world_facts, the quickstart's prompt with its few-shot
    example, bfloat16), edit success and known facts retained by `place`: "before" 0.23 and 0.94, "line" 0.04 and 0.91,
    "question" 0.26 and 0.74; "line" with the template "Q: {prompt}\\nA: {target}\\n" 0.18 and 0.92. So small a model
    hardly reads what it is told.

    Args:
        layers: name -> (d_in, d_out): only to tell the base model by; they are not edited.
        template: what is said of each fact; `{prompt}` and `{target}` are replaced.
        place: where the facts stand, see `with_facts`: "before" everything, on the "line" before the question's, or
            directly before the "question".

    Example:
        >>> editor = InContext({"fc": (2, 3)})
        >>> editor.told([("Capital of France?", "Zagreb")])
        'New fact: Capital of France? Zagreb\\n'
    """

    changes_weights = False

    def __init__(
        self,
        layers: Mapping[str, tuple[int, int]],
        template: str = "New fact: {prompt} {target}\n",
        place: Place = "before",
    ) -> None:
        super().__init__(layers, template=template, place=place)
        missing = [key for key in ("{prompt}", "{target}") if key not in template]
        if missing:
            raise ConfigError(f"The template of InContext must contain {missing[0]}; it is {template!r}.")
        self.template, self.place = template, place

    def told(self, facts: Sequence[tuple[str, str]]) -> str:
        """Returns the text that comes before a question."""
        return "".join(_filled(self.template, prompt, target) for prompt, target in facts)

    def edited(
        self, model: nn.Module, z_edit: Rows, trunk: TrunkOutputs | None = None, x_keep: Rows | None = None
    ) -> PromptedModel:
        """The model that is told the facts of `z_edit` before each question.

        Raises:
            ConfigError: the rows hold no text, or there is no encoder.
        """
        if not z_edit.texts:
            raise ConfigError("InContext reads the text of edits (Rows.texts), which these lack. Encoder.rows sets it.")
        facts = [[text for text, of in zip(z_edit.texts, z_edit.task.tolist()) if of == i] for i in range(z_edit.tasks)]
        return PromptedModel([self.told(each) for each in facts], self.place, self.text_encoder())


@dataclass(frozen=True)
class PromptedModel:
    """The base model whose prompts get a prefix (an `Edited`).

    Attributes:
        told: the text of each task.
        place: where it stands, see `with_facts`.
        encoder: text to ids.
    """

    told: Sequence[str]
    place: Place
    encoder: Encoder
    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    deltas: Mapping[str, Delta] = field(default_factory=dict)

    def states_at(self, model: nn.Module, rows: Rows, where: Positions, trunk: TrunkOutputs) -> HeadStates:
        """See `Edited.states_at`. `where` must be the labels' positions: others have no counterpart in a longer prompt.

        Raises:
            ConfigError: `where` has other positions.
            TokenizerError: behind the longer prompt the tokenizer makes other ids of an answer.
        """
        if not torch.equal(torch.stack([where.row, where.column], 1), (rows.labels != IGNORED_LABEL).nonzero()):
            raise ConfigError("In-context edits have logits at the labels' positions only (Rows.label_positions).")
        longer = self.longer(model, rows)
        if not torch.equal(longer.label_positions.take(longer.labels), where.take(rows.labels)):
            raise TokenizerError(
                "The tokenizer makes other ids of an answer when a fact comes before its question. End the template "
                "of InContext with a newline or a blank."
            )
        with replayed(run_trunk(model, longer, {}), slice(None)):
            return states_at(model, longer, longer.label_positions)

    def longer(self, model: nn.Module, rows: Rows) -> Rows:
        """Returns `rows` whose questions come after the facts of their tasks."""
        encoder = _unchanged(self.encoder)
        tasks = rows.task.tolist()
        formats = [self.encoder.format_of(key) for key in rows.formats or [""] * len(rows)]
        pairs = [
            (self._asked(format, task, prompt), target)
            for format, task, (prompt, target) in zip(formats, tasks, rows.texts)
        ]
        longer = encoder.rows(pairs, tasks, rows.tasks, rows.formats).to(rows.labels.device)
        limit = getattr(model.config, "max_position_embeddings", None)
        length = longer.inputs["input_ids"].shape[1]
        if limit is not None and length > limit:
            raise ConfigError(
                f"With the facts before the question, a prompt has {length} tokens; {type(model).__name__} reads {limit}. "
                "Tell fewer facts at once."
            )
        return longer

    def answers(
        self,
        model: nn.Module,
        encoder: Encoder,
        prompts: Sequence[str],
        task_of_row: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> list[str]:
        """See `Edited.answers`."""
        tasks = tasks_of_prompts(len(prompts), len(self.told), task_of_row)
        asked = [self._asked(encoder.format, task, prompt) for task, prompt in zip(tasks, prompts)]
        return generate_answers(model, _unchanged(encoder), asked, lengths=lengths)

    def _asked(self, format: PromptFormat, task: int, prompt: str) -> str:
        return with_facts(format.prompt, self.told[task], prompt, self.place)


def with_facts(template: str, told: str, prompt: str, place: Place) -> str:
    """The whole text that the model is asked to continue.

    Args:
        template: of the question, `PromptFormat.prompt`; may hold few-shot examples.
        told: the facts.
        prompt: the question.
        place: "before": before the template. "line": before the template's line that holds the question.
            "question": directly before the question, inside the template.

    Example:
        >>> with_facts("Q: 1?\\nA: 2\\nQ: {input}\\nA:", "New: 3? 4\\n", "3?", "line")
        'Q: 1?\\nA: 2\\nNew: 3? 4\\nQ: 3?\\nA:'
    """
    before, _, after = template.partition("{input}")
    start = {"before": 0, "line": before.rfind("\n") + 1, "question": len(before)}[place]
    # A template may ask the same question twice.
    return before[:start] + told + before[start:] + prompt + after.replace("{input}", prompt)


def tasks_of_prompts(prompts: int, tasks: int, task_of_row: Tensor | None) -> list[int]:
    """The task of every prompt; None: prompts are grouped by task in equal numbers.

    Example:
        >>> tasks_of_prompts(4, 2, None)
        [0, 0, 1, 1]
    """
    return [i * tasks // prompts for i in range(prompts)] if task_of_row is None else task_of_row.tolist()


def _filled(template: str, prompt: str, target: str) -> str:
    # In one go: a prompt may hold the word {target}.
    return re.sub(r"\{(prompt|target)\}", lambda found: {"prompt": prompt, "target": target}[found[1]], template)


def _unchanged(encoder: Encoder) -> Encoder:
    """An encoder for texts that are whole already: nothing is put around them, and nothing is cut."""
    whole = {key: replace(format, prompt="{input}") for key, format in {"": encoder.format, **encoder.formats}.items()}
    return replace(encoder, format=whole.pop(""), formats=whole, max_length=sys.maxsize)
