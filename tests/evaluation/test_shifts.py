"""What an edit did to each question, against a plain loop: one question at a time, no padding, float64, dense weights."""

from __future__ import annotations

import contextlib
import json
from itertools import count

import pytest
import torch
from helpers.edited import FACT, Plainly, dense_copy, tiny_edit
from helpers.models import KINDS

from mend_lightning.errors import ConfigError, TokenizerError
from mend_lightning.evaluation.answer_probabilities import answer_nll, answer_rows
from mend_lightning.evaluation.shifts import Shift, answer_shifts, next_token_shifts, token_shifts
from mend_lightning.models.forward.logits import logits_at, row_of

pytest_plugins = ["helpers.bases"]
FAMILIES = ["llama", "gpt2", "t5", "bart", "bert"]
# How large the edits are: some answers change and some stay (but BART, which learned nothing, changes them all).
SIZE = {"llama": 2.0, "gpt2": 0.5, "t5": 0.5, "bart": 1.0, "bert": 1.0}


def questions(facts, kind: str) -> list[str]:
    prefix = "claims_" if kind == "classifier" else ""
    lines = (facts / f"{prefix}test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["input"] for line in lines]


def close(actual, expected) -> bool:
    return actual == pytest.approx(expected, rel=2e-4, abs=1e-7)


@pytest.fixture(scope="module")
def made(base_folder):
    kept = {}

    def make(family: str):
        if family not in kept:
            each = tiny_edit(base_folder(family), family, SIZE[family])
            each.base = Plainly(family, each.model, each.tokenizer)
            each.after = Plainly(family, dense_copy(each.model, each.edit), each.tokenizer)
            kept[family] = each
        return kept[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_probabilities_are_those_of_a_plain_loop(family, made, facts):
    each = made(family)
    asked = questions(facts, KINDS[family])
    shifts = answer_shifts(each.model, each.encoder, asked, each.edit, batch_size=3)
    assert [shift.question for shift in shifts] == asked
    for shift in shifts:
        if family != "bart":
            # transformers' BART ends an answer that is too long with a token of its own.
            assert (shift.old, shift.new) == (each.base.answer(shift.question), each.after.answer(shift.question))
        for answer, before, after in (
            (shift.old, shift.p_old_before, shift.p_old_after),
            (shift.new, shift.p_new_before, shift.p_new_after),
        ):
            assert close(before, each.base.probability(shift.question, answer))
            assert close(after, each.after.probability(shift.question, answer))
        assert shift.changed == (shift.old != shift.new)
    if family != "bart":
        assert {shift.changed for shift in shifts} == {True, False}, "the edit changes some answers and leaves others"


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence(family, made, facts):
    each = made(family)
    for shift in answer_shifts(each.model, each.encoder, questions(facts, KINDS[family]), each.edit):
        ids = each.base.answer_ids(shift.question, shift.old) if shift.old else [0]
        expected = []
        for i in range(len(ids) if KINDS[family] != "classifier" else 1):
            p, q = (model.distribution(shift.question, ids[:i]) for model in (each.base, each.after))
            expected.append(float((p * (p / q).log()).sum()))
        assert shift.kl == pytest.approx(sum(expected) / len(expected), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_an_answer(family, made, facts):
    each = made(family)
    question = questions(facts, KINDS[family])[0]
    answer = "SUPPORTS" if family == "bert" else "Asia"
    tokens = token_shifts(each.model, each.encoder, question, answer, each.edit)
    assert [token.id for token in tokens] == each.base.answer_ids(question, answer)
    assert close([token.before for token in tokens], each.base.token_probabilities(question, answer))
    assert close([token.after for token in tokens], each.after.token_probabilities(question, answer))
    if family == "llama":
        assert "".join(token.token for token in tokens) == " Asia\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_likeliest_next_tokens(family, made, facts):
    each = made(family)
    question = questions(facts, KINDS[family])[1]
    tokens = next_token_shifts(each.model, each.encoder, question, each.edit, top=4)
    before, after = (model.distribution(question, []) for model in (each.base, each.after))
    wanted = {int(i) for p in (before, after) for i in p.topk(min(4, len(p))).indices}
    assert {token.id for token in tokens} == wanted
    for token in tokens:
        assert close((token.before, token.after), (float(before[token.id]), float(after[token.id])))
    highest = [max(token.before, token.after) for token in tokens]
    assert highest == sorted(highest, reverse=True)
    if family == "bert":
        assert {token.token for token in tokens} == {"SUPPORTS", "REFUTES"}


def test_edits_may_be_anything_that_can_be_applied(made, facts):
    each = made("llama")
    asked = questions(facts, "causal")
    one = answer_shifts(each.model, each.encoder, asked, each.edit)
    assert answer_shifts(each.model, each.encoder, asked, each.edit.applied) == one
    assert answer_shifts(each.model, each.encoder, asked, [each.edit.applied]) == one
    twice = dense_copy(dense_copy(each.model, each.edit), each.edit)
    plain = Plainly("llama", twice, each.tokenizer)
    for shift in answer_shifts(each.model, each.encoder, asked, [each.edit, each.edit]):
        assert close(shift.p_old_after, plain.probability(shift.question, shift.old))
    nothing = answer_shifts(each.model, each.encoder, asked, [])
    assert all(shift.size == shift.kl == 0 and not shift.changed for shift in nothing)


def test_an_edited_model_that_says_nothing(made, facts):
    """A hook in place of an edit makes the model stop at once: the new answer is empty, and its probability that of a stop."""
    each = made("llama")
    stop = each.tokenizer("\n")["input_ids"][-1]

    @contextlib.contextmanager
    def silenced(model):
        hook = model.lm_head.register_forward_hook(lambda module, args, output: output + _only(output, stop, 100.0))
        yield
        hook.remove()

    shifts = answer_shifts(each.model, each.encoder, questions(facts, "causal"), silenced)
    for shift in shifts:
        assert shift.new == "" and shift.changed
        assert shift.p_new_after == pytest.approx(1.0)
        assert close(shift.p_new_before, each.base.probability(shift.question, ""))


def _only(like: torch.Tensor, index: int, value: float) -> torch.Tensor:
    offset = torch.zeros(like.shape[-1])
    offset[index] = value
    return offset


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_empty_answer_among_others(family, made, facts):
    each = made(family)
    asked = list(zip(questions(facts, KINDS[family]), ["", "Asia", ""]))
    rows, mask, empty = answer_rows(each.encoder, asked, torch.device("cpu"))
    row = row_of(mask)
    nll = answer_nll(logits_at(each.model, rows, mask), rows.labels[mask], empty[row], each.encoder)
    for i, (question, answer) in enumerate(asked):
        assert close(float(nll[row == i].sum().neg().exp()), each.base.probability(question, answer))


def test_the_model_is_left_as_it_was(made, facts):
    each = made("llama")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in each.model.modules())
    with pytest.raises(ZeroDivisionError):
        answer_shifts(each.model, each.encoder, questions(facts, "causal"), [each.edit, lambda model: 1 / 0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in each.model.modules())


def test_kinds_and_sizes(made, facts):
    each = made("llama")
    shifts = answer_shifts(each.model, each.encoder, [FACT[0], "Where?"], each.edit, ["edited", "unrelated"])
    assert [shift.kind for shift in shifts] == ["edited", "unrelated"]
    numbers = count(1)
    shift = Shift("a", "", "x", "y", *(next(numbers) / 10 for _ in range(4)), 0.0)
    assert shift.size == pytest.approx(0.1) and shift.as_dict()["changed"] is True
    assert Shift("a", "", "x", "x", 0.9, 0.2, 0.9, 0.2, 0.0).size == pytest.approx(0.7)
    assert json.loads(json.dumps(shift.as_dict())) == shift.as_dict()


def test_classes_in_the_words_of_the_edit(made, facts):
    each = made("bert")
    asked = questions(facts, "classifier")
    plain = answer_shifts(each.model, each.encoder, asked, each.edit)
    named = answer_shifts(each.model, each.encoder, asked, each.edit, like="true")
    words = {"SUPPORTS": "true", "REFUTES": "false"}
    assert [(shift.old, shift.new) for shift in named] == [(words[shift.old], words[shift.new]) for shift in plain]


def test_what_is_refused(made):
    each = made("llama")
    with pytest.raises(ConfigError, match="2 questions have 1 kinds"):
        answer_shifts(each.model, each.encoder, ["a", "b"], each.edit, ["edited"])
    with pytest.raises(ConfigError, match="batch_size must be at least 1, not 0"):
        answer_shifts(each.model, each.encoder, ["a"], each.edit, batch_size=0)
    with pytest.raises(ConfigError, match="top must be at least 1, not 0"):
        next_token_shifts(each.model, each.encoder, "a", each.edit, top=0)
    with pytest.raises(TokenizerError, match="target of 'a' is empty"):
        token_shifts(each.model, each.encoder, "a", " ", each.edit)
    assert answer_shifts(each.model, each.encoder, [], each.edit) == []
