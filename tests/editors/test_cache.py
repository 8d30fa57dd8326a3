"""The cache, against a plain loop over rows in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.bases import FORMATS, REMARKS, assert_same_state, state_copy
from helpers.models import KINDS, make_batch, make_rows, tiny_model
from helpers.slow_scores import FIELDS, plain_greedy, position_scores

from mend_lightning import Cache, load_base
from mend_lightning.data.batch import collate_tasks
from mend_lightning.editors import Editor
from mend_lightning.editors.cache import certain_logits, key_distances
from mend_lightning.errors import ConfigError
from mend_lightning.evaluation.evaluate import evaluate_batch
from mend_lightning.evaluation.generated_answers import questions
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import Rows

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)


def slow_key(model, rows: Rows, row: int) -> torch.Tensor:
    """The mean of the final states over a question's tokens: of one row, without padding and answer."""
    labels, ids = rows.labels[row].tolist(), rows.inputs["input_ids"][row]
    ids = ids[: int(rows.inputs["attention_mask"][row].sum())]
    if model.config.is_encoder_decoder:
        return model.get_encoder()(input_ids=ids[None]).last_hidden_state[0].mean(0)
    if len(labels) > 1:
        first = next(i for i, label in enumerate(labels) if label != -100)
        ids = ids[: first + 1]
    return model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0].mean(0)


def slow_scores(model, batch, name: str, threshold: float, probability: float) -> tuple[list[dict], int]:
    """Every row alone: the scores, and how many hit the cache."""
    found, hits, rows, edits = [], 0, getattr(batch, name), batch.z_edit
    for row in range(len(rows)):
        inputs = {key: value[row : row + 1] for key, value in rows.inputs.items()}
        before = model(**inputs).logits[0]
        after, key = before.clone(), slow_key(model, rows, row)
        mine = [i for i in range(len(edits)) if edits.task[i] == rows.task[row]]
        distance, edit = min((float((slow_key(model, edits, i) - key).norm()), i) for i in mine)
        labels = rows.labels[row].tolist()
        if distance < threshold:
            hits += 1
            stored = [label for label in edits.labels[edit].tolist() if label != -100]
            odds = probability / (1 - probability)
            if after.shape == (1,):
                after[0] = torch.tensor(odds).log() * (1 if stored[0] else -1)
            places = [i for i, label in enumerate(labels) if label != -100] if after.dim() == 2 else []
            for j, place in enumerate(places):
                after[place] = 0
                after[place, stored[min(j, len(stored) - 1)]] = torch.tensor(odds * (after.shape[1] - 1)).log()
        found.append(position_scores(before, after, labels))
    return found, hits


def between(model, batch, *names: str) -> float:
    """A threshold that some rows of these sets are nearer than, and others not; no row is as near as it is."""
    distances = [key_distances(model, batch.z_edit, getattr(batch, name)) for name in names]
    distances = torch.cat(distances).sort().values
    middle = len(distances) // 2
    return float(distances[middle - 1] + distances[middle]) / 2


@pytest.mark.parametrize("edits", [1, 2])
def test_scores_are_those_of_a_loop_over_rows(family, edits):
    model = tiny_model(family)
    batch = make_batch(family, tasks=3, edits=edits)
    threshold, base = between(model, batch, "x_in", "x_out"), state_copy(model)
    editor = Cache.for_model(model, threshold=threshold, probability=0.9)
    scores = evaluate_batch(model, editor, batch)
    assert_same_state(state_copy(model), base)
    counts = []
    for name, actual in (("z_edit", scores.edit), ("x_in", scores.rephrase), ("x_out", scores.locality)):
        expected, hits = slow_scores(model, batch, name, threshold, 0.9)
        counts.append(hits)
        for field in FIELDS[name]:
            values = [row[field] for row in expected]
            assert getattr(actual, field).tolist() == pytest.approx(values, rel=1e-4, abs=1e-4), (name, field)
    assert counts[0] == len(batch.z_edit) and scores.edit.correct_after.all(), "an edit is its own nearest"
    assert 0 < counts[1] + counts[2] < len(batch.x_in) + len(batch.x_out)


