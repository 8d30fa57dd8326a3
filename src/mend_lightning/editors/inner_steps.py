"""How an edit is made of gradient factors: one step, or several until the model is confident of the new answer.

MEND takes one step. One gradient says how the base would have to change for the answer to become a little more probable, and for
most facts that direction is good enough, at some size (`confident_scales`). For some it is not: of 48 facts of relations that an
editor had never seen, five never became confident at any size, and they are the ones whose edits grow large and do harm. There
the gradient is taken again, of the edited model, and a second step is put on the first; with three all 48 became confident.
Edits that are confident already get nothing more, so they are the same with any number of steps. Not in the MEND paper, whose
`inner_steps` is 1; ENN and fine-tuning take several of their own kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from mend_lightning.editors.confidence import confident_scales
from mend_lightning.editors.constraints import constrained, kept_inputs
from mend_lightning.editors.edited_model import Made
from mend_lightning.editors.factors import Factors, edit_factors
from mend_lightning.editors.wordings import in_wordings
from mend_lightning.edits.deltas import LowRankDelta, concatenated
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.device import is_synchronous
from mend_lightning.models.forward.hooks import Delta
from mend_lightning.models.forward.phases import TRANSFORMS, phase
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import TrunkOutputs
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.models.sharding.collectives import any_rank, is_sharded


def check_inner_steps(count: int, confidence: float | None) -> None:
    """Raises ConfigError unless edits with this `confidence` can be made in up to `count` steps."""
    if count < 1:
        raise ConfigError(f"inner_steps is a number of gradient steps; it must be 1 or more, not {count}.")
    if count > 1 and confidence is None:
        raise ConfigError("inner_steps go on until an edit reaches its confidence: set confidence as well.")


class GradientEditor(Protocol):
    """What is asked here of an editor that makes its deltas of factors."""

    confidence: float | None
    constrains: bool
    training: bool

    @property
    def inner_steps(self) -> int: ...
    @property
    def wordings(self) -> int: ...
    def text_encoder(self) -> Encoder: ...
    def modules_in(self, model: nn.Module) -> dict[str, nn.Module]: ...
    def input_metrics(self) -> Mapping[str, Tensor]: ...
    def from_factors(
        self, model: nn.Module, factors: Mapping[str, Factors], z_edit: Rows, trunk: TrunkOutputs
    ) -> Mapping[str, Delta]: ...
    def train(self, mode: bool) -> object: ...


def stepped_deltas(
    editor: GradientEditor, model: nn.Module, z_edit: Rows, trunk: TrunkOutputs, x_keep: Rows | None = None
) -> Made:
    """The deltas of edits: `editor.inner_steps` steps, each kept off `x_keep` and made as large as `confidence` asks.

    Gradients flow through what the editor makes of each step's factors, and not through the factors.

    Args:
        editor: makes deltas of factors.
        model: the base model, in eval mode.
        z_edit: the edits of several independent tasks.
        trunk: the trunk's outputs for `z_edit`; where the editor makes edits in several wordings it runs again, for those.
        x_keep: questions that each task's edit must not touch.
    """
    layers, deltas = editor.modules_in(model), dict[str, Delta]()
    if editor.wordings:
        z_edit = in_wordings(z_edit, editor.text_encoder(), editor.wordings)
        trunk = run_trunk(model, z_edit, layers)
    # Processes that share the model run it equally often, whoever of them has questions to keep.
    has_kept = editor.constrains and any_rank(x_keep is not None, model)
    kept = kept_inputs(model, layers, z_edit if x_keep is None else x_keep) if has_kept else {}
    reached: Tensor | None = None
    first: list[Tensor] = []
    for step in range(editor.inner_steps):
        factors, *measured = edit_factors(model, layers, z_edit, trunk, _detached(deltas))
        first = first or measured
        with phase(TRANSFORMS), _statistics_kept(editor, step > 0):
            found = editor.from_factors(model, factors, z_edit, trunk)
            new = found if x_keep is None or not has_kept else constrained(found, kept, editor.input_metrics())
            deltas, reached = grown(model, layers, deltas, new, z_edit, trunk, editor.confidence, reached)
        if step + 1 < editor.inner_steps and _all_done(reached, model):
            break
    return Made(deltas, *first)


def grown(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    deltas: Mapping[str, Delta],
    new: Mapping[str, Delta],
    z_edit: Rows,
    trunk: TrunkOutputs,
    confidence: float | None,
    reached: Tensor | None = None,
) -> tuple[dict[str, Delta], Tensor | None]:
    """The deltas with one more step, as large as it has to be.

    Args:
        model, layers, z_edit, trunk: see `confident_scales`.
        deltas: of the steps before; empty at the first.
        new: the step, at the learned edit rate.
        confidence: wanted probability; None: the step is as large as the learned rate makes it.
        reached: `[tasks]` bool, whose edits get nothing more.

    Returns:
        The deltas, and which tasks have reached their confidence; None without one.
    """
    if confidence is None:
        return dict(new), None
    # A constant to the meta-gradient: training learns directions, and the search what they are worth.
    found = confident_scales(model, layers, new, z_edit, trunk, confidence, deltas)
    if reached is None:
        return {name: delta.scaled(found.scale) for name, delta in new.items()}, found.reached
    scale = torch.where(reached, 0.0, found.scale)
    return {name: _joined(deltas[name], new[name].scaled(scale)) for name in new}, found.reached | reached


def _joined(first: Delta, second: Delta) -> Delta:
    if not isinstance(first, LowRankDelta) or not isinstance(second, LowRankDelta):
        raise ConfigError("Only low-rank deltas can be made in several inner steps. Leave inner_steps at 1.")
    return concatenated([first, second])


def _detached(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    return {
        name: LowRankDelta(each.down.detach(), each.up.detach()) if isinstance(each, LowRankDelta) else each
        for name, each in deltas.items()
    }


@contextmanager
def _statistics_kept(editor: GradientEditor, keep: bool) -> Iterator[None]:
    """Inside, running statistics take nothing in: the gradients of an edited model are not those that they are of."""
    if not (keep and editor.training):
        yield
        return
    editor.train(False)
    try:
        yield
    finally:
        editor.train(True)


def _all_done(reached: Tensor | None, model: nn.Module) -> bool:
    """Whether no edit needs another step, where asking waits for nobody."""
    if reached is None:
        return True
    asks = is_synchronous(reached.device) or not torch.is_grad_enabled()
    return asks and not is_sharded(model) and bool(reached.all())
