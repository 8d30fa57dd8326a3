"""`python -m benchmarks evaluate`: what it measures and writes. The numbers themselves: tests/test_batched_evaluation.py."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers.bases import FORMATS

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.errors import ConfigError
from mend_lightning.evaluation.metric_collection import PROTOCOL

pytest_plugins = ["helpers.bases"]

# The benchmark is a program beside the package, run from the repository's root, and is not installed.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import evaluate  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402


def test_the_command_for_evaluations(tmp_path, mend, facts, capsys):
    """More edits than there are facts; what one by one gives is checked by tests/test_batched_evaluation.py."""
    module = mend("llama")
    module.configure_model()
    module.editor.prompt_format = asdict(FORMATS["causal"])
    folder, records = module.editor.save_pretrained(tmp_path / "editor"), facts / "test.jsonl"
    options = [
        "--edits",
        "9",
        "--batch-size",
        "4",
        "--alone",
        "3",
        "--dtype",
        "float32",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
    line = main(["evaluate", "--editor", str(folder), "--facts", str(records), *options])
    assert json.loads((tmp_path / "evaluate.jsonl").read_text()) == line
    found = line["dtypes"]["float32"]
    assert found["seconds"] > 0 and found["edits_per_second"] == pytest.approx(9 / found["seconds"])
    alone = found["one_by_one"]
    assert alone.pop("seconds_per_edit") > 0 and alone.pop("largest_difference") < 1e-5
    assert alone == {"edits": 3, "other_counts": 0, "other_answers": 0}
    assert {"generated_exact_match", "kept", "delta_norm"} < set(found["metrics"]) <= set(PROTOCOL) | {"edit_nll"}
    assert "The set has 7 facts" in capsys.readouterr().out


def test_an_evaluation_counts_the_examples_that_differ():
    examples = [
        evaluate.Example(torch.tensor([values, 20.0]), torch.tensor(count), (answer,))
        for values, count, answer in ((0.5, [1], "a"), (0.5, [2], "a"), (0.25, [1], "b"))
    ]
    assert evaluate.compare(examples, examples[:1] * 3) == {
        "largest_difference": 0.25, "other_counts": 1, "other_answers": 1
    }  # fmt: skip


def test_edits_beyond_the_facts_are_other_draws(facts):
    tasks = evaluate.drawn(EditDataModule(test=facts / "test.jsonl").sampler("test"), 10)
    assert [task.prompt for task in tasks[7:]] == [task.prompt for task in tasks[:3]] and tasks[7:] != tasks[:3]


def test_an_evaluation_without_an_editor(tmp_path):
    with pytest.raises(ConfigError, match="holds no editor. Run `make quickstart`"):
        main(["evaluate", "--editor", str(tmp_path), "--threads", "1"])
