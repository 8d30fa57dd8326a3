"""Sharded base models as ready-made strategies of Lightning's Trainer: `Trainer(strategy="fsdp2")`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mend_lightning.editors.editor import Editor
from mend_lightning.errors import ConfigError
from mend_lightning.parallel.sharding import Fill, check_shardable, shard_editor, shard_model, wrap_blocks

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


class ShardedBaseStrategy(DDPStrategy):
    """Shards the base model's blocks with torch's older FullyShardedDataParallel (FSDP1); every process has the whole editor.

    What `--trainer.strategy fsdp` is. The editor is trained as under `ddp`, and checkpoints are the same; embeddings and
    output head stay whole on every device. `fsdp2` shards those and the editor as well.
    """

    def shard_base(self, model: nn.Module, fill: Fill) -> None:
        """See `wrap_blocks`."""
        wrap_blocks(model, self.root_device, fill)

    def shard_editor(self, editor: Editor) -> None:
        """Leaves it whole, if it can work on a sharded base."""
        check_shardable(editor)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The editor's: the frozen base is in no checkpoint, and is not gathered for one."""
        return self.lightning_module.editor.state_dict(prefix="editor.")


# "fsdp" itself is Lightning's; the command line puts `ShardedBaseStrategy` in its place.
StrategyRegistry.register("fsdp1", ShardedBaseStrategy, description="The base's blocks sharded (FSDP1), the editor whole")
StrategyRegistry.register(
    "fsdp2", ShardedStrategy, description="The base sharded by its blocks, and the editor, over all processes (FSDP2)"
)
