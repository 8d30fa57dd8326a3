"""LoRA adapters of edits: PEFT and transformers do with them what the edit does, and they come back as edits."""

from __future__ import annotations

import copy
import json
import os
import sys

import pytest
import torch
import transformers
from helpers.bases import assert_same_state, state_copy
from helpers.edits import assert_same_deltas, changed, dense_edit, logits, ragged_edit
from helpers.models import ROUNDING, make_rows, relative_error, rounds_alike, tiny_model
from safetensors.torch import load_file

from mend_lightning import Edit, LowRankDelta
from mend_lightning.edits.export.peft_export import export_peft
from mend_lightning.edits.export.peft_import import import_peft
from mend_lightning.errors import (
    AdapterError,
    BaseModelMismatchError,
    ConfigError,
    MissingPackageError,
    OutputPathError,
    TiedWeightsWarning,
)

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
ORIENTATION = "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`"
FACTORS = "adapter_model.safetensors"


@pytest.mark.parametrize("count", [1, 2])
def test_every_way_of_loading_it_gives_the_edited_model(family, count, tmp_path):
    model, rows = tiny_model(family, torch.float32), make_rows(family, [0, 0], 1)
    edits = [ragged_edit(model, seed) for seed in range(count)]
    base, before = state_copy(model), logits(model, rows)
    folder = export_peft(edits, model, tmp_path / "adapter")
    assert_same_state(state_copy(model), base)
    expected = logits(changed(model, *edits), rows)
    assert relative_error(before, expected) > 1e-2, "the edits do something"
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    assert relative_error(logits(loaded, rows), expected) < ROUNDING
    assert relative_error(logits(loaded.merge_and_unload(), rows), expected) < ROUNDING
    plain = copy.deepcopy(model)
    plain.load_adapter(folder)
    assert relative_error(logits(plain, rows), expected) < ROUNDING
    assert os.listdir(tmp_path) == ["adapter"], "no temporary folder is left"


def test_the_edit_comes_back(family, tmp_path):
    model = tiny_model(family, torch.float32)
    edit = ragged_edit(model)
    back = import_peft(export_peft(edit, model, tmp_path / "adapter"))
    assert_same_deltas(back, edit)
    assert back.about == edit.about
    with back.applied(model):
        pass


def test_several_edits_come_back_as_one(tmp_path):
    model, rows = tiny_model("llama", torch.float32), make_rows("llama", [0, 0], 1)
    edits = [ragged_edit(model, seed) for seed in range(3)]
    back = import_peft(export_peft(edits, model, tmp_path / "adapter"))
    assert back.about["edits"] == [fact for edit in edits for fact in edit.about["edits"]]
    with back.applied(model):
        actual = logits(model, rows)
    assert relative_error(actual, logits(changed(model, *edits), rows)) < ROUNDING
    for name, delta in back.deltas.items():
        assert torch.equal(delta.down, torch.cat([edit.deltas[name].down for edit in edits], 1))


def test_edits_of_different_layers_are_one_adapter(tmp_path):
    model, rows = tiny_model("llama", torch.float32), make_rows("llama", [0, 0], 1)
    edits = [ragged_edit(model, patterns=["*.2.mlp.*"]), ragged_edit(model, patterns=["*.3.mlp.*", "*.1.mlp.up_proj"])]
    back = import_peft(export_peft(edits, model, tmp_path / "adapter"))
    with back.applied(model):
        actual = logits(model, rows)
    assert relative_error(actual, logits(changed(model, *edits), rows)) < ROUNDING
    other_weights = copy.deepcopy(model)
    other_weights.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(BaseModelMismatchError):
        back.layers_in(other_weights)
    forced = export_peft(
        [ragged_edit(other_weights), ragged_edit(model)], other_weights, tmp_path / "forced", force=True
    )
    assert len(import_peft(forced).about["combined"]) == 2


