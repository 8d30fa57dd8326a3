"""Token ids of prompts and targets, for causal models, encoder-decoders and classifiers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from mend_lightning.errors import ConfigError, TokenizerError, TruncationWarning
from mend_lightning.models.inputs.prompts import PromptFormat
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows, is_grouped, padded

ModelKind = Literal["causal", "encoder_decoder", "classifier"]
TRUE_LABELS = ("SUPPORTS", "TRUE", "YES", "1")
FALSE_LABELS = ("REFUTES", "FALSE", "NO", "0")


def model_kind(model: Any) -> ModelKind:
    """What kind of model this is, from its config and its output head.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> config = T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=16)
        >>> model_kind(T5ForConditionalGeneration(config))
        'encoder_decoder'
    """
    getter = getattr(model, "get_output_embeddings", None)
    if getter is None or getter() is None:
        return "classifier"
    return "encoder_decoder" if getattr(model.config, "is_encoder_decoder", False) else "causal"


@dataclass(frozen=True)
class Encoder:
    """Encodes (prompt, target) pairs as model inputs with aligned labels.

    The same code serves training, editing and evaluation. Rows are padded on the right here, whatever the
    tokenizer's padding side; a pad token is not needed.

    Args:
        tokenizer: a Hugging Face tokenizer.
        format: the text around questions and answers.
        kind: see `model_kind`.
        max_length: longest row in tokens. A prompt that does not fit loses its beginning (causal; BOS stays) or its
            end (encoders, as in the original), with a warning; a target is never cut: one that does not fit is an
            error. Only running text (`stop` is None), which has no end anyway, loses what does not fit, with a warning.
        decoder_start_token_id: of an encoder-decoder (`model.config.decoder_start_token_id`).
        pad_token_id: `model.config.pad_token_id`. Padding is never attended to, so any id would do, but for
            classifiers on decoders (GPT-2, Llama): they find a row's end by it.
        formats: other formats that rows can be asked in, by key (`prompt_formats`).
    """

    tokenizer: Any
    format: PromptFormat = PromptFormat()
    kind: ModelKind = "causal"
    max_length: int = 200
    decoder_start_token_id: int | None = None
    pad_token_id: int | None = None
    formats: Mapping[str, PromptFormat] = field(default_factory=dict, hash=False)

    @classmethod
    def for_model(
        cls, model: Any, tokenizer: Any, format: PromptFormat, max_length: int = 200, kind: ModelKind | None = None
    ) -> Encoder:
        """The encoder of a model; what depends on the model is read off its config."""
        config = getattr(model, "config", None)
        start, pad = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
        return cls(tokenizer, format, kind or model_kind(model), max_length, start, pad)

    def __post_init__(self) -> None:
        if self.kind == "encoder_decoder":
            self._decoder_start()
        if self.kind != "classifier" and self.format.stop == "" and self.tokenizer.eos_token_id is None:
            raise TokenizerError(
                f"{type(self.tokenizer).__name__} has no end-of-sequence token, so nothing would end an answer. "
                'Set a stop text (for example stop: "\\n"), or null for running text.'
            )

    def _decoder_start(self) -> int:
        if self.decoder_start_token_id is None:
            raise ConfigError("An encoder-decoder needs decoder_start_token_id (model.config.decoder_start_token_id).")
        return self.decoder_start_token_id

    def asking(self, key: str) -> Encoder:
        """The encoder of one of `formats`; "" is the format of this one.

        What a format puts before a question beyond what this one does comes on top of `max_length`.

        Raises:
            ConfigError: there is no such format here.
        """
        if not key:
            return self
        format = self.format_of(key)
        own, other = self.token_counts([self.format.prompt, format.prompt])
        return replace(self, format=format, max_length=self.max_length + max(0, other - own), formats={})

    def format_of(self, key: str) -> PromptFormat:
        """One of `formats`; "" is this encoder's own."""
        if key and key not in self.formats:
            raise ConfigError(
                f"The encoder has no format {key!r}; it has {', '.join(self.formats) or 'none but its own'}."
            )
        return self.formats[key] if key else self.format

    def rows(
        self, pairs: Sequence[tuple[str, str]], task: Sequence[int], tasks: int, formats: Sequence[str] = ()
    ) -> Rows:
        """Rows of (prompt, target) pairs.

        Args:
            pairs: what is asked and answered.
            task: of each pair, the task that it belongs to.
            tasks: how many there are.
            formats: of each pair, the format that it is asked in, see `asking`; empty: all in this encoder's own.
        """
        keys = tuple(formats) if any(formats) else ()
        encoders = {key: self.asking(key) for key in {*keys}}
        encoded = [encoders.get(key, self).pair(*pair) for key, pair in zip(keys or [""] * len(pairs), pairs)]
        names = [name for name in encoded[0] if name != "labels"]
        pad = {"input_ids": self.pad_token_id or 0}
        inputs = {name: padded([row[name] for row in encoded], pad.get(name, 0)) for name in names}
        labels = padded([row["labels"] for row in encoded], IGNORED_LABEL)
        grouped = is_grouped(task, tasks)
        texts = tuple((prompt, target) for prompt, target in pairs)
        return Rows(inputs, labels, torch.tensor(task), tasks, grouped, pad["input_ids"], texts, keys)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself: nothing stands around it, and nothing is cut."""
        sound = [_sound(text) for text in texts]
        return [len(ids) for ids in self.tokenizer(sound, add_special_tokens=False)["input_ids"]] if sound else []

    def pair(self, prompt: str, target: str) -> dict[str, list[int]]:
        """Unpadded model inputs and aligned labels of one pair."""
        if self.kind == "causal":
            return self._causal(prompt, target)
        ids = self.prompt_ids(prompt)
        inputs = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if self.kind == "classifier":
            return {**inputs, "labels": [_binary_label(target)]}
        labels = self.target_ids(prompt, target)
        decoder = [self._decoder_start(), *labels[:-1]]
        # A leading BOS (BART) is given by the decoding, not by the fact: it is not trained.
        bos = self.tokenizer.bos_token_id
        labels = [IGNORED_LABEL if i == 0 and label == bos else label for i, label in enumerate(labels)]
        masks = {"decoder_input_ids": decoder, "decoder_attention_mask": [1] * len(decoder)}
        return {**inputs, **masks, "labels": labels}

    def _causal(self, prompt: str, target: str) -> dict[str, list[int]]:
        target_ids = self.target_ids(prompt, target)
        prompt_ids = self._cut(self.prompt_ids(prompt), max(1, self.max_length - len(target_ids)))
        # The last target id is predicted and never read, so it is not an input.
        ids = [*prompt_ids, *target_ids[:-1]]
        labels = [IGNORED_LABEL] * (len(prompt_ids) - 1) + target_ids
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of the question as the model gets it."""
        text = _sound(self.format.question(prompt))
        ids = self.tokenizer(text)["input_ids"]
        if not ids:
            raise TokenizerError(f"The prompt {text!r} has no token.")
        if self.kind == "causal":
            # Some tokenizers end every text with EOS; a continuation must not start behind one that the format does not have.
            return ids[:-1] if len(ids) > 1 and self._ends_with_eos and ids[-1] == self.tokenizer.eos_token_id else ids
        return self._cut(ids, self.max_length)

    @cached_property
    def _ends_with_eos(self) -> bool:
        return self.tokenizer("a")["input_ids"][-1:] == [self.tokenizer.eos_token_id]

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """At most `length` of a prompt's ids, with a warning where some are lost."""
        if len(ids) <= length:
            return ids
        causal = self.kind == "causal"
        # The same text every time, so that Python shows it once and not for every record.
        warnings.warn(
            f"There are prompts that do not fit into max_length ({self.max_length} tokens, the answer included); they "
            f"lose their {'beginning' if causal else 'end'}. Raise max_length.",
            TruncationWarning,
            stacklevel=2,
        )
        if not causal:
            return [*ids[: length - 1], ids[-1]]
        # A model that was trained with BOS before every text answers badly without it.
        start = [ids[0]] if ids[0] == self.tokenizer.bos_token_id and length > 1 else []
        return [*start, *ids[len(ids) - length + len(start) :]]

    def target_ids(self, prompt: str, target: str) -> list[int]:
        """Ids of the answer with its stop, if there is one: what the model must predict."""
        if not target.strip():
            raise TokenizerError(f"The target of {prompt!r} is empty; it must hold at least one token.")
        _sound(target)
        ids = self._continuation(prompt, target) if self.kind == "causal" else self._decoder_target(target)
        if self.format.stop == "" and ids[-1] != self.tokenizer.eos_token_id:
            ids = [*ids, self.tokenizer.eos_token_id]
        if self.format.stop is None:
            return self._fitting(ids, prompt)
        if len(ids) >= self.max_length:
            raise TokenizerError(
                f"The target {target!r} has {len(ids)} tokens; max_length is {self.max_length}. Raise max_length."
            )
        return ids

    def _fitting(self, ids: list[int], prompt: str) -> list[int]:
        """As much of a running text as fits; behind its prompt where there is room (a paragraph's first word)."""
        if len(ids) < self.max_length:
            return ids
        warnings.warn(
            f"There are running texts that do not fit into max_length ({self.max_length} tokens); they lose their end. "
            "Raise max_length.",
            TruncationWarning,
            stacklevel=2,
        )
        before = len(self.tokenizer(self.format.question(prompt))["input_ids"]) if self.kind == "causal" else 1
        return ids[: max(1, self.max_length - before)]

    def _continuation(self, prompt: str, target: str) -> list[int]:
        """The target's ids as they stand behind the prompt (some tokenizers treat a text's start apart)."""
        answer = self.format.answer(target) + (self.format.stop or "")
        before = self.prompt_ids(prompt)
        whole = self.tokenizer(self.format.question(prompt) + answer)["input_ids"]
        if whole[: len(before)] == before:
            ids = whole[len(before) :]
            # Some tokenizers end every text with EOS; here the stop text is the end, or there is none.
            ids = self._without_eos(ids)
        else:
            ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not ids:
            raise TokenizerError(f"The target {target!r} has no token of its own behind the prompt {prompt!r}.")
        return ids

    def _without_eos(self, ids: list[int]) -> list[int]:
        return ids[:-1] if self.format.stop != "" and ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _decoder_target(self, target: str) -> list[int]:
        text = self.format.answer(target).strip() + (self.format.stop or "")
        ids = self.tokenizer(text_target=text)["input_ids"]
        ids = self._without_eos(ids) if self.format.stop is None else ids
        if not ids:
            raise TokenizerError(f"The target {target!r} has no token.")
        return ids


