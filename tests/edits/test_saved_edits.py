"""Files of edits: damaged, foreign, and places that cannot be written."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from mend_lightning import Edit, LowRankDelta, MendEditor
from mend_lightning.errors import (
    OutputPathError,
    StateDictError,
)

FACT = ("Which continent is North Korea in?", "Oceania")
CLAIM = ("Which continent is North Korea in? Asia.", "REFUTES")
OTHER = ("Which country is Managua in?", "Cuba")
LAST = "model.layers.3.mlp.down_proj"


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    "damage, text",
    [
        (truncate, "cannot be read as a saved edit"),
        (lambda path: path.write_bytes(b""), "cannot be read as a saved edit"),
        (lambda path: path.unlink(), "cannot be read as a saved edit: .*[Nn]o such file"),
        (
            lambda path: save_file(load_file(path), path),
            "is a safetensors file, but not an edit saved by mend-lightning",
        ),
    ],
)
def test_damaged_files(damage, text, tmp_path):
    path = Edit({"fc": LowRankDelta(torch.ones(1, 1, 3), torch.ones(1, 1, 5))}).save(tmp_path / "fact.safetensors")
    damage(path)
    with pytest.raises(StateDictError, match=text):
        Edit.load(path)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"fc.up": torch.ones(2, 5)}, "fc has 1 input and 2 output factors"),
        ({"fc.down": torch.full((1, 3), float("nan"))}, "fc holds NaN or infinite values"),
        ({"fc.down": torch.ones(3)}, r"fc holds a torch.float32 tensor of shape \(3,\)"),
        ({"fc.down": torch.ones(1, 3, dtype=torch.int32)}, "fc holds a torch.int32 tensor"),
        ({"fc.up": None}, "a part missing or broken: 'fc.up'"),
    ],
)
def test_files_with_something_wrong_inside(change, text, tmp_path):
    path = tmp_path / "fact.safetensors"
    tensors = {"fc.down": torch.ones(1, 3), "fc.up": torch.ones(1, 5), **change}
    about = {"mend_lightning_edit": "1", "about": "{}"}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata=about)
    with pytest.raises(StateDictError, match=text):
        Edit.load(path)


@pytest.mark.parametrize(
    "about, text",
    [
        ("[]", "about is a list in place of an object"),
        ("null", "about is a NoneType in place of an object"),
        ('{"edits": null}', "edits is None in place of a list"),
        ('{"edits": [{"prompt": "a"}]}', "holds {'prompt': 'a'} in place of a prompt and a target"),
        ('{"on_top_of": 3}', "on_top_of is 3 in place of a list"),
        ('{"relative_norm": "x"}', "relative_norm is 'x' in place of a dict"),
    ],
)
def test_files_that_say_nonsense_about_themselves(about, text, tmp_path):
    tensors = {"fc.down": torch.ones(1, 3), "fc.up": torch.ones(1, 5)}
    save_file(tensors, tmp_path / "edit", metadata={"mend_lightning_edit": "1", "about": about})
    with pytest.raises(StateDictError, match=text):
        Edit.load(tmp_path / "edit")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    edit = Edit({"fc": LowRankDelta(torch.ones(1, 1, 3), torch.ones(1, 1, 5))})
    path = edit.save(tmp_path / "fact.safetensors")
    monkeypatch.setattr("mend_lightning.edits.edit.save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        edit.save(path)
    assert os.listdir(tmp_path) == ["fact.safetensors"]
    assert Edit.load(path).deltas.keys() == {"fc"}


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    edit = Edit({"fc": LowRankDelta(torch.ones(1, 1, 3), torch.ones(1, 1, 5))})
    with pytest.raises(
        OutputPathError, match="Cannot write to the folder .*file: it is a file. Give the path of a folder"
    ):
        edit.save(tmp_path / "file" / "fact.safetensors")
    with pytest.raises(OutputPathError, match="Cannot write"):
        MendEditor({"fc": (2, 3)}, rank=2).save_pretrained(tmp_path / "file" / "editor")
