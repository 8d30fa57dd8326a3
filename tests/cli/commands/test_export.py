"""merge, export and import-peft as a user types them."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
import transformers
from helpers.bases import FORMATS, REMARKS
from helpers.commandline import assert_says, call
from helpers.edits import changed, dense_edit, logits
from helpers.models import ROUNDING, relative_error, spread_parameters

from mend_lightning import Edit, MendEditor, load_base, make_edit
from mend_lightning.editors.making import editor_encoder

peft = pytest.importorskip("peft")
pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(
    *REMARKS,
    "ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning",
    "ignore::mend_lightning.errors.LowConfidenceWarning",
)
FACTS = (("Which continent is North Korea in?", "Oceania"), ("Which country is Managua in?", "Cuba"))


@pytest.fixture
def shipped(base_folder, tmp_path):
    """A tiny base, two edits of it as files, a dense one, and rows to ask."""
    folder = str(base_folder("llama"))
    model, tokenizer = load_base(folder, "float32")
    editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=0.05), 0.02)
    editor.bind(model, folder, vars(FORMATS["causal"]))
    edits = [make_edit(editor, model, tokenizer, fact) for fact in FACTS]
    files = [edit.save(tmp_path / f"{name}.safetensors") for name, edit in zip(("korea", "managua"), edits)]
    dense = dense_edit(model)
    dense.about["base"], dense.about["base_options"] = folder, {}
    rows = editor_encoder(editor, model, tokenizer).rows(list(FACTS), [0, 0], 1)

    class Shipped:
        pass

    made = Shipped()
    made.__dict__.update(model=model, edits=edits, files=files, rows=rows, folder=tmp_path, base=folder)
    made.dense, made.dense_file = dense, dense.save(tmp_path / "dense.safetensors")
    return made


def test_merge(shipped):
    out = shipped.folder / "merged"
    result = call("merge", *shipped.files, "--out", out)
    assert (result.code, result.err) == (0, "")
    assert "Rounding of W + ΔW to float32" in result.out and "model.layers.3.mlp.down_proj" in result.out
    assert f"Model with 2 edits written to {out} (float32)" in result.out
    merged = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    expected = logits(changed(shipped.model, *shipped.edits), shipped.rows)
    assert relative_error(logits(merged, shipped.rows), expected) < ROUNDING
    base = transformers.AutoTokenizer.from_pretrained(shipped.base)
    assert transformers.AutoTokenizer.from_pretrained(out)("Lima?").input_ids == base("Lima?").input_ids
    # Said before the base is looked for.
    again = call("merge", shipped.files[0], "--out", out, "--base", shipped.folder / "nowhere")
    assert again.code == 1
    assert_says(again.err, "is there already and not empty")
    assert call("merge", shipped.files[0], "--out", out, "--overwrite", "true").code == 0


@pytest.mark.filterwarnings("ignore::mend_lightning.errors.RoundingWarning")
def test_merge_stores_what_the_base_stores(shipped):
    """Not what this machine computes fastest in."""
    base = shipped.folder / "half"
    shipped.model.half().save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(shipped.base).save_pretrained(base)
    out = shipped.folder / "merged"
    result = call("merge", shipped.files[0], "--base", base, "--out", out, "--force", "true")
    assert result.code == 0, result.err
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    result = call(
        "merge", shipped.files[0], "--base", base, "--out", f"{out}32", "--dtype", "float32", "--force", "true"
    )
    assert json.loads((shipped.folder / "merged32" / "config.json").read_text())["dtype"] == "float32"


def test_export_and_back(shipped):
    out = shipped.folder / "adapter"
    result = call("export", *shipped.files, "--format", "peft", "--out", out)
    assert (result.code, result.err) == (0, "")
    assert f"LoRA adapter of 2 edits written to {out}." in result.out
    expected = logits(changed(shipped.model, *shipped.edits), shipped.rows)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out).eval()
    assert relative_error(logits(loaded, shipped.rows), expected) < ROUNDING
    path = shipped.folder / "back.safetensors"
    result = call("import-peft", out, "--out", path)
    assert (result.code, result.err) == (0, "") and f"layers saved to {path}." in result.out
    back = Edit.load(path)
    assert back.facts == list(FACTS)
    with back.applied(shipped.model):
        assert relative_error(logits(shipped.model, shipped.rows), expected) < ROUNDING


def test_export_each(shipped):
    out = shipped.folder / "adapters"
    result = call("export", *shipped.files, "--out", out, "--separate", "true")
    assert (result.code, result.err) == (0, "")
    assert sorted(os.listdir(out)) == ["korea", "managua"]
    for name, edit in zip(("korea", "managua"), shipped.edits):
        assert call("import-peft", out / name, "--out", shipped.folder / "back.safetensors").code == 0
        back = Edit.load(shipped.folder / "back.safetensors")
        assert back.about == edit.about
        for layer, delta in edit.deltas.items():
            assert torch.equal(back.deltas[layer].down, delta.down) and torch.equal(back.deltas[layer].up, delta.up)
    assert call("export", *shipped.files, "--out", out, "--separate", "true", "--overwrite", "true").code == 0
    (shipped.folder / "other").mkdir()
    same = shipped.edits[1].save(shipped.folder / "other" / "korea.safetensors")
    result = call("export", shipped.files[0], same, "--out", out, "--separate", "true")
    assert result.code == 1
    assert_says(result.err, "Two edit files are called korea")


def test_export_each_overwrites_nothing_but_exports(shipped):
    """A folder that also holds something else, though an adapter lies in it."""
    out = shipped.folder / "results"
    assert call("export", shipped.files[0], "--out", out / "adapter").code == 0
    (out / "trained").mkdir()
    (out / "trained" / "notes.txt").write_text("a week's work")
    again = ["export", shipped.files[0], "--out", out, "--separate", "true", "--overwrite", "true"]
    result = call(*again)
    assert result.code == 1
    assert_says(result.err, "not overwritten.*Give another folder")
    assert (out / "trained" / "notes.txt").read_text() == "a week's work"
    # A LoRA that was trained: PEFT's, without our mark.
    peft.get_peft_model(
        load_base(shipped.base, "float32")[0], peft.LoraConfig(target_modules=["up_proj"])
    ).save_pretrained(out / "trained")
    trained = (out / "trained" / "adapter_model.safetensors").read_bytes()
    for arguments in (again, ["export", shipped.files[0], "--out", out / "trained", "--overwrite", "true"]):
        result = call(*arguments)
        assert result.code == 1
        assert_says(result.err, "trained is not overwritten: it holds an adapter that .* did not write")
    assert (out / "trained" / "adapter_model.safetensors").read_bytes() == trained


@pytest.mark.parametrize("options", [["--rank", "3"], ["--energy", "0.5"]])
def test_export_of_a_dense_edit(options, shipped):
    out = shipped.folder / "adapter"
    refused = call("export", shipped.dense_file, "--out", out)
    assert refused.code == 1 and not out.exists()
    assert_says(refused.err, "The edit is dense at .*--rank N or --energy 0.99")
    result = call("export", shipped.dense_file, "--out", out, *options)
    assert (result.code, result.err) == (0, "")
    smaller, errors = shipped.dense.compressed(**{"rank": 3} if options[0] == "--rank" else {"energy": 0.5})
    assert f"‖ΔW − compressed‖/‖ΔW‖ = {max(errors.values()):.4f}" in result.out
    loaded = peft.PeftModel.from_pretrained(load_base(shipped.base, "float32")[0], out)
    expected = logits(changed(shipped.model, smaller), shipped.rows)
    assert relative_error(logits(loaded, shipped.rows), expected) < ROUNDING


def test_brackets_in_paths(shipped):
    """Rich would take them for colours, or fail at one that ends none."""
    for command, name, given in (
        ("merge", "m[/red]", shipped.files[0]),
        ("export", "e[/red]", shipped.files[0]),
        ("import-peft", "i[red]", shipped.folder / "e[" / "red]"),
    ):
        result = call(command, given, "--out", shipped.folder / name)
        assert (result.code, result.err) == (0, "")
        assert name in result.out.replace(" ", "")


def test_what_is_refused(shipped):
    out, (first, _) = shipped.folder / "out", shipped.files
    nameless = Edit(shipped.edits[0].deltas).save(shipped.folder / "nameless.safetensors")
    for arguments, text in (
        ([], "Name at least one edit file"),
        ([first, first], "korea.safetensors is named twice"),
        ([shipped.folder / "none.safetensors"], "cannot be read as a saved edit"),
        ([nameless], "do not say which base model they are for. Give --base"),
        ([first, "--base", shipped.folder / "nowhere"], "could not be loaded"),
    ):
        for command in ("merge", "export"):
            result = call(command, *arguments, "--out", out)
            assert result.code == 1, result.out
            assert_says(result.err, text)
    other = Edit(shipped.edits[1].deltas, {**shipped.edits[1].about, "base": "other"}).save(
        shipped.folder / "x.safetensors"
    )
    result = call("merge", first, other, "--out", out)
    assert_says(result.err, "made for several base models: .*, other")
    result = call("import-peft", shipped.folder, "--out", out)
    assert_says(result.err, "expected a folder that PEFT saved an adapter to")
    assert not out.exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_merge_that_is_killed_while_it_writes(shipped, monkeypatch, sent):
    """Nothing of it is left, and the process has its own way with the signal again."""
    before = signal.getsignal(signal.SIGTERM)
    save = transformers.PreTrainedModel.save_pretrained

    def killed(model, folder, **settings):
        save(model, folder, **settings)
        signal.raise_signal(sent)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", killed)
    files = set(os.listdir(shipped.folder))
    result = call("merge", *shipped.files, "--out", shipped.folder / "merged")
    assert (result.code, result.err) == (130, "interrupted")
    assert set(os.listdir(shipped.folder)) == files
    assert signal.getsignal(signal.SIGTERM) == before
