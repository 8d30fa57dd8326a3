"""What every test runs under: one thread, no hub, fixed seeds, deterministic kernels, warnings as errors.

`MEND_TEST_THREADS=2` runs the tests with two threads of torch instead of one. Processes that a test starts keep one thread
each: they come in twos and fours, and would spin against each other.
"""

from __future__ import annotations

import gc
import os
import signal
from getpass import getuser
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir

# Before torch is imported: two processes of several OpenMP threads spin against each other on a small machine.
THREADS = int(os.environ.get("MEND_TEST_THREADS", "1"))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
# A thread that waits must not keep a core from the process beside it: on two busy cores two threads take seven times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# torch finds its compiled code again by the graph, not by the instructions it is for: code for AVX512 does not build under
# ATEN_CPU_CAPABILITY=default. So each has a folder of its own.
CAPABILITY = os.environ.get("ATEN_CPU_CAPABILITY", "own")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{gettempdir()}/torchinductor-{getuser()}-{CAPABILITY}")
# What deterministic kernels need where there is a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest  # noqa: E402
import torch  # noqa: E402

# Files that tests read; a script among them is for another tree.
collect_ignore = ["assets"]
# Warnings of other packages that nothing here can avoid; every other warning is an error.
THIRD_PARTY_WARNINGS = (
    # Lightning walks through batches with an old name of torch's.
    r"ignore:.*isinstance\(treespec, LeafSpec\).* is deprecated:FutureWarning",
)
# Tiny models know little, and what they are taught in a test changes little: tests of this warning ask for it.
OF_TINY_RUNS = "ignore::mend_lightning.errors.FailingRunWarning"


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell that runs the suite in the background has it so; tests interrupt what they start, and themselves.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The last line that matches counts.
    for line in ("error", *THIRD_PARTY_WARNINGS, OF_TINY_RUNS):
        config.addinivalue_line("filterwarnings", line)
    if find_spec("gradio") is None:
        # An extra, and this file is nothing without it: its examples cannot be collected.
        page = Path(__file__).parents[1] / "src" / "mend_lightning" / "ui" / "page.py"
        config.option.ignore = [*(config.option.ignore or []), str(page)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The page's browser comes first: it takes long, and last it would leave one of two cores idle."""
    items.sort(key=lambda item: item.path.name != "test_page.py")


def pytest_collection() -> None:
    """Modules, tests and what they import stay until the end: nothing of them is garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Whoever collects garbage (`cost.release` does, for every measured edit) need not go through all that again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _deterministic_kernels():
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _no_process_group_is_left():
    """A Trainer with a strategy of several processes leaves its group behind, and Lightning then takes every run for one."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["t5", "t5_gated", "bart", "gpt2", "llama", "bert"])
def family(request) -> str:
    """Every tiny model in turn."""
    return request.param


@pytest.fixture(params=["gpt2", "llama"])
def causal_family(request) -> str:
    return request.param


@pytest.fixture(params=["t5", "t5_gated", "bart"])
def encoder_decoder_family(request) -> str:
    return request.param
