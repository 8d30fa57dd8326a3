"""A run that was stopped, or killed, and resumed ends bit-equal to one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from helpers.bases import REMARKS, assert_same_state, run_config
from lightning.pytorch.callbacks import ModelCheckpoint

from mend_lightning.cli.main import main
from mend_lightning.training.run_callbacks import StartReport

pytest_plugins = ["helpers.bases"]
# Runs from one checkpoint write to folders of their own, or to the folder of the run that was killed.
pytestmark = pytest.mark.filterwarnings(
    *REMARKS, "ignore:The dirpath has changed from.*", "ignore:Checkpoint directory .* exists and is not empty.*"
)
# 16 records in batches of 4: an epoch has four batches, and the run ends in its second epoch.
STEPS = 7


class Runs:
    """Fits and resumes one kind of run; each starts from the same editor."""

    def __init__(
        self, mend, edit_data, trainer, folder: Path, workers: int = 0, more: type[L.Callback] | None = None, **settings
    ) -> None:
        self.mend, self.edit_data, self.trainer, self.folder, self.workers = mend, edit_data, trainer, folder, workers
        self.more = more
        self.settings = {"max_steps": STEPS, "enable_checkpointing": True, **settings}

    def fit(self, name: str, ckpt_path: Path | None = None, keep: ModelCheckpoint | None = None) -> dict:
        """The state at the end, as a checkpoint."""
        # A resumed run must not owe anything to its own random start.
        torch.manual_seed(len(name))
        if ckpt_path is None:
            torch.manual_seed(0)
        more = [] if self.more is None else [self.more()]
        run = self.trainer(callbacks=[keep or every_step(self.folder / name), StartReport(), *more], **self.settings)
        # The preconditioning is estimated once, by the run that is stopped.
        module = self.mend("llama", warmup_steps=2, decay="linear", precondition=1.0)
        run.fit(module, self.edit_data(num_workers=self.workers), ckpt_path=ckpt_path)
        run.save_checkpoint(self.folder / f"{name}.ckpt")
        return load(self.folder / f"{name}.ckpt")


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def assert_same_run(actual: dict, expected: dict) -> None:
    """Weights, statistics, optimiser, schedule and place in the data."""
    assert actual["global_step"] == expected["global_step"]
    assert_same_state(actual["state_dict"], expected["state_dict"])
    optimizers = [flat(checkpoint["optimizer_states"][0]["state"]) for checkpoint in (actual, expected)]
    assert_same_state(*optimizers)
    assert actual["lr_schedulers"] == expected["lr_schedulers"]
    loops = [checkpoint["loops"]["fit_loop"]["state_dict"] for checkpoint in (actual, expected)]
    assert loops[0] == loops[1]


def flat(state: dict) -> dict[str, torch.Tensor]:
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


class Noise(L.Callback):
    """Training that draws: a scale from Python and numpy, and noise of torch on every gradient."""

    def on_train_batch_start(self, *_) -> None:
        self.scale = random.random() + np.random.rand()

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        for parameter in module.editor.parameters():
            parameter.grad += self.scale * torch.randn_like(parameter)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"more": Noise, "workers": 1, "max_steps": 6},
        {"accumulate_grad_batches": 2, "max_steps": 5},
        {"accumulate_grad_batches": 3, "max_steps": 4},
    ],
    ids=lambda settings: (
        "-".join(f"{key}_{getattr(value, '__name__', value)}" for key, value in settings.items()) or "plain"
    ),
)
def test_stopped_after_any_step(settings, mend, edit_data, trainer, tmp_path):
    runs = Runs(mend, edit_data, trainer, tmp_path, **settings)
    expected = runs.fit("whole", keep=every_step(tmp_path / "steps"))
    stops = sorted((tmp_path / "steps").glob("*.ckpt"), key=lambda path: load(path)["global_step"])
    assert [load(path)["global_step"] for path in stops] == list(range(1, runs.settings["max_steps"] + 1))
    assert expected["epoch"] > 0, "the run continues beyond an epoch"
    for path in stops[:-1]:
        assert_same_run(runs.fit(f"from {path.stem}", path), expected)


def test_validation_in_mid_epoch_changes_nothing(mend, edit_data, trainer, tmp_path):
    """And a run resumed from the checkpoint that a validation made continues behind it."""
    validated = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    plain = Runs(mend, edit_data, trainer, tmp_path / "plain").fit("whole")
    runs = Runs(mend, edit_data, trainer, tmp_path, **validated)
    keep = partial(ModelCheckpoint, filename="{step}", monitor="val/loss", save_top_k=-1)
    expected = runs.fit("whole", keep=keep(tmp_path / "steps"))
    assert_same_state(expected["state_dict"], plain["state_dict"])
    for step in (3, 6):
        stop = tmp_path / "steps" / f"step={step}.ckpt"
        assert_same_run(runs.fit(f"from {step}", stop, keep(tmp_path / f"from {step}")), expected)


def test_resumed_twice(mend, edit_data, trainer, tmp_path):
    runs = Runs(mend, edit_data, trainer, tmp_path)
    expected = runs.fit("whole", keep=every_step(tmp_path / "first"))
    runs.fit("second", tmp_path / "first" / "step=3.ckpt", keep=every_step(tmp_path / "second"))
    assert_same_run(runs.fit("third", tmp_path / "second" / "step=5.ckpt"), expected)


def test_another_start_would_be_seen(mend, edit_data, trainer, tmp_path):
    """The comparison can fail: the same run from the checkpoint's weights alone."""
    runs = Runs(mend, edit_data, trainer, tmp_path)
    expected = runs.fit("whole", keep=every_step(tmp_path / "steps"))
    saved = load(tmp_path / "steps" / "step=5.ckpt")
    saved["optimizer_states"][0]["state"][0]["exp_avg"].mul_(1.001)
    torch.save(saved, tmp_path / "changed.ckpt")
    with pytest.raises(AssertionError, match="differ, among them"):
        assert_same_run(runs.fit("changed", tmp_path / "changed.ckpt"), expected)


