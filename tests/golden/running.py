"""Runs the real code path on a golden case and records what passes through it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor

from golden.cases import Case, load_case
from mend_lightning.editors.capture import Tape
from mend_lightning.editors.factors import Factors
from mend_lightning.editors.mend import MendEditor
from mend_lightning.editors.normalizer import RunningNormalizer
from mend_lightning.editors.original_checkpoint import original_names
from mend_lightning.edits.deltas import LowRankDelta
from mend_lightning.models.forward.hooks import applied
from mend_lightning.models.forward.logits import run_model
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import replayed
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.training.step import StepOutput, edit_step

Moments = tuple[int, Tensor, Tensor]


@dataclass
class Seen:
    """What one `edit_step` computed, by layer name."""

    output: StepOutput = None
    raw: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)
    tilde: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    deltas: dict[str, LowRankDelta] = field(default_factory=dict)
    calls: dict[int, list[Moments]] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A case's three stages."""

    case: Case
    editor: MendEditor
    stages: dict[str, Seen]


@cache
def run_case(name: str) -> Run:
    """`warmup` and `train` with statistics updated, then `eval` without: the README's procedure."""
    case = load_case(name)
    editor = case.editor()
    stages = {stage: _run_stage(case, editor, stage) for stage in ("warmup", "train", "eval")}
    return Run(case, editor, stages)


def _run_stage(case: Case, editor: MendEditor, stage: str) -> Seen:
    editor.train(stage != "eval").zero_grad()
    seen = watched_step(case, editor, stage)
    seen.output.total(case.config["cedit"]).backward()
    seen.gradients = {name: value.grad.clone() for name, value in editor.named_parameters()}
    seen.statistics = {name: value.clone() for name, value in editor.named_buffers()}
    batch = case.batch(stage)
    seen.logits["pre_loc"] = logits(case, editor, batch.x_out, {})
    seen.logits["post_loc"] = logits(case, editor, batch.x_out, seen.deltas)
    seen.logits["post_edit"] = logits(case, editor, batch.x_in, seen.deltas)
    return seen


def watched_step(case: Case, editor: MendEditor, stage: str) -> Seen:
    """One `edit_step` with hooks on all that it computes."""
    seen = Seen()
    with ExitStack() as stack:
        stack.callback(editor.register_forward_hook(lambda _, args, out: _keep(seen, args[0], out)).remove)
        for transform, group in zip(editor.transforms, editor.groups):
            hook = transform.register_forward_hook(lambda _, __, out, group=group: seen.tilde.update(zip(group, out)))
            stack.callback(hook.remove)
        stack.enter_context(patch.object(Tape, "gradients", _keeping_raw(seen)))
        stack.enter_context(patch.object(RunningNormalizer, "update", _keeping_calls(seen)))
        seen.output = edit_step(case.model, editor, case.batch(stage))
    return seen


def _keep(seen: Seen, factors: dict[str, Factors], deltas: dict[str, LowRankDelta]) -> None:
    seen.factors, seen.deltas = dict(factors), dict(deltas)


def _keeping_raw(seen: Seen):
    gradients = Tape.gradients

    def keep(tape: Tape, *args) -> dict[str, tuple[Tensor, Tensor]]:
        seen.raw = gradients(tape, *args)
        return seen.raw

    return keep


def _keeping_calls(seen: Seen):
    update = RunningNormalizer.update

    def keep(self: RunningNormalizer, rows: Tensor, kept: Tensor | None = None) -> None:
        update(self, rows, kept)
        moments = (int(self.count), self.mean.clone(), self.m2.clone())
        seen.calls.setdefault(id(self), []).append(moments)

    return keep


def logits(case: Case, editor: MendEditor, rows: Rows, deltas: dict[str, LowRankDelta]) -> Tensor:
    """All logits of `rows`, edited by `deltas`, above a replayed trunk."""
    layers = editor.modules_in(case.model)
    trunk = run_trunk(case.model, rows, layers)
    with torch.no_grad(), replayed(trunk, slice(None)), applied(layers, deltas, rows.task_of_row):
        return run_model(case.model, rows)


def parameters_by_original_name(editor: MendEditor, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values or gradients of the editor's parameters by the original's names and in its sign."""
    names = original_names(editor.layers, editor.settings["shared"], editor.state_dict())
    return {names[ours]: -value if ours == "edit_rates" else value for ours, value in values.items()}
