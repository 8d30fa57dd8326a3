"""Answers in several formats at once, against one question after another."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.bases import REMARKS
from helpers.models import spread_parameters
from helpers.slow_scores import dense_weights, plain_greedy
from helpers.tokenizers import CHAT_TEMPLATES

from mend_lightning import InContext, KnowledgeEditor, MendEditor, load_base
from mend_lightning.data.batch import collate_tasks
from mend_lightning.editors.knowledge_editor import predictions
from mend_lightning.evaluation.evaluate import evaluate_batch
from mend_lightning.evaluation.generated_answers import edited_answers, question_formats, questions, task_records
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.training.evaluation_steps import predict_batch

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
SHORT = {"name": "short", "prompt": "{input}", "stop": "a"}
FORMATS = ["own", "chat", SHORT, "passage"]


@pytest.fixture
def asked(base_folder, edit_data):
    """A base that knows the facts, and five edits of which every row is asked in a format of its own."""
    model, tokenizer = load_base(str(base_folder("llama")), "float32")
    tokenizer.chat_template = CHAT_TEMPLATES["plain"]
    data = edit_data("causal", eval_rephrases=2, eval_formats=FORMATS, tokenizer=tokenizer)
    tasks = [data.sampler("validation").task(0, i) for i in range(5)]
    return SimpleNamespace(model=model, encoder=data.encoder, batch=collate_tasks(tasks, data.encoder))


def test_answers_are_those_of_plain_greedy_decoding_in_each_format(asked):
    model, encoder, batch = asked.model, asked.encoder, asked.batch
    editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=2e-3), 0.02).eval()
    scores = evaluate_batch(model, editor, batch)
    answers = edited_answers(model, encoder, batch, scores)
    prompts, _, tasks = questions(batch)
    formats = question_formats(batch)
    assert set(formats) == {"own", "chat", "short", "passage"}
    weights = [dense_weights(model, editor.modules_in(model), scores.edited.deltas, i) for i in range(5)]
    expected = [
        plain_greedy(model, weights[task], encoder.asking(key), prompt)
        for prompt, key, task in zip(prompts, formats, tasks.tolist())
    ]
    assert answers == expected
    assert [record["formats"]["x_e"] for record in task_records(batch, scores, answers)] == formats[:5]
    predicted = predict_batch(model, editor, encoder, batch, classifies=False)
    assert [record["after"] for record in predicted] == expected[:5]
    unedited = [plain_greedy(model, {}, encoder.asking(key), text) for text, key in zip(prompts[:5], formats)]
    assert [record["before"] for record in predicted] == unedited


def test_in_context_facts_stand_before_each_format_s_text(asked):
    model, batch = asked.model, asked.batch
    editor = InContext.for_model(model)
    editor.encoder = asked.encoder
    edited = editor.edited(model, batch.z_edit)
    for name in ("z_edit", "x_in", "x_out"):
        rows = getattr(batch, name)
        longer = edited.longer(model, rows)
        for i, (key, (prompt, _)) in enumerate(zip(rows.formats, rows.texts)):
            format = asked.encoder.format_of(key)
            edit = batch.texts[int(rows.task[i])]
            text = f"New fact: {edit.prompt} {edit.target}\n" + format.question(prompt)
            ids = asked.encoder.tokenizer(text)["input_ids"]
            assert longer.inputs["input_ids"][i][: len(ids)].tolist() == ids
            labels = [label for label in longer.labels[i].tolist() if label != -100]
            assert labels == [label for label in rows.labels[i].tolist() if label != -100]


def test_what_the_base_says_is_read_up_to_each_format_s_stop(asked):
    model, rows = asked.model, asked.batch.x_in
    editor = KnowledgeEditor.for_model(model, embedding=16)
    said = predictions(model, rows, asked.encoder, run_trunk(model, rows, editor.modules_in(model)))
    for i, key in enumerate(rows.formats):
        inputs = {name: value[i : i + 1] for name, value in rows.inputs.items()}
        with torch.no_grad():
            best = model(**inputs).logits[0].argmax(-1)
        text = asked.encoder.tokenizer.decode(best[rows.labels[i] != -100], skip_special_tokens=True)
        assert said[i] == asked.encoder.format_of(key).read(text)
