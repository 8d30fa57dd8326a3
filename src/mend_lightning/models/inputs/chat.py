"""A model's chat template as a prompt format: the text around a question and its answer, and what ends a turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from mend_lightning.errors import ConfigError
from mend_lightning.models.inputs.prompts import PromptFormat

INPUT, TARGET = "{input}", "{target}"
# What was asked and what was answered.
Turn = tuple[str, str]


def chat_format(tokenizer: Any, system: str = "", talk: Sequence[Turn] = ()) -> PromptFormat:
    """How the tokenizer's chat template asks a question, as its users ask it (`add_generation_prompt`).

    The blank before an answer is the template's, and so is what ends it: its end of turn is found by looking at what the
    template writes behind an assistant's message. A BOS that the tokenizer puts before every text is left out of the text.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        system: what the system is told; a template that has no such role (Gemma's) has it at the start of the first turn.
        talk: questions and answers that come before the question.

    Raises:
        ConfigError: there is no chat template, or it does not take these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"{type(tokenizer).__name__} has no chat template, so nobody talks to this model in turns. Leave the chat formats "
            "out, take the instruction-tuned model of the family, or set tokenizer.chat_template to the one that the model "
            "was trained with."
        )
    messages = _messages(tokenizer, system, talk)
    asked = rendered(tokenizer, messages, add_generation_prompt=True)
    answered = rendered(tokenizer, [*messages, {"role": "assistant", "content": TARGET}])
    if INPUT not in asked or TARGET not in answered:
        raise ConfigError(
            "The chat template does not write a message as it is given, so no question can be put into it."
        )
    before, _, after = answered.partition(TARGET)
    header, blank = _split(before[len(asked) :] if before.startswith(asked) else "")
    blank_after, stop = end_of_turn(tokenizer, after)
    return PromptFormat(_without_bos(tokenizer, asked) + header, f"{blank}{TARGET}{blank_after}", stop)


def end_of_turn(tokenizer: Any, after: str) -> tuple[str, str]:
    """What ends an answer.

    Args:
        tokenizer: the tokenizer.
        after: what its template writes behind the last message of an assistant.

    Returns:
        Blanks that stand before the end, and the stop of a `PromptFormat`: the text of a special token or the first words;
        "" where it is the end-of-sequence token, or where the template leaves the end to the model.
    """
    text = after.lstrip()
    if not text:
        return "", "\n" if "\n" in after else ""
    special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    first = min((place for token in special if (place := text.find(token)) >= 0), default=len(text))
    stop = text[:first].rstrip() or next(token for token in special if text.startswith(token))
    return after[: len(after) - len(text)], "" if stop == tokenizer.eos_token else stop


def rendered(tokenizer: Any, messages: Sequence[dict[str, str]], **settings: Any) -> str:
    """The messages as the template writes them.

    Raises:
        ConfigError: the template refuses them.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **settings)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(f"The chat template takes no messages of {roles}: {error}. Choose another format.") from error


def _messages(tokenizer: Any, system: str, talk: Sequence[Turn]) -> list[dict[str, str]]:
    said = [text for turn in talk for text in turn] + [INPUT]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    if not system:
        return turns
    told = [{"role": "system", "content": system}, *turns]
    return told if _writes(tokenizer, told, system) else [_told(system, turns[0]), *turns[1:]]


def _writes(tokenizer: Any, messages: Sequence[dict[str, str]], system: str) -> bool:
    """Whether the template has a place for the system's message; some refuse it, others pass it over."""
    try:
        return system in rendered(tokenizer, messages)
    except ConfigError:
        return False


def _told(system: str, turn: dict[str, str]) -> dict[str, str]:
    return {**turn, "content": f"{system}\n\n{turn['content']}"}


def _split(header: str) -> tuple[str, str]:
    """What a template writes between its generation prompt and an answer, and the blanks that belong to the answer.

    The first is an empty thought, say: the model's users do not have it think either.

    Example:
        >>> _split("<think></think> "), _split(" ")
        (('<think></think>', ' '), ('', ' '))
    """
    text = header.rstrip(" ") if header.strip() else ""
    return text, header[len(text) :]


def _without_bos(tokenizer: Any, text: str) -> str:
    bos = tokenizer.bos_token
    adds = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds else text
