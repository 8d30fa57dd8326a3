"""Preconditioning of ũ: what all inputs share an edit leaves alone, and what rephrasings share it follows.

An edit adds `δ̃ (v · u)` to a layer's output for *every* input u, where v is made of the edit's own input ũ. Two questions
decide what v should be, and both have a linear answer that is estimated once, before training:

* Unrelated inputs should be answered little. They share strong directions with the edit (the words of the question, the
  format of the prompt), so `ũ · u` is large for them too. With `A = E[u uᵀ]`, `v = A⁻¹ũ` minimises `E[(v · u)²]` at a fixed
  `v · ũ`. This is the input side of K-FAC's natural gradient (Martens & Grosse, 2015) and ROME's `C⁻¹k` (Meng et al., 2022).
* Rephrases should be answered as much as the edit itself. They are not known, but what to expect of them is: the linear
  regression of a rephrase's input u′ on the edit's, `E[u′ | ũ] = C B⁻¹ ũ` with `C = E[u′ uᵀ]` and `B = E[u uᵀ]` over pairs of
  phrasings at the same token of the answer. What changes from phrasing to phrasing is shrunk, what stays is kept. It then
  stands in for ũ: `v = A⁻¹ C B⁻¹ ũ`.

Neither is in the MEND paper, and both are off by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mend_lightning.errors import ConfigError


@dataclass
class Moments:
    """Second moment of pairs of rows, as sums in float64.

    Attributes:
        count: number of pairs `(u, v)`; products: `[width, width]` sum of `(u vᵀ + v uᵀ) / 2`.
    """

    count: Tensor
    products: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Moments:
        zeros = torch.zeros(width + 1, width, dtype=torch.float64, device=device)
        return cls(zeros[0, 0].clone(), zeros[1:])

    def add(self, u: Tensor, v: Tensor | None = None) -> None:
        """Takes in rows `u` `[tokens, width]`, each with itself or with its row of `v`."""
        # The product in the rows' own precision: float64 matrix products are slow, single batches small.
        products = u.T @ (u if v is None else v)
        self.count += u.shape[0]
        self.products += products if v is None else (products + products.T) / 2

    def mean(self) -> Tensor:
        """`[width, width]`, of at least one pair."""
        return self.products / self.count


@dataclass
class InputMoments:
    """Moments of a layer's inputs.

    Attributes:
        total: `[width]` float64, sum over all tokens.
        all: of all tokens.
        answers: of the tokens at which an answer is predicted; there are none in an encoder.
        paired, pairs: of an edit's and a rephrase's inputs at the same token of the answer: each with itself, and
            one with the other. None where no regression on rephrases is wanted.
    """

    total: Tensor
    all: Moments
    answers: Moments
    paired: Moments | None = None
    pairs: Moments | None = None

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu", pairs: bool = True) -> InputMoments:
        """Moments of nothing; `pairs` says whether rephrases will be paired (two more matrices)."""
        total = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(total, *(Moments.empty(width, device) for _ in range(4 if pairs else 2)))

    def add(self, u: Tensor) -> None:
        """Takes in inputs `u` `[tokens, width]` at any token."""
        self.total += u.sum(0)
        self.all.add(u)

    def add_pairs(self, u: Tensor, rephrased: Tensor) -> None:
        """Takes in inputs `[tokens, width]` of edits and of their rephrases, token by token of the answer, where wanted."""
        if self.paired is None or self.pairs is None:
            return
        self.paired.add(u)
        self.paired.add(rephrased)
        self.pairs.add(u, rephrased)

    def second(self) -> Tensor:
        """`A` `[width, width]`: the tokens that decide an answer count as much as all tokens together."""
        return (self.all.mean() + self.answers.mean()) / 2 if bool(self.answers.count) else self.all.mean()

    def all_reduce(self) -> None:
        """Sums over all processes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [part for part in (self.all, self.answers, self.paired, self.pairs) if part is not None]
            for tensor in (self.total, *(t for part in parts for t in (part.count, part.products))):
                torch.distributed.all_reduce(tensor)


