"""Scores and answers of edited models, against one edit at a time with dense weights and plain greedy decoding."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers.bases import FORMATS, assert_same_state, state_copy
from helpers.edits import compute_deltas
from helpers.models import KINDS, make_batch, make_rows, spread_parameters, tiny_model
from helpers.slow_scores import FIELDS, dense_weights, one_task, plain_greedy, slow_scores
from torch.func import functional_call
from torch.nn import functional as F

from mend_lightning import MendEditor, load_base
from mend_lightning.data.batch import collate_tasks
from mend_lightning.evaluation.evaluate import RowScores, evaluate_batch
from mend_lightning.evaluation.generated_answers import edited_answers, judge_answers, questions, task_records
from mend_lightning.models.forward.generation import MAX_NEW_TOKENS, generate_answers
from mend_lightning.models.inputs.encoder import Encoder

pytest_plugins = ["helpers.bases"]


def with_right_answers(model, editor, batch):
    """Random labels are never right; every other row of `x_in` and `x_out` gets the (edited, base) model's own."""
    layers = editor.modules_in(model)
    changed = {}
    for name in ("x_in", "x_out"):
        rows = getattr(batch, name)
        labels = rows.labels.clone()
        for row in range(0, len(rows), 2):
            deltas = compute_deltas(model, editor, one_task(batch.z_edit, int(rows.task[row])))
            weights = dense_weights(model, layers, deltas) if name == "x_in" else {}
            inputs = {key: value[row : row + 1] for key, value in rows.inputs.items()}
            logits = functional_call(model, weights, args=(), kwargs=inputs).logits[0]
            best = (logits > 0).long() if logits.shape == (1,) else logits.argmax(-1)
            labels[row] = torch.where(labels[row] == -100, labels[row], best)
        changed[name] = replace(rows, labels=labels)
    return replace(batch, **changed)


@pytest.mark.parametrize("edits", [1, 2])
def test_independent_edits_at_once_are_one_edit_at_a_time(family, edits):
    model = tiny_model(family)
    editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=0.05), 0.02).eval()
    batch = with_right_answers(model, editor, make_batch(family, tasks=3, edits=edits))
    base = state_copy(model)
    scores = evaluate_batch(model, editor, batch)
    assert_same_state(state_copy(model), base)
    for name, actual in (("z_edit", scores.edit), ("x_in", scores.rephrase), ("x_out", scores.locality)):
        expected = slow_scores(model, editor, batch, name)
        assert torch.equal(actual.task, getattr(batch, name).task)
        for field in FIELDS[name]:
            values = [row[field] for row in expected]
            assert getattr(actual, field).tolist() == pytest.approx(values, rel=1e-4, abs=1e-5), (name, field)
    assert scores.rephrase.correct_after.any() and not scores.rephrase.correct_after.all()
    assert scores.locality.correct_before.any() and not scores.locality.correct_before.all()
    assert scores.locality.kl.min() > 1e-5, "the edits do something"


def test_an_edit_does_not_depend_on_its_batch():
    model = tiny_model("llama")
    editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=0.05), 0.02).eval()
    batch = make_batch("llama", tasks=3)
    together = evaluate_batch(model, editor, batch)
    for task in range(3):
        alone = replace(batch, **{name: one_task(getattr(batch, name), task) for name in ("z_edit", "x_in", "x_out")})
        scores = evaluate_batch(model, editor, alone)
        rows = together.rephrase.part(together.rephrase.task == task)
        assert scores.rephrase.nll_after.tolist() == pytest.approx(rows.nll_after.tolist(), rel=1e-5)


@pytest.fixture
def asked(base_folder, edit_data):
    """`asked(family)`: edits of a base that knows the facts; every other edit asks for what is true already."""

    def make(family: str, edits_at_once: int = 1):
        model, tokenizer = load_base(str(base_folder(family)), "float32")
        kind, data = KINDS[family], edit_data(KINDS[family], eval_rephrases=2)
        start = getattr(model.config, "decoder_start_token_id", None)
        encoder = Encoder(tokenizer, FORMATS[kind], kind, 96, start)
        tasks = [data.sampler("validation").task(0, i) for i in range(5)]
        tasks = [replace(task, target=task.answers[0]) if i % 2 else task for i, task in enumerate(tasks)]
        editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=2e-3), 0.02).eval()
        return model, editor, encoder, collate_tasks(tasks[: 5 - 5 % edits_at_once], encoder, edits_at_once)

    return make


def check_records(records, batch, scores, answers) -> None:
    """Every edit's record holds the rows that were made of that edit: two rephrases and four unrelated facts each."""
    edits = len(batch.texts)
    assert [record["prompt"] for record in records] == [text.prompt for text in batch.texts]
    for i, (record, text) in enumerate(zip(records, batch.texts)):
        assert (len(text.rephrases), len(text.locality)) == (2, 4)
        assert record["generated"] == [answers[i], answers[edits + 2 * i], answers[edits + 2 * i + 1]]
        assert record["general"] == [bool(scores.rephrase.correct_after[2 * i + j]) for j in range(2)]
        assert record["known_after"] == [bool(scores.locality.correct_after[4 * i + j]) for j in range(4)]