def _binary_label(target: str) -> int:
    """1 or 0 of a binary classifier's class name.

    Raises:
        TokenizerError: it is no class name.
    """
    name = target.strip().upper()
    if name not in TRUE_LABELS + FALSE_LABELS:
        raise TokenizerError(
            f"The target {target!r} is no class of a binary classifier. Expected one of "
            f"{', '.join(TRUE_LABELS)} (true) or {', '.join(FALSE_LABELS)} (false)."
        )
    return int(name in TRUE_LABELS)


def class_name(true: bool, like: str = TRUE_LABELS[0]) -> str:
    """A binary class in the words of another one: an answer or a prediction beside the edit's target.

    Example:
        >>> class_name(False, like="true"), class_name(True, like="REFUTES")
        ('FALSE', 'SUPPORTS')
    """
    name = like.strip().upper()
    names = TRUE_LABELS if name in TRUE_LABELS else FALSE_LABELS
    return (TRUE_LABELS if true else FALSE_LABELS)[names.index(name)]


def in_words(name: str, like: str) -> str:
    """A class that a classifier answered with (SUPPORTS or REFUTES) in the words and letters of another name.

    Example:
        >>> in_words("REFUTES", like="true"), in_words("SUPPORTS", like="REFUTES")
        ('false', 'SUPPORTS')
    """
    found = class_name(name == class_name(True), like)
    return found.lower() if like.strip().islower() else found


def _sound(text: str) -> str:
    """The text, which no tokenizer reads if it holds what bytes that are no UTF-8 became on their way in.

    Raises:
        TokenizerError: it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"The text {ascii(text)[:80]} is not valid Unicode (was it UTF-8?): {error.reason}."
        ) from error
    return text
