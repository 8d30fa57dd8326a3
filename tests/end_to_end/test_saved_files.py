"""What version 0.1 saved is loaded by today's code, and does what it did: tests/assets/saved_by_0.1 (README.md there)."""

from __future__ import annotations

import csv
import json
import shutil
from importlib import import_module
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from helpers.bases import REMARKS
from helpers.commandline import call
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mend_lightning import (
    Edit,
    EditDataModule,
    Editor,
    EditorCheckpointIO,
    MendCallback,
    MendModule,
    import_peft,
    load_base,
    make_edit,
)
from mend_lightning.cli.config.moved_classes import MOVED, with_current_names
from mend_lightning.editors import confidence
from mend_lightning.editors.making import ready
from mend_lightning.models.base import BaseModel

pytestmark = pytest.mark.filterwarnings(
    *REMARKS,
    "ignore:The dirpath has changed from.*",
    "ignore:Checkpoint directory .* exists and is not empty.*",
    r"ignore:Be aware that when using `ckpt_path`, callbacks.*",
    # Tiny models, two or three steps: nobody wants these edits.
    "ignore:After the edit .* the model gives the new answer with probability.*",
)
ASSETS = Path(__file__).parents[1] / "assets"
EXPECTED = json.loads((ASSETS / "saved_by_0.1" / "expected.json").read_text(encoding="utf-8"))
LOGITS = load_file(ASSETS / "saved_by_0.1" / "expected.safetensors")
QUESTIONS = ["Which continent is North Korea in?", "Where in the world is North Korea?", "Which country is Lyon in?"]
FACT = (QUESTIONS[0], "Oceania")
# Another processor adds up in another order. In parts of the largest logit that is some 1e-6 in float32, and what an edit
# changes is more than 1e-2.
TOLERANCE = 1e-4
# Of losses and metrics, in parts of each: behind them are a search for the edit's size and a step of Adam.
METRIC_TOLERANCE = 1e-3
# Means of losses. The other metrics count what is right, and a tie may fall otherwise elsewhere.
CONTINUOUS = {"edit_nll", "locality_kl", "loss", "perplexity_drawdown"}
# What is measured since then.
SINCE = {"probability", "stop_probability", "confident", "delta_norm"}
TRAINER = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip
LEARNING = {
    "layers": ["model.layers.1.mlp.down_proj"], "rank": 4, "edit_rate": 0.3, "lr": 1e-2, "edit_rate_lr": 1e-2,
    "c_edit": 1.0,
}  # fmt: skip


class Host(L.LightningModule):
    """The training that MendCallback worked beside."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.tokenizer = load_base("base", "float32")
        self.model.requires_grad_(True).train()

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def loader(self) -> DataLoader:
        records = [json.loads(line) for line in Path("../facts/train.jsonl").read_text(encoding="utf-8").splitlines()]
        texts = [f"Q: {record['input']}\nA: {record['output'][0]['answer']}\n" for record in records]

        def collate(texts: list[str]) -> dict[str, Tensor]:
            inputs = dict(self.tokenizer(texts, return_tensors="pt", padding=True))
            inputs.pop("token_type_ids", None)
            return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}

        return DataLoader(texts, batch_size=4, collate_fn=collate)


@pytest.fixture(autouse=True)
def saved(tmp_path, monkeypatch) -> Path:
    """A copy of the files, and the folder that the test runs in: paths inside of them are relative to it."""
    shutil.copytree(ASSETS / "saved_by_0.1", tmp_path / "saved")
    shutil.copytree(ASSETS / "facts", tmp_path / "facts")
    monkeypatch.chdir(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def base() -> tuple[nn.Module, object]:
    return load_base("base", "float32")


def edit_data() -> EditDataModule:
    return EditDataModule(**yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))["data"])


def logits(model: nn.Module, tokenizer) -> Tensor:
    """What the model would answer each question with first: `[questions, vocabulary]`."""
    with torch.no_grad():
        rows = [tokenizer(f"Q: {question}\nA:", return_tensors="pt")["input_ids"] for question in QUESTIONS]
        return torch.cat([model(ids).logits[:, -1] for ids in rows])


def assert_logits(actual: Tensor, name: str) -> None:
    """The logits that version 0.1 had with that edit, which are not the base's."""
    size = LOGITS[name].abs().max()
    assert (actual - LOGITS[name]).abs().max() < TOLERANCE * size
    if name != "base":
        assert (LOGITS[name] - LOGITS["base"]).abs().max() > 100 * TOLERANCE * size


