"""MendCallback on two processes, ddp and FSDP2: the same training, the same editor; this file is also what they run."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.bases import REMARKS, assert_same_state
from helpers.hosts import Host, Watch, callback_for, compare, host_loader, train_host, trainer_for
from helpers.processes import launch
from helpers.training import assert_same_training
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from mend_lightning.models.sharding.collectives import whole_state

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
# Steps of the editor, one in four of the host's eight, and their learning rate.
VISITS, RATE = 2, 1e-2


class Still(Host):
    """Does not move, so that the editor's numbers can be told from those of one process."""

    def __init__(self) -> None:
        super().__init__("llama", lr=0.0)


class Sharded(Still):
    """Shards its blocks, as a host does under FSDP2."""

    def configure_model(self) -> None:
        if not hasattr(self.model, "set_requires_gradient_sync"):
            for block in self.model.model.layers:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


class Moving(Sharded):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-3


def editor_of(facts: Path, host: type[Host], processes: int, **settings) -> tuple[dict, dict]:
    """The editor's state after a training, on every process, and what was measured."""
    # Two processes have half as many batches an epoch each.
    callback = callback_for(facts, precondition=0.1, calibration_batches=2, every_n_steps=4 // processes)
    callback._attachment.edits.batch_size = 4 // processes
    L.seed_everything(7, verbose=False)
    module = host()
    trainer = trainer_for([callback], num_sanity_val_steps=0, **settings)
    trainer.fit(module, host_loader(module, facts), host_loader(module, facts, shuffle=False))
    measured = {name: float(value) for name, value in trainer.callback_metrics.items() if "loss" not in name}
    measured.pop("mend/time_share")
    return callback.editor.state_dict(), measured


def sharded_run(facts: Path, callbacks: list[L.Callback]) -> dict:
    L.seed_everything(7, verbose=False)
    module, watch = Moving(), Watch()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = trainer_for([*callbacks, watch], strategy=strategy, devices=2, max_epochs=1)
    trainer.fit(module, host_loader(module, facts), host_loader(module, facts, shuffle=False))
    losses = [(state[0], state[1], state[-1]) for state in watch.states]
    return {"states": losses, "weights": whole_state(module), "logged": trainer.logger.without("mend")}


def main(facts: Path, folder: Path) -> None:
    """What each of the two processes does; it leaves its numbers in a file of its own."""
    spread = {"devices": 2, "strategy": "ddp"}
    compare(train_host(facts, [], **spread), train_host(facts, [callback_for(facts)], **spread))
    alone, attached = sharded_run(facts, []), sharded_run(facts, [callback_for(facts)])
    compare(alone, attached)
    sharded = {"devices": 2, "strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}
    out = {"ddp": editor_of(facts, Still, 2, **spread), "fsdp2": editor_of(facts, Sharded, 2, **sharded)}
    torch.save(out, folder / f"{torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def processes(facts, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    # Both hosts are compared there, with and without the callback.
    launch(__file__, 2, facts, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_one_editor_and_that_of_one_process(processes, facts):
    state, measured = editor_of(facts, Still, 1)
    for layout in ("ddp", "fsdp2"):
        (first, told), (second, other) = (each[layout] for each in processes)
        # At this rate a single weight that rounding sends another way is seen.
        assert told == other and told == pytest.approx(measured, rel=RATE, abs=RATE / 100), layout
        assert_same_state(first, second)
        assert_same_training(first, state, RATE, VISITS)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True)
    main(*map(Path, sys.argv[1:]))
