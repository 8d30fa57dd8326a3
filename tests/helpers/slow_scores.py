"""Scores and answers of an edited model the slow way: one row at a time, dense weights, plain greedy decoding."""

from __future__ import annotations

import torch
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from helpers.edits import compute_deltas
from mend_lightning.models.forward.generation import MAX_NEW_TOKENS
from mend_lightning.models.inputs.rows import Rows

AFTER = ("correct_after", "nll_after", "tokens", "hits")
BEFORE = ("correct_before", "nll_before", "agreement", "kl", "end_before")
FIELDS = {"z_edit": AFTER, "x_in": AFTER, "x_out": (*AFTER, *BEFORE)}


def one_task(rows: Rows, task: int) -> Rows:
    """The rows of a task, as the only one."""
    index = (rows.task == task).nonzero().flatten()
    inputs = {name: value[index] for name, value in rows.inputs.items()}
    return Rows(inputs, rows.labels[index], torch.zeros(len(index), dtype=torch.long), 1)


def dense_weights(model, layers, deltas, task: int = 0) -> dict[str, torch.Tensor]:
    """W + ΔW of every edited layer."""
    weights = {}
    for name, delta in deltas.items():
        change = delta.dense()[task].to(layers[name].weight.dtype)
        weights[f"{name}.weight"] = layers[name].weight + (change.T if isinstance(layers[name], Conv1D) else change)
    return weights


def slow_scores(model, editor, batch, name: str) -> list[dict]:
    """Every row of one set, scored alone: a model copy per edit, a loop over positions."""
    layers, found = editor.modules_in(model), []
    for row in range(len(getattr(batch, name))):
        task = int(getattr(batch, name).task[row])
        with torch.no_grad():
            weights = dense_weights(model, layers, compute_deltas(model, editor, one_task(batch.z_edit, task)))
            inputs = {key: value[row : row + 1] for key, value in getattr(batch, name).inputs.items()}
            logits = [functional_call(model, w, args=(), kwargs=inputs).logits[0] for w in ({}, weights)]
        labels = getattr(batch, name).labels[row].tolist()
        found.append(position_scores(*logits, labels))
    return found


def position_scores(before: torch.Tensor, after: torch.Tensor, labels: list[int]) -> dict:
    if before.shape == (1,):
        # A classifier's logit is that of the true class.
        before, after = (torch.stack([torch.zeros_like(logit), logit], -1) for logit in (before, after))
    scores = dict.fromkeys(FIELDS["x_out"], 0.0)
    scores["correct_before"] = scores["correct_after"] = True
    for position, label in enumerate(labels):
        if label == -100:
            continue
        p, q = F.log_softmax(before[position].double(), -1), F.log_softmax(after[position].double(), -1)
        scores["correct_before"] &= int(p.argmax()) == label
        scores["correct_after"] &= int(q.argmax()) == label
        scores["nll_before"] -= float(p[label])
        scores["nll_after"] -= float(q[label])
        scores["tokens"] += 1
        scores["hits"] += int(q.argmax()) == label
        scores["agreement"] += int(p.argmax()) == int(q.argmax())
        scores["kl"] += float((p.exp() * (p - q)).sum())
        # The last one stays.
        scores["end_before"] = float(p[label].exp())
    return scores


def plain_greedy(model, weights, encoder, prompt: str) -> str:
    """One question, one token at a time, no cache, no padding."""
    tokenizer, ids = encoder.tokenizer, torch.tensor([encoder.prompt_ids(prompt)])
    decoder = torch.tensor([[encoder.decoder_start_token_id or 0]])
    said: list[int] = []
    while len(said) < MAX_NEW_TOKENS:
        inputs = {"input_ids": ids} if encoder.kind == "causal" else {"input_ids": ids, "decoder_input_ids": decoder}
        with torch.no_grad():
            token = functional_call(model, weights, args=(), kwargs=inputs).logits[0, -1].argmax().view(1, 1)
        text = tokenizer.decode(token[0])
        if int(token) == tokenizer.eos_token_id or (encoder.format.stop and encoder.format.stop in text):
            break
        said.append(int(token))
        ids = torch.cat([ids, token], 1) if encoder.kind == "causal" else ids
        decoder = torch.cat([decoder, token], 1)
    return tokenizer.decode(said, skip_special_tokens=True).strip()
