"""Tiny bases with edits on them, made by editors with random weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from bases import FORMATS
from models import KINDS, spread_parameters
from torch import nn
from transformers.pytorch_utils import Conv1D

from mend_lightning import Edit, MendEditor, load_base, make_edit
from mend_lightning.making import editor_encoder

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
    changed = copy.deepcopy(model).double()
    modules = dict(changed.named_modules())
    for name, delta in edit.deltas.items():
        change = delta.dense()[0].double()
        modules[name].weight.data += change.T if isinstance(modules[name], Conv1D) else change
    return changed
