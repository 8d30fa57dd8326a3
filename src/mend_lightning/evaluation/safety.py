"""Whether an edit is safe to keep: does it hold in other words, and does it leave alone what it has nothing to do with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from mend_lightning.edits.edit import Edit
from mend_lightning.edits.stack_state import question_key
from mend_lightning.errors import ConfigError
from mend_lightning.evaluation.neutral import neutral_questions
from mend_lightning.evaluation.shifts import Shift, answer_shifts
from mend_lightning.evaluation.statistics import exact_match
from mend_lightning.models.inputs.encoder import Encoder

# What an edit is asked for: where the wanted answer must come, and where the answer must stay.
MUST_CHANGE = ("edited", "rephrase")


@dataclass(frozen=True)
class Limits:
    """What an edit must reach to be kept.

    Attributes:
        min_success: share of edited questions and rephrases that get the new answer.
        min_kept: share of the other questions whose answer is not lost, of those that the base model is sure of.
        max_kl: KL(base ‖ edited) on the other questions, mean, in nats. Edits of the quickstart's editor cost about 0.01.
        sure: probability from which on the base model counts as sure of its own answer. One that it gives with less is
            hardly a belief, and changes at the slightest touch.
        falls: a changed answer counts as lost if its probability fell below this share of what it was. Where two answers are
            nearly as probable, the other one comes out at the slightest touch, rounding included.
    """

    min_success: float = 0.9
    min_kept: float = 0.95
    max_kl: float = 0.05
    sure: float = 0.2
    falls: float = 0.5

    def __post_init__(self) -> None:
        for name in ("min_success", "min_kept", "sure", "falls"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share or a probability, 0 to 1; it is {getattr(self, name)}.")
        if not self.max_kl >= 0:
            raise ConfigError(f"max_kl must not be negative; it is {self.max_kl}.")


@dataclass(frozen=True)
class EditCheck:
    """What an edit does where it should and where it should not.

    Attributes:
        success: share of edited questions and rephrases that the edited model answers with the target (greedy, exact).
        kept: share of the other questions, of those the base is sure of, whose answer is not lost.
        sure: number of questions that `kept` is a share of.
        kl_mean, kl_max: KL(base ‖ edited) of all other questions.
        others: "given", or "neutral" for the shipped questions.
        reasons: why the edit is not safe; empty where it is.
        remarks: what the check could not see.
        limits: what it was held against.
        shifts: every question with its answers and their probabilities.
        failed: edited questions and rephrases that do not get the target.
    """

    success: float
    kept: float
    sure: int
    kl_mean: float
    kl_max: float
    others: Literal["given", "neutral"]
    reasons: tuple[str, ...]
    remarks: tuple[str, ...]
    limits: Limits
    shifts: tuple[Shift, ...]
    failed: tuple[str, ...]

    @property
    def safe(self) -> bool:
        return not self.reasons

    @property
    def moved(self) -> list[Shift]:
        """The other questions whose answer changed, the largest move first."""
        others = (shift for shift in self.shifts if shift.kind not in MUST_CHANGE and shift.changed)
        return sorted(others, key=lambda shift: -shift.size)

    def as_dict(self) -> dict[str, Any]:
        """The numbers, the reasons and what went wrong, as builtins small enough for an edit's file."""
        changed = [{"question": each.question, "old": each.old, "new": each.new} for each in self.moved]
        counts = {
            kind: sum(each.kind == kind for each in self.shifts) for kind in dict.fromkeys(e.kind for e in self.shifts)
        }
        return {
            "safe": self.safe, "success": self.success, "kept": self.kept, "kept_of": self.sure, "kl_mean": self.kl_mean,
            "kl_max": self.kl_max, "others": self.others, "questions": counts, "reasons": list(self.reasons),
            "remarks": list(self.remarks), "failed": list(self.failed), "changed": changed, "limits": asdict(self.limits),
        }  # fmt: skip


