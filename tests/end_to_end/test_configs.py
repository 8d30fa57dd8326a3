"""Every shipped config, through the command line, on a tiny random model of the architecture it is for."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers.architectures import ARCHITECTURES, CONFIGS, save_tiny
from helpers.bases import REMARKS, SIZES
from helpers.commandline import assert_says, call

from mend_lightning.cli.config.files import config_folder, config_names
from mend_lightning.cli.config.overlays import read_config
from mend_lightning.cli.main import main

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
FOLDER = config_folder()
ROOT = Path(__file__).parents[2]
FORMATS = Path(__file__).parents[1] / "assets" / "formats"
# Comparisons have tests of their own: test_compare_configs.py.
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "compare")
# What runs on data that the package does not bring.
VALUES = {name: read_config(name).values() for name in config_names()}
PUBLISHED = [name for name, values in VALUES.items() if values["data"]["train"].startswith("data/")]
# The small files have no room for the real sizes.
SMALL = {
    "model.rank": 4, "model.base.dtype": "float32", "data.batch_size": 2, "data.eval_batch_size": 2,
    "data.max_length": 96, "data.validation_edits": 2, "trainer.max_steps": 1, "trainer.val_check_interval": 1,
    "trainer.limit_val_batches": 1,
    "trainer.accumulate_grad_batches": 1, "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    # No curves and no look before the first step: they take as long as all else.
    "trainer.logger": "false", "model.validate_first": "false",
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny(architecture)`: the folder of its tiny model, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def test_every_config_is_found_and_has_an_architecture():
    assert len(FILES) >= 40 and len({path.name for path in FILES}) == len(FILES)
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == config_names()
    assert sorted(CONFIGS) == config_names(), "a config needs a line in architectures.CONFIGS"
    assert set(ARCHITECTURES) == set(CONFIGS.values())


@pytest.mark.parametrize("name", config_names())
def test_one_step_of_training(name, tiny, facts, tmp_path):
    architecture = ARCHITECTURES[CONFIGS[name]]
    values = VALUES[name]
    given = {"model.base.name": tiny(CONFIGS[name]), "trainer.default_root_dir": tmp_path, **SMALL}
    given |= small_files(values["data"], facts)
    if "calibration_batches" in values["model"]:
        given["model.calibration_batches"] = 1
    result = call("fit", "--config", name, *(part for key, value in given.items() for part in (f"--{key}", value)))
    assert result.code == 0, result.err
    about = json.loads((tmp_path / "editor" / "editor.json").read_text())
    expected = values["model"].get("layers") or default_of(architecture)
    assert [layer for layer, _ in about["layers"]] == expected
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 1
    adam = last["optimizer_states"][0]
    (rates,) = next(group["params"] for group in adam["param_groups"] if group["name"] == "edit_rates")
    # The loss depends on the edit of every chosen layer.
    gradient = adam["state"][rates]["exp_avg"]
    assert gradient.shape == (len(expected),) and gradient.all()


def small_files(data: dict, facts: Path) -> dict[str, Path | str]:
    """A few records of the kind that the config reads, in place of its files."""
    kind = data.get("format")
    published = FORMATS / f"{kind}.jsonl" if kind in ("fever", "wikitext") else None
    prefix = "claims_" if "statements" in data["train"] else ""
    given = {f"data.{split}": published or facts / f"{prefix}{split}.jsonl" for split in SIZES}
    if "locality_data" in data:
        given["data.locality_data"] = json.dumps(dict.fromkeys(SIZES, str(FORMATS / "nq.jsonl")))
    return given


def default_of(architecture) -> list[str]:
    """What is edited in all: the last block's layers, and the same ones in the blocks before it."""
    count, names = 2 if architecture.kind == "encoder_decoder" else 3, []
    stacks: dict[str, list[str]] = {}
    for name in architecture.edited:
        before, index, after = re.match(r"(.*?\.)(\d+)(\..*)", name).groups()
        stacks.setdefault(f"{before}|{index}", []).append(after)
    for stack, ends in stacks.items():
        before, last = stack.split("|")
        names += [f"{before}{i}{end}" for i in range(int(last) - count + 1, int(last) + 1) for end in ends]
    return names


@pytest.mark.parametrize("name", config_names())
def test_the_parser_gets_what_is_written(name):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as end:
        main(["fit", "--config", name, "--print_config"])
    assert end.value.code == 0
    parsed = yaml.safe_load(shown.getvalue())
    leaves = dict(read_config(name).leaves())
    assert len(leaves) > 15
    # The parser adds a callback's other arguments.
    different = [key for key, leaf in leaves.items() if key != "trainer.callbacks" and at(parsed, key) != leaf.value]
    assert different == []


