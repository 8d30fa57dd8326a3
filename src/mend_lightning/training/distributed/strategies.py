"""Sharded base models as ready-made strategies of Lightning's Trainer: `Trainer(strategy="fsdp2")`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from mend_lightning.editors.editor import Editor
from mend_lightning.errors import ConfigError
from mend_lightning.models.sharding.collectives import whole
from mend_lightning.models.sharding.fsdp import (
    Fill,
    load_whole_state,
    shard_model,
    sharded_optimizer_state,
    wrap_blocks,
)
from mend_lightning.training.distributed.checkpoint_file import EDITOR_PREFIX, editor_state
from mend_lightning.training.distributed.checkpoint_io import EditorCheckpointIO
from mend_lightning.training.distributed.sharded_checkpoint import with_shards, write_sharded

TIMEOUT = timedelta(minutes=30)


class ShardedStrategy(ModelParallelStrategy):
    """Shards the base model by its blocks, and the editor, its gradient and Adam's state, over all processes (FSDP2).

    `MendModule` loads the base so that no process ever holds it whole. Runs on GPUs (NCCL) and on CPUs (gloo).

    Args:
        save_distributed_checkpoint: every process writes its shards of the editor; False: process 0 writes all of it, in the
            format of a run on one device. Either can be resumed on any number of processes, sharded or not.
        tensor_parallel_size: 1. Blocks are not split inside.
        process_group_backend: "nccl" or "gloo"; None: by the device.
        timeout: how long a process waits for the others before it gives up.
    """

    # A process has a part of the base: all of them must run equally many batches.
    shards_base = True

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        tensor_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        if tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_parallel_size={tensor_parallel_size}: tensor parallelism is not supported. An edit is added to the whole "
                "output of a layer, and a layer that is split over devices has none. Leave it at 1: fsdp2 shards the "
                "blocks over all devices."
            )
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend, timeout=timeout,
        )  # fmt: skip
        self._mesh: DeviceMesh | None = None

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        # Lightning's own would leave shards behind, and reads no sharded checkpoint.
        if self._checkpoint_io is None:
            self._checkpoint_io = EditorCheckpointIO()

    @property
    def mesh(self) -> DeviceMesh:
        """All processes in one dimension."""
        if self._mesh is None:
            self._mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        return self._mesh

    def shard_base(self, model: nn.Module, fill: Fill) -> None:
        """See `shard_model`."""
        shard_model(model, self.mesh, fill)

    def shard_editor(self, editor: Editor) -> None:
        """See `sharding.shard_editor`."""
        shard_editor(editor.to(self.root_device), self.mesh)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The editor's state, without the base, which no process could hold: whole on the CPU, or in shards."""
        return self._saved(_editor_of(self).state_dict(prefix=EDITOR_PREFIX))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As torch's `Optimizer.state_dict()` on one device; whole on the CPU, or in shards."""
        return self._saved(getattr(optimizer, "_optimizer", optimizer).state_dict())

    def _saved(self, state: dict[str, Any]) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return state
        return apply_to_collection(state, Tensor, lambda value: whole(value).cpu())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        filepath = self.broadcast(filepath)
        if self._save_distributed_checkpoint:
            write_sharded(checkpoint, filepath)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint of any layout, with whole tensors; every process reads it."""
        path = self.broadcast(checkpoint_path)
        trusted = {} if weights_only is None else {"weights_only": weights_only}
        return with_shards(self.checkpoint_io.load_checkpoint(path, **trusted), path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        load_whole_state(_editor_of(self), editor_state(checkpoint))

    @property
    def lightning_restore_optimizer(self) -> bool:
        # ModelParallelStrategy restores it while it reads the checkpoint, and not where this property is asked.
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            optimizer.load_state_dict(sharded_optimizer_state(optimizer, state))

    def teardown(self) -> None:
        super().teardown()
        # ModelParallelStrategy leaves it out, and with it what went wrong with the last asynchronous write.
        self.checkpoint_io.teardown()


class ShardedBaseStrategy(DDPStrategy):
    """Shards the base model's blocks with torch's older FullyShardedDataParallel (FSDP1); every process has the whole editor.

    What `--trainer.strategy fsdp` is. The editor is trained as under `ddp`, and checkpoints are the same; embeddings and
    output head stay whole on every device. `fsdp2` shards those and the editor as well.
    """

    shards_base = True

    def shard_base(self, model: nn.Module, fill: Fill) -> None:
        """See `wrap_blocks`."""
        wrap_blocks(model, self.root_device, fill)

    def shard_editor(self, editor: Editor) -> None:
        """Leaves it whole, if it can work on a sharded base."""
        check_shardable(editor)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The editor's: the frozen base is in no checkpoint, and is not gathered for one."""
        return _editor_of(self).state_dict(prefix=EDITOR_PREFIX)


def _editor_of(strategy: Strategy) -> Editor:
    module: Any = strategy.lightning_module
    return module.editor


# "fsdp" itself is Lightning's; the command line puts `ShardedBaseStrategy` in its place.
StrategyRegistry.register(
    "fsdp1", ShardedBaseStrategy, description="The base's blocks sharded (FSDP1), the editor whole"
)

StrategyRegistry.register(
    "fsdp2", ShardedStrategy, description="The base sharded by its blocks, and the editor, over all processes (FSDP2)"
)


def shard_editor(editor: Editor, mesh: DeviceMesh) -> None:
    """Shards what an editor learns, its gradient and its optimiser's state, on the device of `mesh`.

    Raises:
        ConfigError: see `check_shardable`.
    """
    units = check_shardable(editor)
    # The same on every process, whatever the seeds: each keeps its part of the first one's.
    for parameter in editor.parameters():
        distributed.broadcast(parameter.data, src=0)
    # The editor last: it is gathered when its own forward is called, with what is in no unit (edit rates).
    for unit in [*units, editor]:
        fully_shard(unit, mesh=mesh)


def check_shardable(editor: Editor) -> list[nn.Module]:
    """The modules of the editor that are gathered one by one.

    Raises:
        ConfigError: this editor cannot work on a sharded model.
    """
    units = editor.shard_units()
    if units is None:
        raise ConfigError(
            f"{type(editor).__name__} cannot work on a sharded model: it uses its parameters or the base's outside of "
            "their modules' forward, or decides from the data how often the model runs. Use --trainer.strategy ddp, or "
            "MendEditor."
        )
    return units
