"""Passes in step: a block that is sharded is gathered by all its processes, so each must run it equally often.

Whatever decides from the data how often a model runs asks here, and all processes get one answer.
"""

from __future__ import annotations

import torch
from torch import distributed, nn

from mend_lightning.models.sharding.collectives import is_sharded


def smallest(value: int, model: nn.Module) -> int:
    """The smallest `value` of all processes that share `model`; itself where the model is not sharded.

    Example:
        >>> smallest(3, nn.Linear(2, 2))
        3
    """
    if not is_sharded(model):
        return value
    shared = torch.tensor(value, device=next(model.parameters()).device)
    distributed.all_reduce(shared, distributed.ReduceOp.MIN)
    return int(shared)


def anywhere(flag: bool, model: nn.Module) -> bool:
    """Whether `flag` is true on any of the processes that share `model`; itself where the model is not sharded.

    Example:
        >>> anywhere(False, nn.Linear(2, 2))
        False
    """
    return not smallest(int(not flag), model)
