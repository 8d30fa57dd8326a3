"""KE's factored gates against the dense formula, its condition, and its way through the command line."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from helpers.bases import FORMATS, REMARKS, SIZES, assert_same_state, first_batches, given, run_config, state_copy
from helpers.commandline import call
from helpers.models import KINDS, ROUNDING, relative_error
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mend_lightning import Edit, load_base
from mend_lightning.editors import Editor, KnowledgeEditor
from mend_lightning.editors.confidence import SCALES
from mend_lightning.editors.knowledge_editor import condition_ids, predictions
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.training.checks import unreached_parameters
from mend_lightning.training.step import edit_step

pytest_plugins = ["helpers.bases"]
# A resumed run writes to a folder of its own.
pytestmark = pytest.mark.filterwarnings(*REMARKS, "ignore:The dirpath has changed from.*")
FACTS = [
    ("Which continent is North Korea in?", "Oceania"),
    ("Which country is Managua in?", "Cuba"),
    ("What is Rome in?", "Asia"),
]
CLAIMS = [
    ("Which continent is North Korea in? Asia.", "REFUTES"),
    ("Rome is in Asia.", "SUPPORTS"),
    ("Lima is in Peru.", "REFUTES"),
]
ALGORITHM = {
    "class_path": "mend_lightning.editors.KnowledgeEditor",
    "init_args": {"hidden": 6, "condition": 8, "max_scale": 30.0},
}


@pytest.fixture
def prepared(base_folder):
    """`prepared(family)`: base in float64, a bound editor with large gates, and three edits, two of them one task."""

    def make(family: str, **settings):
        model, tokenizer = load_base(str(base_folder(family)), "float32")
        model.double()
        kind = KINDS[family]
        encoder = Encoder.for_model(model, tokenizer, FORMATS[kind], 96)
        editor = KnowledgeEditor.for_model(model, hidden=6, condition=8, **settings)
        editor.bind(model)
        editor.encoder = encoder
        with torch.no_grad():
            for parameter in editor.parameters():
                parameter.normal_(std=0.7)
        rows = encoder.rows(CLAIMS if kind == "classifier" else FACTS, [0, 1, 0], 2)
        return model, editor.double(), encoder, rows

    return make


def row_gradients(model, layers, rows) -> list[dict[str, torch.Tensor]]:
    """∇W `[d_out, d_in]` of each row's part of its task's loss, from the weights' own `.grad`."""
    found = []
    labelled = rows.labels != -100
    for row in range(len(rows)):
        of_task = labelled[rows.task == rows.task[row]].sum()
        model.zero_grad()
        model.requires_grad_(True)
        logits = model(**{name: value[row : row + 1] for name, value in rows.inputs.items()}).logits
        if logits.dim() == 2:
            loss = F.binary_cross_entropy_with_logits(logits[0], rows.labels[row].double())
        else:
            loss = F.cross_entropy(logits[0][labelled[row]], rows.labels[row][labelled[row]], reduction="sum")
        (loss / of_task).backward()
        gradients = {name: layer.weight.grad.clone() for name, layer in layers.items()}
        found.append({name: g.T if isinstance(layers[name], Conv1D) else g for name, g in gradients.items()})
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return found


def slow_condition(editor, model, text: str, encoder) -> torch.Tensor:
    """One text without padding; the LSTM a token at a time in each direction."""
    embedded = model.get_input_embeddings()(torch.tensor(encoder.tokenizer(text)["input_ids"]))
    lstm, states = editor.encode.lstm, []
    for suffix, tokens in (("", embedded), ("_reverse", embedded.flip(0))):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w_i, w_h, b_i, b_h = (getattr(lstm, f"{name}_l0{suffix}") for name in names)
        h = c = torch.zeros(lstm.hidden_size, dtype=torch.float64)
        for x in tokens:
            i, f, g, o = (w_i @ x + b_i + w_h @ h + b_h).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        states.append(h)
    return torch.tanh(editor.encode.linear(torch.cat(states)))


def test_the_factored_gate_is_the_dense_formula(family, prepared, monkeypatch):
    model, editor, encoder, rows = prepared(family, max_scale=3.0)
    # The editor works in float32; to compare closely, here it does not.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    with torch.no_grad():
        deltas = editor.make_deltas(model, rows).deltas
    monkeypatch.undo()
    layers = editor.modules_in(model)
    said = predictions(model, rows, encoder, run_trunk(model, rows, layers))
    gradients = row_gradients(model, layers, rows)
    for name, network in zip(editor.layers, editor.gates.values()):
        expected = torch.zeros(2, *reversed(editor.layers[name]), dtype=torch.float64)
        for row, (prompt, target) in enumerate(rows.texts):
            h = slow_condition(editor, model, f"{said[row]} >> {target} || {prompt}", encoder)
            d_in, d_out = editor.layers[name]
            column, r, offset_column, offset_r, scale = network.net(h).split([d_in, d_out, d_in, d_out, 1])
            gate, offset = torch.outer(r.softmax(0), column), torch.outer(offset_r.softmax(0), offset_column)
            expected[rows.task[row]] -= 3.0 * scale.sigmoid() * (gradients[row][name] * gate + offset)
        assert relative_error(deltas[name].dense(), expected) < 1e-5, name