def assert_metrics(actual: dict[str, float], name: str) -> None:
    """The metrics that version 0.1 had."""
    expected = EXPECTED[name]
    assert expected.keys() <= actual.keys()
    assert {key.rpartition("/")[2] for key in actual.keys() - expected.keys()} <= SINCE
    compared = [key for key in expected if key.rpartition("/")[2] in CONTINUOUS]
    assert compared
    assert {key: float(actual[key]) for key in compared} == {
        key: pytest.approx(expected[key], rel=METRIC_TOLERANCE) for key in compared
    }


def last_logged() -> dict[str, float]:
    """The last row in the log of the latest run of the command line."""
    log = max(Path("run/logs").glob("version_*/metrics.csv"))
    *_, row = csv.DictReader(log.read_text(encoding="utf-8").splitlines())
    return {name: float(value) for name, value in row.items() if value and "/" in name}


def test_the_base(base):
    assert_logits(logits(*base), "base")


@pytest.mark.parametrize("name", sorted(LOGITS.keys() - {"base"}))
def test_edits(name, base):
    model, tokenizer = base
    edit = Edit.load(f"edits/{name}.safetensors")
    assert edit.facts[0] == FACT
    with edit.applied(model):
        assert_logits(logits(model, tokenizer), name)
    assert_logits(logits(model, tokenizer), "base")


@pytest.mark.parametrize("name", ["MendEditor", "EnnEditor", "KnowledgeEditor"])
def test_editors_make_the_same_edits(name, base):
    model, tokenizer = base
    editor = Editor.from_pretrained(f"editors/{name}")
    assert type(editor).__name__ == name
    edit = make_edit(editor, model, tokenizer, FACT)
    expected = EXPECTED["probabilities"][name]
    assert {key: edit.about[key] for key in expected} == pytest.approx(expected, rel=METRIC_TOLERANCE)
    assert edit.about.get("holds_resting", False) == (name == "EnnEditor")
    with edit.applied(model):
        assert_logits(logits(model, tokenizer), name)


def test_a_cache_gives_the_same_answers(base):
    model, tokenizer = base
    cache = Editor.from_pretrained("editors/Cache")
    with ready(cache, model, tokenizer) as encoder, torch.no_grad():
        edited = cache.edited(model, encoder.rows([FACT], [0], 1))
        answers = edited.answers(model, encoder, QUESTIONS)
    assert answers == EXPECTED["answers of Cache"]
    assert answers[0] == FACT[1] != answers[2], "it answers what is near, and nothing else"


def test_fine_tuning_reaches_the_answer_again(base):
    """RMSprop's first step is the gradient's sign: nothing closer can be asked of another processor."""
    edit = make_edit(Editor.from_pretrained("editors/FineTuning"), *base, FACT)
    expected = EXPECTED["probabilities"]["FineTuning"]
    assert edit.about["probability_before"] == pytest.approx(expected["probability_before"], rel=METRIC_TOLERANCE)
    assert edit.about["probability"] > 0.5 < expected["probability"]


def test_an_adapter_is_the_edit(base):
    model, tokenizer = base
    edit, back = Edit.load("edits/MendEditor.safetensors"), import_peft("adapter")
    assert back.about == edit.about
    with back.applied(model):
        assert_logits(logits(model, tokenizer), "MendEditor")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
def test_peft_loads_the_adapter(base):
    peft = pytest.importorskip("peft")
    assert_logits(logits(peft.PeftModel.from_pretrained(base[0], "adapter"), base[1]), "MendEditor")