# More than a run makes before it is killed, or interrupted.
ENDLESS = 100_000


def test_killed(base_folder, facts, tmp_path):
    """SIGKILL in mid-training; `last.ckpt` is whole, and `fit --ckpt_path last.ckpt` ends as if nothing had been."""
    killed, whole = (
        run_config(tmp_path / name, base_folder("llama"), facts, max_steps=ENDLESS) for name in ("killed", "whole")
    )
    command = [sys.executable, "-m", "mend_lightning.cli", "fit", "--config", str(killed)]
    # As many threads as the run that it is compared with: they split sums, and rounding with them.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, env=environment)
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    wait_for(last, process)
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -9
    steps = load(last)["global_step"] + 3
    assert 4 <= steps < ENDLESS
    assert main(["fit", "--config", str(killed), "--ckpt_path", str(last), "--trainer.max_steps", str(steps)]) == 0
    assert main(["fit", "--config", str(whole), "--trainer.max_steps", str(steps)]) == 0
    resumed, expected = load(last), load(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    assert resumed["global_step"] == steps
    assert_same_run(resumed, expected)


def test_interrupted(base_folder, facts, tmp_path):
    """Ctrl-C: the exit code says so, the last checkpoint is whole, and the run resumes from it."""
    config = run_config(tmp_path / "run", base_folder("llama"), facts, max_steps=ENDLESS)
    command = [sys.executable, "-m", "mend_lightning.cli", "fit", "--config", str(config)]
    # As from a terminal: a shell that runs the tests in the background has them, and all they start, ignore Ctrl-C.
    reset = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=reset)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    try:
        wait_for(last, process)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[0].decode()
    finally:
        process.kill()
        process.communicate()
    assert process.returncode not in (0, None) and "Traceback" not in printed, printed
    steps = load(last)["global_step"]
    assert 0 < steps < ENDLESS
    assert main(["fit", "--config", str(config), "--ckpt_path", str(last), "--trainer.max_steps", str(steps + 2)]) == 0
    assert load(last)["global_step"] == steps + 2


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    """Returns as soon as `path` exists."""
    end = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() >= end:
            process.kill()
            raise AssertionError(process.communicate()[0].decode())
        time.sleep(0.01)
