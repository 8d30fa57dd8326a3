"""Many single edits evaluated in batches: the numbers and answers that each has alone, and those of dense weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.bases import FORMATS, small_tokenizer, tiny_base
from helpers.models import KINDS, rounds_alike, spread_parameters
from helpers.slow_scores import FIELDS, slow_scores

from mend_lightning import MendEditor, load_base
from mend_lightning.data.batch import collate_tasks
from mend_lightning.evaluation.evaluate import evaluate_batch
from mend_lightning.evaluation.generated_answers import edited_answers, questions
from mend_lightning.models.inputs.encoder import Encoder

pytest_plugins = ["helpers.bases"]
SETS = {"z_edit": "edit", "x_in": "rephrase", "x_out": "locality"}
EDITS = 24


@pytest.fixture
def drawn(base_folder, edit_data):
    """`drawn(family, edits)`: a taught base, an editor, an encoder and tasks; every other one asks for what is true already."""

    def make(family: str, edits: int):
        # BART learns nothing in so few steps.
        model, tokenizer = unknowing(family) if family == "bart" else load_base(str(base_folder(family)), "float32")
        encoder = Encoder.for_model(model, tokenizer, FORMATS[KINDS[family]], 96)
        sampler = edit_data(KINDS[family], rephrases=2, locality=4).sampler("train")
        tasks = [sampler.task(*divmod(i, len(sampler))) for i in range(edits)]
        if encoder.kind != "classifier":
            tasks = [replace(task, target=task.answers[0]) if i % 2 else task for i, task in enumerate(tasks)]
        editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=2e-3), 0.02).eval()
        return model, editor, encoder, tasks

    return make


def unknowing(family: str):
    tokenizer = small_tokenizer(KINDS[family])
    return tiny_base(family, tokenizer), tokenizer


def examples(model, editor, encoder, tasks, size: int, answered: int | None = None) -> Iterator[dict]:
    """Scores of every edit, from batches of `size`, and answers; of the first `answered` edits only, if given."""
    for start in range(0, len(tasks), size):
        batch = collate_tasks(tasks[start : start + size], encoder)
        scores = evaluate_batch(model, editor, batch)
        answers = said(model, encoder, batch, scores) if answered is None or start < answered else ()
        for task in range(len(batch)):
            of_task = (questions(batch)[2] == task).tolist()
            yield {
                "answers": [answer for answer, own in zip(answers, of_task) if own],
                **{name: fields(getattr(scores, of), task, FIELDS[name]) for name, of in SETS.items()},
            }


def said(model, encoder, batch, scores) -> list[str]:
    if encoder.kind == "classifier":
        prompts, _, tasks = questions(batch)
        return scores.edited.answers(model, encoder, prompts, tasks)
    return edited_answers(model, encoder, batch, scores)


def fields(rows, task: int, names) -> dict[str, list[float]]:
    return {name: getattr(rows, name)[rows.task == task].tolist() for name in names}


def in_float64(model, editor, encoder, tasks) -> list[dict]:
    """Scores of the edits one by one, and no answers."""
    return list(examples(copy.deepcopy(model).double(), copy.deepcopy(editor).double(), encoder, tasks, 1, answered=0))


def assert_same(actual: list[dict], alone: list[dict], exact: list[dict]) -> None:
    """Answers and counts are equal; losses and divergences are as near to float64's as those of edits alone in float32."""
    for one, other in zip(actual, alone, strict=True):
        assert one["answers"] == other["answers"] or not other["answers"]
    for name in SETS:
        for field in FIELDS[name]:
            found, expected, truth = (
                torch.tensor([value for each in edits for value in each[name][field]], dtype=torch.float64)
                for edits in (actual, alone, exact)
            )
            if field.startswith(("nll", "kl", "end")):
                assert rounds_alike([found], [expected], [truth]), (name, field)
            else:
                assert found.tolist() == expected.tolist(), (name, field)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart", "bert"])
def test_edits_in_batches_of_any_size_are_edits_one_by_one(family, drawn):
    model, editor, encoder, tasks = drawn(family, EDITS)
    alone, exact = (
        list(examples(model, editor, encoder, tasks, 1, answered=6)),
        in_float64(model, editor, encoder, tasks),
    )
    for size in (5, EDITS):
        assert_same(list(examples(model, editor, encoder, tasks, size)), alone, exact)
    right = [hit for each in alone for name in ("z_edit", "x_in") for hit in each[name]["correct_after"]]
    assert (any(right) or family == "bart") and not all(right), "some answers are decoded, some need not be"
    assert len({answer for each in alone for answer in each["answers"]}) > 1
    assert max(kl for each in alone for kl in each["x_out"]["kl"]) > 1e-3, "the edits do something"


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart", "bert"])
def test_the_scores_of_a_batch_are_those_of_dense_weights(family, drawn):
    """Each row alone through a model with W + ΔW, in float64, position by position."""
    model, editor, encoder, tasks = drawn(family, 4)
    batch = collate_tasks(tasks, encoder)
    scores = evaluate_batch(model.double(), editor.double(), batch)
    for name, of in SETS.items():
        expected = slow_scores(model, editor, batch, name)
        for field in FIELDS[name]:
            # Llama's and T5's norms compute in float32 all the same: of a logit of 40, 1e-4 is twenty times the last bit.
            close = pytest.approx([row[field] for row in expected], rel=1e-4, abs=1e-4)
            assert getattr(getattr(scores, of), field).tolist() == close, (name, field)


def test_a_thousand_edits(drawn):
    """A sample of them against one by one."""
    model, editor, encoder, tasks = drawn("llama", 1000)
    together = list(examples(model, editor, encoder, tasks, 100))
    assert len(together) == 1000
    sample = range(0, 1000, 125)
    chosen = [tasks[i] for i in sample]
    alone = list(examples(model, editor, encoder, chosen, 1))
    assert_same([together[i] for i in sample], alone, in_float64(model, editor, encoder, chosen))
    assert len({tuple(each["answers"]) for each in together}) > 10
    assert torch.tensor([each["z_edit"]["nll_after"] for each in together]).isfinite().all()
