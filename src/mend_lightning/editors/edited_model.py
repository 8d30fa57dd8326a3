"""A model under edits: how it scores rows and what it answers, each row under its own task's edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from mend_lightning.models.forward.generation import generate_answers
from mend_lightning.models.forward.head import HeadStates, states_at
from mend_lightning.models.forward.hooks import Delta, applied
from mend_lightning.models.forward.trunk import TrunkOutputs, replayed
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.positions import Positions
from mend_lightning.models.inputs.rows import Rows


@dataclass(frozen=True)
class Made:
    """What an editor made of the edits of a batch.

    Attributes:
        deltas: layer name -> Delta, one `ΔW` a task.
        inner: `[tasks]` the unedited model's NLL of the edit.
        skipped: share of the edit tokens that were dropped because u or delta is zero.
        reached: `[tasks]` bool, whether the targets are the edited model's greedy output; None where the editor does not
            look.
    """

    deltas: Mapping[str, Delta]
    inner: Tensor
    skipped: Tensor
    reached: Tensor | None = None


class Edited(Protocol):
    """What an editor made of `z_edit`. Most editors change weights (`DeltaEdits`), some the prompt or the output.

    Attributes:
        layers: name -> module of the layers whose weights change; the blocks below them are trunk. Empty where an edit
            changes no weight.
        deltas: name -> Delta of those layers.
    """

    @property
    def layers(self) -> Mapping[str, nn.Module]: ...
    @property
    def deltas(self) -> Mapping[str, Delta]: ...

    def states_at(self, model: nn.Module, rows: Rows, where: Positions, trunk: TrunkOutputs) -> HeadStates:
        """What the edited model's logits are made of (`HeadStates.logits_of`), at n positions.

        Args:
            model: the base model.
            rows: what is asked; `rows.task` says under which edit.
            where: positions with a label; every row has one.
            trunk: the trunk's outputs for `rows` (`run_trunk(model, rows, self.layers)`).
        """
        ...

    def answers(
        self,
        model: nn.Module,
        encoder: Encoder,
        prompts: Sequence[str],
        task_of_row: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> list[str]:
        """Greedy answers of the edited model; arguments as in `generate_answers`."""
        ...


@dataclass(frozen=True)
class DeltaEdits:
    """Edits that add a `ΔW` to some layers: everything but the cache and the in-context baseline."""

    layers: Mapping[str, nn.Module]
    deltas: Mapping[str, Delta]

    def states_at(self, model: nn.Module, rows: Rows, where: Positions, trunk: TrunkOutputs) -> HeadStates:
        with replayed(trunk, slice(None)), applied(self.layers, self.deltas, rows.task_of_row):
            return states_at(model, rows, where)

    def answers(
        self,
        model: nn.Module,
        encoder: Encoder,
        prompts: Sequence[str],
        task_of_row: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> list[str]:
        return generate_answers(model, encoder, prompts, self.layers, self.deltas, task_of_row, lengths=lengths)
