"""The networks that turn normalised gradient factors into edit factors (MEND, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mend_lightning.editors.normalizer import RunningNormalizer

Init = Literal["identity", "xavier"]
Inputs = Literal["combined", "separate", "u", "delta", "smaller"]


class LowRankLayer(nn.Module):
    """`h + max(0, s ⊙ (U V h + b) + o)`; the scale s and offset o are each edited layer's own.

    Deviations from the paper, as in the original code: every layer is clamped, the last one too, and
    `V ~ N(0, 1)` unscaled. The clamp is `clamp(min=0)` and not `relu`: at the identity start all is
    exactly 0, where relu's gradient is 0 and training would never leave the start.

    Args:
        width: of the input and output.
        rank: of `U V`; cut to width.
        modes: number of edited layers that share `U V`; 0 leaves out s and o.
        init: "identity" (U = 0: the layer starts as h -> h) or "xavier" (no residual branch).
    """

    def __init__(self, width: int, rank: int, modes: int, init: Init) -> None:
        super().__init__()
        rank = min(rank, width)
        self.residual = init == "identity"
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.v = nn.Parameter(torch.randn(rank, width))
        self.bias = nn.Parameter(torch.zeros(width))
        if init == "xavier":
            nn.init.xavier_uniform_(self.u)
            nn.init.xavier_uniform_(self.v)
        self.scale = nn.Parameter(torch.ones(modes, width)) if modes else None
        self.shift = nn.Parameter(torch.zeros(modes, width)) if modes else None

    def forward(self, h: Tensor, mode: Tensor) -> Tensor:
        """Transforms rows `h` `[n, width]` of the edited layers `mode` `[n]`."""
        z = nn.functional.linear(h @ self.v.T, self.u, self.bias)
        if self.scale is not None and self.shift is not None:
            # repeat_interleave would do for sorted rows; the embedding has a cheaper backward.
            z = z * nn.functional.embedding(mode, self.scale) + nn.functional.embedding(mode, self.shift)
        z = z.clamp(min=0)
        return h + z if self.residual else z


class LowRankMLP(nn.Module):
    """`n_hidden + 1` LowRankLayers, all alike."""

    def __init__(self, width: int, rank: int, n_hidden: int, modes: int, init: Init) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LowRankLayer(width, rank, modes, init) for _ in range(n_hidden + 1))

    def forward(self, h: Tensor, mode: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h, mode)
        return h


class GradientTransform(nn.Module):
    """Transform of all edited layers of one shape: statistics, normalisation, network.

    Args:
        d_in, d_out: the layers' shape.
        modes: how many layers share this transform.
        rank, n_hidden, init: see `LowRankMLP`.
        inputs: what the network sees. "combined": one network on `[u; delta]` (the paper's);
            "separate": one for each; "u" or "delta": only that side; "smaller": only the narrower
            side (delta if d_in > d_out, else u). A side without a network is passed on.
        shared: whether layers have scale and shift of their own.
        normalize: whether the network sees normalised factors (statistics are kept either way).
        constant_units: see `RunningNormalizer`.

    Example:
        >>> transform = GradientTransform(2, 3, modes=1, rank=4)
        >>> u, delta = transform([(torch.rand(5, 2), torch.rand(5, 3))], [0])[0]
        >>> u.shape, delta.shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        modes: int,
        rank: int = 1920,
        n_hidden: int = 1,
        init: Init = "identity",
        inputs: Inputs = "combined",
        shared: bool = True,
        normalize: bool = True,
        constant_units: str = "center",
    ) -> None:
        super().__init__()
        self.d_in, self.d_out, self.normalize = d_in, d_out, normalize
        self.u_stats = RunningNormalizer(d_in, constant_units)
        self.delta_stats = RunningNormalizer(d_out, constant_units)
        widths = network_widths(inputs, d_in, d_out)
        self.nets = nn.ModuleDict(
            {side: LowRankMLP(width, rank, n_hidden, modes if shared else 0, init) for side, width in widths.items()}
        )

    def forward(
        self,
        factors: list[tuple[Tensor, Tensor]],
        modes: list[int],
        kept: Sequence[Tensor | None] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Transforms the factors of several layers of this shape in one pass.

        Args:
            factors: per layer `(u [n, d_in], delta [n, d_out])` float32.
            modes: per layer, its index among those that share this transform.
            kept: per layer, which tokens `[n]` the statistics take in; None: all.

        Returns:
            Per layer `(ũ [n, d_in], δ̃ [n, d_out])`.
        """
        # Statistics are sequential, as in the original: a layer is normalised with what has been seen so far.
        kept = kept or [None] * len(factors)
        prepared = [self._prepare(u, delta, tokens) for (u, delta), tokens in zip(factors, kept)]
        counts = [u.shape[0] for u, _ in prepared]
        u = torch.cat([u for u, _ in prepared])
        delta = torch.cat([delta for _, delta in prepared])
        # Filled on the device: a list of numbers would be sent there, and waited for.
        mode = torch.cat([torch.full((count,), mode, device=u.device) for mode, count in zip(modes, counts)])
        u, delta = self._transform(u, delta, mode)
        return list(zip(u.split(counts), delta.split(counts)))

    def _prepare(self, u: Tensor, delta: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.training:
            self.u_stats.update(u, kept)
            self.delta_stats.update(delta, kept)
        if not self.normalize:
            return u, delta
        return self.u_stats(u), self.delta_stats(delta)

    def _transform(self, u: Tensor, delta: Tensor, mode: Tensor) -> tuple[Tensor, Tensor]:
        if "combined" in self.nets:
            both = self.nets["combined"](torch.cat([u, delta], -1), mode)
            return both[:, : self.d_in], both[:, self.d_in :]
        u = self.nets["u"](u, mode) if "u" in self.nets else u
        delta = self.nets["delta"](delta, mode) if "delta" in self.nets else delta
        return u, delta


def network_widths(inputs: Inputs, d_in: int, d_out: int) -> dict[str, int]:
    smaller = {"delta": d_out} if d_in > d_out else {"u": d_in}
    return {
        "combined": {"combined": d_in + d_out},
        "separate": {"u": d_in, "delta": d_out},
        "u": {"u": d_in},
        "delta": {"delta": d_out},
        "smaller": smaller,
    }[inputs]


def group_layers(layers: Mapping[str, tuple[int, int]], shared: bool) -> list[list[str]]:
    """Layers that share a transform, in order: those of one shape, or each alone.

    Example:
        >>> group_layers({"a": (2, 3), "b": (3, 2), "c": (2, 3)}, shared=True)
        [['a', 'c'], ['b']]
    """
    if not shared:
        return [[name] for name in layers]
    groups: dict[tuple[int, int], list[str]] = {}
    for name, shape in layers.items():
        groups.setdefault(shape, []).append(name)
    return list(groups.values())
