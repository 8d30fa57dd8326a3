"""PEFT adapters as edits: those of others, and broken ones."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.edits import logits, ragged_edit
from helpers.models import ROUNDING, make_rows, relative_error, tiny_model
from safetensors.torch import load_file, save_file

from mend_lightning import Edit
from mend_lightning.edits.export.peft_export import export_peft
from mend_lightning.edits.export.peft_import import import_peft
from mend_lightning.errors import (
    AdapterError,
)

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
ORIENTATION = "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`"
FACTORS = "adapter_model.safetensors"


def foreign(model, folder, **settings):
    """A LoRA as PEFT itself makes and saves it, with random factors."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["up_proj", "down_proj"], **settings}
    made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(folder)
    return made.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.5},
        {"rank_pattern": {"layers.2.mlp.up_proj": 2}, "alpha_pattern": {r"layers\.[12]\.mlp.*": 9}},
    ],
)
def test_a_plain_lora_of_somebody_else(settings, tmp_path):
    model, rows = tiny_model("llama", torch.float32), make_rows("llama", [0, 0], 1)
    expected = logits(foreign(model, tmp_path / "theirs", **settings), rows)
    edit = import_peft(tmp_path / "theirs")
    assert edit.about["editor"] == "PEFT LoRA" and edit.about["imported_from"] == "theirs"
    assert not {"base_fingerprint", "weights"} & edit.about.keys()
    with edit.applied(model):
        assert relative_error(logits(model, rows), expected) < ROUNDING
    assert relative_error(logits(model, rows), expected) > 1e-2, "it does something"
    path = edit.save(tmp_path / "edit.safetensors")
    assert Edit.load(path).about == edit.about


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_plain_lora_of_gpt2(tmp_path):
    model, rows = tiny_model("gpt2", torch.float32), make_rows("gpt2", [0, 0], 1)
    expected = logits(foreign(model, tmp_path / "theirs", target_modules=["c_fc", "c_proj"]), rows)
    with import_peft(tmp_path / "theirs").applied(model):
        assert relative_error(logits(model, rows), expected) < ROUNDING


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "settings, text",
    [
        ({"use_dora": True}, "lora_magnitude_vector|use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight|modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only", "lora_bias": False, "target_modules": ["up_proj"]}, "bias='lora_only'"),
        ({"target_modules": ["embed_tokens"]}, "embed"),
    ],
)
def test_adapters_that_are_more_than_a_lora(settings, text, tmp_path):
    foreign(tiny_model("llama", torch.float32), tmp_path / "theirs", **settings)
    with pytest.raises(AdapterError, match=text):
        import_peft(tmp_path / "theirs")


def test_adapters_that_are_no_lora(tmp_path):
    config = peft.IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"])
    peft.get_peft_model(tiny_model("llama", torch.float32), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="of type IA3; only LORA"):
        import_peft(tmp_path)


def change_config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def change_weights(change, metadata=None):
    def changed(folder):
        tensors = load_file(folder / FACTORS)
        change(tensors)
        save_file(tensors, folder / FACTORS, metadata=metadata)

    return changed


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-60])


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json cannot be read; expected a folder"),
        (lambda folder: (folder / FACTORS).unlink(), "adapter_model.safetensors cannot be read"),
        (lambda folder: (folder / FACTORS).rename(folder / "adapter_model.bin"), "adapter_model.bin .pickle., which is not"),
        (cut("adapter_config.json"), "adapter_config.json cannot be read"),
        (cut(FACTORS), "adapter_model.safetensors cannot be read"),
        (change_config(peft_type="LOHA"), "of type LOHA"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "of type None"),
        (change_weights(lambda tensors: tensors.popitem()), "no matching lora_A and lora_B"),
        (change_weights(lambda tensors: tensors.clear()), "holds no LoRA factors"),
        (change_weights(lambda tensors: None, {"mend_lightning_adapter": "1"}), "part missing or broken: KeyError"),
        (
            change_weights(lambda tensors: None, {"mend_lightning_adapter": "1", "ranks": "{", "about": "{}"}),
            "part missing or broken: JSONDecodeError",
        ),
        (
            change_weights(lambda tensors: None, {"mend_lightning_adapter": "1", "ranks": "{}", "about": "{}"}),
            "no rank of model.layers.1.mlp",
        ),
        (lambda folder: (change_weights(lambda tensors: None)(folder), change_config(use_nextora=1)(folder)),
         "use_nextora=1"),
        (change_config(alpha_pattern={"(": 1}), "part missing or broken"),
        (change_weights(lambda tensors: next(iter(tensors.values())).fill_(float("nan"))), "NaN or infinite"),
        (lambda folder: (change_weights(lambda tensors: None)(folder), change_config(init_lora_weights="pissa")(folder)),
         "init_lora_weights='pissa'"),
        (lambda folder: (change_weights(lambda tensors: None)(folder), change_config(lora_alpha=None)(folder)),
         "part missing or broken"),
    ],
)  # fmt: skip
def test_broken_adapters(damage, text, tmp_path):
    model = tiny_model("llama", torch.float32)
    folder = export_peft(ragged_edit(model), model, tmp_path / "adapter")
    damage(folder)
    with pytest.raises(AdapterError, match=text):
        import_peft(folder)


def test_our_adapter_with_another_scaling(tmp_path):
    """Somebody made the edit weaker in adapter_config.json, as one does with a LoRA."""
    model = tiny_model("llama", torch.float32)
    edit = ragged_edit(model, patterns=["model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj"])
    folder = export_peft(edit, model, tmp_path / "adapter")
    change_config(lora_alpha=0.5)(folder)
    name = "model.layers.3.mlp.down_proj"
    torch.testing.assert_close(import_peft(folder).deltas[name].dense(), 0.5 * edit.deltas[name].dense())


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(AdapterError, match="expected a folder that PEFT saved an adapter to"):
        import_peft(tmp_path / "none")
