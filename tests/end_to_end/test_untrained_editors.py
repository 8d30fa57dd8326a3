"""Editors that need no training, from the command line: named in the config, fit, test, predict, edit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.bases import REMARKS, SIZES, run_config
from helpers.commandline import assert_says, call
from helpers.models import KINDS

from mend_lightning import Edit
from mend_lightning.editors import Editor

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS, "ignore:Checkpoint directory .* exists and is not empty.*")
QUESTION, TARGET = "Which continent is North Korea in?", "Oceania"
UNKNOWN = r"FineTunning.*Did you mean 'FineTuning'\? .*editors: Cache, "
SETTINGS = {
    "FineTuning": {"lr": 3e-3, "max_steps": 20},
    "FineTuning+KL": {"lr": 1e-3, "max_steps": 5, "c_edit": 0.5},
    "Cache": {"threshold": 0.5},
    "InContext": {"template": "New fact: {prompt} {target}\n"},
}


def config_of(editor: str, family: str, base: Path, facts: Path, root: Path) -> Path:
    """A run's config that names the editor, with its settings."""
    settings, kind = dict(SETTINGS[editor]), KINDS[family]
    name, _, kl = editor.partition("+")
    if kl:
        settings["locality_data"] = str(facts / ("claims_train.jsonl" if kind == "classifier" else "train.jsonl"))
    path = run_config(root, base, facts, kind, max_steps=3, limit_val_batches=1)
    config = yaml.safe_load(path.read_text())
    config["model"]["algorithm"] = {"class_path": name, "init_args": settings}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module", params=["llama", "t5", "bert"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=list(SETTINGS))
def session(request, family, base_folder, facts, tmp_path_factory) -> SimpleNamespace:
    """test without fit, then fit, test and predict with what it wrote."""
    root = tmp_path_factory.mktemp("run")
    path = config_of(request.param, family, base_folder(family), facts, root)
    results = {"untrained": call("test", "--config", path)}
    first = json.loads((root / "results.json").read_text())["metrics"]
    fitted = ["--config", path, "--model.editor", root / "editor"]
    results |= {"fit": call("fit", "--config", path), "test": call("test", *fitted)}
    if family != "bert":
        results["predict"] = call("predict", *fitted)
    return SimpleNamespace(name=request.param, family=family, root=root, results=results, first=first)


def test_every_command_succeeds(session):
    codes = {name: (result.code, result.err) for name, result in session.results.items()}
    assert codes == dict.fromkeys(session.results, (0, ""))
    name, _, kl = session.name.partition("+")
    results = json.loads((session.root / "results.json").read_text())
    assert (results["editor"], results["edits"]) == (name, SIZES["test"])
    assert results["metrics"] == session.first, "with and without fit"
    assert f"({name} needs no training)" in session.results["fit"].out
    editor = Editor.from_pretrained(session.root / "editor")
    assert type(editor).__name__ == name and not editor.trainable
    given = SETTINGS[session.name]
    assert {key: editor.settings[key] for key in given} == given
    assert bool(editor.settings.get("locality_data")) == bool(kl)


def test_what_they_do(session):
    """What can be known of any base: fine-tuning and the cache reach the edit itself; predict says what test said."""
    metrics = json.loads((session.root / "results.json").read_text())["metrics"]
    if session.name == "FineTuning":
        # The causal base is 16 wide: few of its facts can be changed by the last blocks' MLPs.
        assert metrics["reliability"] >= {"llama": 1 / 8, "t5": 0.5, "bert": 1.0}[session.family]
    if session.name == "Cache":
        assert metrics["reliability"] == 1.0
    assert metrics["locality_kl"] >= 0 and ("generated_exact_match" in metrics) == (session.family != "bert")
    if session.family != "bert":
        lines = [json.loads(line) for line in (session.root / "predictions.jsonl").read_text().splitlines()]
        examples = [json.loads(line) for line in (session.root / "examples.jsonl").read_text().splitlines()]
        assert [line["after"] for line in lines] == [example["generated"][0] for example in examples]


def test_edit(session):
    if session.family != "llama":
        pytest.skip("one family is enough")
    out = session.root / "edit.safetensors"
    asked = ["--prompt", QUESTION, "--target", TARGET, "--dtype", "float32", "--out", out]
    if session.name == "FineTuning+KL":
        with pytest.warns(match="FineTuning came to its end before"):
            result = call("edit", "--editor", session.root / "editor", *asked)
    else:
        result = call("edit", "--editor", session.root / "editor", *asked)
    assert (result.code, result.err) == (0, "")
    if session.name.startswith("FineTuning"):
        edit, editor = Edit.load(out), Editor.from_pretrained(session.root / "editor")
        for name, (d_in, d_out) in editor.layers.items():
            dense = edit.deltas[name].dense()
            assert dense.shape == (1, d_out, d_in) and torch.count_nonzero(dense) > 0
        assert "Edit saved to" in result.out
    else:
        assert "changes no weight, so there is no edit to save" in result.out and not out.exists()
    if session.name in ("FineTuning", "Cache"):
        # The verdict goes on below, beside the probabilities.
        assert f"{QUESTION} │ Asia │ Oceania │ changed as" in result.out
    result = call("edit", "--editor", session.root / "editor", *asked, "--confidence", 0.5)
    assert_says(result.err, "has no confidence: how far its edits go is decided in another way")


@pytest.mark.parametrize(
    "algorithm, text",
    [
        ({"class_path": "FineTunning"}, UNKNOWN),
        ({"class_path": "mend_lightning.editors.FineTunning"}, UNKNOWN),
        ({"class_path": "FineTuning", "init_args": {"max_step": 3}}, "'max_step' is not .*Did you mean 'max_steps'"),
        ({"class_path": "FineTuning", "init_args": {"lr": "many"}}, '"lr".*Expected a .*float.*Got value: many'),
    ],
)
def test_typos(algorithm, text, base_folder, facts, tmp_path):
    path = run_config(tmp_path, base_folder("llama"), facts, max_steps=3)
    config = yaml.safe_load(path.read_text())
    config["model"]["algorithm"] = algorithm
    path.write_text(yaml.safe_dump(config))
    result = call("fit", "--config", path)
    assert result.code == 2
    assert_says(result.err, text)
