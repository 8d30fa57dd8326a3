"""What is lost where an edit is stored in a dtype of few digits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mend_lightning.errors import NoEffectWarning, RoundingWarning

# From here on a layer's rounding is worth a warning: this part of ΔW (Frobenius) is not what was stored.
MUCH_LOST = 0.25


@dataclass(frozen=True)
class LayerRounding:
    """What storing `W + ΔW` in the base's dtype did to one layer.

    Attributes:
        entries: of the weight.
        changed: how many of them ΔW changes (is not 0 at).
        lost: how many of those are stored as they were in the base.
        relative_error: ‖stored − (W + ΔW)‖ / ‖ΔW‖ (Frobenius); 0 where ΔW is 0.
    """

    entries: int
    changed: int
    lost: int
    relative_error: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        layers: layer name -> LayerRounding.
        dtype: that the edited weights are stored in.
        folder: where the model was written; None if it was not.
    """

    layers: dict[str, LayerRounding]
    dtype: str
    folder: Path | None = None

    @property
    def lost(self) -> float:
        """Share of the entries that ΔW changes which are stored as they were."""
        changed = sum(layer.changed for layer in self.layers.values())
        return sum(layer.lost for layer in self.layers.values()) / changed if changed else 0.0

    def warn(self) -> None:
        """Warns of a layer of whose change much is not what was stored, and of edits that change nothing."""
        if not any(layer.changed for layer in self.layers.values()):
            warnings.warn("The edits change nothing: every ΔW is zero.", NoEffectWarning, stacklevel=3)
        name, worst = max(self.layers.items(), key=lambda item: item[1].relative_error)
        if worst.relative_error > MUCH_LOST:
            warnings.warn(
                f"Much of the edit is lost in {self.dtype}: of {name} {100 * worst.relative_error:.0f} % of ΔW (Frobenius) "
                f"is rounding, and {100 * self.lost:.0f} % of all changed entries are stored as they were. Ask the merged "
                "model; float32 keeps the edit.",
                RoundingWarning,
                stacklevel=3,
            )


def layer_rounding(base: Tensor, change: Tensor, exact: Tensor, stored: Tensor) -> LayerRounding:
    """Compares what was stored with `exact = base + change`, all of one shape.

    Example:
        >>> import torch
        >>> base, change = torch.ones(2).bfloat16(), torch.tensor([1e-4, 1.0])
        >>> layer_rounding(base, change, base + change, (base + change).bfloat16())
        LayerRounding(entries=2, changed=2, lost=1, relative_error=0.0001000165...)
    """
    changed = change != 0
    size = float(change.norm())
    error = float((stored.to(exact.dtype) - exact).norm()) / size if size else 0.0
    return LayerRounding(change.numel(), int(changed.sum()), int((changed & (stored == base)).sum()), error)
