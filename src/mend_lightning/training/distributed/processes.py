"""Processes of one run that end together: when one is gone, the others say so instead of waiting for it."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

from mend_lightning.errors import MendError, ProcessLostError

# The process that Lightning's launcher starts the others from tells them its number.
_FIRST = "MEND_LIGHTNING_FIRST_PROCESS"
_LOST = re.compile(
    r"gloo.*(closed by peer|reset by peer|broken pipe|timed out)|remote process exited|nccl.*(timeout|aborted)",
    re.IGNORECASE | re.DOTALL,
)


def end_with_first_process(seconds: float = 1.0, grace: float = 10.0) -> None:
    """Ends this process when the one that started it has ended; does nothing in that one, or under torchrun or SLURM.

    With NCCL a process waits for one that is gone until a timeout of half an hour. (When another than the first one is
    gone, it is Lightning that ends the first.)

    Args:
        seconds: between two looks.
        grace: how long this process may take to notice it by itself, and to say more.
    """
    first = os.environ.get(_FIRST)
    os.environ[_FIRST] = str(os.getpid())
    if first != str(os.getppid()) or os.environ.get("LOCAL_RANK", "0") == "0":
        return

    def watch() -> None:
        while str(os.getppid()) == first:
            time.sleep(seconds)
        time.sleep(grace)
        sys.stderr.write("error: the first process of this run has ended, so this one ends too.\n")
        sys.stderr.flush()
        # The main thread may be inside a collective, where no exception reaches it.
        os._exit(1)

    threading.Thread(target=watch, name="first-process-watch", daemon=True).start()


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Turns what gloo and NCCL say about a process that is gone into an error that says what to do.

    Raises:
        ProcessLostError: another process of the run has ended, or does not answer.

    Example:
        >>> with lost_processes_named():
        ...     raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
        Traceback (most recent call last):
        ...
        mend_lightning.errors.ProcessLostError: Process 0 cannot reach another process of this run...
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, MendError) or not _LOST.search(str(error)):
            raise
        said = shorten(str(error).partition(" This is typically")[0], 200)
        raise ProcessLostError(
            f"Process {_rank()} cannot reach another process of this run: it was killed (out of memory?), stopped with an "
            "error of its own (look above, or into its log), or the network failed. The last checkpoint is whole. To resume: "
            f"the same command with --ckpt_path last. ({said})"
        ) from error


def _rank() -> int:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
