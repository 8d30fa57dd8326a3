"""The ways in which people ask for a fact, by name: bare, as a statement, through a chat template, behind a paragraph.

Each is a `PromptFormat`, or several of its kind, that is made of the data's own format and the model's tokenizer.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from mend_lightning.errors import ConfigError
from mend_lightning.models.inputs.chat import INPUT, Turn, chat_format
from mend_lightning.models.inputs.encoder import Encoder, ModelKind
from mend_lightning.models.inputs.format_texts import PASSAGES, SYSTEMS, TALKS
from mend_lightning.models.inputs.prompts import PromptFormat


@dataclass(frozen=True)
class NamedFormat(ABC):
    """A way to ask for a fact.

    Attributes:
        name: what it is called in settings, results and edits.
        kinds: the kinds of models that can be asked in it.
        completes: it asks by a statement that the model completes, and not by a question.
    """

    name: str
    kinds: ClassVar[tuple[ModelKind, ...]] = ("causal", "encoder_decoder")
    completes: ClassVar[bool] = False

    @abstractmethod
    def forms(self, own: PromptFormat, tokenizer: Any, kind: ModelKind) -> tuple[PromptFormat, ...]:
        """The format in each of its texts; the first is that of evaluation and of edits, training draws among the others.

        Args:
            own: the data's own format.
            tokenizer: the model's.
            kind: of the model.

        Raises:
            ConfigError: the model cannot be asked in this way.
        """

    @property
    def texts(self) -> int:
        """How many forms there are."""
        return 1

    @property
    def keys(self) -> tuple[str, ...]:
        """What each form is called: "chat", "chat/1", …"""
        return (self.name, *(f"{self.name}/{i}" for i in range(1, self.texts)))

    @property
    def training_keys(self) -> tuple[str, ...]:
        """The forms that training draws from: what evaluation asks in is new to the editor, where there are several."""
        return self.keys[1:] or self.keys


@dataclass(frozen=True)
class OwnFormat(NamedFormat):
    """The format of the data: `data.prompt`, `data.target` and `data.stop`."""

    kinds: ClassVar[tuple[ModelKind, ...]] = ("causal", "encoder_decoder", "classifier")

    def forms(self, own: PromptFormat, tokenizer: Any, kind: ModelKind) -> tuple[PromptFormat, ...]:
        return (own,)


@dataclass(frozen=True)
class TextFormat(NamedFormat):
    """Other text around questions and answers than the data's own.

    Attributes:
        changes: `prompt`, `target` or `stop`; what is not given is as in the data's own format.
    """

    changes: Mapping[str, str | None] = field(default_factory=dict, hash=False)

    def forms(self, own: PromptFormat, tokenizer: Any, kind: ModelKind) -> tuple[PromptFormat, ...]:
        changes: dict[str, Any] = {"target": _apart(own.target), **self.changes}
        return (replace(own, **changes),)


@dataclass(frozen=True)
class StatementFormat(NamedFormat):
    """A statement without its end, as it stands in a record's `statements`, which a causal model goes on with.

    Attributes:
        stop: what ends an answer of a causal model; None: nothing, for a sentence may go on behind it.
    """

    completes: ClassVar[bool] = True
    stop: str | None = None

    def forms(self, own: PromptFormat, tokenizer: Any, kind: ModelKind) -> tuple[PromptFormat, ...]:
        # A decoder of its own ends its answer whatever the encoder read.
        return (PromptFormat(INPUT, _apart(own.target), self.stop if kind == "causal" else own.stop),)


@dataclass(frozen=True)
class PassageFormat(NamedFormat):
    """The data's own format behind a paragraph that has nothing to do with the question."""

    passages: tuple[str, ...] = PASSAGES

    def forms(self, own: PromptFormat, tokenizer: Any, kind: ModelKind) -> tuple[PromptFormat, ...]:
        return tuple(replace(own, prompt=f"{passage}\n\n{own.prompt}") for passage in self.passages)

    @property
    def texts(self) -> int:
        return len(self.passages)


@dataclass(frozen=True)
class ChatFormat(NamedFormat):
    """Through the model's chat template.

    Attributes:
        systems: what the system is told, one of these; "": what the template says by itself.
        talks: questions and answers before the question, one of these.
    """

    kinds: ClassVar[tuple[ModelKind, ...]] = ("causal",)
    systems: tuple[str, ...] = ("",)
    talks: tuple[tuple[Turn, ...], ...] = ((),)

    def forms(self, own: PromptFormat, tokenizer: Any, kind: ModelKind) -> tuple[PromptFormat, ...]:
        return tuple(chat_format(tokenizer, system, talk) for system in self.systems for talk in self.talks)

    @property
    def texts(self) -> int:
        return len(self.systems) * len(self.talks)


