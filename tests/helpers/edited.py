"""Tiny bases with edits on them, made by editors with random weights; and the plainest way to ask a model."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import torch
from torch import nn

from helpers.bases import FORMATS
from helpers.edits import changed
from helpers.models import KINDS, spread_parameters
from mend_lightning import Edit, MendEditor, load_base, make_edit
from mend_lightning.editors.making import editor_encoder
from mend_lightning.models.forward.generation import MAX_NEW_TOKENS

FACT = ("Which continent is North Korea in?", "Oceania")
CLAIM = ("Which continent is North Korea in? Asia.", "REFUTES")


def tiny_edit(folder, family: str, size: float = 1.0, seed: int = 0, facts=None) -> SimpleNamespace:
    """The base of `base_folder(family)`, its tokenizer, an editor with random weights, an edit of it and an encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, tokenizer = load_base(str(folder), "float32")
        editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=0.05), 0.02)
    editor.bind(model, str(folder), vars(FORMATS[KINDS[family]]))
    facts = facts or [CLAIM if family == "bert" else FACT]
    edit = make_edit(editor, model, tokenizer, facts)
    edit = Edit({name: delta.scaled(size) for name, delta in edit.deltas.items()}, edit.about)
    encoder = editor_encoder(editor, model, tokenizer)
    return SimpleNamespace(model=model, tokenizer=tokenizer, editor=editor, edit=edit, encoder=encoder, facts=facts)


def dense_copy(model: nn.Module, edit: Edit) -> nn.Module:
    """A float64 copy of the model with W + ΔW in place of W."""
    return changed(copy.deepcopy(model).double(), edit)


class Plainly:
    """A model asked one question at a time, in the plainest way."""

    def __init__(self, family: str, model, tokenizer) -> None:
        self.kind, self.model, self.tokenizer = KINDS[family], copy.deepcopy(model).double(), tokenizer
        self.format = FORMATS[self.kind]

    def distribution(self, question: str, answer_ids: list[int]) -> torch.Tensor:
        """Probabilities of the token behind those of an answer so far."""
        ids = self.tokenizer(self.format.question(question))["input_ids"]
        with torch.no_grad():
            if self.kind == "causal":
                logits = self.model(input_ids=torch.tensor([ids + answer_ids])).logits[0, -1]
            elif self.kind == "encoder_decoder":
                start = [self.model.config.decoder_start_token_id]
                output = self.model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([start + answer_ids]))
                logits = output.logits[0, -1]
            else:
                true = self.model(input_ids=torch.tensor([ids])).logits[0, 0].sigmoid()
                return torch.stack([1 - true, true])
        return logits.softmax(-1)

    def stops(self, token: int) -> bool:
        text = self.tokenizer.decode([token])
        return token == self.tokenizer.eos_token_id or bool(self.format.stop) and self.format.stop in text

    def answer(self, question: str) -> str:
        if self.kind == "classifier":
            return ["REFUTES", "SUPPORTS"][int(self.distribution(question, []).argmax())]
        ids: list[int] = []
        for _ in range(MAX_NEW_TOKENS):
            ids.append(int(self.distribution(question, ids).argmax()))
            if self.stops(ids[-1]):
                break
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return (text.split(self.format.stop)[0] if self.format.stop else text).strip()

    def answer_ids(self, question: str, answer: str) -> list[int]:
        if self.kind == "classifier":
            return [int(answer == "SUPPORTS")]
        if self.kind == "encoder_decoder":
            return self.tokenizer(answer)["input_ids"]
        prompt = self.tokenizer(f"Q: {question}\nA:")["input_ids"]
        return self.tokenizer(f"Q: {question}\nA: {answer}\n")["input_ids"][len(prompt) :]

    def token_probabilities(self, question: str, answer: str) -> list[float]:
        ids = self.answer_ids(question, answer)
        return [float(self.distribution(question, ids[:i])[id]) for i, id in enumerate(ids)]

    def probability(self, question: str, answer: str) -> float:
        if not answer:
            stops = [i for i in range(len(self.tokenizer)) if self.stops(i)]
            return float(self.distribution(question, [])[stops].sum())
        return math.prod(self.token_probabilities(question, answer))
