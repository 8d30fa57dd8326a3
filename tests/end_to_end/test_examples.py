"""The scripts in examples/, shortened: each runs, and the ones with an editor end where the ones without do."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.bases import REMARKS

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.records import read_records
from mend_lightning.errors import LowConfidenceWarning
from mend_lightning.training.mend_callback.callback import MendCallback

pytest_plugins = ["helpers.bases"]
pytestmark = [
    pytest.mark.skipif(not (Path(__file__).parents[2] / "examples").is_dir(), reason="needs the checkout"),
    pytest.mark.filterwarnings(*REMARKS, "ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning"),
]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(base_folder, facts, monkeypatch, tmp_path):
    """`run(name, family)`: the Trainer of a few steps of an example, on a few facts."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, family: str):
        specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        example = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(example)
        example.read_records = lambda source: read_records(facts / f"{Path(source).name}.jsonl")
        files = [facts / "train.jsonl", facts / "validation.jsonl"]
        example.EditDataModule = lambda train, validation, **given: EditDataModule(*files, **given)
        return example.main(str(base_folder(family)), steps=5, batch_size=2)

    return run


@pytest.mark.parametrize(("name", "family"), [("fine_tune_t5", "t5"), ("fine_tune_causal", "llama")])
def test_the_loss_is_the_same_to_the_last_bit(name, family, run):
    # Both models are read from one file, and their weights lie alike.
    plain, with_editor = (run(script, family) for script in (name, f"{name}_with_editor"))
    assert torch.equal(plain.callback_metrics["loss"], with_editor.callback_metrics["loss"])
    for name, value in plain.lightning_module.state_dict().items():
        assert torch.equal(value, with_editor.lightning_module.state_dict()[name]), name
    assert "mend/edit_success" in with_editor.callback_metrics and "mend/edit_success" not in plain.callback_metrics


@pytest.mark.parametrize("name", ["fine_tune_t5", "fine_tune_causal"])
def test_what_the_editor_takes_are_a_few_lines(name):
    texts = [(EXAMPLES / f"{script}.py").read_text().split('"""', 2)[2] for script in (name, f"{name}_with_editor")]
    changes = difflib.ndiff(*(text.splitlines() for text in texts))
    assert sum(line.startswith("+ ") for line in changes) <= 5


def test_lora(run):
    """The adapters learn, the editor is of the model with them, and an edit of it can be applied to that."""
    pytest.importorskip("peft")
    trainer = run("fine_tune_lora_with_editor", "llama")
    (callback,) = (each for each in trainer.callbacks if isinstance(each, MendCallback))
    assert "mend/edit_success" in trainer.callback_metrics and callback.model is not trainer.lightning_module.model
    assert all(name.startswith("model.layers.") for name in callback.editor.layers)
    with pytest.warns(LowConfidenceWarning):
        edit = callback.edit("In which country is Lyon?", "Peru")
    with edit.applied(callback.model):
        pass