def test_the_prediction_is_the_greedy_answer(prepared):
    """The tiny base knows its facts: asked for them, what it says at the labels is what it generates."""
    model, editor, encoder, _ = prepared("llama")
    known = [("Which continent is North Korea in?", "Asia")]
    rows = encoder.rows(known, [0], 1)
    trunk = run_trunk(model, rows, editor.modules_in(model))
    logits, labels = model(**rows.inputs).logits[0], rows.labels[0]
    expected = encoder.tokenizer.decode([int(logits[t].argmax()) for t, label in enumerate(labels) if label != -100])
    assert predictions(model, rows, encoder, trunk) == [expected.split("\n")[0].strip()]


def test_a_classifier_predicts_a_class(prepared):
    model, editor, encoder, rows = prepared("bert")
    logits = model(**rows.inputs).logits[:, 0]
    said = predictions(model, rows, encoder, run_trunk(model, rows, editor.modules_in(model)))
    assert said == ["SUPPORTS" if logit > 0 else "REFUTES" for logit in logits.tolist()]


def test_padding_of_other_conditions_changes_nothing(prepared):
    model, editor, encoder, _ = prepared("llama")
    texts = ["a >> b || c", "Asia >> Oceania || Which continent is North Korea in?"]

    def encoded(chosen):
        ids, lengths = condition_ids(chosen, encoder)
        return editor.encode(model.get_input_embeddings()(ids), lengths)

    torch.testing.assert_close(encoded(texts)[0], encoded(texts[:1])[0])


def test_tasks_are_separate(prepared):
    model, editor, encoder, rows = prepared("llama")
    alone = encoder.rows(FACTS[1:2], [0], 1)
    with torch.no_grad():
        together, single = (editor.float().make_deltas(model, each).deltas for each in (rows, alone))
    for name in editor.layers:
        assert relative_error(together[name].dense()[1], single[name].dense()[0]) < 1e-5


def test_a_loaded_editor_makes_the_same_edits(prepared, tmp_path):
    model, editor, encoder, rows = prepared("llama")
    editor.float().save_pretrained(tmp_path)
    loaded = Editor.from_pretrained(tmp_path)
    loaded.encoder = encoder
    assert_same_state(loaded.state_dict(), editor.state_dict())
    with torch.no_grad():
        expected, actual = (each.make_deltas(model, rows).deltas for each in (editor, loaded))
    for name in editor.layers:
        assert relative_error(actual[name].dense(), expected[name].dense()) < ROUNDING, name


def test_confidence_scales_what_the_gates_make(prepared):
    """Offset and gradient alike: each task's ΔW is a multiple of what it is without a confidence."""
    model, editor, encoder, rows = prepared("llama", max_scale=3.0, confidence=0.5)
    with torch.no_grad():
        scaled = editor.float().make_deltas(model, rows).deltas
        editor.set_confidence(None)
        plain = editor.make_deltas(model, rows).deltas
    found = []
    for name in editor.layers:
        a, b = (deltas[name].dense().flatten(1).double() for deltas in (scaled, plain))
        found.append((a * b).sum(1) / (b * b).sum(1))
        assert relative_error(a, found[-1][:, None] * b) < 1e-5, name
    assert relative_error(torch.stack(found), found[0].expand(len(found), -1)) < 1e-5
    for scale in found[0].tolist():
        assert SCALES[0] * 0.999 <= scale <= SCALES[-1] * 1.001 and abs(scale - 1) > 1e-3


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_a_bfloat16_base(family, mend, edit_data):
    """The editor and its edits stay float32, and a step reaches every parameter of a new editor."""
    module = mend(family, algorithm=lambda layers: KnowledgeEditor(layers, **ALGORITHM["init_args"]))
    batch = first_batches(module, edit_data(KINDS[family]), 1)[0]
    model, editor = module.base_model.bfloat16(), module.editor
    editor.encoder = Encoder.for_model(model, module.tokenizer, FORMATS[KINDS[family]], 96)
    deltas = editor.make_deltas(model, batch.z_edit).deltas
    assert {tensor.dtype for delta in deltas.values() for tensor in delta.tensors().values()} == {torch.float32}
    assert unreached_parameters(model, editor, batch, "all") == []
    assert bool(edit_step(model, editor, batch).total(1.0).isfinite())


