"""The verdict on an edit: what is counted, what it is held against, and what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.edited import FACT, tiny_edit

from mend_lightning import Edit
from mend_lightning.errors import ConfigError
from mend_lightning.evaluation.neutral import neutral_questions, neutral_records
from mend_lightning.evaluation.safety import Limits, check_edit, judged
from mend_lightning.evaluation.shifts import Shift, answer_shifts

pytest_plugins = ["helpers.bases"]
TARGETS = {"q": "new"}


def shift(
    kind: str, old: str = "old", new: str = "old", p: float = 0.8, kl: float = 0.01, question: str = "q"
) -> Shift:
    after = p if new == old else p / 4
    return Shift(question, kind, old, new, p, after, 0.0, 0.5, kl)


EDITED, REPHRASED, STAYS = shift("edited", new="new"), shift("rephrase", new=" new"), shift("unrelated")


def test_a_good_edit_is_safe():
    check = judged([EDITED, REPHRASED, STAYS], TARGETS, Limits())
    assert check.safe and check.reasons == check.remarks == check.failed == ()
    assert (check.success, check.kept, check.sure, check.kl_mean, check.kl_max) == (1.0, 1.0, 1, 0.01, 0.01)


@pytest.mark.parametrize(
    "shifts, reason",
    [
        (
            [EDITED, shift("rephrase", new="other"), STAYS],
            r"1 of 2 edited questions and rephrases .*0.50; at least 0.9",
        ),
        ([shift("edited"), STAYS], r"0 of 1 edited"),
        ([EDITED, REPHRASED, STAYS, shift("neighbour", new="x")], r"1 of 2 other answers stay \(0.500; at least 0.95"),
        ([EDITED, REPHRASED, shift("neutral", kl=0.3), shift("neutral", kl=0.1)], r"move by 0.2 nats on average"),
        ([EDITED, REPHRASED, shift("neutral", kl=math.nan)], r"move by nan nats"),
    ],
)
def test_why_an_edit_is_not_safe(shifts, reason):
    check = judged(shifts, TARGETS, Limits())
    assert not check.safe and len(check.reasons) == 1
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(check.reasons[0])


def test_only_answers_that_the_base_is_sure_of_count_as_kept():
    unsure = [shift("neutral", new="x", p=0.19, question=str(i)) for i in range(5)]
    check = judged([EDITED, REPHRASED, *unsure, shift("neutral", p=0.2)], TARGETS, Limits())
    assert (check.kept, check.sure, check.safe) == (1.0, 1, True)
    assert [each.question for each in check.moved] == ["0", "1", "2", "3", "4"], "they are named all the same"
    check = judged([EDITED, REPHRASED, *unsure, shift("neutral", p=0.2)], TARGETS, Limits(sure=0.1))
    assert (check.sure, check.safe) == (6, False)
    assert check.kept == pytest.approx(1 / 6)


def test_a_near_tie_is_not_lost():
    """Another answer came out, and the old one is nearly as probable as before; a halved one is lost, whatever came out."""
    tie = replace(shift("neutral", new="x"), p_old_after=0.41)
    assert judged([EDITED, REPHRASED, tie], TARGETS, Limits()).kept == 1.0
    assert judged([EDITED, REPHRASED, replace(tie, p_old_after=0.39)], TARGETS, Limits()).kept == 0.0
    assert judged([EDITED, REPHRASED, tie], TARGETS, Limits(falls=0.9)).kept == 0.0
    assert judged([EDITED, REPHRASED, replace(tie, p_old_after=math.nan)], TARGETS, Limits()).kept == 0.0
    assert judged([EDITED, REPHRASED, replace(tie, new="old", p_old_after=0.1)], TARGETS, Limits()).kept == 1.0


def test_remarks():
    check = judged([EDITED, shift("neutral", p=0.1)], TARGETS, Limits())
    assert check.safe and check.sure == 1
    assert "No rephrase was given" in check.remarks[0] and "sure of none" in check.remarks[1]


def test_limits_are_arguments():
    shifts = [EDITED, shift("rephrase", new="x"), STAYS, shift("neutral", new="x", kl=0.2)]
    assert len(judged(shifts, TARGETS, Limits()).reasons) == 3
    assert judged(shifts, TARGETS, Limits(min_success=0.5, min_kept=0.5, max_kl=0.2)).safe
    for wrong in (
        {"min_success": 1.1},
        {"min_kept": -0.1},
        {"sure": 2.0},
        {"falls": 2.0},
        {"max_kl": -1.0},
        {"max_kl": math.nan},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Limits(**wrong)


def test_what_goes_into_the_file():
    check = judged([EDITED, shift("rephrase", new="x", question="r"), shift("neutral", new="y")], TARGETS, Limits())
    said = check.as_dict()
    assert json.loads(json.dumps(said)) == said
    assert (said["safe"], said["success"], said["kept"], said["kept_of"]) == (False, 0.5, 0.0, 1)
    assert said["failed"] == ["r"] and said["changed"] == [{"question": "q", "old": "old", "new": "y"}]
    assert said["questions"] == {"edited": 1, "rephrase": 1, "neutral": 1}
    assert said["limits"] == {"min_success": 0.9, "min_kept": 0.95, "max_kl": 0.05, "sure": 0.2, "falls": 0.5}


def test_a_check_of_given_questions(base_folder):
    made = tiny_edit(base_folder("llama"), "llama", 2.0)
    rephrases, unrelated, neighbours = ["What continent is North Korea on?"], ["Where?"], ["Who?", "Why?"]
    check = check_edit(made.model, made.encoder, made.edit, rephrases, unrelated, neighbours)
    kinds = ["edited", "rephrase", "unrelated", "neighbour", "neighbour"]
    assert [each.kind for each in check.shifts] == kinds and check.others == "given"
    expected = answer_shifts(made.model, made.encoder, [FACT[0], *rephrases, *unrelated, *neighbours], made.edit, kinds)
    assert list(check.shifts) == expected
    assert check.kl_mean == pytest.approx(sum(each.kl for each in expected[2:]) / 3)
    assert check.success == sum(each.new == FACT[1] for each in expected[:2]) / 2


def test_without_other_questions_the_shipped_ones_are_asked(base_folder, monkeypatch):
    made = tiny_edit(base_folder("llama"), "llama", 0.0)
    shipped = ["Where?", "which continent is NORTH Korea in", "Who?"]
    monkeypatch.setattr("mend_lightning.evaluation.safety.neutral_questions", lambda: shipped)
    check = check_edit(made.model, made.encoder, made.edit)
    asked = [(each.kind, each.question) for each in check.shifts]
    assert asked == [("edited", FACT[0]), ("neutral", "Where?"), ("neutral", "Who?")], "not the edited one once more"
    assert (check.kept, check.kl_mean, check.others) == (1.0, 0.0, "neutral")
    assert check.success == 0 and not check.safe, "an edit that does nothing"


def test_what_cannot_be_checked(base_folder):
    made = tiny_edit(base_folder("bert"), "bert")
    with pytest.raises(ConfigError, match="no statements that a classifier could judge"):
        check_edit(made.model, made.encoder, made.edit)
    assert check_edit(made.model, made.encoder, made.edit, unrelated=["Paris is a city."]).shifts
    with pytest.raises(ConfigError, match="does not say which facts"):
        check_edit(made.model, made.encoder, Edit(made.edit.deltas))


def test_the_shipped_questions():
    records = neutral_records()
    questions = neutral_questions()
    assert questions == [record["question"] for record in records]
    assert 100 <= len(set(questions)) == len(questions) <= 200
    assert len({record["field"] for record in records}) > 10
    for record in records:
        assert record.keys() == {"question", "answer", "field"} and all(text.strip() for text in record.values())
        assert record["question"].endswith("?")
        words = set(record["question"].lower().split())
        assert not words & {"capital", "country", "continent", "currency", "nation"}, "what world_facts edits"


def test_no_gradient_is_left(base_folder):
    made = tiny_edit(base_folder("llama"), "llama")
    check_edit(made.model, made.encoder, made.edit, unrelated=["Where?"])
    assert all(parameter.grad is None for parameter in made.model.parameters()) and torch.is_grad_enabled()
