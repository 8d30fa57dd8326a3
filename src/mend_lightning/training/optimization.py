"""How an editor's parameters learn: groups with rates of their own, warm-up and decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mend_lightning.editors.editor import Editor
from mend_lightning.models.sharding.collectives import whole

if TYPE_CHECKING:
    # For its type alone: what is here runs without Lightning.
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

Decay = Literal["none", "linear"]


def parameter_groups(editor: Editor, lr: float, edit_rate_lr: float) -> list[dict[str, Any]]:
    """Adam's groups: the few numbers a layer that `editor.rate_names` names, and everything else; empty without parameters."""
    named = dict(editor.named_parameters())
    rates = [named.pop(name) for name in editor.rate_names if name in named]
    groups = {"transforms": (list(named.values()), lr), "edit_rates": (rates, edit_rate_lr)}
    return [{"params": each, "lr": rate, "name": name} for name, (each, rate) in groups.items() if each]


def lr_factor(step: int, total: float, warmup_steps: int, decay: Decay) -> float:
    """What the learning rates are multiplied by in `step`, from 0.

    Args:
        step: optimiser steps that were taken.
        total: of the whole training; infinite where it has no end, and then nothing decays.
        warmup_steps: steps in which the factor rises to 1.
        decay: "linear" lets it fall to 0 over `total`.

    Example:
        >>> [lr_factor(step, 4, warmup_steps=1, decay="linear") for step in range(4)]
        [0.5, 0.75, 0.5, 0.25]
    """
    factor = min(1.0, (step + 1) / (warmup_steps + 1))
    if decay == "linear" and not math.isinf(total):
        factor *= max(0.0, 1 - step / total)
    return factor


def gradient_norm(editor: Editor) -> Tensor:
    """The 2-norm over all gradients that the editor has, whole where they are sharded: a scalar."""
    gradients = [parameter.grad for parameter in editor.parameters() if parameter.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))


def edit_rate_range(editor: Editor) -> dict[str, Tensor]:
    """The smallest and the largest edit rate α, as what they are logged by; nothing of an editor without."""
    parameter = dict(editor.named_parameters()).get("edit_rates")
    if parameter is None:
        return {}
    rates = whole(parameter.detach())
    return {"edit_rate_min": rates.min(), "edit_rate_max": rates.max()}


def adam(
    editor: Editor, lr: float, edit_rate_lr: float, fused: bool, factor: Callable[[int], float]
) -> OptimizerLRSchedulerConfig | None:
    """Adam over `parameter_groups`, whose rates `factor` multiplies at every step, as Lightning takes it; None without any."""
    groups = parameter_groups(editor, lr, edit_rate_lr)
    if not groups:
        return None
    optimizer = torch.optim.Adam(groups, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