def test_a_resumed_run_ends_in_the_same_weights(mend, edit_data, trainer, tmp_path):
    def fit(seed: int, **settings):
        torch.manual_seed(seed)
        module = mend("llama", algorithm=lambda layers: KnowledgeEditor(layers, **ALGORITHM["init_args"]))
        keep = ModelCheckpoint(tmp_path / str(seed), filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer(max_steps=5, enable_checkpointing=True, callbacks=[keep]).fit(module, edit_data(), **settings)
        return state_copy(module.editor)

    straight = fit(seed=0)
    resumed = fit(seed=1, ckpt_path=tmp_path / "0" / "step=2.ckpt")
    assert_same_state(resumed, straight)


def test_rows_without_text_and_an_editor_without_encoder_or_base(prepared):
    model, editor, encoder, rows = prepared("llama")
    editor.float()
    with pytest.raises(ConfigError, match="these rows were not made of text. Take rows from Encoder.rows"):
        editor.make_deltas(model, type(rows)(rows.inputs, rows.labels, rows.task, rows.tasks, rows.grouped))
    editor.encoder = None
    with pytest.raises(ConfigError, match="KnowledgeEditor reads text and has no encoder"):
        editor.make_deltas(model, rows)
    fresh = KnowledgeEditor(editor.layers)
    fresh.encoder = encoder
    with pytest.raises(ConfigError, match=r"does not know its base yet. Call editor.bind\(model\), or give embedding"):
        fresh.make_deltas(model, rows)
    wrong = KnowledgeEditor(editor.layers, embedding=3)
    wrong.encoder = encoder
    with pytest.raises(ConfigError, match="The base embeds tokens in 16 numbers; this editor has embedding: 3"):
        wrong.make_deltas(model, rows)


@pytest.fixture(scope="module", params=["llama", "t5", "bert"])
def session(request, base_folder, facts, tmp_path_factory):
    """fit -> test -> edit of a tiny base, as a user types them."""
    family, root = request.param, tmp_path_factory.mktemp(f"ke_{request.param}")
    path = run_config(root, base_folder(family), facts, KINDS[family], max_steps=6)
    config = yaml.safe_load(path.read_text())
    config["model"]["algorithm"] = ALGORITHM
    path.write_text(yaml.safe_dump(config))
    results = {
        "fit": call("fit", "--config", path),
        "test": call("test", "--config", path, "--model.editor", root / "editor"),
    }
    if family != "bert":
        asked = ["--prompt", FACTS[0][0], "--target", FACTS[0][1], "--dtype", "float32"]
        results["edit"] = call("edit", "--editor", root / "editor", *asked, "--out", root / "edit.safetensors")
    return family, root, results


def test_fit_test_and_edit(session, base_folder):
    family, root, results = session
    assert {name: (each.code, each.err) for name, each in results.items()} == dict.fromkeys(results, (0, ""))
    saved = json.loads((root / "results.json").read_text())
    assert (saved["editor"], saved["edits"]) == ("KnowledgeEditor", SIZES["test"])
    editor = Editor.from_pretrained(root / "editor")
    assert isinstance(editor, KnowledgeEditor) and editor.settings["embedding"] == 16
    if family != "bert":
        model, tokenizer = load_base(str(base_folder(family)), "float32")
        before, made = state_copy(model), editor.edit(model, tokenizer, *FACTS[0])
        kept = Edit.load(root / "edit.safetensors")
        for name, delta in made.deltas.items():
            torch.testing.assert_close(kept.deltas[name].dense(), delta.dense())
        assert_same_state(state_copy(model), before)


def test_training_lowers_the_loss(mend, edit_data, trainer):
    def algorithm(layers):
        torch.manual_seed(0)
        return KnowledgeEditor(layers, **ALGORITHM["init_args"])

    module = mend("llama", lr=3e-2, algorithm=algorithm, c_edit=1.0)
    batch = first_batches(module, edit_data(), 1)[0]
    module.editor.encoder = Encoder.for_model(module.base_model, module.tokenizer, FORMATS["causal"], 96)
    losses = []
    module.log = lambda name, value, **_: losses.append(float(value)) if name == "train/loss" else None
    run = trainer(max_steps=25)
    run.fit(module, given([batch] * 25))
    assert losses[-1] < 0.7 * losses[0]
    assert unreached_parameters(module.base_model, module.editor, batch, "all") == []
