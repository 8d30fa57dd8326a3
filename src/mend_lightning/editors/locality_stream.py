"""Unrelated facts for editors that look at them while they edit, one a step."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from mend_lightning.data.record import Record
from mend_lightning.data.records import iterate_records
from mend_lightning.data.tasks import as_unrelated
from mend_lightning.errors import EmptyDatasetError
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import TrunkOutputs
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import Rows

# So many steps' examples go through the trunk together.
STEPS_AT_A_TIME = 16


def locality_pair(records: Sequence[Record], seed: int, step: int) -> tuple[str, str]:
    """The (question, true answer) of a step: the same for every edit, whatever else is in its batch.

    Example:
        >>> records = [Record("Capital of France?", ("Paris",), ("Rome",), ())]
        >>> locality_pair(records, seed=0, step=3)
        ('Capital of France?', 'Paris')
    """
    draw = random.Random(f"{seed}/{step}")
    return as_unrelated(draw, draw.choice(records))


def read_unrelated(name: str) -> list[Record]:
    """The records of a source that can be asked as unrelated facts: those with a true answer, or a text.

    Raises:
        EmptyDatasetError: there is none.
    """
    records = [record for record in iterate_records(name) if record.can_be_asked]
    if not records:
        raise EmptyDatasetError(f"locality_data {name} has no question with a true answer. Give another file.")
    return records


@dataclass
class LocalityStream:
    """The locality example of every step, with what the trunk makes of it.

    Args:
        model: the base model.
        layers: name -> module of the edited layers.
        encoder: text to ids.
        records: what is drawn from.
        seed: of the draws.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    encoder: Encoder
    records: Sequence[Record]
    seed: int
    _blocks: dict[int, tuple[Rows, TrunkOutputs]] = field(default_factory=dict)

    def at(self, step: int, copies: int) -> tuple[Rows, TrunkOutputs, torch.Tensor]:
        """The example of `step`, once for each of `copies` tasks.

        Returns:
            Rows with one row a task; the trunk's outputs that hold it, and where `[copies]` in them.
        """
        block, place = divmod(step, STEPS_AT_A_TIME)
        if block not in self._blocks:
            self._blocks[block] = self._made(block)
        rows, trunk = self._blocks[block]
        index = torch.full((copies,), place, device=rows.task.device)
        task = torch.arange(copies, device=index.device)
        return replace(rows.part(index), task=task, tasks=copies, grouped=True), trunk, index

    def _made(self, block: int) -> tuple[Rows, TrunkOutputs]:
        steps = range(block * STEPS_AT_A_TIME, (block + 1) * STEPS_AT_A_TIME)
        pairs = [locality_pair(self.records, self.seed, step) for step in steps]
        rows = self.encoder.rows(pairs, range(len(pairs)), len(pairs)).to(next(self.model.parameters()).device)
        return rows, run_trunk(self.model, rows, self.layers)
