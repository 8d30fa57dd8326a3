"""Gradient factors of an edit: what editors make their deltas of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mend_lightning.editors.capture import kept_factors, record_factors
from mend_lightning.editors.gradient_reach import gradient_reach
from mend_lightning.edits.deltas import Delta, applied
from mend_lightning.errors import NonFiniteError
from mend_lightning.models.forward.attention import quick_backward
from mend_lightning.models.forward.head import head_nll, states_at
from mend_lightning.models.forward.logits import labelled, logits_at
from mend_lightning.models.forward.losses import mean_by_task, token_nll
from mend_lightning.models.forward.phases import INNER, phase
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import TrunkOutputs, replayed
from mend_lightning.models.inputs.positions import Reach
from mend_lightning.models.inputs.rows import Factors, Rows
from mend_lightning.training.finite import answers_at_once


@phase(INNER)
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

    Raises:
        NonFiniteError: a layer's input or gradient is too large for the model's float16.
    """
    where, targets, task = labelled(z_edit, "The edit")
    trunk = trunk or run_trunk(model, z_edit, layers)
    reach = gradient_reach(model, layers, z_edit)
    # torch's fused attention kernels have no second derivative.
    attention = sdpa_kernel(SDPBackend.MATH) if keep_graph else quick_backward(model, z_edit)
    changed = applied(layers, deltas or {}, z_edit.task_of_row)
    # The deltas' hooks come first: the tape must see outputs that hold them.
    with replayed(trunk, slice(None)), changed, attention, record_factors(layers, keep_graph) as tape:
        # Nor has the loss that makes its gradient along with itself.
        if keep_graph:
            nll = mean_by_task(token_nll(logits_at(model, z_edit, where), targets), task, z_edit.tasks)
        else:
            nll = head_nll(states_at(model, z_edit, where), targets, task, z_edit.tasks)
        raw = tape.gradients(nll.sum(), loss_scale(max(z_edit.labels_of_task)) if tape.float16 else 1.0)
    if tape.float16:
        nll = _checked(raw, nll)
    factors = {name: _kept(u, delta, z_edit, reach[name]) for name, (u, delta) in raw.items()}
    total = sum(u.shape[:-1].numel() for u, _ in raw.values())
    return factors, nll.detach(), 1 - _count(factors.values()) / total


def _kept(u: Tensor, delta: Tensor, z_edit: Rows, reach: Reach | None) -> Factors:
    tokens = None if reach is None else z_edit.tokens(reach)
    return kept_factors(u, delta, z_edit.task, z_edit.tasks, tokens)


def _count(factors: Iterable[Factors]) -> Tensor:
    """How many tokens are kept, of all layers: a float scalar on the device."""
    counts = [
        torch.full((), float(each.u.shape[0]), device=each.u.device) if each.kept is None else each.kept.sum().float()
        for each in factors
    ]
    return torch.stack(counts).sum()


def loss_scale(most: int) -> float:
    """What the edits' loss is multiplied by in a model that computes in float16, so that small gradients do not become 0.

    A task's loss is the mean over its label tokens, so the more there are, the smaller is the gradient of each: of 100
    facts at once SmolLM2 lost 13 % of delta's entries, of a single one 0.4 %. This takes their number out, up to a power
    of two, and leaves six bits for what is small in itself. It is the edit's own: the Trainer's loss scale does not come here.

    Args:
        most: label tokens of the task that has most.

    Example:
        >>> loss_scale(3)
        256.0
    """
    return 64.0 * 2 ** (most - 1).bit_length()


def _checked(raw: Mapping[str, tuple[Tensor, Tensor]], nll: Tensor) -> Tensor:
    """`nll`, if all factors are finite. A training step does not wait for the device: it gets NaN, and checks its losses."""
    if answers_at_once(nll.device) or not torch.is_grad_enabled():
        _check_finite(raw)
        return nll
    finite = torch.stack([values.isfinite().all() for pair in raw.values() for values in pair]).all()
    return torch.where(finite, nll, torch.nan)


def _check_finite(raw: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Statistics that took in one infinite number would be lost, and the editor with them."""
    for name, pair in raw.items():
        for what, values in zip(("input", "gradient"), pair):
            if not bool(values.isfinite().all()):
                raise NonFiniteError(
                    f"The {what} of layer {name!r} is not finite: it is too large for float16. Use a base in bfloat16 or "
                    "float32, and Trainer precision '32-true' or 'bf16-mixed'."
                )
