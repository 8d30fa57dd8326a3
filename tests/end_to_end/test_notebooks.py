"""The notebooks: each runs through, shortened, and the committed ones hold the outputs of a whole run."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from pathlib import Path

import lightning as L
import pytest
from helpers.bases import REMARKS
from matplotlib import rc_context

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.models.base import BaseModel
from mend_lightning.models.smollm2 import find_smollm2
from mend_lightning.training.module import MendModule

NEEDS = "the notebooks need the extra `notebooks`: pip install 'mend-lightning[notebooks]'"
nbformat = pytest.importorskip("nbformat", reason=NEEDS)
pytest.importorskip("ipykernel", reason=NEEDS)
CellExecutionError = pytest.importorskip("nbclient.exceptions", reason=NEEDS).CellExecutionError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
prepared = pytest.mark.skipif(find_smollm2() is None, reason="SmolLM2 is not prepared: mend-lightning get-smollm2")
pytestmark = pytest.mark.filterwarnings(*REMARKS)


@pytest.fixture
def in_this_process(monkeypatch):
    """What a notebook changes for good in the process that runs it."""
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    with rc_context():
        yield


def _runner():
    """scripts/run_notebooks.py as a module: what the committed outputs were made with."""
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "scripts" / "run_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = _runner()


@pytest.fixture(scope="session")
def short_editor(tmp_path_factory) -> Path:
    """An editor of SmolLM2 with the parts of the quickstart's, after one step: it edits, and not well."""
    folder = tmp_path_factory.mktemp("short")
    module = MendModule(
        BaseModel(), layers=["model.layers.26.mlp.down_proj"], rank=8, edit_rate=1e-4, precondition=1.0,
        rephrase_ridge=0.03, calibration_batches=2, confidence=0.75, locality_positions="answer",
    )  # fmt: skip
    prompt = "Geography quiz\nQ: In which US state is Miami?\nA: Florida\nQ: {input}\nA:"
    trainer = L.Trainer(
        max_steps=1, limit_val_batches=0, accelerator="cpu", inference_mode=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, EditDataModule("world_facts/train", prompt=prompt, stop="\n", max_length=96, batch_size=4))
    return module.editor.save_pretrained(folder / "editor")


@pytest.fixture
def run(in_this_process, monkeypatch):
    """`run(number, values, asked)`: a committed notebook with other parameters; the value of the expression `asked` at its end.

    Without a kernel, which imports everything anew; `test_an_error_in_a_notebook_is_one_here` starts one.
    """
    monkeypatch.chdir(NOTEBOOKS[0].parent)

    def result(number: int, values: dict, asked: str) -> dict:
        notebook, found = runner.with_parameters(nbformat.read(NOTEBOOKS[number - 1], 4), values), {}
        # What a kernel would print beside its cells.
        with warnings.catch_warnings(action="ignore"):
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    exec(cell.source, found)
            return eval(asked, found)

    return result


@prepared
def test_edit_a_model(short_editor, tmp_path, run):
    asked = (
        "{'new': edit.about['probability'], 'old': edit.about['probability_before'], 'saved': path.is_file(), 'same': same, "
        "'equal': torch.equal(base_logits, after_logits), 'moved': not torch.equal(base_logits, edited_logits), "
        "'left': len(edits), 'base': before[0], 'cleared': generate_answers(model, encoder, asked[:1])[0]}"
    )
    found = run(1, {"EDITOR": str(short_editor), "OUT": str(tmp_path), "QUESTIONS": 4}, asked)
    assert found["new"] > 100 * found["old"]
    assert found["saved"] and found["same"] and found["equal"] and found["moved"]
    assert found["left"] == 0 and found["cleared"] == found["base"] == "Paris"


@prepared
def test_train_your_editor(tmp_path, run):
    values = {"FOLDER": str(tmp_path), "STEPS": 1, "CHECK_EVERY": 1, "ASKED": 8, "MEASURED": 2}
    asked = (
        "{'steps': trainer.global_step, 'learned': float(module.editor.transforms[0].nets['combined'].layers[0].u.norm()), "
        "'results': results, 'new': edit.about['probability'], 'old': edit.about['probability_before'], "
        "'splits': {name: len(part) for name, part in splits.items()}, "
        "'overlap': len({name for part in splits.values() for name, _ in part})}"
    )
    found = run(2, values, asked)
    assert found["steps"] == 1 and found["learned"] > 0
    assert found["overlap"] == sum(found["splits"].values())
    assert 0 <= found["results"]["test/edit_success"] <= 1 and found["results"]["test/base_accuracy"] > 0
    assert found["new"] > 100 * found["old"]
    assert {"editor.json", "editor.safetensors"} == {path.name for path in (tmp_path / "editor").iterdir()}
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == found["splits"]["train"]
    assert all(json.loads(line)["answers"][0] not in json.loads(line)["targets"] for line in lines)


