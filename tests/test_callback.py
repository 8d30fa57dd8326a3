"""MendCallback in somebody else's training: it learns, and the training is what it is without it, to the last bit."""

from __future__ import annotations

import pytest
import torch
from bases import REMARKS
from hosts import Host, ManualHost, compare, guest, host_loader, train_host, trainer_for

pytest_plugins = ["bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS, "ignore:.*The `srun` command is available.*")


@pytest.mark.parametrize(
    ("host", "settings"),
    [
        (Host, {}),
        (Host, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (ManualHost, {}),
        (Host, {"precision": "bf16-mixed", "max_epochs": 1}),
    ],
    ids=["automatic", "accumulating", "manual", "bf16-mixed"],
)
def test_the_host_does_not_notice(host, settings, facts):
    callback = guest(facts)
    alone = train_host(facts, [], host, **settings)
    visited = train_host(facts, [callback], host, **settings)
    compare(alone, visited)
    steps = len({state[1] for state in alone["states"]} - {0})
    assert callback._kept["optimizer"]["steps"] == steps // 2 > 0
    logged = {name for row in visited["trainer"].logger.rows for name in row if name.startswith("mend/")}
    assert {"mend/edit_loss", "mend/locality_loss", "mend/time_share", "mend/edit_success", "mend/drawdown"} <= logged