def check_edit(
    model: nn.Module,
    encoder: Encoder,
    edit: Edit,
    rephrases: Sequence[str] = (),
    unrelated: Sequence[str] = (),
    neighbours: Sequence[str] = (),
    limits: Limits = Limits(),
    batch_size: int = 32,
) -> EditCheck:
    """Asks an edited model what must have changed and what must not.

    Args:
        model: the base model, in eval mode, without the edit.
        encoder: the prompt format and tokenizer that the edit was made with.
        edit: what is checked; its own facts are asked too.
        rephrases: other phrasings of its questions, which must get a target as well.
        unrelated: questions whose answers must stay; where neither these nor neighbours are given, the shipped neutral ones.
        neighbours: likewise, near the edited fact.
        limits: what the edit must reach.
        batch_size: questions in one pass.

    Raises:
        ConfigError: the edit does not say what it changes, or a classifier is to be checked without statements that must
            stay (the shipped questions are none).
    """
    targets = {fact["prompt"]: fact["target"] for fact in edit.about.get("edits", [])}
    if not targets:
        raise ConfigError("The edit does not say which facts it changes (about['edits']), so it cannot be checked.")
    neutral = not unrelated and not neighbours
    if neutral and encoder.kind == "classifier":
        raise ConfigError(
            "The shipped neutral questions are no statements that a classifier could judge. Give some whose verdict must "
            "stay (--unrelated+)."
        )
    asked = [*(("edited", question) for question in targets), *(("rephrase", question) for question in rephrases)]
    others = (
        _neutral(targets, rephrases)
        if neutral
        else [*(("unrelated", q) for q in unrelated), *(("neighbour", q) for q in neighbours)]
    )
    kinds, questions = zip(*asked, *others)
    shifts = answer_shifts(model, encoder, questions, edit, kinds, next(iter(targets.values())), batch_size)
    return judged(shifts, targets, limits, "neutral" if neutral else "given")


def _neutral(targets: dict[str, str], rephrases: Sequence[str]) -> list[tuple[str, str]]:
    """The shipped questions but those that the edit is about."""
    own = {question_key(question) for question in (*targets, *rephrases)}
    return [("neutral", question) for question in neutral_questions() if question_key(question) not in own]


def judged(
    shifts: Sequence[Shift], targets: dict[str, str], limits: Limits, others: Literal["given", "neutral"] = "given"
) -> EditCheck:
    """The verdict on shifts.

    Args:
        shifts: of kind "edited" and "rephrase" where the answer must change, of any other kind where it must stay; at least
            one of both.
        targets: edited question -> wanted answer. A rephrase does not say of which, so any of them will do.
        limits: what the edit must reach.
        others: where the questions come from whose answers must stay.
    """
    wanted = [shift for shift in shifts if shift.kind in MUST_CHANGE]
    elsewhere = [shift for shift in shifts if shift.kind not in MUST_CHANGE]
    failed = tuple(shift.question for shift in wanted if not reached(shift, targets))
    sure = [shift for shift in elsewhere if shift.p_old_before >= limits.sure]
    remarks = tuple(_remarks(wanted, sure))
    sure = sure or elsewhere
    success = 1 - len(failed) / len(wanted)
    kept = sum(not lost(shift, limits.falls) for shift in sure) / len(sure)
    kl = [shift.kl for shift in elsewhere]
    mean = sum(kl) / len(kl)
    reasons = tuple(_reasons(success, kept, mean, len(wanted), len(sure), limits))
    return EditCheck(success, kept, len(sure), mean, max(kl), others, reasons, remarks, limits, tuple(shifts), failed)


def lost(shift: Shift, falls: float) -> bool:
    """Whether another answer is given, and the old one is no longer nearly as probable as it was.

    Example:
        >>> near_tie = Shift("5 times 5?", "neutral", "25", "15", 0.25, 0.21, 0.13, 0.16, 0.01)
        >>> damage = Shift("End of World War II?", "neutral", "1945", "1939", 0.65, 0.28, 0.0, 0.3, 0.1)
        >>> lost(near_tie, 0.5), lost(damage, 0.5)
        (False, True)
    """
    # `not >=`: a NaN is a loss.
    return shift.changed and not shift.p_old_after >= falls * shift.p_old_before


def reached(shift: Shift, targets: dict[str, str]) -> bool:
    """Whether an edited question or a rephrase got the wanted answer."""
    wanted = [targets[shift.question]] if shift.kind == "edited" else targets.values()
    return any(exact_match(shift.new, target) for target in wanted)


def _remarks(wanted: Sequence[Shift], sure: Sequence[Shift]) -> Iterator[str]:
    if all(shift.kind == "edited" for shift in wanted):
        yield "No rephrase was given, so whether the edit holds in other words is not known."
    if not sure:
        yield "The base model is sure of none of its answers to the other questions; all of them were counted."


def _reasons(success: float, kept: float, kl: float, wanted: int, sure: int, limits: Limits) -> Iterator[str]:
    if success < limits.min_success:
        yield (
            f"{round(success * wanted)} of {wanted} edited questions and rephrases get the new answer ({success:.2f}; at least "
            f"{limits.min_success:g} must)."
        )
    if kept < limits.min_kept:
        yield f"{round(kept * sure)} of {sure} other answers stay ({kept:.3f}; at least {limits.min_kept:g} must)."
    # `not <=`: a NaN is not safe.
    if not kl <= limits.max_kl:
        yield f"The answers to other questions move by {kl:.3g} nats on average (KL; at most {limits.max_kl:g} may be)."
