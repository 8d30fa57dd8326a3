"""Questions that an edit must not touch, as constraints on it.

An edit adds `Σ_t up_t (down_t · u)` to a layer's output for every input u. An input `k` of a question whose answer must stay
sees nothing of it where `down_t · k = 0` for all t. So each `down_t` is moved to the nearest vector of that kind, nearest in
the metric of the inputs' second moment `A` (`InputPreconditioner`): what it does to all other inputs changes least,

    down' = down − down Kᵀ (K A⁻¹ Kᵀ + ε)⁻¹ K A⁻¹.

The same follows from adding the constrained inputs to `A` with a large weight `1/ε` and preconditioning again. With one edited
layer this is exact, for its inputs do not depend on the edit; with several it holds to first order. ROME and MEMIT (Meng et
al., 2022) constrain what an edit must *say* by such a solve; here it is what it must not say. Not in the MEND paper.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mend_lightning.edits.deltas import LowRankDelta
from mend_lightning.models.forward.hooks import Delta
from mend_lightning.models.forward.layer_inputs import encoder_modules, record_inputs
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.inputs.positions import slots
from mend_lightning.models.inputs.rows import Rows

# ε, as a share of the mean of the diagonal of `K A⁻¹ Kᵀ`: two questions that are almost the same need it.
RIDGE = 1e-2


def without_effect_on(down: Tensor, kept: Tensor, inverse: Tensor | None, ridge: float = RIDGE) -> Tensor:
    """`down` changed as little as possible so that it answers none of the inputs `kept`.

    Args:
        down: `[tasks, rank, d_in]` float32, of a `LowRankDelta`.
        kept: `[tasks, n, d_in]` float32, the layer's inputs that must see nothing of each task's edit; rows of zeros are
            none.
        inverse: `[d_in, d_in]`, `A⁻¹` up to a factor; None: the identity, every direction counts alike.
        ridge: ε as a share; larger lets more through, and changes `down` less.

    Returns:
        `[tasks, rank, d_in]`.

    Example:
        >>> down, kept = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[0.0, 2.0]]])
        >>> without_effect_on(down, kept, None, ridge=0.0).tolist()
        [[[1.0, 0.0]]]
    """
    moved = kept if inverse is None else kept @ inverse
    gram = moved @ kept.mT
    used = (kept != 0).any(-1)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.sum(-1) / used.sum(-1).clamp(min=1)
    # Rows of zeros get a one, so that the matrix can be inverted; their products are zero anyway.
    damping = torch.where(used, ridge * mean[:, None], 1.0)
    return down - (down @ kept.mT) @ torch.linalg.solve(gram + torch.diag_embed(damping), moved)


@torch.no_grad()
def kept_inputs(model: nn.Module, layers: Mapping[str, nn.Module], x_keep: Rows) -> dict[str, Tensor]:
    """The layers' inputs at the token that decides each question's answer, laid out by task.

    That is the token whose output predicts the answer's first; of a classifier, the one it reads its verdict from. All of a
    question's tokens as constraints would cost the edit too much: most of them stand in the edited question as well.
    An encoder-decoder's encoder has no such token, so layers there are left out.

    Args:
        model: the base model.
        layers: name -> module of the edited layers.
        x_keep: questions, each of the task whose edit must not touch it, with any answer.

    Returns:
        name -> `[tasks, n, d_in]` float32, padded with zeros.
    """
    seen = record_inputs(model, layers, x_keep, run_trunk(model, x_keep, layers))
    encoder, slot, rank = encoder_modules(model), slots(x_keep.task, x_keep.tasks), x_keep.rows_of_task
    found = {}
    for name, calls in seen.items():
        if layers[name] in encoder:
            continue
        u = torch.cat([_deciding(model, each.reshape(len(x_keep), -1, each.shape[-1]), x_keep) for each in calls], -2)
        kept = u.new_zeros(x_keep.tasks, rank, *u.shape[1:], dtype=torch.float32)
        found[name] = kept.index_put((x_keep.task, slot), u.float()).flatten(1, 2)
    return found


def _deciding(model: nn.Module, u: Tensor, rows: Rows) -> Tensor:
    """`u` `[rows, tokens, d_in]` at each row's deciding token: `[rows, 1, d_in]`."""
    if u.shape[1] == rows.labels.shape[1]:
        return rows.answer_starts.take(u)[:, None]
    # A classifier on a decoder reads its verdict at the end (transformers calls that head `score`), an encoder at the start.
    mask = rows.inputs.get("attention_mask")
    last = mask.sum(1) - 1 if hasattr(model, "score") and mask is not None else torch.zeros_like(rows.task)
    return u[torch.arange(len(rows), device=u.device), last][:, None]


def constrained(
    deltas: Mapping[str, Delta], kept: Mapping[str, Tensor], metrics: Mapping[str, Tensor]
) -> dict[str, Delta]:
    """`deltas` without effect on the inputs `kept`.

    Args:
        deltas: name -> Delta of all tasks; others than low-rank ones stay as they are.
        kept: name -> `[tasks, n, d_in]` of the layers that can be constrained (`kept_inputs`).
        metrics: name -> `A⁻¹`; see `without_effect_on`.
    """
    return {
        name: LowRankDelta(without_effect_on(delta.down, kept[name], metrics.get(name)), delta.up)
        if name in kept and isinstance(delta, LowRankDelta)
        else delta
        for name, delta in deltas.items()
    }
