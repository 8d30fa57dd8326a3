"""The validation before the first step: what it measures, that it changes nothing, and what it warns of."""

from __future__ import annotations

import json
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from helpers.bases import (
    REMARKS,
    SIZES,
    assert_same_state,
    first_batches,
    given,
    small_tokenizer,
    state_copy,
    tiny_base,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.editors import FineTuning
from mend_lightning.errors import FailingRunWarning, NonFiniteError
from mend_lightning.models.base import BaseModel
from mend_lightning.training.curves import read_curves
from mend_lightning.training.module import MendModule
from mend_lightning.training.progress.progress_bar import EditProgressBar
from mend_lightning.training.run_callbacks import ResultsReport, SaveEditor, StartReport
from mend_lightning.training.start_statistics import training_edits
from mend_lightning.training.training_change import TrainingChange

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS, "ignore:Checkpoint directory .* exists and is not empty.*")
VALIDATED = {"val_check_interval": 2, "check_val_every_n_epoch": None}


class Noise(L.Callback):
    """Draws in every batch of training and of validation, and notes what training drew."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def on_train_batch_start(self, *_) -> None:
        self.drawn += [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def on_validation_batch_start(self, *_) -> None:
        random.random(), np.random.rand(), torch.rand(3)


def flat(state: dict) -> dict[str, torch.Tensor]:
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def run(mend, edit_data, trainer, folder: Path, settings: dict, **trained) -> tuple[dict, Noise, L.Trainer]:
    """The state of a run of four steps at its end, as a checkpoint; what it drew; its Trainer."""
    keep, noise = ModelCheckpoint(folder, monitor="val/loss", save_top_k=-1), Noise()
    L.seed_everything(0, verbose=False)
    fitted = trainer(max_steps=4, callbacks=[keep, noise], enable_checkpointing=True, **VALIDATED, **trained)
    fitted.fit(mend("llama", **settings), edit_data())
    fitted.save_checkpoint(folder / "end.ckpt")
    return torch.load(folder / "end.ckpt", weights_only=True), noise, fitted


@pytest.mark.parametrize("settings", [{}, {"confidence": 0.5, "precondition": 1.0}], ids=["published", "confident"])
def test_it_changes_nothing_but_what_is_known(settings, mend, edit_data, trainer, tmp_path):
    ends, noises, runs = zip(
        *(
            run(mend, edit_data, trainer, tmp_path / str(first), {**settings, "validate_first": first})
            for first in (True, False)
        )
    )
    assert_same_state(ends[0]["state_dict"], ends[1]["state_dict"])
    assert_same_state(*(flat(end["optimizer_states"][0]["state"]) for end in ends))
    for part in ("loops", "lr_schedulers", "global_step", "epoch"):
        assert ends[0][part] == ends[1][part], part
    assert noises[0].drawn == noises[1].drawn and len(noises[0].drawn) == 12
    assert torch.equal(*(end["random_states"][0]["torch"] for end in ends))
    # The same checkpoints: none of step 0.
    kept = [sorted(path.name for path in (tmp_path / str(first)).glob("*.ckpt")) for first in (True, False)]
    assert kept[0] == kept[1] == ["end.ckpt", "epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"]
    assert runs[0].callback_metrics == runs[1].callback_metrics
    assert [end["validations"]["first"] is None for end in ends] == [False, True]
    assert ends[0]["validations"]["last"] == ends[1]["validations"]["last"]
    assert runs[0].num_sanity_val_steps == 0


def plain_measure(module: MendModule, edit_data, trainer) -> dict[str, float]:
    """What `validate` says of a module's editor, under the metrics' own names."""
    module._trained = True
    (values,) = trainer().validate(module, edit_data(), verbose=False)
    return {name.removeprefix("val/"): value for name, value in values.items()}


@pytest.mark.parametrize("edits_at_once", [1, 2])
def test_what_it_measures(edits_at_once, mend, edit_data, trainer):
    """The editor as it is built, with the statistics of the training edits, which a loop gathers here."""
    data, module = edit_data(edits_at_once=edits_at_once, batch_size=4), mend("llama", edit_rate=3e-3)
    torch.manual_seed(3)
    module.configure_model()
    start = state_copy(module.editor)
    trainer(max_steps=1).fit(module, data)
    first = module.looks.validations.first
    assert (first.step, first.edits) == (0, SIZES["validation"] // edits_at_once * edits_at_once)

    other = mend("llama", edit_rate=3e-3)
    other.configure_model()
    other.editor.load_state_dict(start)
    data.setup("fit")
    with torch.no_grad():
        for rows in training_edits(data, 0, 1):
            other.editor.train().make_deltas(other.base_model, rows)
    assert {int(each.u_stats.count) > 100 for each in other.editor.transforms} == {True}
    again = edit_data(edits_at_once=edits_at_once, batch_size=4)
    other._trained = True
    (values,) = trainer().validate(other, again, verbose=False)
    assert {f"val/{name}": value for name, value in first.values.items()} == pytest.approx(values, rel=1e-5)
    # Without the statistics it would not be the editor that is trained.
    other.editor.load_state_dict(start)
    (bare,) = trainer().validate(other, edit_data(edits_at_once=edits_at_once, batch_size=4), verbose=False)
    assert bare["val/edit_nll"] != pytest.approx(values["val/edit_nll"], rel=1e-3)


def test_all_edits_of_a_small_set_are_seen_once(edit_data):
    data = edit_data(batch_size=3, tokenizer=small_tokenizer())
    texts = [text for rows in training_edits(data, 0, 1) for text in rows.texts]
    assert len(texts) == len(set(texts)) == SIZES["train"]
    shares = [[len(rows) for rows in training_edits(data, rank, 3)] for rank in range(3)]
    assert shares == [[3, 2]] * 3, "as many on every process"


def test_training_starts_without_statistics(mend, edit_data, trainer):
    counts = []

    class Watch(L.Callback):
        def on_train_start(self, trainer, module) -> None:
            counts.append([int(each.u_stats.count) for each in module.editor.transforms])

    trainer(max_steps=1, callbacks=[Watch()]).fit(mend("llama"), edit_data())
    assert counts == [[0, 0]]


def test_it_is_step_0_of_the_log_and_of_the_curves(mend, edit_data, trainer, tmp_path):
    fitted = trainer(max_steps=2, logger=CSVLogger(tmp_path, name=""), log_every_n_steps=1, **VALIDATED)
    module = mend("llama")
    fitted.fit(module, edit_data())
    curves = read_curves(Path(fitted.logger.log_dir) / "metrics.csv")
    validations = module.looks.validations
    for name in ("loss", "edit_success", "generality", "locality_kl", "probability"):
        (first_step, first), (_, second) = curves[f"val/{name}"]
        assert first_step == 0 and first == pytest.approx(validations.first.values[name])
        assert second == pytest.approx(validations.last.values[name])
    assert curves["val/delta_norm"][0][1] > 0


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint.*")
def test_a_resumed_run_knows_it_and_does_not_do_it_again(mend, edit_data, trainer, tmp_path, capsys):
    end, _, fitted = run(mend, edit_data, trainer, tmp_path, {})
    validated = []

    class Watch(L.Callback):
        def on_validation_start(self, trainer, module) -> None:
            validated.append(trainer.global_step)

    resumed = trainer(
        max_steps=6, callbacks=[Watch(), SaveEditor(), TrainingChange()], num_sanity_val_steps=2, logger=False, **VALIDATED
    )  # fmt: skip
    module = mend("llama")
    resumed.fit(module, edit_data(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert validated == [6] and resumed.num_sanity_val_steps == 2
    assert module.looks.validations.saved()["first"] == end["validations"]["first"]
    line = capsys.readouterr().out.splitlines()[-1]
    before, after = module.looks.validations.first.values, module.looks.validations.last.values
    assert line.startswith(f"Training changed, on {SIZES['validation']} validation edits: success ")
    assert f"generality {before['generality']:.3f} → {after['generality']:.3f}" in line


def test_the_line_is_about_the_editor_that_is_kept(mend, edit_data, trainer, tmp_path, capsys):
    """The best checkpoint's, not the last step's."""
    keep = ModelCheckpoint(tmp_path / "kept", monitor="val/loss")
    fitted = trainer(
        max_steps=6, callbacks=[keep, SaveEditor(), TrainingChange()], enable_checkpointing=True, **VALIDATED
    )
    module = mend("llama")
    fitted.fit(module, edit_data())
    kept = torch.load(keep.best_model_path, weights_only=True)
    assert kept["global_step"] < 6, "the case is one"
    assert module.looks.validations.kept.values == kept["validations"]["last"]["values"]
    assert f"→ {kept['validations']['last']['values']['locality_kl']:.4f}." in capsys.readouterr().out.splitlines()[-1]
    assert plain_measure(module, edit_data, trainer) == pytest.approx(module.looks.validations.kept.values, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*configure_optimizers.*returned.*None.*")
@pytest.mark.parametrize(
    "module_settings, trainer_settings",
    [
        ({"validate_first": False}, {}),
        ({"algorithm": FineTuning}, {}),
        ({}, {"max_steps": 0}),
        ({}, {"limit_val_batches": 0}),
    ],
    ids=["not wanted", "nothing to train", "no step", "no validation"],
)  # fmt: skip
def test_where_there_is_none(module_settings, trainer_settings, mend, edit_data, trainer):
    module = mend("llama", **module_settings)
    fitted = trainer(**{"max_steps": 1, "num_sanity_val_steps": 0, **trainer_settings})
    fitted.fit(module, edit_data())
    assert module.looks.validations.first is None and fitted.num_sanity_val_steps == 0


def test_loaders_without_a_data_module(mend, edit_data, trainer):
    """There are no training edits to take statistics from, unless none are needed."""
    module = mend("llama")
    batches = given(first_batches(module, edit_data(), 2))
    trainer(max_steps=1).fit(module, batches, batches)
    assert module.looks.validations.first is None
    plain = mend("llama", normalize=False)
    trainer(max_steps=1).fit(plain, batches, batches)
    assert plain.looks.validations.first.edits == 8


def test_what_is_trained_is_said_before_it_and_once(mend, edit_data, trainer, capsys):
    fitted = trainer(max_steps=1, callbacks=[StartReport(), EditProgressBar()], enable_progress_bar=True)
    for _ in range(2):
        fitted.fit(mend("llama"), edit_data())
        shown = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
        assert shown.count("Base model") == 1
        assert shown.index("Base model") < shown.index("Validation before the first step")
        fitted = trainer(max_steps=1, callbacks=fitted.callbacks[:2], enable_progress_bar=True)


def test_a_second_fit_of_a_trained_module_says_so_of_its_own_start(mend, edit_data, trainer):
    module = mend("llama")
    trainer(max_steps=3).fit(module, edit_data())
    measured = plain_measure(module, edit_data, trainer)
    trainer(max_steps=1).fit(module, edit_data())
    assert module.looks.validations.first.values == pytest.approx(measured, rel=1e-5)


def test_a_check_of_some_batches_is_no_validation(mend, edit_data, trainer):
    module = mend("llama", validate_first=False)
    trainer(max_steps=1, num_sanity_val_steps=1).fit(module, edit_data())
    assert module.looks.validations.saved() == {"first": None, "last": None}


def test_what_is_not_finite_is_said_before_the_first_step(mend, edit_data, trainer):
    with (
        pytest.warns(FailingRunWarning, match="before the first step fails, .* losses of edited models are not finite"),
        pytest.raises(NonFiniteError, match="in step 0"),
    ):
        trainer(max_steps=1).fit(mend("llama", edit_rate=1e30), edit_data())


SUBJECTS = (
    "Danielle Darrieux",
    "Edwin of Northumbria",
    "Autonomous University of Madrid",
    "Toko Yasuda",
    "Anaal Nathrakh",
)


@pytest.fixture
def statements(tmp_path) -> Path:
    """Statements to complete, in the form of CounterFact's records."""
    records = [
        {
            "prompt": f"The mother tongue of {subject} is", "target": new, "answers": [old], "subject": subject,
            "rephrases": [f"{subject}, a native", f"{subject} spoke the language"],
        }
        for subject, new, old in zip(SUBJECTS, ("English", "Dutch", "French") * 2, ("French", "English", "Dutch") * 2)
    ]  # fmt: skip
    (tmp_path / "statements.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return tmp_path / "statements.jsonl"


@pytest.fixture
def knows_nothing(tmp_path) -> Path:
    """Folder of a tiny Llama with random weights."""
    tokenizer = small_tokenizer()
    tiny_base("llama", tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_an_editor_for_statements_whose_stop_nobody_says(statements, knows_nothing, trainer, tmp_path):
    """The warning of `fit` and of `test`, once each, with the stop text first; results and records hold its figures."""
    data = {"prompt": "{input}", "stop": "\n", "batch_size": 2, "locality": 2, "require_rephrases": False}
    edits = EditDataModule(**dict.fromkeys(("train", "validation", "test"), statements), **data)
    module = MendModule(BaseModel(str(knows_nothing), "float32"), rank=4, edit_rate=1e-4, confidence=0.75)
    with pytest.warns(FailingRunWarning) as caught:
        trainer(max_steps=2, callbacks=[SaveEditor()], **VALIDATED).fit(module, edits)
    (fitted,) = [str(each.message) for each in caught if each.category is FailingRunWarning]
    with pytest.warns(FailingRunWarning) as caught:
        trainer(callbacks=[ResultsReport()]).test(module, edits, verbose=False)
    (tested,) = [str(each.message) for each in caught if each.category is FailingRunWarning]
    for said, what in ((fitted, "The validation before the first step"), (tested, "The test")):
        assert said.startswith(f"{what} fails, on {len(SUBJECTS)} edits: the base model answers 0.000 of the unrelated")
        causes = said.partition("Likely causes, the likeliest first: ")[2]
        assert causes.startswith(r"(1) the stop text (data.stop, '\n'): behind the true answers of x_out the base")
        assert "(2) the prompt (data.prompt, '{input}')" in causes
        assert (
            "; 1.000 of the edits miss their confidence: less than 0.9 × 0.75" in said and "(4) the edit rate" in causes
        )
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    records = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    ends = [value for record in records for value in record["stop_probability"]]
    assert metrics["stop_probability"] == pytest.approx(sum(ends) / len(ends), rel=1e-3) and 0 < max(ends) < 0.1
    assert metrics["confident"] == sum(record["confident"] for record in records) / len(records) == 0
    assert sorted(record["probability"] for record in records)[2] == pytest.approx(metrics["probability"], abs=6e-4)


def test_an_editor_that_learned_nothing_in_its_training_is_said_at_the_end(mend, edit_data, trainer):
    """Without `confidence` an untrained editor need not succeed: nothing is said before it was trained."""
    with pytest.warns(
        FailingRunWarning, match="^The validation after step 2 fails, on 5 edits: .*edit success is 0.0"
    ) as caught:
        trainer(max_steps=2, **VALIDATED).fit(mend("llama", edit_rate=1e-6, lr=1e-6, edit_rate_lr=1e-6), edit_data())
    assert [each.category for each in caught].count(FailingRunWarning) == 1
