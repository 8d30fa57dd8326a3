"""Distributed runs of the command line that lose a process, all of them, or a node: they end, and are resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from helpers.bases import REMARKS, run_config
from helpers.processes import free_port
from helpers.training import assert_same_moments, assert_same_training

from mend_lightning.cli.main import main
from mend_lightning.training.distributed.checkpoint_file import read_checkpoint

pytest_plugins = ["helpers.bases"]
pytestmark = [
    pytest.mark.filterwarnings(*REMARKS, "ignore:Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of a run in /proc"),
]
STEPS, RATE = 40, 1e-4
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    # A node that joins again is told the address anew: docs/distributed.md.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def config(root: Path, base: Path, facts: Path) -> Path:
    path = run_config(root, base, facts, max_steps=STEPS, limit_val_batches=0)
    settings = yaml.safe_load(path.read_text())
    # A small rate: Adam makes whole steps of gradients that are nothing but rounding.
    settings["model"] |= {"lr": RATE, "edit_rate_lr": RATE, "warmup_steps": 5, "decay": "linear"}
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def whole(base_folder, facts, tmp_path_factory) -> dict:
    """The end of a run on one process that nothing happened to."""
    root = tmp_path_factory.mktemp("whole")
    assert main(["fit", "--config", str(config(root, base_folder("llama"), facts))]) == 0
    return read_checkpoint(root / "checkpoints" / "last.ckpt")


@pytest.fixture
def start(tmp_path) -> Iterator[Callable]:
    """`start(name, *arguments)`: Python in the background, its output in a file `name`; none is left behind."""
    processes: list[subprocess.Popen] = []

    def started(name: str, *arguments) -> subprocess.Popen:
        with (tmp_path / name).open("w") as output:
            command = [sys.executable, *map(str, arguments)]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        process.output = tmp_path / name
        processes.append(process)
        return process

    yield started
    for process in processes:
        kill(process.pid, *ranks(process))
        process.wait(10)


def ranks(process: subprocess.Popen) -> list[int]:
    """The processes that a run or an agent has started."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [
            int(child) for child in children if b"mend_lightning.cli" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
    except FileNotFoundError:
        return []


def kill(*pids: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def gone(pid: int, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def wait_for_step(last: Path, step: int, process: subprocess.Popen, seconds: float = 90) -> int:
    """Until the run has a checkpoint of this step or a later one; returns which."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        # At any moment it is whole.
        found = read_checkpoint(last)["global_step"] if last.exists() else 0
        if found >= step:
            return found
        time.sleep(0.02)
    raise AssertionError(process.output.read_text())


def assert_as_whole(actual: dict, expected: dict) -> None:
    """Weights, statistics, optimiser, schedule and place in the data."""
    assert actual["global_step"] == STEPS
    assert actual["lr_schedulers"] == expected["lr_schedulers"]
    assert actual["loops"]["fit_loop"]["state_dict"] == expected["loops"]["fit_loop"]["state_dict"]
    (adam,), (expected_adam,) = actual["optimizer_states"], expected["optimizer_states"]
    assert adam["param_groups"] == expected_adam["param_groups"]
    assert_same_moments(adam["state"], expected_adam["state"])
    assert_same_training(actual["state_dict"], expected["state_dict"], RATE, STEPS)


def test_one_process_killed_then_all(base_folder, facts, tmp_path, start, whole):
    run = config(tmp_path / "run", base_folder("llama"), facts)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fit = ["-m", "mend_lightning.cli", "fit", "--config", run, "--ckpt_path", "last"]
    ddp = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.batch_size", 2]

    first = start("first", *fit, *ddp)
    wait_for_step(last, 2, first)
    kill(*ranks(first))
    assert first.wait(30) not in (0, None)
    said = first.output.read_text()
    assert "error: Process 0 cannot reach another process of this run" in said and "Traceback" not in said, said

    stopped = read_checkpoint(last)["global_step"]
    second = start("second", *fit, *ddp)
    reached = wait_for_step(last, stopped + 2, second)
    assert reached < STEPS
    (other,) = ranks(second)
    # The first process alone: the other one must end by itself.
    kill(second.pid)
    assert second.wait(30) == -signal.SIGKILL and gone(other)
    assert f"Resuming from {last}, after step {stopped}" in " ".join(second.output.read_text().split())

    assert main(["fit", "--config", str(run), "--ckpt_path", "last"]) == 0
    assert_as_whole(read_checkpoint(last), whole)
    assert [path.name for path in last.parent.glob("last*")] == ["last.ckpt"]
    assert not list(last.parent.glob(".*"))


def test_a_node_that_dies_and_comes_back(base_folder, facts, tmp_path, start, whole):
    """Two agents of torchrun, as on two machines; what is left of the run waits for the second one."""
    run = config(tmp_path / "run", base_folder("llama"), facts)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    agent = [
        "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, "--max_restarts", 3, "--rdzv_id", "run",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}",
        "--rdzv_conf", "keep_alive_interval=1,last_call_timeout=1", "--monitor_interval", 0.1,
    ]  # fmt: skip
    fit = [
        "-m", "mend_lightning.cli", "fit", "--config", run, "--trainer.num_nodes", 2, "--trainer.devices", 1,
        "--trainer.strategy", "ddp", "--data.batch_size", 2, "--ckpt_path", "last",
    ]  # fmt: skip
    stays = start("node 0", *agent, *fit)
    # It keeps the meeting point of the two, which must not be on the node that dies.
    time.sleep(1)
    dies = start("node 1", *agent, *fit)
    stopped = wait_for_step(last, 2, dies)
    kill(dies.pid, *ranks(dies))
    dies.wait(10)
    back = start("node 1 again", *agent, *fit)
    for process in (stays, back):
        assert process.wait(90) == 0, stays.output.read_text() + back.output.read_text()
    said = " ".join(stays.output.read_text().split()) + " ".join(back.output.read_text().split())
    assert stopped < STEPS and f"Resuming from {last}, after step " in said
    assert_as_whole(read_checkpoint(last), whole)