def at(data: dict, key: str):
    """The value under a dotted key."""
    for part in key.split("."):
        data = data[part]
    return data


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_says_what_it_is_and_how_it_is_run(path):
    text = path.read_text(encoding="utf-8")
    head = re.match(r"(#.*\n)+", text).group().splitlines()
    assert head[0].startswith("# ") and head[0].endswith(".") and len(head[0]) > 40
    commands = [line.removeprefix("#   ") for line in head if line.startswith("#   ")]
    name = path.stem
    if path.parent == FOLDER:
        assert any(command.startswith(f"mend-lightning fit --config {name}") for command in commands)
        assert any(command.startswith(f"mend-lightning test --config {name} ") for command in commands)
        root = VALUES[name]["trainer"]["default_root_dir"]
        assert root == f"runs/{name}" and any(f"--model.editor {root}/editor" in command for command in commands)
    else:
        shown = re.fullmatch(r"mend-lightning show-config (\S+)", commands[0]).group(1)
        assert path.resolve() in read_config(shown).files
        assert "does not run alone" in text
        for command in (command for command in commands if command.startswith("mend-lightning ")):
            # 1: the text file is not there. 2 would be a command that does not exist.
            expected = int("make-generation-data" in command)
            assert call(*command.split()[1:]).code == expected, command
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_of_a_published_experiment_has_a_source(name):
    without = [key for key, leaf in read_config(name).leaves() if not leaf.comment]
    assert without == []
    # And the numbers that make it the paper's are there, from one file.
    sources = dict(read_config(name).leaves())
    for key, value in {"model.rank": 1920, "model.lr": 1e-6, "model.c_edit": 0.1, "model.edit_rate": 1e-4}.items():
        assert (sources[key].value, sources[key].file.stem) == (value, "paper")
        assert sources[key].comment.startswith(("paper", "original"))


def test_published_experiments():
    assert len(PUBLISHED) == 9
    for name in PUBLISHED:
        data, trainer = VALUES[name]["data"], VALUES[name]["trainer"]
        # Ten edits a step, validated every 5000 edits, at most 500,000 edits.
        assert data["batch_size"] * trainer.get("accumulate_grad_batches", 1) == 10
        assert data["batch_size"] * trainer["val_check_interval"] == 5000
        assert 10 * trainer["max_steps"] == 500_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_data_that_is_not_there_is_missed_before_the_model_loads(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("fit", "--config", name, "--model.base.name", tmp_path / "no-model")
    assert result.code == 1
    train = VALUES[name]["data"]["train"]
    assert_says(result.err, f"'{re.escape(train)}' does not exist \\(looked in {re.escape(str(tmp_path))}\\)")


def model_table():
    """scripts/model_table.py as a module."""
    spec = importlib.util.spec_from_file_location("model_table", ROOT / "scripts" / "model_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_models_has_every_config():
    table, page = model_table(), (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    lines = [line for line in page.split("<!-- table:")[1].splitlines() if line.startswith("| `")]
    assert sorted(line.split("`")[1] for line in lines) == config_names()
    # Counting all of them takes 15 s: a classifier, an untied T5, one of today's, and the one that was run.
    for name in ("bert-base", "t5-xl", "llama-3.2-1b", "quickstart"):
        assert table.row(name) in lines, "run scripts/model_table.py --write"
    assert {line.split("`")[1] for line in lines if line.endswith("| yes |")} == model_table().RUN_BY_US


@pytest.mark.parametrize(
    ("name", "published"), [("llama-3.2-1b", 1.24e9), ("t5-xl", 2.85e9), ("bert-base", 109e6), ("gemma-3-4b", 4.3e9)]
)
def test_sizes_of_the_table(name, published):
    base, editor = model_table().sizes(name)
    assert base == pytest.approx(published, rel=0.01)
    widths = {"llama-3.2-1b": 2048 + 8192, "t5-xl": 2048 + 5120, "bert-base": 768 + 3072, "gemma-3-4b": 2560 + 10240}
    width = widths[name]
    # Two shapes, each with two layers of U and V and a bias; what a layer has of its own is small.
    assert editor == pytest.approx(2 * 2 * (2 * 1920 * width + width), rel=0.01)
