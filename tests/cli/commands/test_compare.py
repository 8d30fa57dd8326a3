"""`compare` through the command line: what it runs, what it skips, and its numbers against plain loops over the records."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.bases import REMARKS, SIZES, run_config
from helpers.commandline import assert_says, call
from matplotlib.image import imread

from mend_lightning.cli.commands import compare
from mend_lightning.cli.commands.compare import plan
from mend_lightning.cli.commands.comparison import Outcome, check_same_edits, difference, per_task, rows_of
from mend_lightning.editors import Editor
from mend_lightning.errors import ConfigError, MendError, StateDictError
from mend_lightning.evaluation.statistics import paired_interval

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
ENN = {"class_path": "mend_lightning.editors.EnnEditor", "init_args": {"edit_rate": 0.5}}


def write_config(root: Path, base: Path, facts: Path, **section) -> Path:
    config = yaml.safe_load(run_config(root, base, facts, max_steps=2, val_check_interval=2).read_text())
    # Each run has a folder of its own.
    del config["trainer"]["callbacks"]
    config["trainer"]["logger"] = False
    config["compare"] = {
        "out": str(root / "compared"), "reference": "MEND",
        "editors": {"MEND": {}, "Own steps": {"model": {"algorithm": ENN}}}, **section,
    }  # fmt: skip
    path = root / "compare.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def call_here(command: str, config: Path, *arguments: str) -> None:
    """`compare._call` without a process of its own, most of whose time would go into imports."""
    result = call(command, "--config", config, *arguments)
    if result.code:
        raise MendError(result.err)


@pytest.fixture(scope="module")
def compared(base_folder, facts, tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    config = write_config(root, base_folder("llama"), facts, edits_at_once=[1, 2], train_at_each=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "_call", call_here)
        return config, root / "compared", call("compare", "--config", config)


def test_every_editor_at_every_number_of_edits(compared):
    _, root, result = compared
    assert result.code == 0, result.err
    written = json.loads((root / "comparison.json").read_text())
    assert [(row["editor"], row["edits_at_once"], row["edits"]) for row in written["rows"]] == [
        ("MEND", 1, SIZES["test"]), ("MEND", 2, 6), ("MEND, not trained", 1, SIZES["test"]), ("MEND, not trained", 2, 6),
        ("Own steps", 1, SIZES["test"]), ("Own steps", 2, 6),
    ]  # fmt: skip
    for row in written["rows"]:
        folder = root / row["editor"].replace(",", "").replace(" ", "-").lower() / f"k{row['edits_at_once']}"
        metrics = json.loads((folder / "results.json").read_text())["metrics"]
        assert row["metrics"]["edit_success"] == metrics["edit_success"]
        # The editor trained on single edits is the one that is tested on two.
        assert (folder / "editor").is_dir() is (row["edits_at_once"] == 1)
        assert (row["fit_seconds"] > 0) is (row["edits_at_once"] == 1)
        assert row["cost_of_an_edit"]["seconds"] > 0
    assert "minus_MEND" in written["rows"][4] and "minus_MEND" not in written["rows"][0]


def test_the_table_is_on_the_screen_and_in_the_page(compared):
    _, root, result = compared
    page = (root / "comparison.md").read_text()
    for text in ("MEND", "Own steps", "success − MEND", "generated", "MB/edit"):
        assert text in result.out and text in page
    # Two tables, at two numbers of edits.
    assert page.count("\n| MEND |") == page.count("\n| MEND, not trained |") == 4 and page.count("\n| Own steps |") == 4
    metrics = json.loads((root / "own-steps" / "k1" / "results.json").read_text())["metrics"]
    assert f"| Own steps | 1 | {metrics['edit_success']:.3f} | {metrics['generality']:.3f} |" in page


def test_the_plots_are_drawn(compared):
    _, root, _ = compared
    for name in ("success-drawdown", "success-edits", "cost"):
        picture = imread(root / f"{name}.png")
        assert picture.shape[0] > 150 and picture[..., :3].std() > 0.05, name


def test_what_is_finished_is_not_done_again(compared):
    """And what is missing is done in a process of its own."""
    config, root, _ = compared
    files = [*root.glob("*/k*/results.json"), *root.glob("*/k*/fit.json")]
    before = {path: path.stat().st_mtime_ns for path in files}
    (root / "own-steps" / "k2" / "results.json").unlink()
    assert call("compare", "--config", config).code == 0
    after = {path: path.stat().st_mtime_ns for path in files}
    changed = [path for path in files if before[path] != after[path]]
    assert len(files) == 9 and changed == [root / "own-steps" / "k2" / "results.json"]


def test_another_config_in_the_same_folder(compared, tmp_path):
    config, root, _ = compared
    other = yaml.safe_load(config.read_text())
    other["model"]["rank"] = 3
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    result = call("compare", "--config", tmp_path / "other.yaml")
    assert result.code == 1
    assert_says(
        result.err,
        "mend/k1 holds results of another config than MEND's is now. Remove that folder, or give another --out",
    )


def test_a_failure_names_the_command(base_folder, facts, tmp_path, capfd, monkeypatch):
    config = write_config(tmp_path, base_folder("llama"), facts, reference="B", editors={"B": {"model": {"lr": "x"}}})
    result = call("compare", "--config", config)
    assert result.code == 1
    assert_says(result.err, r"fit --config .*/b/k1/run.yaml` failed \(exit code 2\); its error is above")
    assert not json.loads((tmp_path / "compared" / "b" / "k1" / "fit.json").read_text())["finished"]
    # Corrected, it may be tried again where it failed before it made anything.
    (run,), _ = plan(str(write_config(tmp_path, base_folder("llama"), facts, reference="B", editors={"B": {}})))
    monkeypatch.setattr(compare, "_call", lambda *_: None)
    with pytest.raises(StateDictError, match="does not hold the results"):
        compare.run(run)
    assert yaml.safe_load((run.folder / "run.yaml").read_text()) == run.config
    assert "model.lr" in capfd.readouterr().err


@pytest.mark.parametrize(
    "section, text",
    [
        (None, "has no section `compare` with `editors`"),
        ({"editors": {"A": 3}}, r"compare.editors.A must hold what differs from the shared config, or {}; it is 3"),
        ({"editors": {"A": {}}, "refrence": "A"}, "compare.refrence is 'A'. The section takes editors and out"),
        ({"editors": {"A": {}}, "edits_at_once": 3}, r"compare.edits_at_once is 3.*edits_at_once \(list\)"),
    ],
)
def test_a_wrong_section(section, text, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"data": {"train": "x"}, **({"compare": section} if section else {})}))
    result = call("compare", "--config", path)
    assert result.code == 1
    assert_says(result.err, text)


def test_what_is_planned(base_folder, facts, tmp_path):
    config = write_config(
        tmp_path, base_folder("llama"), facts, edits_at_once=[1, 4], reference="A",
        editors={"A": {"trainer": {"max_steps": 9}}, "B": {"model": {"editor": "some/folder"}}},
    )  # fmt: skip
    runs, reference = plan(str(config))
    assert reference == "A"
    found = [
        (run.editor, run.config["data"]["edits_at_once"], run.config["data"]["batch_size"], run.trained) for run in runs
    ]
    assert found == [
        ("A", 1, 4, None),
        ("A", 4, 1, None),
        ("B", 1, 4, Path("some/folder")),
        ("B", 4, 1, Path("some/folder")),
    ]
    assert [run.config["trainer"]["max_steps"] for run in runs] == [9, 9, 2, 2]
    (only,), _ = plan(str(config), out=tmp_path / "x", editors=["B"], counts=[2])
    assert only.folder == tmp_path / "x" / "b" / "k2"
    plain, _ = plan("quickstart", counts=[1, 5, 25])
    assert [(run.editor, run.folder.as_posix(), run.trained) for run in plain] == [
        (name, f"runs/quickstart-several/{folder}/k{count}", None)
        for name, folder in (("MEND", "mend"), ("MEND, not trained", "mend-not-trained"))
        for count in (1, 5, 25)
    ]
    assert [run.config["data"]["batch_size"] for run in plain] == [8, 1, 1] * 2
    misspelt = write_config(tmp_path, base_folder("llama"), facts, reference="MNED")
    with pytest.raises(ConfigError, match="compare.reference is 'MNED'; it must be one of MEND, Own steps"):
        plan(str(misspelt))
    twins = write_config(tmp_path, base_folder("llama"), facts, reference="A b", editors={"A b": {}, "A, b": {}})
    with pytest.raises(ConfigError, match="The editors 'A b' and 'A, b' would share the folder .*a-b/k1. Rename one"):
        plan(str(twins))
    empty = write_config(tmp_path, base_folder("llama"), facts, reference="A", editors={"A": {"model": None}})
    with pytest.raises(ConfigError, match="compare.editors.A: model must hold settings, and it is None"):
        plan(str(empty))
    config = write_config(
        tmp_path, base_folder("llama"), facts, edits_at_once=[1, 4], reference="A",
        editors={"A": {"trainer": {"max_steps": 9}}, "B": {"model": {"editor": "some/folder"}}},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="compares A, B; there is no C"):
        plan(str(config), editors=["C"])


def test_mend_is_compared_untrained_as_well(base_folder, facts, tmp_path):
    """The same settings but for the learning rates, and steps enough for the statistics where the config counts in steps."""
    config = write_config(tmp_path, base_folder("llama"), facts, edits_at_once=[1, 2], train_at_each=False)
    runs, _ = plan(str(config))
    assert [run.editor for run in runs] == [name for name in ("MEND", "MEND, not trained", "Own steps") for _ in (1, 2)]
    mend, still = runs[0], runs[2]
    changed = {"lr": 0.0, "edit_rate_lr": 0.0, "validate_first": False}
    assert still.config["model"] == {**mend.config["model"], **changed} and mend.config["model"]["lr"] > 0
    assert still.config["data"] == mend.config["data"]
    assert still.config["trainer"] == {**mend.config["trainer"], "default_root_dir": str(still.folder)}
    assert runs[3].trained == still.folder / "editor" and runs[1].trained == mend.folder / "editor"
    for off in ({"untrained": False}, {"editors": {"MEND": {"model": {"editor": "some/folder"}}}}):
        config = write_config(tmp_path, base_folder("llama"), facts, **off)
        assert "MEND, not trained" not in {run.editor for run in plan(str(config))[0]}
    long, _ = plan("compare/smollm2", editors=["KE", "MEND"], counts=[1, 4])
    assert [(run.editor, run.config["trainer"]["max_steps"]) for run in long] == [
        ("KE", 60), ("KE", 60), ("MEND", 60), ("MEND", 60), ("MEND, not trained", 16), ("MEND, not trained", 16)
    ]  # fmt: skip


def test_an_untrained_editor_is_the_one_that_training_begins_with(compared):
    """Its weights are those of a new editor; what it has seen of the data is the statistics."""
    _, root, _ = compared
    editor = Editor.from_pretrained(root / "mend-not-trained" / "k1" / "editor")
    trained = Editor.from_pretrained(root / "mend" / "k1" / "editor")
    for name, value in editor.named_parameters():
        if name.endswith((".u", ".bias")):
            assert not value.any(), name
    assert not torch.equal(trained.edit_rates, editor.edit_rates)
    assert torch.equal(editor.edit_rates, torch.full_like(editor.edit_rates, editor.settings["edit_rate"]))
    assert torch.equal(editor.transforms[0].u_stats.count, trained.transforms[0].u_stats.count)


def outcome(name: str, seed: int, edits_at_once: int = 1) -> Outcome:
    draw = random.Random(seed)
    records = [
        {
            "prompt": f"{i}?", "target": "t", "rephrases": [], "locality": [], "hard": 1, "reliable": draw.random() < 0.6,
            "general": [draw.random() < 0.5], "known_before": [draw.random() < 0.8 for _ in range(3)],
            "known_after": [draw.random() < 0.7 for _ in range(3)],
        }
        for i in range(12)
    ]  # fmt: skip
    results = {"metrics": {}, "intervals_95": {}, "cost_of_an_edit": {}, "edits_at_a_time": edits_at_once}
    return Outcome(name, edits_at_once, results, records)


@pytest.mark.parametrize("edits_at_once", [1, 3])
def test_differences_are_those_of_plain_means(edits_at_once):
    a, b = outcome("a", 1, edits_at_once), outcome("b", 2, edits_at_once)
    successes = [[v for record in each.records for v in (record["reliable"], *record["general"])] for each in (a, b)]
    drawdowns = [
        [
            before - after
            for record in each.records
            for before, after in zip(record["known_before"], record["known_after"])
        ]
        for each in (a, b)
    ]
    for metric, (mine, theirs) in (("edit_success", successes), ("drawdown", drawdowns)):
        middle, low, high = difference(a, b, metric)
        assert middle == pytest.approx(sum(mine) / len(mine) - sum(theirs) / len(theirs))
        assert low < middle < high
        assert len(per_task(a, metric)) == 12 // edits_at_once
    assert difference(a, a, "edit_success") == (0, 0, 0)
    assert rows_of([a, b], "a")[1]["minus_a"]["edit_success"][0] == pytest.approx(
        difference(b, a, "edit_success")[0], abs=1e-6
    )


def test_pairing_makes_the_interval_narrow():
    """Two editors that succeed on the same tasks but one: their difference is sure, whatever their means."""
    draw = random.Random(0)
    values = [(float(draw.random() < 0.5), 1) for _ in range(200)]
    others = [*values[:-1], (1 - values[-1][0], 1)]
    middle, low, high = paired_interval(values, others)
    assert abs(middle) == pytest.approx(1 / 200) and high - low < 0.03


def test_other_edits_are_not_compared():
    a, b = outcome("A", 1), outcome("B", 1)
    check_same_edits([a, b])
    b.records[3]["locality"] = [["another?", "fact"]]
    with pytest.raises(
        ConfigError, match="B was tested on other edits than A, so their difference says nothing. Leave test"
    ):
        check_same_edits([a, b])
    with pytest.raises(ConfigError, match="B was tested on other edits"):
        check_same_edits([a, replace(outcome("B", 1), records=a.records[:-1])])


def test_a_killed_training_resumes_from_its_last_checkpoint(tmp_path, monkeypatch):
    calls = []

    def killed_once(command, config, *arguments):
        calls.append((command, arguments))
        if len(calls) == 1:
            raise MendError("killed")

    run = compare.Run("A", 1, tmp_path / "a" / "k1", {"data": {}})
    monkeypatch.setattr(compare, "_call", killed_once)
    with pytest.raises(MendError, match="killed"):
        compare.run(run)
    last = run.folder / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    with pytest.raises(StateDictError, match="does not hold the results"):
        compare.run(run)
    tested = ("test", ("--model.editor", str(run.folder / "editor")))
    assert calls == [("fit", ()), ("fit", ("--ckpt_path", str(last))), tested]
    assert json.loads((run.folder / "fit.json").read_text())["finished"]
