"""`fit` and `test` with formats, end to end on a tiny chat model."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from helpers.bases import REMARKS, run_config
from helpers.commandline import call
from helpers.tokenizers import CHAT_TEMPLATES
from matplotlib.image import imread

from mend_lightning.evaluation.format_table import shares_of

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
NAMES = ["own", "chat", "passage"]


@pytest.fixture
def run(base_folder, facts, tmp_path):
    """`run(command, formats, *arguments)`: the command with a config that mixes formats."""
    base = shutil.copytree(base_folder("llama"), tmp_path / "chatting")
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATES["plain"])

    def make(command: str, formats, *arguments):
        config = run_config(tmp_path / "run", base, facts, max_steps=2, val_check_interval=1, logger=False)
        values = yaml.safe_load(config.read_text())
        values["data"] |= {"formats": formats, "format_edits": 3, "locality": 2}
        config.write_text(yaml.safe_dump(values))
        return call(command, "--config", config, *arguments)

    return make


def test_a_run_that_mixes_formats(run, tmp_path):
    """Trained in all of them, measured in the first, and each edit made in each and asked in each."""
    mine = {"name": "exam", "prompt": "Exam. {input}\nAnswer:"}
    result = run("fit", [*NAMES, mine])
    assert (result.code, result.err) == (0, ""), result.err
    folder = tmp_path / "run"
    result = run("test", [*NAMES, mine], "--model.editor", folder / "editor")
    assert (result.code, result.err) == (0, ""), result.err
    results = json.loads((folder / "results.json").read_text())
    examples = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    table = results["formats"]
    assert table["formats"] == [*NAMES, "exam"] and table["edits"] == 3
    assert table == shares_of([example["made_and_asked_in"] for example in examples[:3]])
    assert all("made_and_asked_in" not in example for example in examples[3:]) and len(examples) == 7
    for example in examples[:3]:
        # The rest of the report is of the first format, and so is this cell.
        cell = example["made_and_asked_in"]["own"]["own"]
        assert cell["success"] == [example["reliable"], *example["general"]]
        known = zip(example["known_before"], example["known_after"])
        assert cell["kept"] == [after for before, after in known if before]
    assert "3 edits made in each format, asked in each" in result.out and "Asked in the other formats" in result.out
    assert imread(folder / "formats.png").shape[1] > 500


def test_without_formats_a_report_says_nothing_of_them(run, tmp_path):
    run("fit", None)
    result = run("test", None, "--model.editor", tmp_path / "run" / "editor")
    assert (result.code, result.err) == (0, "")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "formats" not in results and not (tmp_path / "run" / "formats.png").exists()
    assert "asked in each" not in result.out


def test_a_format_without_statements_is_left_out_and_said(run, tmp_path):
    run("fit", ["own", "statement", "bare"])
    result = run("test", ["own", "statement", "bare"], "--model.editor", tmp_path / "run" / "editor")
    assert (result.code, result.err) == (0, "")
    assert "No test record has statements, so nothing is asked in the format statement." in result.out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["formats"]["formats"] == ["own", "bare"]