@pytest.fixture
def search_of_0_1(monkeypatch):
    """Edits as large as version 0.1 made them: it looked for the confidence at these multiples of the edit rate alone."""
    monkeypatch.setattr(confidence, "SCALES", (0.25, 0.4, 0.63, 1.0, 1.6, 2.5, 4.0))
    # The lower end once more in place of a finer search: the crossing is interpolated between the two ends, as it was.
    monkeypatch.setattr(confidence, "STEPS", (1.0,))
    monkeypatch.setattr(
        confidence, "best_scale", lambda scales, scores: scales.gather(0, scores.nll.argmin(0)[None])[0]
    )


def test_a_checkpoint_is_validated(search_of_0_1):
    result = call("validate", "--config", "config.yaml", "--ckpt_path", "last.ckpt")
    assert result.code == 0, result.err
    assert_metrics(last_logged(), "validated")


def test_a_run_resumes(search_of_0_1):
    # The checkpoint names itself as the best one, by where the run wrote it.
    path = Path("run/checkpoints/epoch=0-step=3.ckpt")
    path.parent.mkdir(parents=True)
    Path("last.ckpt").rename(path)
    result = call("fit", "--config", "config.yaml", "--ckpt_path", path, "--trainer.max_steps", 4)
    assert result.code == 0, result.err
    assert f"from {path}, after step 3" in result.out
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert_metrics(last_logged(), "resumed")


def test_shards_are_resumed_by_one_process():
    trainer = L.Trainer(
        **TRAINER, inference_mode=False, max_steps=3, max_epochs=-1, num_sanity_val_steps=0, limit_val_batches=0,
        log_every_n_steps=1, plugins=[EditorCheckpointIO()],
    )  # fmt: skip
    trainer.fit(MendModule(BaseModel("base", "float32"), **LEARNING), edit_data(), ckpt_path="sharded/last.ckpt")
    assert trainer.global_step == 3
    (loss,) = EXPECTED["resumed from shards"].values()
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(loss, rel=METRIC_TOLERANCE)


def beside_a_host(max_epochs: int) -> MendCallback:
    """The callback after the host's training resumed from its checkpoint, which ends with the first epoch."""
    callback = MendCallback("model", edits=edit_data(), every_n_steps=2, confidence=None, warmup_steps=0, **LEARNING)
    host = Host()
    trainer = L.Trainer(**TRAINER, max_epochs=max_epochs, callbacks=[callback], num_sanity_val_steps=0)
    if max_epochs == 1:
        trainer.validate(host, host.loader(), ckpt_path="host.ckpt", verbose=False)
    else:
        trainer.fit(host, host.loader(), ckpt_path="host.ckpt")
    return callback


def test_a_callback_measures_from_a_checkpoint():
    assert_metrics(beside_a_host(max_epochs=1).results, "measured beside a host")


def test_a_callback_trains_on_from_a_checkpoint():
    callback = beside_a_host(max_epochs=2)
    assert callback.state_dict()["training"]["training"]["steps"] == 4
    assert_metrics(callback.results, "resumed beside a host")


@pytest.mark.parametrize("name", ["config.yaml", "config_of_classes.yaml"])
def test_configs_are_read(name):
    result = call("fit", "--config", name, "--print_config")
    assert (result.code, result.err) == (0, "")
    assert not [old for old in MOVED if old in result.out]


def test_a_run_whose_config_names_classes_by_their_old_places():
    result = call("fit", "--config", "config_of_classes.yaml", "--trainer.devices", 1, "--trainer.max_steps", 1)
    assert result.code == 0, result.err
    config = yaml.safe_load(next(Path("run").rglob("config.yaml")).read_text(encoding="utf-8"))["trainer"]
    assert config["strategy"]["class_path"] == "mend_lightning.ShardedStrategy"
    assert [each["class_path"] for each in config["plugins"]] == ["mend_lightning.EditorCheckpointIO"]
    assert list(Path("run/checkpoints/shards").iterdir())


@pytest.mark.parametrize("old", EXPECTED["classes"])
def test_every_class_of_a_config_is_found_by_its_old_name(old):
    module, _, name = with_current_names(old).rpartition(".")
    assert getattr(import_module(module), name).__name__ == old.rpartition(".")[2]


def test_no_class_that_has_moved_is_missing():
    assert {"mend_lightning.data.module.EditData", *EXPECTED["classes"]} >= set(MOVED)