def test_every_layer_of_many(tmp_path):
    """More targets than PEFT looks up one by one, ranks 0 to 35, and blocks 1 and 11."""
    model, rows = tiny_model("llama", torch.float32, blocks=12), make_rows("llama", [0, 0], 1)
    edit = ragged_edit(model, patterns=["model.layers.*.mlp.*"], size=0.02)
    folder = export_peft(edit, model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    expected = logits(changed(model, edit), rows)
    assert relative_error(logits(loaded, rows), expected) < ROUNDING < relative_error(logits(model, rows), expected)
    assert_same_deltas(import_peft(folder), edit)


def test_what_the_files_say(tmp_path):
    model = tiny_model("gpt2", torch.float32)
    folder = export_peft(ragged_edit(model), model, tmp_path / "deep" / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"], config["revision"]) == (
        "CAUSAL_LM",
        "some/base",
        "abc",
    )
    assert config["fan_in_fan_out"] is True and config["inference_mode"] is True
    assert {tensor.dtype for tensor in load_file(folder / FACTORS).values()} == {torch.float32}
    mask = os.umask(0)
    os.umask(mask)
    assert (folder / FACTORS).stat().st_mode & 0o777 == 0o666 & ~mask
    for family, task in (("bart", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")):
        model = tiny_model(family, torch.float32)
        folder = export_peft(ragged_edit(model), model, tmp_path / family)
        assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == task


def test_the_head_of_a_classifier_is_kept(tmp_path):
    model = tiny_model("bert", torch.float32)
    folder = export_peft(ragged_edit(model), model, tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    assert torch.equal(merged.classifier.weight, model.classifier.weight)
    with pytest.raises(AdapterError, match="classifier, a part of the classifier's head"):
        export_peft(ragged_edit(model, patterns=["bert.pooler.dense", "classifier"]), model, tmp_path / "head")


def test_names_that_end_like_other_layers(tmp_path):
    """PEFT looks names up by their end, and ranks by a pattern in which a dot is any character."""

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 4)

    class Model(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.fc, self.inner = torch.nn.Linear(4, 4), Inner()
            self.a = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4), "xfc": torch.nn.Linear(4, 4)})
            self.post_init()

        def get_input_embeddings(self):
            return None

        def forward(self, x, **_):
            return self.a["xfc"](self.a["fc"](self.inner.fc(self.fc(x))))

    model = Model(transformers.LlamaConfig())
    ranks = {"fc": 1, "inner.fc": 2, "a.xfc": 3}
    edit = Edit({name: LowRankDelta(torch.randn(1, r, 4), torch.randn(1, r, 4)) for name, r in ranks.items()})
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), export_peft(edit, model, tmp_path / "adapter"))
    layers = {name: m for name, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {name: (m.r["default"], m.scaling["default"]) for name, m in layers.items()} == {
        name: (rank, 1.0) for name, rank in ranks.items()
    }
    x = torch.randn(2, 4)
    torch.testing.assert_close(loaded.base_model.model(x), changed(model.requires_grad_(False), edit)(x))


@pytest.mark.filterwarnings(f"ignore:{ORIENTATION}")
def test_both_orientations_in_one_model(tmp_path):
    config = tiny_model("gpt2").config
    config.tie_word_embeddings = False
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    rows = make_rows("gpt2", [0, 0], 1)
    edit = ragged_edit(model, patterns=["*.3.mlp.c_fc", "lm_head", "*.3.mlp.c_proj", "*.2.attn.c_proj"], size=0.3)
    folder = export_peft(edit, model, tmp_path / "adapter")
    expected = logits(changed(model, edit), rows)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    assert relative_error(logits(loaded, rows), expected) < ROUNDING
    assert relative_error(logits(loaded.merge_and_unload(), rows), expected) < ROUNDING
    model.load_adapter(folder)
    assert relative_error(logits(model, rows), expected) < ROUNDING


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning", f"ignore:{ORIENTATION}")
def test_a_tied_layer_works_unmerged(tmp_path):
    model, rows = tiny_model("gpt2", torch.float32), make_rows("gpt2", [0, 0], 1)
    edit = ragged_edit(model, patterns=["transformer.h.3.mlp.c_fc", "lm_head"], size=0.3)
    with pytest.warns(TiedWeightsWarning, match="lm_head, whose weight is transformer.wte's as well"):
        folder = export_peft(edit, model, tmp_path / "adapter")
    with edit.applied(model):
        expected = logits(model, rows)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    assert relative_error(logits(loaded, rows), expected) < ROUNDING


def test_a_base_in_bfloat16_and_factors_in_bfloat16(tmp_path):
    model, rows = tiny_model("llama", torch.bfloat16), make_rows("llama", [0, 0], 1)
    edit = ragged_edit(model, size=0.3)
    folder = export_peft(edit, model, tmp_path / "exact")
    assert_same_deltas(import_peft(folder), edit)
    with edit.applied(model):
        expected = logits(model, rows)
    found = logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder), rows)
    exact = logits(changed(model.double(), edit), rows)
    assert rounds_alike([found], [expected], [exact])
    assert relative_error(logits(model, rows), exact) > 0.5, "the edit does more than bfloat16 rounds"
    small = export_peft(edit, model, tmp_path / "small", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(small / FACTORS).values()} == {torch.bfloat16}
    for name, delta in import_peft(small).deltas.items():
        assert torch.equal(delta.down, edit.deltas[name].down.bfloat16().float())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_base(tmp_path):
    quanto = pytest.importorskip("optimum.quanto")
    model = tiny_model("llama", torch.float32)
    quantized = copy.deepcopy(model)
    quanto.quantize(quantized, weights=quanto.qint8)
    quanto.freeze(quantized)
    edit = ragged_edit(model)
    assert_same_deltas(import_peft(export_peft(edit, quantized, tmp_path / "adapter", force=True)), edit)


