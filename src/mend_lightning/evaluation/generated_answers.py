"""The answers of edited models, judged; and one record per edit task for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.evaluation.evaluate import BatchScores
from mend_lightning.evaluation.metric_collection import reaches
from mend_lightning.evaluation.statistics import exact_match, token_f1
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.sharding.collectives import any_rank


def questions(batch: EditBatch) -> tuple[list[str], list[str], torch.Tensor]:
    """Prompts, targets and tasks of every `x_e` and then every rephrase of a batch."""
    edits = list(zip(batch.texts, batch.z_edit.task.tolist()))
    asked = [(text.prompt, text.target, task) for text, task in edits]
    asked += [(rephrase, text.target, task) for text, task in edits for rephrase in text.rephrases]
    prompts, targets, tasks = (list(column) for column in zip(*asked))
    return prompts, targets, torch.tensor(tasks)


def edited_answers(model: nn.Module, encoder: Encoder, batch: EditBatch, scores: BatchScores) -> list[str]:
    """Greedy answers of each task's edited model to its question and rephrases, ended by the natural stop.

    A row whose every target token, the stop included, is the most probable one given those before it is what
    greedy decoding says, so only the other rows are decoded. Where the format has no stop (running text), an answer is
    as many tokens as its target has: exact matches are then the right rows, but for near ties that bfloat16 rounds
    differently in a padded batch.

    Returns:
        Answers in the order of `questions`.
    """
    prompts, targets, tasks = questions(batch)
    right = torch.cat([scores.edit.correct_after, scores.rephrase.correct_after]).tolist()
    answers = list(targets)
    open_rows = [i for i, known in enumerate(right) if not known]
    if not open_rows and any_rank(bool(open_rows), model):
        # Other processes have answers to generate, and the model is sharded: this one must run with them.
        scores.edited.answers(model, encoder, prompts[:1], tasks[:1].to(scores.edit.task.device), [1])
    if open_rows:
        running = encoder.format.stop is None
        lengths = [len(encoder.target_ids(prompts[i], targets[i])) for i in open_rows] if running else None
        tasks = tasks[open_rows].to(scores.edit.task.device)
        texts = scores.edited.answers(model, encoder, [prompts[i] for i in open_rows], tasks, lengths)
        for i, text in zip(open_rows, texts):
            answers[i] = text
    return answers


def judge_answers(answers: Sequence[str], batch: EditBatch) -> tuple[list[bool], list[float]]:
    """Exact match and F1 of each answer, in the order of `questions`."""
    _, targets, _ = questions(batch)
    matches = [exact_match(answer, target) for answer, target in zip(answers, targets)]
    return matches, [token_f1(answer, target) for answer, target in zip(answers, targets)]


def task_records(
    batch: EditBatch,
    scores: BatchScores,
    answers: Sequence[str] | None,
    confidence: float | None = None,
    has_stop: bool = False,
) -> list[dict[str, Any]]:
    """One JSON-able record an edit: what was asked, what came out, and what else changed.

    Args:
        batch: the edit tasks.
        scores: from `evaluate_batch`.
        answers: from `edited_answers`; None: nothing was generated.
        confidence, has_stop: see `Scoreboard.update`.
    """
    records, asked, unrelated = [], 0, 0
    # As lists, once: each look at a tensor waits for its device.
    reliable, general = scores.edit.correct_after.tolist(), scores.rephrase.correct_after.tolist()
    known = [getattr(scores.locality, name).tolist() for name in ("correct_before", "correct_after")]
    kl = (scores.locality.kl / scores.locality.tokens).tolist()
    probability, end = scores.edit.probability_after.tolist(), scores.locality.end_before.tolist()
    confident = None if confidence is None else reaches(scores.edit, confidence).tolist()
    for i, text in enumerate(batch.texts):
        of_rephrases = slice(asked, asked + len(text.rephrases))
        of_locality = slice(unrelated, unrelated + len(text.locality))
        asked, unrelated = of_rephrases.stop, of_locality.stop
        record = {
            "prompt": text.prompt,
            "target": text.target,
            "answers": list(text.answers),
            "subject": text.subject,
            "relation": text.relation,
            "reliable": reliable[i],
            "probability": _rounded(probability[i]),
            "rephrases": list(text.rephrases),
            "general": general[of_rephrases],
            "locality": [list(pair) for pair in text.locality],
            "hard": text.hard,
            "known_before": known[0][of_locality],
            "known_after": known[1][of_locality],
            "kl": [round(value, 6) for value in kl[of_locality]],
        }
        if confident is not None:
            record["confident"] = confident[i]
        if has_stop:
            record["stop_probability"] = [_rounded(value) for value in end[of_locality]]
        if answers is not None:
            record["generated"] = [answers[i], *answers[len(batch.texts) :][of_rephrases]]
        records.append(record)
    return records


def _rounded(probability: float) -> float:
    """Four significant digits: a base gives an answer with probability 1e-7, not with 0."""
    return float(f"{probability:.4g}")