@pytest.fixture
def asked(base_folder, edit_data):
    """`asked(family)`: a base that knows facts, and three edits of it."""

    def make(family: str) -> SimpleNamespace:
        model, tokenizer = load_base(str(base_folder(family)), "float32")
        encoder = Encoder.for_model(model, tokenizer, FORMATS[KINDS[family]], 96)
        data = edit_data(KINDS[family], eval_rephrases=2)
        batch = collate_tasks([data.sampler("validation").task(0, i) for i in range(3)], encoder)
        return SimpleNamespace(model=model, encoder=encoder, batch=batch, threshold=between(model, batch, "x_in"))

    return make


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_answers_of_hits_and_misses(family, asked):
    made = asked(family)
    edited = Cache.for_model(made.model, threshold=made.threshold).edited(made.model, made.batch.z_edit)
    prompts, targets, tasks = questions(made.batch)
    answers = edited.answers(made.model, made.encoder, prompts, tasks)
    distances = [key_distances(made.model, made.batch.z_edit, rows) for rows in (made.batch.z_edit, made.batch.x_in)]
    near = (torch.cat(distances) < made.threshold).tolist()
    assert any(near) and not all(near)
    for answer, prompt, target, hit in zip(answers, prompts, targets, near):
        assert answer == (target if hit else plain_greedy(made.model, {}, made.encoder, prompt))
    assert edited.answers(made.model, made.encoder, prompts[:3]) == targets[:3], "grouped"


def test_behind_the_stored_answer_nothing_but_its_stop_is_said():
    model = tiny_model("llama")
    rows = make_rows("llama", [0], 1)
    short = rows.labels.clone()
    short[0, :-1] = -100
    edited = Cache.for_model(model).edited(model, replace(rows, labels=short))
    longer = rows.labels.clone()
    longer[0, -3:] = 5
    longer = replace(rows, labels=longer)
    # Their questions end at different tokens, so their keys differ: here they shall not.
    edited = replace(edited, threshold=1e9)
    with torch.no_grad():
        states = edited.states_at(model, longer, longer.label_positions, run_trunk(model, longer, {}))
        logits = states.logits_of(states.hidden)
    assert logits.argmax(-1).tolist() == [int(short[0, -1])] * int((longer.labels != -100).sum())


def test_how_sure_a_hit_is():
    logits = certain_logits(torch.tensor([2, 0]), 7, 0.9)
    assert logits.softmax(-1)[[0, 1], [2, 0]].tolist() == pytest.approx([0.9, 0.9])
    assert certain_logits(torch.tensor([1, 0]), 1, 0.9).sigmoid().flatten().tolist() == pytest.approx([0.9, 0.1])


def test_saved_and_loaded(asked, tmp_path):
    made = asked("llama")
    editor = Cache.for_model(made.model, threshold=made.threshold, probability=0.9)
    loaded = Editor.from_pretrained(editor.save_pretrained(tmp_path))
    assert isinstance(loaded, Cache) and loaded.settings == {"threshold": made.threshold, "probability": 0.9}


def test_what_cannot_be(asked):
    with pytest.raises(ConfigError, match="threshold of Cache is a distance; it must be greater than 0, not 0"):
        Cache({"fc": (2, 3)}, threshold=0)
    with pytest.raises(ConfigError, match="probability of Cache must lie between 0 and 1, not 1"):
        Cache({"fc": (2, 3)}, probability=1)
    made = asked("llama")
    edited = Cache.for_model(made.model).edited(made.model, replace(made.batch.z_edit, texts=()))
    with pytest.raises(ConfigError, match="Cache answers with the text of edits"):
        edited.answers(made.model, made.encoder, ["Where?"])