# ------------------------------------------------------------------------------------- bad input to the export


def test_dense_edits_are_refused(tmp_path):
    model = tiny_model("t5", torch.float32)
    text = r"dense at .* \(made by FineTuning\).*Edit.compressed\(rank=.*--rank N or --energy 0.99"
    with pytest.raises(AdapterError, match=text):
        export_peft([ragged_edit(model), dense_edit(model)], model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_what_is_not_exported(tmp_path):
    model, other = tiny_model("llama", torch.float32), tiny_model("gpt2", torch.float32)
    edit, folder = ragged_edit(model), tmp_path / "adapter"
    with pytest.raises(ConfigError, match="no edit to export"):
        export_peft([], model, folder)
    with pytest.raises(ConfigError, match="change no layer"):
        export_peft(Edit({}), model, folder)
    with pytest.raises(BaseModelMismatchError):
        export_peft([edit], other, folder)
    changed = copy.deepcopy(model)
    changed.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(BaseModelMismatchError, match="same shapes and other weights"):
        export_peft(edit, changed, folder)
    with pytest.raises(AdapterError, match="for Hugging Face models; this is a ModuleDict"):
        export_peft(edit, torch.nn.ModuleDict({"model": model.model}), folder)
    assert not folder.exists()
    assert_same_deltas(import_peft(export_peft(edit, changed, folder, force=True)), edit)


def test_without_peft(tmp_path, monkeypatch):
    model = tiny_model("llama", torch.float32)
    folder = export_peft(ragged_edit(model), model, tmp_path / "first")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'mend-lightning\[peft\]'"):
        export_peft(ragged_edit(model), model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    import_peft(folder)


def test_where_it_is_not_written(tmp_path):
    model = tiny_model("llama", torch.float32)
    edit, folder = ragged_edit(model), tmp_path / "adapter"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputPathError, match="is a file"):
        export_peft(edit, model, tmp_path / "file")
    with pytest.raises(OutputPathError, match="the folder .*file: it is a file"):
        export_peft(edit, model, tmp_path / "file" / "adapter")
    export_peft(edit, model, folder)
    with pytest.raises(OutputPathError, match="not empty.*overwrite"):
        export_peft(ragged_edit(model, 1), model, folder)
    assert_same_deltas(import_peft(folder), edit)
    export_peft(ragged_edit(model, 1), model, folder, overwrite=True)
    assert_same_deltas(import_peft(folder), ragged_edit(model, 1))
    (folder / "adapter_config.json").rename(folder / "mine.json")
    with pytest.raises(OutputPathError, match="not overwritten: it holds no adapter_config.json"):
        export_peft(edit, model, folder, overwrite=True)


@pytest.mark.parametrize(
    "error, shown", [(OSError("disk full"), OutputPathError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_an_error_while_writing_leaves_what_was_there(error, shown, tmp_path, monkeypatch):
    model = tiny_model("llama", torch.float32)
    edit, folder = ragged_edit(model), tmp_path / "adapter"
    export_peft(edit, model, folder)

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("mend_lightning.edits.export.peft_export.save_file", fail)
    for name in ("adapter", "new"):
        with pytest.raises(shown):
            export_peft(edit, model, tmp_path / name, overwrite=True)
    assert os.listdir(tmp_path) == ["adapter"]
    assert_same_deltas(import_peft(folder), edit)


# ------------------------------------------------------------------------------------- adapters of somebody else