class InputPreconditioner(nn.Module):
    """Multiplies rows by `s (A + λ tr(A)/d · 1)⁻¹ C (B + ρ tr(B)/d · 1)⁻¹`, fixed once it is calibrated.

    The scale s keeps the edit's mean effect on its own inputs what it is without preconditioning, so edit rates
    mean the same with and without.

    Args:
        width: d_in of the layer.
        damping: λ; larger is closer to no preconditioning.
        keep_inverse: keep `(A + …)⁻¹` by itself as well, for constraints (`InputPreconditioner.inverse`): twice the memory.
        rephrase_ridge: ρ, the ridge of the regression `C B⁻¹` on rephrases; None leaves `C B⁻¹` out. It is left out as well
            where no token of a rephrase corresponds to one of the edit (encoders).

    Example:
        >>> moments = InputMoments.empty(2)
        >>> moments.add(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.1], [0.0, -0.1]]))
        >>> preconditioner = InputPreconditioner(2, damping=1e-3)
        >>> preconditioner.calibrate(moments)
        >>> common, rare = preconditioner(torch.eye(2)).diagonal().tolist()
        >>> rare > 50 * common
        True
    """

    matrix: Tensor
    calibrated: Tensor
    inverse: Tensor | None

    def __init__(
        self, width: int, damping: float, rephrase_ridge: float | None = None, keep_inverse: bool = False
    ) -> None:
        super().__init__()
        _check_positive("precondition is the damping of an inverse", damping)
        if rephrase_ridge is not None:
            _check_positive("rephrase_ridge is the ridge of a regression", rephrase_ridge)
        self.damping, self.rephrase_ridge = damping, rephrase_ridge
        self.register_buffer("matrix", torch.eye(width))
        self.register_buffer("inverse", torch.eye(width) if keep_inverse else None)
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        # Asked in every step, and of the device only until it is true.
        self._ready = False

    @property
    def ready(self) -> bool:
        """Whether the matrix is calibrated; on the meta device, where memory is planned, it counts as if it were."""
        self._ready = self._ready or self.calibrated.is_meta or bool(self.calibrated)
        return self._ready

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ready = False
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def calibrate(self, moments: InputMoments) -> None:
        """Sets the matrix from the moments of a sample of inputs."""
        if not bool(moments.all.count >= 1):
            raise ConfigError("No input to estimate the preconditioning from: the calibration batches hold no token.")
        matrix = _damped_inverse(moments.second(), self.damping)
        if self.inverse is not None:
            # Up to a factor; in float32 the entries of an inverse of tiny moments would be too large.
            self.inverse.copy_(matrix / matrix.diagonal().mean())
        paired, pairs = moments.paired, moments.pairs
        if self.rephrase_ridge is not None and paired is not None and pairs is not None and bool(pairs.count):
            # Rows are multiplied from the left: the transpose of A⁻¹ C B⁻¹, whose three parts are symmetric.
            matrix = _damped_inverse(paired.mean(), self.rephrase_ridge) @ pairs.mean() @ matrix
        second, mean = moments.all.mean(), moments.total / moments.all.count
        spread = (second.diagonal() - mean.square()).clamp(min=0).sqrt()
        # E[norm(u) · u] over E[v · u]: the effect of an edit on its own inputs, without and with.
        self.matrix.copy_(spread.sum() / (matrix * second).sum() * matrix)
        self.calibrated.fill_(True)

    def forward(self, rows: Tensor) -> Tensor:
        """Preconditions `rows` `[n, width]` in the units of the layer's inputs."""
        return rows @ self.matrix


def _damped_inverse(second: Tensor, damping: float) -> Tensor:
    ridge = damping * second.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.inv(second + ridge * torch.eye(len(second), dtype=second.dtype, device=second.device))


def _check_positive(what: str, value: float) -> None:
    if value <= 0:
        raise ConfigError(f"{what} and must be positive, not {value}.")
