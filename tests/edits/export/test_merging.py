"""Edits merged into full model folders: plain transformers loads them, and rounding is counted right."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from helpers.bases import assert_same_state, small_tokenizer, state_copy
from helpers.edits import changed, dense_edit, logits, ragged_edit
from helpers.models import KINDS, ROUNDING, make_rows, relative_error, tiny_model

from mend_lightning import Edit, LowRankDelta
from mend_lightning.edits.export.merging import EDITS_FILE, merge
from mend_lightning.errors import (
    BaseModelMismatchError,
    ConfigError,
    MergeError,
    NoEffectWarning,
    OutputPathError,
    RoundingWarning,
)
from mend_lightning.files import written_folder

CLASSES = {
    "causal": transformers.AutoModelForCausalLM,
    "encoder_decoder": transformers.AutoModelForSeq2SeqLM,
    "classifier": transformers.AutoModelForSequenceClassification,
}


@pytest.fixture(autouse=True)
def _no_progress_bars():
    transformers.utils.logging.disable_progress_bar()


def load(family: str, folder, **options):
    return CLASSES[KINDS[family]].from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("kind", ["low-rank", "several", "dense"])
def test_the_folder_holds_the_edited_model(family, kind, tmp_path):
    model, rows = tiny_model(family, torch.float32), make_rows(family, [0, 0], 1)
    edits = (
        [dense_edit(model)]
        if kind == "dense"
        else [ragged_edit(model, seed) for seed in range(1 + (kind == "several"))]
    )
    base, before = state_copy(model), logits(model, rows)
    report = merge(edits, model, tmp_path / "merged")
    assert_same_state(state_copy(model), base)
    assert torch.equal(logits(model, rows), before)
    expected = logits(changed(model, *edits), rows)
    assert relative_error(before, expected) > 1e-2, "the edits do something"
    merged = load(family, tmp_path / "merged")
    assert type(merged) is type(model)
    assert relative_error(logits(merged, rows), expected) < ROUNDING
    unedited = state_copy(model).keys() - {f"{name}.weight" for name in report.layers}
    assert_same_state({k: v for k, v in merged.state_dict().items() if k in unedited}, {k: base[k] for k in unedited})
    assert json.loads((tmp_path / "merged" / EDITS_FILE).read_text()) == [edit.about for edit in edits]
    assert os.listdir(tmp_path) == ["merged"], "no temporary folder is left"


def test_what_lies_beside_the_weights(tmp_path):
    model = tiny_model("gpt2", torch.float32)
    model.generation_config.max_new_tokens = 7
    merge(ragged_edit(model), model, tmp_path / "deep" / "merged", small_tokenizer())
    folder = tmp_path / "deep" / "merged"
    assert load("gpt2", folder).generation_config.max_new_tokens == 7
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Where?")["input_ids"] == small_tokenizer()("Where?")["input_ids"]
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.iterdir()):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


@pytest.mark.filterwarnings("ignore::mend_lightning.errors.RoundingWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_float32_arithmetic(dtype, tmp_path):
    """Every stored entry is W + ΔW of float32, rounded once: against a loop over the entries."""
    model = tiny_model("llama", dtype)
    edits = [ragged_edit(model, seed, size=0.03) for seed in range(2)]
    report = merge(edits, model, tmp_path / "merged")
    merged = dict(load("llama", tmp_path / "merged", dtype="auto").named_modules())
    assert merged["model.layers.3.mlp.up_proj"].weight.dtype == dtype
    name = "model.layers.3.mlp.down_proj"
    base, stored = dict(model.named_modules())[name].weight, merged[name].weight.detach()
    change = sum(edit.deltas[name].dense()[0] for edit in edits)
    changed = lost = 0
    squares = {"error": 0.0, "change": 0.0}
    for i in range(base.shape[0]):
        for j in range(base.shape[1]):
            exact = base[i, j].float() + change[i, j]
            assert stored[i, j] == exact.to(dtype)
            changed += int(change[i, j] != 0)
            lost += int(change[i, j] != 0 and stored[i, j] == base[i, j])
            squares["error"] += float(stored[i, j].double() - exact.double()) ** 2
            squares["change"] += float(change[i, j].double()) ** 2
    layer = report.layers[name]
    assert (layer.entries, layer.changed, layer.lost) == (base.numel(), changed, lost)
    assert 0 < lost < changed
    assert layer.relative_error == pytest.approx((squares["error"] / squares["change"]) ** 0.5, rel=1e-4)
    assert report.dtype == str(dtype).removeprefix("torch.")
    total = [sum(getattr(layer, key) for layer in report.layers.values()) for key in ("lost", "changed")]
    assert report.lost == total[0] / total[1]


def test_an_edit_that_rounding_takes_away():
    model = tiny_model("llama", torch.bfloat16)
    with pytest.warns(RoundingWarning, match="Much of the edit is lost in bfloat16.*float32 keeps the edit"):
        report = merge(ragged_edit(model, size=1e-3), model)
    assert report.lost > 0.9 and report.folder is None
    report = merge(ragged_edit(model.float(), size=1e-3), model)
    assert report.lost < 0.01 and max(layer.relative_error for layer in report.layers.values()) < 0.1


def test_edits_of_different_layers_and_a_layer_left_alone():
    model = tiny_model("t5", torch.float32)
    first, second = "encoder.block.1.layer.1.DenseReluDense.wo", "decoder.block.2.layer.2.DenseReluDense.wi"
    edits = [ragged_edit(model, patterns=[first]), ragged_edit(model, patterns=[first, second])]
    report = merge(edits, model)
    assert list(report.layers) == [first, second]
    assert (report.layers[first].changed, report.layers[first].relative_error) == (0, 0.0), "both have rank 0 there"
    assert report.layers[second].changed > 0


def test_a_module_that_runs_several_times(tmp_path):
    config = transformers.AlbertConfig(
        vocab_size=40, embedding_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_labels=1,
    )  # fmt: skip
    model = transformers.AlbertForSequenceClassification(config).eval().requires_grad_(False)
    rows = make_rows("bert", [0, 0], 1)
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
    edit = Edit({name: LowRankDelta(torch.randn(1, 2, 16), torch.randn(1, 2, 24))})
    with edit.applied(model):
        expected = logits(model, rows)
    merge(edit, model, tmp_path / "merged")
    assert relative_error(logits(load("bert", tmp_path / "merged"), rows), expected) < ROUNDING


# ------------------------------------------------------------------------------------- bad input


def test_a_sum_that_does_not_fit(tmp_path):
    model = tiny_model("llama", torch.float16)
    edit = ragged_edit(model, patterns=["model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj"], size=1e3)
    with pytest.raises(MergeError, match="W . ΔW of model.layers.3.mlp.up_proj holds values that float16 cannot"):
        merge(edit, model, tmp_path / "merged")
    merge(edit, model.bfloat16(), tmp_path / "merged")


def test_edits_of_nothing(tmp_path):
    model = tiny_model("llama", torch.float32)
    with pytest.raises(ConfigError, match="change no layer"):
        merge(Edit({}), model, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    with pytest.warns(NoEffectWarning, match="every ΔW is zero"):
        merge(ragged_edit(model, patterns=["model.layers.2.mlp.up_proj"]), model, tmp_path / "merged")


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    model = tiny_model("llama", torch.float32)
    merge(ragged_edit(model), model, tmp_path / "merged")
    weights = (tmp_path / "merged" / "model.safetensors").read_bytes()
    rename = Path.rename

    def fail(path, target):
        if path.name == "new":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputPathError, match="Cannot put the finished folder at"):
        merge(ragged_edit(model, 1), model, tmp_path / "merged", overwrite=True)
    assert os.listdir(tmp_path) == ["merged"]
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == weights


def test_tied_weights(tmp_path):
    model = tiny_model("gpt2", torch.float32)
    edit = ragged_edit(model, patterns=["transformer.h.3.mlp.c_fc", "lm_head"])
    with pytest.raises(MergeError, match="changes lm_head, whose weight is transformer.wte's as well"):
        merge(edit, model, tmp_path / "merged")
    shared = tiny_model("llama", torch.float32)
    shared.model.layers[3].mlp = shared.model.layers[2].mlp
    with pytest.raises(MergeError, match="layers.2.mlp.up_proj, whose weight is model.layers.3.mlp.up_proj's as well"):
        merge(ragged_edit(shared, patterns=["model.layers.2.mlp.up_proj"]), shared, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_base(tmp_path):
    quanto = pytest.importorskip("optimum.quanto")
    model = tiny_model("llama", torch.float32)
    edit = ragged_edit(model)
    quanto.quantize(model, weights=quanto.qint8, exclude=["lm_head"])
    quanto.freeze(model)
    with pytest.raises(MergeError, match="quantised .*no plain floating-point weight.*bfloat16 or float32"):
        merge(edit, model, tmp_path / "merged", force=True)
    packed = tiny_model("llama", torch.float32)
    packed.model.layers[3].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(5, 1, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(MergeError, match="quantised .*up_proj.weight is no plain floating-point weight"):
        merge(edit, packed, tmp_path / "merged", force=True)
    marked = tiny_model("llama", torch.float32)
    marked.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(MergeError, match="quantised"):
        merge(edit, marked, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_here(tmp_path):
    model = tiny_model("llama", torch.float32)
    edit = ragged_edit(model)
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(MergeError, match="layers.0.mlp.up_proj.weight is sharded or offloaded"):
        merge(edit, model, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_what_is_not_merged(tmp_path):
    model, other = tiny_model("llama", torch.float32), tiny_model("gpt2", torch.float32)
    edit, folder = ragged_edit(model), tmp_path / "merged"
    with pytest.raises(ConfigError, match="no edit to merge"):
        merge([], model, folder)
    with pytest.raises(BaseModelMismatchError, match="which GPT2LMHeadModel does not have"):
        merge(edit, other, folder)
    with pytest.raises(MergeError, match="Only a Hugging Face model .*this is a ModuleDict"):
        merge(edit, torch.nn.ModuleDict({"model": model.model}), folder)
    other_weights = copy.deepcopy(model)
    other_weights.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(BaseModelMismatchError, match="same shapes and other weights"):
        merge([ragged_edit(other_weights), edit], other_weights, folder)
    assert not folder.exists()
    merge(edit, other_weights, folder, force=True)
    rows = make_rows("llama", [0, 0], 1)
    assert relative_error(logits(load("llama", folder), rows), logits(changed(other_weights, edit), rows)) < ROUNDING


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
def test_a_model_with_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", torch.float32)
    edit = ragged_edit(model, patterns=["model.layers.3.self_attn.q_proj", "lm_head"])
    model.add_adapter(peft.LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(MergeError, match="has PEFT adapters loaded"):
        merge(edit, model, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_where_it_is_not_written(tmp_path):
    model = tiny_model("llama", torch.float32)
    edit, folder = ragged_edit(model), tmp_path / "merged"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputPathError, match="is a file"):
        merge(edit, model, tmp_path / "file")
    with pytest.raises(OutputPathError, match="the folder .*file: it is a file"):
        merge(edit, model, tmp_path / "file" / "merged")
    folder.mkdir()
    merge(edit, model, folder)
    weights = (folder / "model.safetensors").read_bytes()
    other = ragged_edit(model, 1)
    with pytest.raises(OutputPathError, match="not empty.*overwrite"):
        merge(other, model, folder)
    assert (folder / "model.safetensors").read_bytes() == weights
    (folder / "left.txt").write_text("of the earlier merge")
    merge(other, model, folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() != weights and not (folder / "left.txt").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(OutputPathError, match=f"not overwritten: it holds no {EDITS_FILE}"):
        merge(edit, model, mine, overwrite=True)
    assert os.listdir(mine) == ["thesis.txt"]


def test_the_base_itself_is_not_overwritten(tmp_path):
    """An edit of a merged model: its folder is the base's now."""
    model = tiny_model("llama", torch.float32)
    merge(ragged_edit(model), model, tmp_path / "merged")
    again = load("llama", tmp_path / "merged")
    with pytest.raises(OutputPathError, match="holds the model that is being merged into"):
        merge(ragged_edit(again), again, tmp_path / "merged", overwrite=True)
    assert_same_state(state_copy(load("llama", tmp_path / "merged")), state_copy(again))


