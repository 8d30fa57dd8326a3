"""Every editor of every shipped comparison, through the command line, on a tiny random model of the architecture."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from helpers.architectures import save_tiny
from helpers.bases import REMARKS, SIZES
from helpers.commandline import call

from mend_lightning.cli.commands.compare import plan
from mend_lightning.cli.config.files import config_folder
from mend_lightning.cli.config.overlays import read_config
from mend_lightning.editors import Editor

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
FOLDER = config_folder() / "compare"
FILES = sorted(FOLDER.glob("*.yaml"))
# Comparison -> architecture of the model it names.
ARCHITECTURE = {"smollm2": "llama_30", "ablations": "llama_30", "small-t5": "t5_gated"}
RUNS = [(path.stem, run.editor) for path in FILES for run in plan(str(path), counts=[1])[0]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = {}

    def folder(name: str):
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.mark.parametrize("name, editor", RUNS)
def test_one_step_of_training_and_a_test(name, editor, tiny, facts, tmp_path):
    run = next(run for run in plan(f"compare/{name}", counts=[1])[0] if run.editor == editor)
    config = dict(run.config)
    files = {split: str(facts / f"{split}.jsonl") for split in SIZES}
    config["data"] |= {**files, "batch_size": 2, "validation_edits": 2, "test_edits": 2, "max_length": 96}
    config["model"] |= {
        "validate_first": False,
        "rank": 4,
        "base": {"name": str(tiny(ARCHITECTURE[name])), "dtype": "float32"},
    }
    config["model"] |= {"calibration_batches": 1} if "calibration_batches" in config["model"] else {}
    config["trainer"] |= {
        "default_root_dir": str(tmp_path), "max_steps": 1, "val_check_interval": 1, "limit_val_batches": 1,
        "enable_progress_bar": False, "log_every_n_steps": 1, "logger": False,
    }  # fmt: skip
    algorithm = config["model"].get("algorithm")
    if isinstance(algorithm, dict) and algorithm["class_path"].endswith("FineTuning"):
        # On a random model fine-tuning would go to its end for every edit.
        algorithm["init_args"]["max_steps"] = 5
    if isinstance(algorithm, dict) and "locality_data" in algorithm.get("init_args", {}):
        algorithm["init_args"]["locality_data"] = files["train"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    fitted = call("fit", "--config", path)
    assert fitted.code == 0, fitted.err
    if name == "ablations" and editor != "MEND":
        # Its transforms differ, which evaluation does not see.
        assert Editor.from_pretrained(tmp_path / "editor").settings["rank"] == 4
        return
    tested = call("test", "--config", path, "--model.editor", tmp_path / "editor")
    assert tested.code == 0, tested.err
    assert json.loads((tmp_path / "results.json").read_text())["edits"] == 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_comparison_says_what_it_is_and_how_it_is_run(path):
    text = path.read_text(encoding="utf-8")
    head = re.match(r"(#.*\n)+", text).group().splitlines()
    assert head[0].startswith("# ") and head[0].endswith(".") and len(head[0]) > 40
    assert f"#   mend-lightning compare --config compare/{path.stem}" in head
    assert max(map(len, text.splitlines())) <= 130
    section = read_config(path).values()["compare"]
    assert section["out"] == f"runs/compare-{path.stem}" and section["reference"] in section["editors"]
