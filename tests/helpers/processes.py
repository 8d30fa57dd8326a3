"""Several processes that talk through gloo, set up as torchrun does: a test's own file is the script that they run.

`launch` starts one process, which imports what the script needs and forks the others: for every process of torchrun and for its
agent torch, Lightning and transformers are imported anew, which takes longer than what these tests compute.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path


def launch(script: str, processes: int, *arguments: str | Path, seconds: float = 600) -> None:
    """Runs `script` with `arguments` in that many processes; all must end well, and none is left behind."""
    command = [sys.executable, "-m", "helpers.processes", str(processes), script, *map(str, arguments)]
    # Where this process found what it imported.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = started.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    assert started.returncode == 0, said[-10_000:]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def fork(processes: int, script: str) -> None:
    """In the first process: forks the others, waits for them, and ends all when one fails. In those: runs the script."""
    # What it imports is there for all of them.
    runpy.run_path(script, run_name="imported")
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0}
    children = set()
    for rank in range(processes):
        if child := os.fork():
            children.add(child)
            continue
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in {**shared, **own}.items()})
        runpy.run_path(script, run_name="__main__")
        return
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"A process failed with status {status}.")


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    fork(int(sys.argv.pop(0)), sys.argv[0])
