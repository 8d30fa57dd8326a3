"""Fine-tuning, against a loop over one edit at a time with torch's own RMSprop on the model's real weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.bases import FORMATS, REMARKS, assert_same_state, state_copy
from helpers.models import KINDS, distance, make_rows, relative_error, tiny_model
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mend_lightning import Edit, FineTuning, load_base, make_edit
from mend_lightning.data.records import read_records
from mend_lightning.editors import Editor
from mend_lightning.editors.locality_stream import locality_pair
from mend_lightning.errors import (
    ConfigError,
    DataFileError,
    InferenceModeError,
    LowConfidenceWarning,
    NoEffectWarning,
    NonFiniteError,
)
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import Rows

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
FACT = ("Which continent is North Korea in?", "Oceania")
RANKS = [0, 1, 1, 3, 25]
SETTINGS = {"lr": 1e-3, "max_steps": 30, "tasks_at_a_time": 2}


def of_task(rows: Rows, task: int) -> Rows:
    index = (rows.task == task).nonzero().flatten()
    inputs = {name: value[index] for name, value in rows.inputs.items()}
    return Rows(inputs, rows.labels[index], torch.zeros(len(index), dtype=torch.long), 1)


def ranked_labels(model, rows: Rows, ranks: list[int]) -> Rows:
    """Each task's labels become the tokens that the model ranks so at their places; 0: what it says already."""
    logits, labels = model(**rows.inputs).logits, rows.labels.clone()
    for row, task in enumerate(rows.task.tolist()):
        if logits.dim() == 2:
            labels[row, 0] = (int(logits[row, 0] > 0) + ranks[task]) % 2
            continue
        order = logits[row].argsort(-1, descending=True)[:, ranks[task]]
        labels[row] = torch.where(labels[row] == -100, labels[row], order)
    return replace(rows, labels=labels)


def scored(model, rows: Rows) -> tuple[torch.Tensor, bool]:
    """NLL of the labels, the mean over them, and whether each is the most probable one; a loop over positions."""
    logits, nll, right = model(**rows.inputs).logits, [], True
    for row, labels in enumerate(rows.labels.tolist()):
        for position, label in enumerate(labels):
            if label == -100:
                continue
            if logits.dim() == 2:
                score = torch.stack([torch.zeros_like(logits[row, 0]), logits[row, 0]])
            else:
                score = logits[row, position]
            nll.append(-F.log_softmax(score, -1)[label])
            right &= int(score.argmax()) == label
    return torch.stack(nll).mean(), right


def drift(model, base, rows: Rows) -> torch.Tensor:
    """KL(base ‖ model), the mean over all real positions; of one row."""
    logits = [each(**rows.inputs).logits[0] for each in (base, model)]
    if logits[0].shape == (1,):
        logits = [torch.stack([torch.zeros_like(each), each], -1) for each in logits]
    mask = rows.inputs.get("decoder_attention_mask", rows.inputs["attention_mask"])[0].bool()
    p, q = (F.log_softmax(each, -1) for each in logits)
    kl = (p.exp() * (p - q)).sum(-1)
    return kl.mean() if kl.shape != mask.shape else kl[mask].mean()


