"""Lightning's plugin for checkpoints that survive a kill, written at once or beside the training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from mend_lightning.errors import ConfigError
from mend_lightning.files import output_file
from mend_lightning.training.distributed.checkpoint_file import write_checkpoint
from mend_lightning.training.distributed.sharded_checkpoint import read_full, remove_shards


class EditorCheckpointIO(CheckpointIO):
    """Checkpoint files that are whole whenever the process dies: `Trainer(plugins=[EditorCheckpointIO()])`.

    `mend-lightning fit` uses it unless the config names another CheckpointIO. Paths of remote file systems (`s3://…`) are
    left to Lightning's TorchCheckpointIO.

    Args:
        asynchronous: copy the state and write it in a thread while training continues. One file is written at a time: the next
            save, load or removal waits, and so does the end of the run, also by Ctrl-C or an error. What goes wrong in
            the thread is raised there.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = EditorCheckpointIO(asynchronous=True)
        ...     files.save_checkpoint({"state_dict": {"w": torch.ones(2)}}, f"{folder}/a.ckpt")
        ...     files.load_checkpoint(f"{folder}/a.ckpt")["state_dict"]["w"]
        tensor([1., 1.])
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._remote = TorchCheckpointIO()
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes `checkpoint`; with `asynchronous` soon.

        Raises:
            OutputPathError: this one, or the one before, could not be written.
        """
        if storage_options is not None:
            raise ConfigError(
                f"storage_options={storage_options!r} mean nothing to EditorCheckpointIO; leave them out."
            )
        self.wait()
        write = self._remote.save_checkpoint if _is_remote(path) else _write
        if self.asynchronous:
            self._start(write, snapshot(checkpoint), path)
        else:
            write(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint, sharded or not, without running code unless `weights_only` is False: then any file is trusted.

        Raises:
            CheckpointNotFoundError, StateDictError: see `read_full`.
            OutputPathError: the last one could not be written.
        """
        self.wait()
        if _is_remote(path):
            return self._remote.load_checkpoint(path, map_location, weights_only is not False)
        return read_full(path, map_location, weights_only is not False)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint and its shards, if it is there; after what is being written, which may be the same one."""
        self.wait()
        if _is_remote(path):
            self._remote.remove_checkpoint(path)
        else:
            # The file first: what is killed between the two leaves shards that nobody names, and not a file without.
            Path(path).unlink(missing_ok=True)
            remove_shards(path)

    def teardown(self) -> None:
        """Waits for what is being written."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk; raises what went wrong with it, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _start(self, write: Callable[[dict, str | Path], None], checkpoint: dict[str, Any], path: str | Path) -> None:
        # Lightning's AsyncCheckpointIO does not wait: copies of a slow disk's backlog pile up in the GPU's memory, a
        # checkpoint is removed before it is written and then stays, a load reads the file before, and an error is
        # raised a save too late.
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending = self._thread.submit(write, checkpoint, path)


def snapshot(value: Any) -> Any:
    """A copy on the CPU that training does not change: tensors, and the dicts and lists that hold them.

    Example:
        >>> import torch
        >>> weight = torch.ones(1)
        >>> copied = snapshot({"w": [weight]})
        >>> _ = weight.zero_()
        >>> copied
        {'w': [tensor([1.])]}
    """
    if isinstance(value, Tensor):
        # `copy`: on the CPU it would be the same memory, which the optimizer writes to.
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: snapshot(item) for key, item in value.items()})
        return copied
    if type(value) in (list, tuple):
        return type(value)(map(snapshot, value))
    return copy.deepcopy(value)


def _write(checkpoint: dict[str, Any], path: str | Path) -> None:
    write_checkpoint(checkpoint, path)
    # Of a sharded one of that name.
    remove_shards(output_file(path))


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
