"""Preconditioning by the inputs' second moment: what all inputs have in common, an edit leaves alone.

An edit adds `δ̃ (ũ · u)` to a layer's output for *every* input u. Inputs share strong directions (the words of the
question, the format of the prompt), so `ũ · u` is large for unrelated questions too. With `A = E[u uᵀ]` the factor
`A⁻¹ũ` answers as little as possible to the average input for the same answer to the edit's own: it minimises
`E[(v · u)²]` subject to `v · ũ` fixed. This is the input side of K-FAC's natural gradient (Martens & Grosse, 2015) and
ROME's `C⁻¹k` (Meng et al., 2022). It is not in the MEND paper, and off by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mend_lightning.errors import ConfigError
from mend_lightning.types import Factors


@dataclass
class InputMoments:
    """Sums over a layer's inputs.

    Attributes:
        count: number of tokens; total: `[width]` their sum; products: `[width, width]` sum of `u uᵀ`. float64.
    """

    count: Tensor
    total: Tensor
    products: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> InputMoments:
        zeros = torch.zeros(width + 1, width, dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.float64, device=device), zeros[0], zeros[1:])

    def add(self, u: Tensor) -> None:
        """Takes in rows `u` `[tokens, width]`."""
        # The product in the rows' own precision: float64 matrix products are slow, single batches small.
        self.count += u.shape[0]
        self.total += u.sum(0)
        self.products += u.T @ u

    def all_reduce(self) -> None:
        """Sums over all processes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in (self.count, self.total, self.products):
                torch.distributed.all_reduce(tensor)


class InputPreconditioner(nn.Module):
    """Multiplies rows by `s (A + λ tr(A)/d · 1)⁻¹`, fixed once it is calibrated.

    The scale s keeps the edit's mean effect on its own inputs what it is without preconditioning, so edit rates
    mean the same with and without.

    Args:
        width: d_in of the layer.
        damping: λ; larger is closer to no preconditioning.

    Example:
        >>> moments = InputMoments.empty(2)
        >>> moments.add(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.1], [0.0, -0.1]]))
        >>> preconditioner = InputPreconditioner(2, damping=1e-3)
        >>> preconditioner.calibrate(moments)
        >>> common, rare = preconditioner(torch.eye(2)).diagonal().tolist()
        >>> rare > 50 * common
        True
    """

    def __init__(self, width: int, damping: float) -> None:
        super().__init__()
        if damping <= 0:
            raise ConfigError(f"precondition is the damping of an inverse and must be positive, not {damping}.")
        self.damping = damping
        self.register_buffer("matrix", torch.eye(width))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def calibrate(self, moments: InputMoments) -> None:
        """Sets the matrix from the moments of a sample of inputs."""
        if not bool(moments.count >= 1):
            raise ConfigError("No input to estimate the preconditioning from: the calibration batches hold no token.")
        count = moments.count
        second, mean = moments.products / count, moments.total / count
        spread = (second.diagonal() - mean.square()).clamp(min=0).sqrt()
        ridge = self.damping * second.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        inverse = torch.linalg.inv(second + ridge * torch.eye(len(mean), dtype=second.dtype, device=second.device))
        # E[norm(u) · u] over E[(A⁻¹u) · u]: the effect of an edit on its own inputs, without and with.
        scale = spread.sum() / (inverse * second).sum()
        self.matrix.copy_(scale * inverse)
        self.calibrated.fill_(True)

    def forward(self, rows: Tensor) -> Tensor:
        """Preconditions `rows` `[n, width]` in the units of the layer's inputs."""
        return rows @ self.matrix


def collect_moments(moments: dict[str, InputMoments], factors: Mapping[str, Factors]) -> None:
    """Adds the inputs of every layer in `factors` to `moments` (name -> InputMoments)."""
    for name, factor in factors.items():
        if name not in moments:
            moments[name] = InputMoments.empty(factor.u.shape[1], factor.u.device)
        moments[name].add(factor.u)
