"""Gradient factors of an edit: what editors make their deltas of."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mend_lightning.capture import kept_factors, record_factors
from mend_lightning.delta import Delta, applied
from mend_lightning.forward import labelled, logits_at
from mend_lightning.losses import mean_by_task, token_nll
from mend_lightning.prefix import run_trunk
from mend_lightning.trunk import TrunkOutputs, replayed
from mend_lightning.types import Factors, Rows


def edit_factors(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    z_edit: Rows,
    trunk: TrunkOutputs | None = None,
    deltas: Mapping[str, Delta] | None = None,
    keep_graph: bool = False,
) -> tuple[dict[str, Factors], Tensor, Tensor]:
    """Gradient factors of the edits' loss, for all tasks in one backward pass.

    Args:
        model: the base model.
        layers: name -> module of the edited layers.
        z_edit: the edits.
        trunk: the trunk's outputs for `z_edit`, where they are there already.
        deltas: name -> Delta that the model has while the gradient is taken; None: the base model's gradient.
        keep_graph: the factors stay functions of `deltas`, for second-order gradients (ENN).

    Returns:
        name -> Factors, the inner loss of each task `[tasks]`, and the share of skipped tokens.
    """
    mask, targets, task = labelled(z_edit, "The edit")
    trunk = trunk or run_trunk(model, z_edit, layers)
    # torch's fused attention kernels have no second derivative.
    attention = sdpa_kernel(SDPBackend.MATH) if keep_graph else nullcontext()
    changed = applied(layers, deltas or {}, z_edit.task_of_row)
    # The deltas' hooks come first: the tape must see outputs that hold them.
    with replayed(trunk, slice(None)), changed, attention, record_factors(layers, keep_graph) as tape:
        nll = mean_by_task(token_nll(logits_at(model, z_edit, mask), targets), task, z_edit.tasks)
        raw = tape.gradients(nll.sum())
    factors = {name: kept_factors(u, delta, z_edit.task, z_edit.tasks) for name, (u, delta) in raw.items()}
    kept = sum(each.u.shape[0] for each in factors.values())
    total = sum(u.shape[:-1].numel() for u, _ in raw.values())
    return factors, nll.detach(), torch.tensor(1 - kept / total)