class FailingTokenizer:
    """Fails when the model is written already."""

    def __init__(self, error: BaseException):
        self.error = error

    def save_pretrained(self, folder):
        assert os.path.getsize(folder / "model.safetensors")
        raise self.error


def test_a_folder_that_came_meanwhile_is_kept(tmp_path):
    """Two processes write to one folder: the one that ends later replaces nothing."""
    with pytest.raises(OutputPathError, match="is there already and not empty"):
        with written_folder(tmp_path / "merged") as later:
            (later / "a.txt").write_text("later")
            with written_folder(tmp_path / "merged") as first:
                (first / "a.txt").write_text("first")
    assert (tmp_path / "merged" / "a.txt").read_text() == "first" and os.listdir(tmp_path) == ["merged"]


@pytest.mark.parametrize(
    "error, shown", [(OSError("disk full"), OutputPathError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_an_error_while_writing_leaves_what_was_there(error, shown, tmp_path):
    model = tiny_model("llama", torch.float32)
    edit = ragged_edit(model)
    merge(edit, model, tmp_path / "merged")
    weights = (tmp_path / "merged" / "model.safetensors").read_bytes()
    base = state_copy(model)
    for name in ("merged", "new"):
        with pytest.raises(shown):
            merge(ragged_edit(model, 1), model, tmp_path / name, FailingTokenizer(error), overwrite=True)
    assert os.listdir(tmp_path) == ["merged"]
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == weights
    assert_same_state(state_copy(model), base)
