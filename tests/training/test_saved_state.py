"""What MendModule saves and loads: checkpoints and editor folders, whole, foreign and damaged."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.bases import REMARKS, assert_same_state
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule

from mend_lightning.editors import FineTuning, KnowledgeEditor, MendEditor
from mend_lightning.errors import (
    BaseModelMismatchError,
    StateDictError,
)

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)


@pytest.fixture
def checkpoint(mend, edit_data, trainer, tmp_path):
    """A checkpoint of a Llama's editor, and the module that wrote it."""
    module = mend("llama")
    run = trainer(max_steps=2)
    run.fit(module, edit_data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt", module


def test_checkpoint_holds_the_editor_alone(checkpoint):
    path, module = checkpoint
    saved = torch.load(path, weights_only=True)
    expected = {f"editor.{name}": value for name, value in module.editor.state_dict().items()}
    assert_same_state(saved["state_dict"], expected)
    assert saved["mend_lightning"] == module.editor.description()
    editor_bytes = sum(value.numel() * value.element_size() for value in expected.values())
    assert path.stat().st_size < 3 * editor_bytes + 50_000


def change_base_of(saved: dict, module) -> None:
    saved["mend_lightning"]["base_fingerprint"] = "0" * 16


def drop_a_parameter(saved: dict, module) -> None:
    del saved["state_dict"]["editor.edit_rates"]


def drop_the_description(saved: dict, module) -> None:
    del saved["mend_lightning"]


@pytest.mark.parametrize(
    "change, error, text",
    [
        (change_base_of, BaseModelMismatchError, r"base_fingerprint is 0{16}, here it is .*Use the config and base"),
        (drop_a_parameter, StateDictError, r"lacks 1 entries of the editor, among them 'edit_rates'"),
        (drop_the_description, StateDictError, r"not written by MendModule"),
    ],
)
def test_foreign_checkpoints(change, error, text, checkpoint, mend, edit_data, trainer):
    path, module = checkpoint
    saved = torch.load(path, weights_only=True)
    change(saved, module)
    torch.save(saved, path)
    with pytest.raises(error, match=text):
        trainer(max_steps=3).fit(mend("llama"), edit_data(), ckpt_path=path)


def test_a_checkpoint_from_before_a_setting_existed(checkpoint, mend, edit_data, trainer):
    path, _ = checkpoint
    saved = torch.load(path, weights_only=True)
    del saved["mend_lightning"]["class"], saved["mend_lightning"]["settings"]["ridge"]
    torch.save(saved, path)
    run = trainer(max_steps=3)
    run.fit(mend("llama"), edit_data(), ckpt_path=path)
    assert run.global_step == 3


class OwnEditor(MendEditor):
    """An editor of somebody else's, which this package cannot find by its name."""


def test_a_saved_editor_of_ones_own_class(mend, edit_data, trainer, tmp_path):
    module = mend("llama", algorithm=partial(OwnEditor, rank=4))
    trainer(max_steps=1).fit(module, edit_data())
    module.editor.save_pretrained(tmp_path / "own")
    again = mend("llama", algorithm=partial(OwnEditor, rank=4), editor=tmp_path / "own")
    trainer().test(again, edit_data(), verbose=False)
    assert type(again.editor) is OwnEditor
    assert_same_state(again.editor.state_dict(), module.editor.state_dict())
    with pytest.raises(StateDictError, match="holds an editor of class 'OwnEditor', not 'Editor'.*set model.algorithm"):
        trainer().test(mend("llama", editor=tmp_path / "own"), edit_data(), verbose=False)
    with pytest.raises(StateDictError, match="holds an editor of class 'OwnEditor', not 'FineTuning'"):
        trainer().test(mend("llama", editor=tmp_path / "own", algorithm=FineTuning), edit_data(), verbose=False)


@pytest.mark.parametrize("settings, named", [({"rank": 4}, "settings"), ({"last_blocks": 1}, "layers")])
def test_checkpoint_of_other_shapes(settings, named, checkpoint, mend, edit_data, trainer):
    with pytest.raises(BaseModelMismatchError, match=f"another editor or base model: its {named} is"):
        trainer(max_steps=3).fit(mend("llama", **settings), edit_data(), ckpt_path=checkpoint[0])


def test_editor_folder_round_trip(checkpoint, mend, edit_data, trainer, tmp_path):
    _, module = checkpoint
    module.editor.save_pretrained(tmp_path / "editor")
    loaded = MendEditor.from_pretrained(tmp_path / "editor")
    assert_same_state(loaded.state_dict(), module.editor.state_dict())
    assert loaded.description() == module.editor.description()
    assert loaded.prompt_format["stop"] == "\n"
    expected = trainer().validate(module, edit_data(), verbose=False)
    # Its settings replace the module's.
    again = mend("llama", editor=tmp_path / "editor", rank=3)
    assert trainer().validate(again, edit_data(), verbose=False) == expected


def test_editor_of_another_base(checkpoint, mend, edit_data, trainer, tmp_path):
    checkpoint[1].editor.save_pretrained(tmp_path / "editor")
    with pytest.raises(BaseModelMismatchError, match="has none. Load the base model the editor was trained on"):
        trainer().validate(mend("gpt2", editor=tmp_path / "editor"), edit_data())


def truncate(folder) -> None:
    path = folder / "editor.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def put_nan(folder) -> None:
    state = load_file(folder / "editor.safetensors")
    state["edit_rates"][1] = float("nan")
    save_file(state, folder / "editor.safetensors")


def put_another_rank(folder) -> None:
    path = folder / "editor.json"
    path.write_text(path.read_text().replace('"rank": 3', '"rank": 4'))


@pytest.mark.parametrize(
    "damage, text",
    [
        (truncate, "editor.safetensors cannot be read as safetensors"),
        (put_nan, "holds NaN or infinite values in 1 tensor.*among them 'edit_rates'"),
        (put_another_rank, "editor.safetensors does not fit its editor.json"),
        (lambda folder: (folder / "editor.safetensors").unlink(), "editor.safetensors cannot be read"),
        (lambda folder: (folder / "editor.json").unlink(), "is not a saved editor: it has no editor.json"),
        (lambda folder: (folder / "editor.json").write_text("{"), "editor.json is not valid JSON"),
        (lambda folder: (folder / "editor.json").write_text("[]"), "has format None; this version reads format 1"),
        (lambda folder: (folder / "editor.json").write_text('{"format": 1}'), "lacks layers, settings, base, .*"),
    ],
)
def test_damaged_editor_folders(damage, text, tmp_path):
    MendEditor({"fc": (2, 3), "other": (2, 3)}, rank=3).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(StateDictError, match=text):
        MendEditor.from_pretrained(tmp_path)


def test_defaults_are_those_of_a_sharded_editors_class_as_well():
    """FSDP2 makes a class of its own of a sharded editor's, which has `__new__` of FSDP's."""
    sharded = type("FSDPKnowledgeEditor", (FSDPModule, KnowledgeEditor), {})
    defaults = KnowledgeEditor.default_settings()
    assert sharded.default_settings() == defaults and defaults["hidden"] > 0