@prepared
def test_how_mend_works(short_editor, run):
    asked = (
        "{'gradient': gradient_error, 'stages': list(by_stage), 'compressed': compressed, 'scale': chosen, "
        "'kl': [kl for _, kl in curve.values()], 'energy': energy.tolist(), 'rank': made.rank, 'tokens': len(tokens), "
        "'full': probability(edit.deltas), 'said': edit.about['probability']}"
    )
    found = run(3, {"EDITOR": str(short_editor), "OTHERS": 4}, asked)
    assert found["gradient"] < 1e-5
    assert found["stages"] == ["raw", "normalised", "network", "preconditioned"]
    assert found["full"] == pytest.approx(found["compressed"][found["rank"]], rel=1e-3)
    assert found["full"] == pytest.approx(found["said"], rel=1e-3)
    assert found["rank"] <= found["tokens"] and found["energy"] == sorted(found["energy"])
    assert 2**-8 <= found["scale"] <= 2**8 and found["kl"][-1] > found["kl"][0] > 0


@prepared
def test_many_edits(short_editor, run):
    asked = (
        "{'ways': sorted({way for way, _ in found}), 'shares': [share for shares in found.values() for share in shares], "
        "'diagonal': cosines.diagonal().tolist(), 'symmetric': bool(torch.allclose(cosines, cosines.T, atol=1e-4)), "
        "'left': len(EditStack(model)), 'known': share(known), 'categories': [w.category.__name__ for w in caught]}"
    )
    found = run(4, {"EDITOR": str(short_editor), "COUNTS": [1, 2], "PROBES": 4}, asked)
    assert found["ways"] == ["independent", "sequential", "together"]
    assert len(found["shares"]) == 18 and all(0 <= share <= 1 for share in found["shares"])
    assert found["diagonal"] == pytest.approx([1.0] * 2, abs=1e-4) and found["symmetric"]
    # The base is back, bit for bit: it knows what it knew.
    assert found["left"] == 0 and found["known"] == 1.0
    assert found["categories"].count("CollidingEditWarning") == 2
    assert "DependentEditWarning" in found["categories"]


@prepared
def test_the_papers_demonstration(short_editor, run):
    """What a whole run shows is in test_demonstration.py, for this editor edits no better than it was trained."""
    asked = (
        "{'off': edit.about['contrasts'], 'plain': plain.about, 'answers': [questions, base, answers, without], "
        "'of_base': verdict(base), 'before': before, 'after': after}"
    )
    found = run(5, {"EDITOR": str(short_editor), "INNER_STEPS": 1, "CONTRASTS": 2}, asked)
    assert len(found["off"]) == 6 and "contrasts" not in found["plain"]
    assert [len(each) for each in found["answers"]] == [18] * 4
    assert found["of_base"] == (0, 7, 11, 11)
    assert found["before"].shape == found["after"].shape == (18,) and not found["after"].equal(found["before"])


def test_a_missing_editor_says_what_to_do(tmp_path, in_this_process):
    says = "Run `make quickstart` first"
    assert all(says in NOTEBOOKS[number - 1].read_text(encoding="utf-8") for number in (1, 3, 4, 5))
    notebook = runner.with_parameters(nbformat.read(NOTEBOOKS[0], 4), {"EDITOR": str(tmp_path / "editor")})
    first, second = [cell.source for cell in notebook.cells if cell.cell_type == "code"][:2]
    # Without a kernel, which takes longer to start.
    found: dict = {}
    exec(first, found)
    with pytest.raises(FileNotFoundError, match=says):
        exec(second, found)


def test_an_error_in_a_notebook_is_one_here():
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        runner.execute(broken, NOTEBOOKS[0].parent, timeout=600)


def test_there_are_five():
    numbers = [path.name.partition("-")[0] for path in NOTEBOOKS]
    assert numbers == ["1", "2", "3", "4", "5"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def committed(request):
    return request.param


def test_committed_notebook_was_run_from_top_to_bottom(committed):
    notebook = nbformat.read(committed, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_committed_notebook_says_nothing_about_the_machine(committed):
    text = committed.read_text(encoding="utf-8")
    pictures = re.compile(r'"image/png": "[^"]*"')
    assert not re.findall(r"/(?:home|root|tmp|work|usr|Users|var|opt)/[^\s\"]*", pictures.sub("", text))
    notebook = nbformat.reads(text, 4)
    assert notebook == runner.cleaned(notebook), "save it with scripts/run_notebooks.py"
    assert len(text) < 1_000_000


def test_other_parameters_change_one_cell(committed):
    notebook = nbformat.read(committed, 4)
    name = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])).source.split(" = ")[0]
    other = runner.with_parameters(notebook, {name: "other"})
    changed = [cell for cell, was in zip(other.cells, notebook.cells) if cell.source != was.source]
    assert len(changed) == 1 and f"{name} = 'other'" in changed[0].source.splitlines()


def test_a_parameter_that_is_not_there():
    notebook = nbformat.read(NOTEBOOKS[0], 4)
    with pytest.raises(KeyError, match="does not set NOTHING"):
        runner.with_parameters(notebook, {"NOTHING": 1})
    with pytest.raises(KeyError, match="No cell is tagged"):
        runner.with_parameters(nbformat.v4.new_notebook(), {"EDITOR": 1})
