"""Two processes with the same global batches do what one does; this file is also the script that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from bases import REMARKS, SIZES, run_config

from mend_lightning.base import BaseModel
from mend_lightning.data.module import EditDataModule
from mend_lightning.errors import EmptyDatasetError
from mend_lightning.module import MendModule
from mend_lightning.run_callbacks import ResultsReport, StartReport

pytest_plugins = ["bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
GLOBAL_BATCH, STEPS = 4, 4


class Losses(L.Callback):
    """The loss of every step, the mean over the processes, and the metrics of every validation."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validations: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))

    def on_validation_end(self, trainer, module) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.validations.append(values)


def run(root: Path, processes: int) -> None:
    """Trains, validates and tests by the config in `root`; leaves `out.pt` and what the test report writes."""
    config = yaml.safe_load((root / "run.yaml").read_text())
    L.seed_everything(0, verbose=False)
    base = BaseModel(**config["model"].pop("base"))
    # A small rate: Adam makes whole steps of gradients that are nothing but rounding.
    rates = {"lr": 1e-4, "edit_rate_lr": 1e-4}
    module = MendModule(base, **{**config["model"], **rates}, precondition=0.1, calibration_batches=2)
    data = EditDataModule(**{**config["data"], "batch_size": GLOBAL_BATCH // processes})
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_steps=STEPS,
        max_epochs=-1, default_root_dir=root, inference_mode=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=2,
        check_val_every_n_epoch=None, gradient_clip_val=1.0, callbacks=[losses, StartReport(), ResultsReport()],
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    states = [module.editor.state_dict()] * processes
    if processes > 1:
        torch.distributed.all_gather_object(states, module.editor.state_dict())
    if trainer.is_global_zero:
        out = {"losses": losses.losses, "validations": losses.validations, "states": states}
        torch.save(out, root / "out.pt")


@pytest.fixture(scope="module")
def runs(base_folder, facts, tmp_path_factory) -> dict[str, tuple[dict, Path]]:
    """Results of one process (this one) and of two."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, processes in (("one", 1), ("two", 2)):
        root = folder / name
        run_config(root, base_folder("llama"), facts)
        if processes == 1:
            run(root, 1)
        else:
            launch(root, processes)
        found[name] = torch.load(root / "out.pt", weights_only=True), root
    return found


def launch(root: Path, processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    # Where this process found what it imported.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [*command, __file__, str(root), str(processes)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_losses(runs):
    one, two = runs["one"][0], runs["two"][0]
    assert len(one["losses"]) == STEPS
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)


def test_weights_and_statistics(runs):
    """Of both processes: the same bits on each, and those of one process up to rounding."""
    expected, states = runs["one"][0]["states"][0], runs["two"][0]["states"]
    assert len(states) == 2
    for name, value in expected.items():
        assert torch.equal(states[0][name], states[1][name]), name
        torch.testing.assert_close(
            states[0][name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    counts = [value for name, value in expected.items() if name.endswith("count")]
    assert counts and all(int(count) > 0 for count in counts)


def test_validation_metrics(runs):
    """Five examples: one process has an uneven batch more than the other."""
    one, two = runs["one"][0]["validations"], runs["two"][0]["validations"]
    assert len(one) == 2 and "val/kept_hard" in one[0]
    for expected, actual in zip(one, two):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_test_metrics_and_examples(runs, facts):
    """Seven examples: none twice, none missing, in the order of the file."""
    results = [json.loads((root / "results.json").read_text()) for _, root in runs.values()]
    assert results[1]["metrics"] == pytest.approx(results[0]["metrics"], rel=1e-4, abs=2e-6)
    assert results[1]["intervals_95"] == results[0]["intervals_95"]
    prompts = [json.loads(line)["input"] for line in (facts / "test.jsonl").read_text().splitlines()]
    examples = [(root / "examples.jsonl").read_text().splitlines() for _, root in runs.values()]
    one, two = ([json.loads(line) for line in lines] for lines in examples)
    assert [line["prompt"] for line in one] == [line["prompt"] for line in two] == prompts
    assert [line["generated"] for line in one] == [line["generated"] for line in two]
    assert len(two) == SIZES["test"]


def test_fewer_examples_than_processes(facts):
    data = EditDataModule(test=facts / "test.jsonl", test_edits=1)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, lightning_module=None)
    with pytest.raises(EmptyDatasetError, match="test.jsonl: 1 record.* on 2 process.*; each needs at least 1"):
        data.test_dataloader()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(Path(sys.argv[1]), int(sys.argv[2]))
