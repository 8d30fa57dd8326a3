"""Gradient factors of an edit: what editors make their deltas of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mend_lightning.editors.capture import record_factors
from mend_lightning.editors.gradient_reach import gradient_reach
from mend_lightning.edits.deltas import LowRankDelta
from mend_lightning.errors import NonFiniteError
from mend_lightning.models.forward.attention import quick_backward
from mend_lightning.models.forward.device import is_synchronous
from mend_lightning.models.forward.head import head_nll, states_at
from mend_lightning.models.forward.hooks import Delta, applied
from mend_lightning.models.forward.logits import labelled, logits_at
from mend_lightning.models.forward.losses import mean_by_task, token_nll
from mend_lightning.models.forward.phases import INNER, phase
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import TrunkOutputs, replayed
from mend_lightning.models.inputs.positions import Reach, Tokens, slots
from mend_lightning.models.inputs.rows import Rows


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
    if is_synchronous(nll.device) or not torch.is_grad_enabled():
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


def kept_factors(u: Tensor, delta: Tensor, task_of_row: Tensor, tasks: int, tokens: Tokens | None = None) -> Factors:
    """Flattens raw factors and drops the tokens that contribute nothing to `∇W`.

    A token whose `u` or `delta` is all zero (padding; in a causal model's last block all but the
    target positions) is dropped before statistics and transform, as in the original code.

    Args:
        u: `[rows, tokens, d_in]`; delta: `[rows, tokens, d_out]`.
        task_of_row: `[rows]`; tasks: their number.
        tokens: those among which all are that contribute; the device is then not asked which of them do.

    Example:
        >>> u, delta = torch.ones(1, 2, 3), torch.tensor([[[1.0], [0.0]]])
        >>> kept_factors(u, delta, torch.tensor([0]), 1).u.shape
        torch.Size([1, 3])
    """
    rows = task_of_row.shape[0]
    u, delta = (x.reshape(rows, -1, x.shape[-1]) for x in (u, delta))
    # A layer that is called several times, or on some of the tokens, has another number.
    if tokens is not None and tokens.length == u.shape[1]:
        return _factors_at(tokens, u, delta, tasks)
    row = torch.arange(rows, device=u.device)[:, None].expand(rows, u.shape[1]).reshape(-1)
    u, delta = u.flatten(0, 1), delta.flatten(0, 1)
    kept = (u != 0).any(-1) & (delta != 0).any(-1)
    return Factors(u[kept].float(), delta[kept].float(), task_of_row[row[kept]], tasks, row[kept])


def _factors_at(tokens: Tokens, u: Tensor, delta: Tensor, tasks: int) -> Factors:
    u, delta = tokens.where.take(u).float(), tokens.where.take(delta).float()
    kept = (u != 0).any(-1) & (delta != 0).any(-1)
    u, delta = (x.masked_fill(~kept[:, None], 0.0) for x in (u, delta))
    return Factors(u, delta, tokens.task, tasks, tokens.where.row, kept, (tokens.slot, tokens.rank))


def descent(u: Tensor, delta: Tensor, factors: Factors, rate: Tensor) -> LowRankDelta:
    """A step down the gradient that the factors make up: `ΔW = −rate Σ_t delta_t u_tᵀ` of every task.

    Args:
        u: `[tokens, d_in]`; delta: `[tokens, d_out]`: the factors' own, or what an editor made of them.
        factors: say which task each token is of.
        rate: scalar.

    Example:
        >>> factors = Factors(torch.ones(2, 1), torch.ones(2, 1), torch.tensor([0, 1]), tasks=2)
        >>> descent(factors.u, factors.delta, factors, torch.tensor(0.5)).dense().flatten().tolist()
        [-0.5, -0.5]
    """
    slot, rank = factors.place or task_slots(factors.task, factors.tasks)
    place = (factors.task, factors.tasks, rank, slot)
    rate = rate if factors.kept is None else (rate * factors.kept)[:, None]
    return LowRankDelta(down=pack_tasks(u, *place), up=pack_tasks(-rate * delta, *place))


def pack_tasks(rows: Tensor, task: Tensor, tasks: int, rank: int, slot: Tensor) -> Tensor:
    """Lays ragged `rows` `[tokens, width]` out as zero-padded `[tasks, rank, width]`."""
    return rows.new_zeros(tasks, rank, rows.shape[-1]).index_put((task, slot), rows)


def task_slots(task: Tensor, tasks: int) -> tuple[Tensor, int]:
    """Position of every token within its task `[tokens]`, and the largest task's token count, which waits for the device.

    Example:
        >>> task_slots(torch.tensor([0, 1, 0]), 2)
        (tensor([0, 0, 1]), 2)
    """
    slot = slots(task, tasks)
    return slot, int(slot.max()) + 1 if task.numel() else 0


@dataclass(frozen=True)
class Factors:
    """Gradient factors of one layer: `∇W = Σ_t delta_t u_tᵀ` for each task.

    Attributes:
        u: `[tokens, d_in]` float32, the layer's input at the kept tokens of all tasks.
        delta: `[tokens, d_out]` float32, the loss gradient at the layer's output.
        task: `[tokens]` int64, the task of each token.
        tasks: number of tasks.
        row: `[tokens]` int64, the row of `z_edit` that each token is of; None where nobody asks.
        kept: `[tokens]` bool, false for tokens that are here only because finding out would synchronize host and device: their
            `u` and `delta` are 0, and neither statistics nor edits may see them. None: all count.
        place: each token's position within its task `[tokens]`, and the largest task's token count; None where it is
            not known without a host-device synchronization.
    """

    u: Tensor
    delta: Tensor
    task: Tensor
    tasks: int
    row: Tensor | None = None
    kept: Tensor | None = None
    place: tuple[Tensor, int] | None = None
