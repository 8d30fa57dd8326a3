"""A quantised base from the command line: fit, resume, test, edit, merge; and what cannot be quantised."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec

import pytest
import torch
import transformers
import yaml
from helpers.bases import REMARKS, SIZES, assert_same_state, run_config
from helpers.commandline import assert_says, call
from helpers.models import ROUNDING, make_batch, relative_error, tiny_model
from helpers.quantized import with_weights_of

from mend_lightning import Edit, MendEditor
from mend_lightning.editors import EnnEditor
from mend_lightning.errors import ConfigError, MissingPackageError, UnverifiedBaseWarning
from mend_lightning.models import quantisation as quantization_module
from mend_lightning.models.base import BaseModel, load_base
from mend_lightning.models.fingerprint import is_quantized
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import replayed
from mend_lightning.models.layers import editable_layers, find_stacks, layer_shape, select_layers
from mend_lightning.models.quantisation import quantization_config, stored_bytes
from mend_lightning.training.editor_checkpoint import check_checkpoint
from mend_lightning.training.step import edit_step

pytest_plugins = ["helpers.bases", "helpers.quantized"]
pytestmark = [
    pytest.mark.filterwarnings(*REMARKS, "ignore:Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.usefixtures("python_unpacking"),
]
pytest.importorskip("optimum.quanto", reason="pip install optimum-quanto: a base with quantised weights")
QUESTION = "Which continent is North Korea in?"


@pytest.fixture(scope="module")
def root(base_folder, facts, tmp_path_factory):
    """Runs of the command line on an int8 base: fit in one go (`whole`), in two (`part`), and what is done with it."""
    folder = tmp_path_factory.mktemp("int8")
    for name, steps in (("whole", 4), ("part", 2)):
        path = run_config(folder / name, base_folder("llama"), facts, max_steps=steps, limit_val_batches=0)
        config = yaml.safe_load(path.read_text())
        config["model"]["base"]["quantize"] = "int8"
        path.write_text(yaml.safe_dump(config))
        result = call("fit", "--config", path)
        assert result.code == 0, result.err
        assert "LlamaForCausalLM, torch.float32, int8 by optimum-quanto" in result.out
    return folder


def last(root, name: str) -> dict:
    return torch.load(root / name / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_what_is_quantised(family, quantize, base_folder):
    """The blocks' linear layers, not what makes the logits; the model is that of the weights they stand for."""
    folder = str(base_folder(family))
    model, tokenizer = BaseModel(folder, "float32", quantize=quantize).load()
    packed = {name for name, layer in editable_layers(model).items() if is_quantized(layer)}
    expected = {
        name for name in editable_layers(model) if any(name.startswith(f"{stack}.") for stack in find_stacks(model))
    }
    # Of T5 transformers keeps `wo` in full, whatever it is told.
    assert packed == {name for name in expected if not name.endswith(".wo")} != set()
    name = next(name for name in packed)
    weight, (d_in, d_out) = model.get_submodule(name).weight, layer_shape(model.get_submodule(name))
    # One number of 8 or 4 bit a weight; a scale for each output (int8), a scale and a shift of each output (int4, narrow).
    scales = 4 * d_out * {"int8": 1, "int4": 2}[quantize]
    assert stored_bytes(weight) == d_in * d_out * {"int8": 2, "int4": 1}[quantize] // 2 + scales
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    inputs = tokenizer(["Q: Which country is Managua in?\nA:"], return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    inputs |= {"decoder_input_ids": torch.zeros(1, 2, dtype=torch.long)} if family == "t5" else {}
    plain, dense = load_base(folder, "float32")[0], with_weights_of(load_base(folder, "float32")[0], model)
    outputs = [each(**inputs).logits for each in (model, dense, plain)]
    assert relative_error(outputs[0], outputs[1]) < ROUNDING
    assert relative_error(outputs[0], outputs[2]) > 10 * ROUNDING


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_losses_and_gradients(quantize, base_folder):
    """Those of the weights that the quantised ones stand for, in every part of a step; the trunk replays bit for bit."""
    folder = str(base_folder("llama"))
    model = load_base(folder, "float32", quantize=quantize)[0]
    dense = with_weights_of(load_base(folder, "float32")[0], model)
    batch, found = make_batch("llama"), []
    for base in (model, dense):
        torch.manual_seed(0)
        editor = MendEditor.for_model(base, rank=4, edit_rate=0.05)
        out = edit_step(base, editor, batch)
        out.total(1.0).backward()
        statistics = {name: value for name, value in editor.state_dict().items() if "stats" in name}
        found.append((out, statistics, {name: each.grad for name, each in editor.named_parameters()}))
    (out, statistics, gradients), (expected, dense_statistics, dense_gradients) = found
    for name in ("edit", "locality", "inner"):
        assert relative_error(getattr(out, name), getattr(expected, name)) < 1e-4, name
    for actual, wanted in ((statistics, dense_statistics), (gradients, dense_gradients)):
        for name, value in wanted.items():
            if value is not None:
                assert relative_error(actual[name], value) < 1e-3, name
    with torch.no_grad():
        whole = model(**batch.x_in.inputs).logits
        with replayed(run_trunk(model, batch.x_in, select_layers(model)), slice(None)):
            assert torch.equal(model(**batch.x_in.inputs).logits, whole)


def lay_alike(model: torch.nn.Module) -> None:
    """Puts the weights where torch allocates: how far they are from a multiple of 64 bytes decides which instructions they meet."""
    for parameter in model.parameters():
        if type(parameter.data) is torch.Tensor:
            parameter.data = parameter.data.clone()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize(
    "dtype, autocast", [("bfloat16", None), ("float32", torch.bfloat16), ("float32", torch.float16)]
)
def test_half_precision(quantize, dtype, autocast, base_folder):
    """In bfloat16, and under the Trainer's mixed precisions: factors and losses of the dequantised weights, bit for bit.

    Quanto alone ends the process at the first of these (bfloat16, int8), and raises at the others.
    """
    folder = str(base_folder("llama"))
    model = load_base(folder, dtype, quantize=quantize)[0]
    dense = with_weights_of(load_base(folder, dtype)[0], model)
    found = []
    for base in (model, dense):
        lay_alike(base)
        torch.manual_seed(0)
        editor = MendEditor.for_model(base, rank=4, edit_rate=0.05)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            out = edit_step(base, editor, make_batch("llama"))
        out.total(1.0).backward()
        found.append((out, editor))
    (out, editor), (expected, dense_editor) = found
    for name in ("edit", "locality", "inner"):
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    assert_same_state(editor.state_dict(), dense_editor.state_dict())
    for name, parameter in dense_editor.named_parameters():
        assert torch.equal(editor.get_parameter(name).grad, parameter.grad), name


def test_second_order_gradients(base_folder):
    """ENN's meta-gradient goes through the quantised layers twice."""
    folder = str(base_folder("llama"))
    model = load_base(folder, "float32", quantize="int8")[0]
    dense = with_weights_of(load_base(folder, "float32")[0], model)
    gradients = []
    for base in (model, dense):
        editor = EnnEditor.for_model(base, edit_rate=0.1)
        edit_step(base, editor, make_batch("llama")).total(1.0).backward()
        gradients.append({name: parameter.grad for name, parameter in editor.named_parameters()})
    for name, gradient in gradients[1].items():
        assert gradient.abs().max() > 0 and relative_error(gradients[0][name], gradient) < 1e-5, name


def test_resume(root):
    """From the checkpoint after two steps to the same weights and statistics; the base is in no checkpoint."""
    path = root / "part" / "run.yaml"
    saved = root / "part" / "checkpoints" / "last.ckpt"
    result = call("fit", "--config", path, "--ckpt_path", saved, "--trainer.max_steps", 4)
    assert (result.code, result.err) == (0, "")
    resumed, whole = last(root, "part"), last(root, "whole")
    assert resumed["global_step"] == whole["global_step"] == 4
    assert_same_state(resumed["state_dict"], whole["state_dict"])
    assert all(name.startswith("editor.") for name in whole["state_dict"])


def test_the_editor_is_used_on_the_base_it_was_trained_on(root, base_folder, tmp_path):
    """`edit` loads the base in 8 bit without being told, and makes the edit that the dequantised base gets."""
    folder, out = root / "whole" / "editor", tmp_path / "edit.safetensors"
    editor = MendEditor.from_pretrained(folder)
    assert editor.base_options["quantize"] == "int8"
    assert editor.base_fingerprint.startswith("quantised:WeightQBytesTensor.float32:")
    asked = ["--prompt", QUESTION, "--target", "Oceania", "--dtype", "float32", "--out", out]
    result = call("edit", "--editor", folder, *asked)
    assert (result.code, result.err) == (0, "")
    edit, plain = Edit.load(out), str(base_folder("llama"))
    model, tokenizer = load_base(plain, "float32", quantize="int8")
    dense = with_weights_of(load_base(plain, "float32")[0], model)
    with pytest.warns(UnverifiedBaseWarning, match="one of the two is quantised"):
        expected = editor.edit(dense, tokenizer, QUESTION, "Oceania")
    for name, delta in expected.deltas.items():
        assert relative_error(edit.deltas[name].dense(), delta.dense()) < 1e-3, name
    assert edit.about["probability"] == pytest.approx(expected.about["probability"], rel=1e-3)
    assert set(edit.about["relative_norm"]) == set(edit.deltas)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit.layers_in(model)
    merged = tmp_path / "merged"
    with pytest.warns(UnverifiedBaseWarning):
        assert call("merge", out, "--out", merged).code == 0
    base, sum_of = load_base(plain, "float32")[0], load_base(str(merged), "float32")[0]
    for name, delta in edit.deltas.items():
        weights = [each.get_submodule(name).weight for each in (base, sum_of)]
        assert relative_error(weights[1], weights[0] + delta.dense()[0]) < 1e-5


def test_test_and_another_form_of_the_base(root):
    """`test` of the run; in 4 bit the same editor is used with a warning, for nobody can tell whose weights they are."""
    path, editor = root / "whole" / "run.yaml", root / "whole" / "editor"
    result = call("test", "--config", path, "--model.editor", editor)
    assert (result.code, result.err) == (0, "")
    results = json.loads((root / "whole" / "results.json").read_text())
    assert results["edits"] == SIZES["test"] and results["base_fingerprint"].startswith("quantised:")
    with pytest.warns(UnverifiedBaseWarning, match="they are quantised in different ways"):
        result = call("test", "--config", path, "--model.editor", editor, "--model.base.quantize", "int4")
    assert result.code == 0, result.err


def test_checkpoints_of_another_form(root, base_folder):
    checkpoint, folder = last(root, "whole"), str(base_folder("llama"))
    editor = MendEditor.from_pretrained(root / "whole" / "editor")
    editor.bind(load_base(folder, "float32")[0])
    with pytest.warns(UnverifiedBaseWarning, match="that the checkpoint was made for"):
        check_checkpoint(checkpoint, editor)


def test_a_sharded_base_is_refused(root, tmp_path):
    """Before anything loads. Two processes under ddp are in test_distributed.py."""
    sharded = ["--trainer.strategy", "fsdp2", "--trainer.default_root_dir", tmp_path]
    result = call("fit", "--config", root / "whole" / "run.yaml", *sharded, "--model.base.name", "nowhere")
    assert_says(result.err, "'int8' and a sharded base cannot go together.*--trainer.strategy ddp")


def test_what_cannot_be_quantised(base_folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'int8' changed no layer of GPT2LMHeadModel.*Conv1D"):
        load_base(str(base_folder("gpt2")), "float32", quantize="int8")
    with pytest.raises(ConfigError, match="must be int8, int4 or nothing, not 'int2'"):
        load_base(str(base_folder("llama")), quantize="int2")
    stored = transformers.LlamaConfig(quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConfigError, match="files are quantised already.*Leave quantize out"):
        quantization_config("int4", transformers.AutoModelForCausalLM, stored, torch.float32)
    monkeypatch.setitem(quantization_module.PACKAGES, "optimum-quanto", ("not_there.quanto", "accelerate"))
    with pytest.raises(MissingPackageError, match=r"not_there-quanto is not installed: pip install optimum-quanto"):
        load_base(str(base_folder("llama")), quantize="int4")


def test_bitsandbytes_on_a_cuda_device(monkeypatch):
    """What transformers is told there; the layers themselves need the library and the device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = transformers.AutoModelForCausalLM, tiny_model("gpt2", torch.float32).config, torch.bfloat16
    if find_spec("bitsandbytes") is None:
        with pytest.raises(
            MissingPackageError, match="needs bitsandbytes on this machine.*pip install bitsandbytes acc"
        ):
            quantization_config("int4", *asked)
    monkeypatch.setitem(quantization_module.PACKAGES, "bitsandbytes", ())
    monkeypatch.setattr(transformers.BitsAndBytesConfig, "post_init", lambda self: None)
    eight, four = (quantization_config(name, *asked) for name in ("int8", "int4"))
    assert (eight.load_in_8bit, eight.load_in_4bit, eight.llm_int8_skip_modules) == (True, False, ["lm_head"])
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == (True, "nf4", torch.bfloat16)
    assert four.llm_int8_skip_modules == ["lm_head"]
