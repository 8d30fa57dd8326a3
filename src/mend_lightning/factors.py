"""Gradient factors of an edit: what editors make their deltas of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mend_lightning.capture import kept_factors, record_factors
from mend_lightning.forward import labelled, logits_at
from mend_lightning.losses import mean_by_task, token_nll
from mend_lightning.prefix import run_trunk
from mend_lightning.trunk import TrunkOutputs, replayed
from mend_lightning.types import Factors, Rows


def edit_factors(
    model: nn.Module, layers: Mapping[str, nn.Module], z_edit: Rows, trunk: TrunkOutputs | None = None
) -> tuple[dict[str, Factors], Tensor, Tensor]:
    """Gradient factors of the edits' loss, for all tasks in one backward pass.

    Args:
        model: the base model.
        layers: name -> module of the edited layers.
        z_edit: the edits.
        trunk: the trunk's outputs for `z_edit`, where they are there already.

    Returns:
        name -> Factors, the inner loss of each task `[tasks]`, and the share of skipped tokens.
    """
    mask, targets, task = labelled(z_edit, "The edit")
    trunk = trunk or run_trunk(model, z_edit, layers)
    with replayed(trunk, slice(None)), record_factors(layers) as tape:
        nll = mean_by_task(token_nll(logits_at(model, z_edit, mask), targets), task, z_edit.tasks)
        raw = tape.gradients(nll.sum())
    factors = {name: kept_factors(u, delta, z_edit.task, z_edit.tasks) for name, (u, delta) in raw.items()}
    kept = sum(each.u.shape[0] for each in factors.values())
    total = sum(u.shape[:-1].numel() for u, _ in raw.values())
    return factors, nll.detach(), torch.tensor(1 - kept / total)