OWN = OwnFormat("own")
NAMED: dict[str, NamedFormat] = {
    each.name: each
    for each in (
        OWN,
        TextFormat("bare", {"prompt": INPUT}),
        StatementFormat("statement"),
        ChatFormat("chat"),
        ChatFormat("chat_system", systems=SYSTEMS),
        ChatFormat("chat_turns", talks=TALKS),
        PassageFormat("passage"),
    )
}
# A name, a format of one's own as a mapping (see `named_format`), or a format.
FormatSpec = str | Mapping[str, Any] | NamedFormat


def named_format(spec: FormatSpec) -> NamedFormat:
    """The format of a name, or one's own.

    Args:
        spec: a name; or a mapping with a `name` of its own and with `prompt`, `target` and `stop` (other text around the
            question), `system` and `talk` (a chat), or `passage` (a paragraph before the data's own format). Of systems and
            passages there may be one or a list.

    Raises:
        ConfigError: there is no such format.

    Example:
        >>> named_format("chat").name, named_format({"name": "exam", "prompt": "Exam. {input}"}).changes
        ('chat', {'prompt': 'Exam. {input}'})
    """
    if isinstance(spec, NamedFormat):
        return spec
    if isinstance(spec, str):
        if spec not in NAMED:
            near = difflib.get_close_matches(spec, NAMED, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"There is no format {spec!r}.{hint} Formats: {', '.join(NAMED)}.")
        return NAMED[spec]
    given = {key: value for key, value in spec.items() if key != "name"}
    name = spec.get("name")
    for keys, make in _OWN_FORMATS:
        if given and given.keys() <= set(keys) and isinstance(name, str) and name not in NAMED and "/" not in name:
            return make(name, given)
    raise ConfigError(
        f"{dict(spec)!r} is no format. One of your own has a name that no other has ({', '.join(NAMED)} are taken) and "
        f"{', or '.join(' / '.join(keys) for keys, _ in _OWN_FORMATS)}."
    )


def named_formats(specs: Sequence[FormatSpec]) -> tuple[NamedFormat, ...]:
    """The formats of a setting.

    Raises:
        ConfigError: there is none, one of them does not exist, or two have the same name.
    """
    formats = tuple(map(named_format, [specs] if isinstance(specs, (str, Mapping)) else specs))
    names = [each.name for each in formats]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"A list of formats names each once, and at least one; it is {names}.")
    return formats


def prompt_formats(
    formats: Sequence[NamedFormat], own: PromptFormat, tokenizer: Any, kind: ModelKind
) -> dict[str, PromptFormat]:
    """The key of every form of these formats -> the text around its questions and answers.

    Args:
        formats: from `named_formats`.
        own: the data's own format.
        tokenizer, kind: the model's.

    Raises:
        ConfigError: a model of this kind, or with this tokenizer, cannot be asked in one of them.
    """
    for each in formats:
        if kind not in each.kinds:
            possible = [name for name, format in NAMED.items() if kind in format.kinds]
            raise ConfigError(
                f"The format {each.name!r} is not for a model of kind {kind}. Formats: {', '.join(possible)}."
            )
    return {key: form for each in formats for key, form in zip(each.keys, each.forms(own, tokenizer, kind))}


def in_format(encoder: Encoder, spec: FormatSpec | None) -> Encoder:
    """The encoder that asks in one format, as edits and evaluation do; None: the given one.

    Args:
        encoder: whose format is the data's own.
        spec: see `named_format`.

    Raises:
        ConfigError: there is no such format, or the model cannot be asked in it.
    """
    if spec is None:
        return encoder
    format = named_format(spec)
    forms = prompt_formats([format], encoder.format, encoder.tokenizer, encoder.kind)
    return replace(encoder, formats=forms).asking(format.name)


def _apart(target: str) -> str:
    """A template of answers that no template of questions leaves a blank for."""
    return f" {target.lstrip(' ')}"


def _several(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _chat(name: str, given: Mapping[str, Any]) -> NamedFormat:
    talk = tuple((asked, answered) for asked, answered in given.get("talk", ()))
    return ChatFormat(name, _several(given.get("system", "")), (talk,))


_OWN_FORMATS: tuple[tuple[tuple[str, ...], Callable[[str, Mapping[str, Any]], NamedFormat]], ...] = (
    (("prompt", "target", "stop"), TextFormat),
    (("system", "talk"), _chat),
    (("passage",), lambda name, given: PassageFormat(name, _several(given["passage"]))),
)
