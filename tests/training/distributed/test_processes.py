"""Processes of one run end together, and say why."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mend_lightning.errors import ConfigError, ProcessLostError
from mend_lightning.training.distributed.processes import lost_processes_named

CHILD = """
import time
from mend_lightning.training.distributed.processes import end_with_first_process
end_with_first_process(0.02, 0)
print("started", flush=True)
time.sleep(30)
"""
FIRST = f"""
import os, subprocess, sys
from mend_lightning.training.distributed.processes import end_with_first_process
end_with_first_process(0.02, 0)
environment = {{**os.environ, "LOCAL_RANK": sys.argv[1]}}
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], env=environment, stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), end="", flush=True)
os._exit(0)
"""


def first_and_its_child(local_rank: str) -> subprocess.Popen:
    command = [sys.executable, "-c", FIRST, local_rank]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_a_process_ends_with_the_first():
    """It sleeps, as one in a collective does, and the pipe is closed when it is gone."""
    process = first_and_its_child("1")
    started, said = process.communicate(timeout=25)
    assert started == "started\n"
    assert said == "error: the first process of this run has ended, so this one ends too.\n"


def test_a_process_that_nobody_launched_does_not_end():
    """Started by somebody's program, which may end before it."""
    process = first_and_its_child("0")
    try:
        assert process.stdout.readline() == "started\n"
        assert process.wait(10) == 0
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=0.5)
    finally:
        os.killpg(process.pid, 9)
        process.communicate()


@pytest.mark.parametrize(
    "said",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is…",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:5] Connection closed by peer [127.0.0.1]:2",
        "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete",
        "NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL version 2.27\nncclRemoteError",
    ],
)  # fmt: skip
def test_a_lost_process_is_named(said):
    with pytest.raises(ProcessLostError, match="Process 0 cannot reach another process.*--ckpt_path last"):
        with lost_processes_named():
            raise RuntimeError(said)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ConfigError("no gloo, timed out"), KeyError("gloo")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught:
        with lost_processes_named():
            raise error
    assert caught.value is error