def slow_edit(base, names, rows: Rows, settings: dict, locality=None) -> SimpleNamespace:
    """Fine-tunes a copy of the model; what has become of its weights."""
    model = copy.deepcopy(base)
    weights = [dict(model.named_modules())[name].weight.requires_grad_() for name in names]
    start = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.RMSprop(weights, lr=settings["lr"])
    for step in range(settings["max_steps"]):
        loss, right = scored(model, rows)
        if right:
            break
        if locality is not None:
            loss = settings["c_edit"] * loss + drift(model, base, locality(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.get("clip", 100.0))
        optimizer.step()
    else:
        step = settings["max_steps"]
    modules = [dict(model.named_modules())[name] for name in names]
    changes = [weight.detach() - before for weight, before in zip(weights, start)]
    changes = [change.T if isinstance(module, Conv1D) else change for module, change in zip(modules, changes)]
    return SimpleNamespace(deltas=dict(zip(names, changes)), steps=step, right=scored(model, rows)[1])


@pytest.mark.parametrize("edits", [1, 2])
def test_it_is_one_edit_at_a_time_with_torchs_rmsprop(family, edits):
    """Several edits side by side, some of which end early, and some not at all."""
    model = tiny_model(family)
    rows = ranked_labels(model, make_rows(family, [task for task in range(5) for _ in range(edits)], 5), RANKS)
    # Few steps: later on a relu's kink makes the ways part that rounding has set off.
    settings = {**SETTINGS, "lr": 2e-3, "max_steps": 10}
    editor, before = FineTuning.for_model(model, **settings), state_copy(model)
    with torch.no_grad():
        made = editor.make_deltas(model, rows)
    assert_same_state(state_copy(model), before)
    slow = [slow_edit(model, list(editor.layers), of_task(rows, task), settings) for task in range(5)]
    assert made.reached.tolist() == [each.right for each in slow]
    assert len({each.steps for each in slow}) > 1 and slow[0].steps == 0, "they end at different steps"
    inner = [float(scored(model, of_task(rows, task))[0]) for task in range(5)]
    assert made.inner.tolist() == pytest.approx(inner, rel=1e-5)
    for name, delta in made.deltas.items():
        assert delta.weight.dtype == torch.float32 and not delta.weight.requires_grad
        for task, each in enumerate(slow):
            # RMSprop divides a gradient by its own size: rounding moves a weight whose gradient is nearly 0.
            assert distance(delta.weight[task], each.deltas[name]) < 2e-3, (name, task, each.steps)


def test_a_gradient_that_is_too_large_is_cut():
    model = tiny_model("llama")
    rows = make_rows("llama", [0, 1], 2)
    settings = {**SETTINGS, "max_steps": 2, "clip": 1e-7}
    made = FineTuning.for_model(model, **settings).make_deltas(model, rows)
    free = FineTuning.for_model(model, **{**settings, "clip": 100.0}).make_deltas(model, rows)
    for task in range(2):
        slow = slow_edit(model, list(made.deltas), of_task(rows, task), settings)
        for name, delta in made.deltas.items():
            assert distance(delta.weight[task], slow.deltas[name]) < 2e-3
            assert relative_error(free.deltas[name].weight[task], slow.deltas[name]) > 0.1, "the cut matters"


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_a_penalty_on_one_unrelated_fact_a_step(family, base_folder, facts):
    kind, name = KINDS[family], "claims_train.jsonl" if family == "bert" else "train.jsonl"
    model, tokenizer = load_base(str(base_folder(family)), "float32")
    model = model.double()
    settings = {**SETTINGS, "locality_data": str(facts / name), "lr": 3e-5, "c_edit": 0.5, "seed": 3, "max_steps": 5}
    editor = FineTuning.for_model(model, **settings)
    editor.encoder = encoder = Encoder.for_model(model, tokenizer, FORMATS[kind], 96)
    records = read_records(facts / name)
    pairs = [(record.prompt, text) for record in records for text in (*record.alternatives, record.answers[0])]
    pairs = [pair for pair in pairs if scored(model, encoder.rows([pair], [0], 1))[0] > 0.8][:2]
    rows = encoder.rows(pairs, range(2), 2)
    made = editor.make_deltas(model, rows)
    plain = FineTuning.for_model(model, **{**settings, "locality_data": None}).make_deltas(model, rows)

    def locality(step: int) -> Rows:
        return encoder.rows([locality_pair(records, 3, step)], [0], 1)

    assert len({locality_pair(records, 3, step) for step in range(5)}) > 3, "a fresh one each step"
    for task in range(2):
        slow = slow_edit(model, list(editor.layers), of_task(rows, task), settings, locality)
        assert slow.steps > 1
        for name, delta in made.deltas.items():
            assert distance(delta.weight[task], slow.deltas[name]) < 5e-3, (name, task, slow.steps)
            assert relative_error(plain.deltas[name].weight[task], slow.deltas[name]) > 0.05, "the penalty matters"


def test_an_edit_does_not_depend_on_its_batch(base_folder, facts):
    model, tokenizer = load_base(str(base_folder("llama")), "float32")
    editor = FineTuning.for_model(model, **{**SETTINGS, "max_steps": 6}, locality_data=str(facts / "train.jsonl"))
    editor.encoder = Encoder.for_model(model, tokenizer, FORMATS["causal"], 96)
    pairs = [(record.prompt, record.alternatives[0]) for record in read_records(facts / "test.jsonl")[:3]]
    together = editor.make_deltas(model, editor.encoder.rows(pairs, range(3), 3))
    for task, pair in enumerate(pairs):
        alone = editor.make_deltas(model, editor.encoder.rows([pair], [0], 1))
        for name, delta in alone.deltas.items():
            assert distance(together.deltas[name].weight[task], delta.weight[0]) < 1e-2


def test_what_is_known_already_changes_nothing():
    model = tiny_model("llama")
    rows = make_rows("llama", [0, 1], 2)
    best = model(**rows.inputs).logits.argmax(-1)
    rows = replace(rows, labels=torch.where(rows.labels == -100, rows.labels, best))
    made = FineTuning.for_model(model, **SETTINGS).make_deltas(model, rows)
    assert made.reached.all() and all(bool((delta.weight == 0).all()) for delta in made.deltas.values())


def test_an_edit_as_a_file(base_folder, tmp_path):
    model, tokenizer = load_base(str(base_folder("llama")), "float32")
    editor = FineTuning.for_model(model, lr=1e-3)
    editor.bind(model, "llama", vars(FORMATS["causal"]))
    editor.save_pretrained(tmp_path / "editor")
    loaded = Editor.from_pretrained(tmp_path / "editor")
    assert isinstance(loaded, FineTuning) and loaded.settings == editor.settings
    edit = make_edit(loaded, model, tokenizer, FACT)
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert again.about["editor"] == "FineTuning" and again.about["probability"] > 0.05
    for name, delta in edit.deltas.items():
        assert torch.equal(again.deltas[name].dense(), delta.dense()) and delta.norm() > 0
    with pytest.warns(LowConfidenceWarning, match="FineTuning came to its end before the model gave .*Oceania"):
        make_edit(FineTuning.for_model(model, lr=1e-7, max_steps=1), model, tokenizer, FACT)
    known = (FACT[0], "Asia")
    editor.prompt_format = vars(FORMATS["causal"])
    with pytest.warns(NoEffectWarning, match="changes nothing"):
        make_edit(editor, model, tokenizer, known)


def test_what_cannot_be(base_folder):
    with pytest.raises(ConfigError, match="max_steps of FineTuning must be greater than 0, not 0"):
        FineTuning({"fc": (2, 3)}, max_steps=0)
    model = tiny_model("llama")
    rows = make_rows("llama", [0], 1)
    with pytest.raises(ConfigError, match="FineTuning reads text and has no encoder"):
        FineTuning.for_model(model, locality_data="world_facts/train").make_deltas(model, rows)
    with pytest.raises(DataFileError, match="'nowhere' does not exist"):
        FineTuning.for_model(model, locality_data="nowhere").make_deltas(model, rows)
    with pytest.raises(InferenceModeError), torch.inference_mode():
        FineTuning.for_model(model).make_deltas(model, rows)
    with pytest.raises(NonFiniteError, match="not finite after .* step"):
        FineTuning.for_model(model, lr=1e38, max_steps=5).make_deltas(model, rows)
