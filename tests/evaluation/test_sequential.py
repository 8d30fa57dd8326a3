"""Edits one after another, against dense weights that are really changed, an edit at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from helpers.bases import FORMATS, REMARKS, assert_same_state, run_config, state_copy
from helpers.commandline import assert_says, call
from helpers.edits import compute_deltas
from helpers.models import KINDS, spread_parameters
from matplotlib.image import imread
from transformers.pytorch_utils import Conv1D

from mend_lightning import MendEditor, load_base
from mend_lightning.editors import Editor, EnnEditor
from mend_lightning.errors import ConfigError
from mend_lightning.evaluation.sequential import Checkpoint, EditSequence, edit_in_sequence
from mend_lightning.models.inputs.encoder import Encoder

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
EDITS = 5


@pytest.fixture
def prepared(base_folder, edit_data):
    """`prepared(family)`: base, encoder, edits and unrelated facts."""

    def make(family: str):
        model, tokenizer = load_base(str(base_folder(family)), "float32")
        model.double()
        kind, data = KINDS[family], edit_data(KINDS[family])
        start = getattr(model.config, "decoder_start_token_id", None)
        encoder = Encoder(tokenizer, FORMATS[kind], kind, 96, start)
        tasks = data.sampler("train").group(0, 0, EDITS)
        probes = list(dict.fromkeys(pair for task in tasks for pair in task.locality))
        return model, encoder, tasks, encoder.rows(probes, [0] * len(probes), 1)

    return make


def mend(model) -> MendEditor:
    return spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=3e-3), 0.02).eval()


def enn(model) -> EnnEditor:
    return spread_parameters(EnnEditor.for_model(model, edit_rate=0.3), 0.01).eval()


def slow(model, editor, encoder, tasks, probes):
    """Writes each edit into the weights. ENN's own ΔW⁰ is there from the start and added once."""
    layers = editor.modules_in(model)
    base_deltas = editor.base_deltas() or {}
    for name, delta in base_deltas.items():
        add(layers[name], delta.dense()[0])
    asked, immediate = [], []
    for task in tasks:
        pairs = [(prompt, task.target) for prompt in (task.prompt, *task.rephrases)]
        for name, delta in base_deltas.items():
            add(layers[name], -delta.dense()[0])
        deltas = compute_deltas(model, editor, encoder.rows(pairs[:1], [0], 1))
        for name, delta in deltas.items():
            add(layers[name], delta.dense()[0])
        asked += pairs
        immediate.append([right(model, encoder, pair) for pair in pairs])
    return immediate, [right(model, encoder, pair) for pair in asked], perplexity(model, probes)


def add(layer, change) -> None:
    layer.weight.data += (change.T if isinstance(layer, Conv1D) else change).to(layer.weight.dtype)


@torch.no_grad()
def right(model, encoder, pair) -> bool:
    rows = encoder.rows([pair], [0], 1)
    logits, labels = model(**rows.inputs).logits, rows.labels
    return bool((logits.argmax(-1) == labels)[labels != -100].all())


@torch.no_grad()
def perplexity(model, rows) -> float:
    logits = torch.log_softmax(model(**rows.inputs).logits, -1)
    losses = [
        -logits[i, t, int(label)] for i, row in enumerate(rows.labels) for t, label in enumerate(row) if label != -100
    ]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("make_editor", [mend, enn])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_against_changed_weights(family, make_editor, prepared):
    model, encoder, tasks, probes = prepared(family)
    editor, base = make_editor(model), state_copy(model)
    found = edit_in_sequence(model, editor, encoder, tasks, probes, every=2)
    assert_same_state(state_copy(model), base)
    assert not any(module._forward_hooks for module in model.modules())
    before = perplexity(model, probes)
    immediate, final, after = slow(model, editor, encoder, tasks, probes)
    assert [each.edits for each in found.checkpoints] == [0, 2, 4, 5]
    assert found.immediate == immediate
    assert [value for each in found.final for value in each] == final
    assert found.checkpoints[0].perplexity == pytest.approx(before, rel=1e-5)
    assert found.checkpoints[-1].perplexity == pytest.approx(after, rel=1e-3)
    assert after != pytest.approx(before, rel=1e-2)


def sequence(perplexities, immediate=((True,),), final=((False,),)) -> EditSequence:
    checkpoints = [Checkpoint(10 * i, 1.0, 1.0, value, 1.0) for i, value in enumerate(perplexities)]
    return EditSequence(checkpoints, [list(each) for each in immediate], [list(each) for each in final])


def test_when_it_breaks_and_what_is_forgotten():
    assert sequence([3.0, 4.0, 5.9]).broken_after is None
    assert sequence([3.0, 4.0, 6.1, 5.0]).broken_after == 20
    assert sequence([3.0, math.nan]).broken_after == 10
    mixed = sequence([1.0], immediate=[[True, True], [False, True]], final=[[True, False], [True, True]])
    assert mixed.forgetting == pytest.approx(1 / 3)


def test_an_editor_that_changes_no_weight(prepared):
    class Talk(Editor):
        changes_weights = False

    model, encoder, tasks, probes = prepared("llama")
    with pytest.raises(ConfigError, match="Talk changes no weight: its edits do not build on each other"):
        edit_in_sequence(model, Talk({}), encoder, tasks, probes)


def test_the_command(base_folder, facts, tmp_path):
    config = run_config(tmp_path, base_folder("llama"), facts, max_steps=2)
    assert call("fit", "--config", config).code == 0
    given = ["sequential", "--config", config]
    result = call(*given, "--edits", 3, "--every", 2)
    assert result.code == 0, result.err
    saved = json.loads((tmp_path / "sequential.json").read_text())
    assert [each["edits"] for each in saved["checkpoints"]] == [0, 2, 3]
    assert f"{saved['retained_success']:.3f}" in result.out and "forgotten" in result.out
    assert imread(tmp_path / "sequential.png")[..., :3].std() > 0.05
    too_many = call(*given, "--edits", 99)
    assert too_many.code == 1
    assert_says(too_many.err, "test.jsonl has 7 facts, fewer than the 99 edits asked for")
    assert_says(
        call(*given, "--edits", 7).err,
        "7 edits at once leave no unrelated fact over: the set has 7 records. Lower edits",
    )
    assert_says(call(*given, "--edits", 0).err, "edits and every must be at least 1, not 0 and 10")
    assert_says(call(*given, "--editor", tmp_path).err, "is not a saved editor")
    other = tmp_path / "other.yaml"
    other.write_text("data: {tset: x}")
    assert_says(
        call("sequential", other).err, "other.yaml is not the config of a run: .*'tset'. Give the one the editor was"
    )
    changed = yaml.safe_load(config.read_text())
    changed["data"]["stop"] = "."
    other.write_text(yaml.safe_dump(changed))
    assert_says(call("sequential", other).err, "The editor was trained with the prompt format")
