"""In-context edits, against the whole text written by hand and scored one row at a time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.bases import FORMATS, REMARKS, assert_same_state, state_copy
from helpers.models import KINDS, make_rows
from helpers.slow_scores import FIELDS, plain_greedy, position_scores

from mend_lightning import InContext, load_base, make_edit
from mend_lightning.data.batch import collate_tasks
from mend_lightning.editors import Editor
from mend_lightning.editors.in_context import with_facts
from mend_lightning.errors import ConfigError, TokenizerError
from mend_lightning.evaluation.evaluate import evaluate_batch
from mend_lightning.evaluation.generated_answers import edited_answers, questions
from mend_lightning.models.forward.trunk import TrunkOutputs
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.positions import Positions

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
FAMILIES = ["llama", "gpt2", "t5", "bert"]


@pytest.fixture
def asked(base_folder, edit_data):
    """`asked(family, edits_at_once)`: a base, an editor, and four edits in tasks of so many."""

    def make(family: str, edits_at_once: int = 1, **settings) -> SimpleNamespace:
        kind = KINDS[family]
        model, tokenizer = load_base(str(base_folder(family)), "float32")
        editor = InContext.for_model(model, **settings)
        # A limit that only the rows as they are fit into: what comes before a question must not be cut.
        editor.encoder = encoder = Encoder.for_model(model, tokenizer, FORMATS[kind], 40)
        data = edit_data(kind, eval_rephrases=2)
        tasks = [data.sampler("validation").task(0, i) for i in range(4)]
        batch = collate_tasks(tasks, encoder, edits_at_once)
        return SimpleNamespace(model=model, editor=editor, encoder=encoder, batch=batch)

    return make


def by_hand(made, name: str, edits_at_once: int) -> list[dict]:
    """Every row of a set with the facts of its task before it, from ids that are put together here."""
    kind, tokenizer, found = made.encoder.kind, made.encoder.tokenizer, []
    rows = getattr(made.batch, name)
    for (prompt, target), task in zip(rows.texts, rows.task.tolist()):
        edits = made.batch.texts[task * edits_at_once : (task + 1) * edits_at_once]
        told = "".join(f"New fact: {edit.prompt} {edit.target}\n" for edit in edits)
        plain, longer = ({}, {})
        for inputs, front in ((plain, ""), (longer, told)):
            if kind == "causal":
                ids = tokenizer(f"{front}Q: {prompt}\nA:")["input_ids"]
                answer = tokenizer(f" {target}\n")["input_ids"]
                inputs["input_ids"] = torch.tensor([ids + answer[:-1]])
                inputs["labels"] = [-100] * (len(ids) - 1) + answer
            else:
                inputs["input_ids"] = torch.tensor([tokenizer(front + prompt)["input_ids"]])
                inputs["labels"] = [int(target == "SUPPORTS")]
            if kind == "encoder_decoder":
                inputs["labels"] = tokenizer(target)["input_ids"]
                inputs["decoder_input_ids"] = torch.tensor([[0, *inputs["labels"][:-1]]])
        with torch.no_grad():
            labels = [inputs.pop("labels") for inputs in (plain, longer)]
            logits = [made.model(**inputs).logits[0] for inputs in (plain, longer)]
        at = [[i for i, label in enumerate(each) if label != -100] for each in labels]
        if kind != "classifier":
            logits = [each[places] for each, places in zip(logits, at)]
        found.append(position_scores(*logits, [labels[1][i] for i in at[1]]))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edits_at_once", [1, 2])
def test_scores_are_those_of_prompts_written_by_hand(family, edits_at_once, asked):
    made = asked(family, edits_at_once)
    base = state_copy(made.model)
    scores = evaluate_batch(made.model, made.editor, made.batch)
    assert_same_state(state_copy(made.model), base)
    assert scores.locality.kl.min() > 1e-6, "the facts do something"
    for name, actual in (("z_edit", scores.edit), ("x_in", scores.rephrase), ("x_out", scores.locality)):
        expected = by_hand(made, name, edits_at_once)
        for field in FIELDS[name]:
            values = [row[field] for row in expected]
            assert getattr(actual, field).tolist() == pytest.approx(values, rel=1e-3, abs=1e-4), (name, field)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_answers_are_those_of_plain_greedy_decoding(family, asked):
    made = asked(family)
    scores = evaluate_batch(made.model, made.editor, made.batch)
    answers = edited_answers(made.model, made.encoder, made.batch, scores)
    prompts, _, tasks = questions(made.batch)
    # The format's own text goes behind the fact.
    bare = replace(made.encoder, format=replace(made.encoder.format, prompt="{input}"), max_length=10**6)
    expected = []
    for prompt, task in zip(prompts, tasks.tolist()):
        edit = made.batch.texts[task]
        text = f"New fact: {edit.prompt} {edit.target}\n" + made.encoder.format.question(prompt)
        expected.append(plain_greedy(made.model, {}, bare, text))
    assert answers == expected
    grouped = scores.edited.answers(made.model, made.encoder, [edit.prompt for edit in made.batch.texts])
    assert grouped == expected[:4]


@pytest.mark.parametrize(
    "place, text",
    [
        ("before", "N\nhead\nQ: 1?\nA: 2\nQ: 3?\nA:"),
        ("line", "head\nQ: 1?\nA: 2\nN\nQ: 3?\nA:"),
        ("question", "head\nQ: 1?\nA: 2\nQ: N\n3?\nA:"),
    ],
)
def test_where_the_facts_stand(place, text):
    assert with_facts("head\nQ: 1?\nA: 2\nQ: {input}\nA:", "N\n", "3?", place) == text
    assert with_facts("{input}", "N\n", "3?", place) == "N\n3?"


def test_a_fact_may_hold_the_words_of_the_template():
    editor = InContext({"fc": (2, 3)}, template="{target} <- {prompt};")
    assert editor.told([("{target}?", "{prompt}!"), ("a", "b")]) == "{prompt}! <- {target}?;b <- a;"


def test_saved_and_loaded(asked, tmp_path):
    made = asked("llama", template="So {prompt} {target}\n", place="line")
    made.editor.bind(made.model, "llama", vars(FORMATS["causal"]))
    loaded = Editor.from_pretrained(made.editor.save_pretrained(tmp_path))
    assert isinstance(loaded, InContext) and loaded.settings == {"template": "So {prompt} {target}\n", "place": "line"}
    loaded.encoder = made.encoder
    edited = [editor.edited(made.model, made.batch.z_edit) for editor in (loaded, made.editor)]
    prompts = [edit.prompt for edit in made.batch.texts]
    assert edited[0].answers(made.model, made.encoder, prompts) == edited[1].answers(made.model, made.encoder, prompts)
    assert edited[0].told == edited[1].told


def test_what_cannot_be(asked):
    with pytest.raises(ConfigError, match="template of InContext must contain {target}"):
        InContext({"fc": (2, 3)}, template="{prompt}")
    made = asked("llama")
    with pytest.raises(ConfigError, match="InContext changes no weight"):
        make_edit(made.editor, made.model, made.encoder.tokenizer, ("a", "b"))
    with pytest.raises(ConfigError, match="InContext reads the text of edits"):
        made.editor.edited(made.model, make_rows("llama", [0], 1))
    edited, rows = made.editor.edited(made.model, made.batch.z_edit), made.batch.x_in
    with pytest.raises(ConfigError, match="logits at the labels' positions only"):
        everywhere = Positions.of(torch.ones_like(rows.labels, dtype=torch.bool))
        edited.states_at(made.model, rows, everywhere, TrunkOutputs(len(rows)))
    with pytest.raises(TokenizerError, match="makes other ids of an answer"):
        other = replace(rows, labels=torch.where(rows.labels == -100, -100, 3))
        edited.states_at(made.model, other, other.label_positions, TrunkOutputs(len(rows)))
    made.model.config.max_position_embeddings = 30
    with pytest.raises(ConfigError, match="a prompt has .* tokens; LlamaForCausalLM reads 30. Tell fewer"):
        edited.states_at(made.model, rows, rows.label_positions, TrunkOutputs(len(rows)))
    made.editor.encoder = None
    with pytest.raises(ConfigError, match="InContext reads text and has no encoder"):
        made.editor.edited(made.model, made.batch.z_edit)
