"""How many different rows a run asks for: tasks are drawn anew in every epoch, from finitely many."""

from __future__ import annotations

from mend_lightning.data.tasks import TaskSampler


def run_rows(sampler: TaskSampler, epochs: float, calibration: float, reads_answers: bool) -> tuple[float, float]:
    """How many rows a run asks for, and about how many different ones: the mean over its draws.

    Args:
        sampler: of the training tasks.
        epochs: of training.
        calibration: share of an epoch that the calibration looks at before: the tasks that training begins with.
        reads_answers: whether the trunk reads the answers: a causal model's does, an encoder's does not.
    """
    seen, records = max(epochs, calibration), sampler.records
    asked = len(records) * (1 + sampler.rephrases + sampler.locality)
    edits = sum(_edit_rows(sampler, number, seen, reads_answers) for number in range(len(records)))
    own = [(len(record.locality), min(sampler.locality, len(record.locality))) for record in records]
    brought = sum(coverage(choices, at_once, seen) for choices, at_once in own if choices)
    drawn = seen * sum(sampler.locality - at_once for _, at_once in own)
    phrasings = sum(1 if record.text else 1 + len(record.rephrases) for record in sampler.pool)
    unrelated = coverage(phrasings, 1, drawn) if drawn else 0.0
    if not reads_answers and drawn and sampler.pool[0] in records:
        # The edits' own questions, in the same words.
        unrelated *= 1 - min(1.0, edits / phrasings)
    return (epochs + calibration) * asked, edits + brought + unrelated


def _edit_rows(sampler: TaskSampler, number: int, seen: float, reads_answers: bool) -> float:
    """Different rows of `z_edit` and `x_in` that are made of one record."""
    record = sampler.records[number]
    targets = len(record.alternatives) if reads_answers else 1
    if record.text:
        # Beginnings are dropped at random.
        return coverage(targets, 1, seen) + seen * sampler.rephrases
    phrasings = max(1, len(record.rephrases))
    return coverage(targets, 1, seen) + coverage(targets * phrasings, min(phrasings, sampler.rephrases), seen)


def coverage(choices: float, at_once: float, draws: float) -> float:
    """How many of `choices` things were drawn, in the mean, by `draws` draws of `at_once` different ones each.

    Example:
        >>> coverage(3, 1, 0.5), coverage(3, 1, 1), round(coverage(3, 1, 2), 2), coverage(4, 4, 9)
        (0.5, 1, 1.67, 4.0)
    """
    if draws <= 1:
        return at_once * draws
    return choices * (1 - (1 - at_once / choices) ** draws)