@pytest.mark.parametrize("edits_at_once", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_answers_are_those_of_plain_greedy_decoding(family, edits_at_once, asked):
    """Also those that were not decoded, for every token of the target had been the most probable one."""
    model, editor, encoder, batch = asked(family, edits_at_once)
    base = state_copy(model)
    scores = evaluate_batch(model, editor, batch)
    answers = edited_answers(model, encoder, batch, scores)
    assert_same_state(state_copy(model), base)
    prompts, targets, tasks = questions(batch)
    layers = editor.modules_in(model)
    expected = [
        plain_greedy(model, dense_weights(model, layers, scores.edited.deltas, task), encoder, prompt)
        for prompt, task in zip(prompts, tasks.tolist())
    ]
    assert answers == expected
    skipped = torch.cat([scores.edit.correct_after, scores.rephrase.correct_after])
    assert not skipped.all() and (skipped.any() or edits_at_once > 1)
    check_records(task_records(batch, scores, answers), batch, scores, answers)
    matches, f1 = judge_answers(answers, batch)
    assert matches == [answer == target for answer, target in zip(answers, targets)]
    assert [value == 1.0 for value in f1] == [a.lower().split() == t.lower().split() for a, t in zip(answers, targets)]


def test_the_base_itself_is_asked_without_deltas(asked):
    model, _, encoder, batch = asked("llama")
    prompts, _, _ = questions(batch)
    assert generate_answers(model, encoder, prompts) == [plain_greedy(model, {}, encoder, p) for p in prompts]


@contextmanager
def scripted(model, tokenizer, text: list[str]):
    """The model says these texts, whatever it is asked; `<eos>` is one of them."""
    ids = [token for part in text for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
    steps = iter(ids)

    def say(module, args, output):
        return F.one_hot(torch.full(output.shape[:-1], next(steps)), output.shape[-1]).to(output.dtype)

    handle = model.get_output_embeddings().register_forward_hook(say)
    yield ids
    handle.remove()


@pytest.mark.parametrize(
    "said, answer",
    [
        ([" Rome", "\n", "Q: What", "\n"], "Rome"),
        ([" Rome", "<eos>", " Paris", "\n"], "Rome"),
        (["\n", " Rome", "\n"], ""),
        ([" New", " York", " City, I think", "\n"], "New York City, I think"),
        ([" Rome"] * 30, None),
    ],
)
def test_where_an_answer_ends(said, answer, asked):
    model, _, encoder, _ = asked("llama")
    with scripted(model, encoder.tokenizer, said) as ids:
        found = generate_answers(model, encoder, ["Where?", "Which city, and of which country?"])
    if answer is None:
        answer = encoder.tokenizer.decode(ids[:MAX_NEW_TOKENS]).strip()
    assert found == [answer] * 2


def test_the_target_does_not_tell_when_to_stop(asked):
    """Nothing but the deltas decides what a wrong answer is; certainly not the length of the target."""
    model, editor, encoder, batch = asked("llama")
    scores = evaluate_batch(model, editor, batch)
    wrong = replace(scores, edit=all_wrong(scores.edit), rephrase=all_wrong(scores.rephrase))
    expected = edited_answers(model, encoder, batch, wrong)
    for target in ("x", "a target of quite a number of words that never end"):
        other = replace(batch, texts=tuple(replace(text, target=target) for text in batch.texts))
        assert edited_answers(model, encoder, other, wrong) == expected


def all_wrong(rows: RowScores) -> RowScores:
    return replace(rows, correct_after=torch.zeros_like(rows.correct_after))


def test_nothing_stays_behind_after_an_exception(asked):
    model, editor, encoder, batch = asked("llama")
    base, scores = state_copy(model), evaluate_batch(model, editor, batch)
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_batch(model, editor, batch)
    with pytest.raises(ZeroDivisionError):
        edited_answers(model, encoder, batch, scores)
    handle.remove()
    assert_same_state(state_copy(model), base)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_classifier_answers_with_a_class_under_each_tasks_own_edit(asked):
    model, tokenizer = asked("bert")[0], asked("bert")[2].tokenizer
    encoder = Encoder(tokenizer, FORMATS["classifier"], "classifier", 96)
    claims = ["Rome is in Asia.", "Which continent is North Korea in? Asia."]
    editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=0.5), 0.02).eval()
    rows = encoder.rows([(claim, "REFUTES") for claim in claims], [0, 1], 2)
    deltas, layers = compute_deltas(model, editor, rows), editor.modules_in(model)
    expected = []
    for claim, task in zip(claims, (1, 0)):
        inputs = {"input_ids": torch.tensor([encoder.prompt_ids(claim)])}
        logit = functional_call(model, dense_weights(model, layers, deltas, task), (), inputs).logits
        expected.append("SUPPORTS" if logit > 0 else "REFUTES")
    assert generate_answers(model, encoder, claims, layers, deltas, torch.tensor([1, 0])) == expected


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_edits_are_evaluated_as_they_are_kept_off_questions(family):
    model, batch = tiny_model(family), make_batch(family)
    batch = replace(batch, x_keep=make_rows(family, [0, 1, 1, 2], 3, seed=9))
    editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=0.1), 0.02).eval()
    with torch.no_grad():
        expected = editor.make_deltas(model, batch.z_edit, x_keep=batch.x_keep).deltas
        free = compute_deltas(model, editor, batch.z_edit)
    found = evaluate_batch(model, editor, batch).edited.deltas
    for name, delta in expected.items():
        torch.testing.assert_close(found[name].dense(), delta.dense(), rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(delta.dense(), free[name].dense(), rtol=1e-2) for name, delta in expected.items())
