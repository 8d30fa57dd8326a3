"""The answers of edited models, judged; and one record per edit task for the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mend_lightning.data.batch import EditBatch
from mend_lightning.edits.provenance import four_digits
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


def question_formats(batch: EditBatch) -> list[str]:
    """The formats in which `questions` are asked, in their order."""
    own = [("",) * len(text.rephrases) for text in batch.texts]
    rephrases = (text.rephrase_formats or none for text, none in zip(batch.texts, own))
    return [*(text.format for text in batch.texts), *(key for keys in rephrases for key in keys)]


def asked_by_format(
    model: nn.Module,
    encoder: Encoder,
    formats: Sequence[str],
    chosen: Sequence[int],
    ask: Callable[[Encoder, Sequence[int]], list[str]],
) -> dict[int, str]:
    """Answers to some of several questions, those of one format together.

    Args:
        model: that is asked.
        encoder: with the formats.
        formats: of each question.
        chosen: which questions are asked.
        ask: an encoder, and which questions -> their answers.

    Returns:
        Number of a question -> its answer.
    """
    answers: dict[int, str] = {}
    for key in ("", *encoder.formats):
        some = [i for i in chosen if formats[i] == key]
        # Other processes may have answers to generate, and share the model: then this one must run with them.
        if any_rank(bool(some), model):
            answers |= zip(some, ask(encoder.asking(key), some or [0]))
    return answers


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

    def ask(asking: Encoder, some: Sequence[int]) -> list[str]:
        running = asking.format.stop is None
        lengths = [len(asking.target_ids(prompts[i], targets[i])) for i in some] if running else None
        of_rows = tasks[list(some)].to(scores.edit.task.device)
        return scores.edited.answers(model, asking, [prompts[i] for i in some], of_rows, lengths)

    for i, text in asked_by_format(model, encoder, question_formats(batch), open_rows, ask).items():
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
            "probability": four_digits(probability[i]),
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
            record["stop_probability"] = [four_digits(value) for value in end[of_locality]]
        if text.format:
            formats = {"x_e": text.format, "rephrases": text.rephrase_formats, "locality": text.locality_formats}
            record["formats"] = {name: keys if isinstance(keys, str) else list(keys) for name, keys in formats.items()}
        if answers is not None:
            record["generated"] = [answers[i], *answers[len(batch.texts) :][of_rephrases]]
        records.append(record)
    return records
