"""ENN's editor: the base is trained so that gradient steps edit it (Sinitsin et al., ICLR 2020).

It follows the re-implementation by MEND's authors (`algs/enn.py`), "the original" below: the inner optimiser is plain
SGD with a learned rate for every layer. Here the base's weights `W` are not touched: what training adds to them, ΔW⁰,
is the editor's.

    pre-edit model  W + ΔW⁰                                    before any edit
    one edit        ΔW = ΔW⁰ − Σ_k α ∇_W L_e(W + ΔW⁰ − …)       k = 1 … steps
    L = c_edit L_edit + KL(pre-edit ‖ edited) + c_base KL(base ‖ pre-edit)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mend_lightning.editors.edited_model import Made
from mend_lightning.editors.editor import Editor
from mend_lightning.editors.factors import Factors, descent, edit_factors
from mend_lightning.edits.deltas import DenseDelta, SumDelta
from mend_lightning.errors import ConfigError
from mend_lightning.models.forward.hooks import Delta
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.forward.trunk import TrunkOutputs
from mend_lightning.models.inputs.rows import Rows


class EnnEditor(Editor):
    """Editable neural networks: ΔW⁰ of every edited layer and the rates of the gradient steps, learned together.

    Edits hold ΔW⁰ and are dense: a saved edit is as large as the layers' weights, and two of them must not be added up.
    Metrics compare edited models with the base as it was given, so drawdown holds what training did to it as well; the
    original measures against the trained model. `Made.inner` is the pre-edit model's loss.

    Memory: ΔW⁰, its gradient and Adam's moments take 16 bytes for each weight of the edited layers, once for all tasks.
    With `first_order=False` the graph of the inner steps is kept until the outer backward pass, attention matrices
    included (fused attention has no second derivative, which also rules out bases loaded with flash attention).

    The original trains every parameter of the model, or those of the last blocks (`no_grad_layers`), and edits some;
    here the edited layers are trained. More `layers` train more.

    Args:
        layers: name -> (d_in, d_out) of the edited layers.
        edit_rate: initial α of every layer (the original's 1e-2; its learning rates: 1e-3 of α, 1e-5 of the model).
        steps: gradient steps of an edit (the original's 1); they share the rates.
        first_order: treat the edit's gradient as a constant in training (FOMAML); False, as in the original, lets the
            meta-gradient flow through it.
        c_base: weight of KL(base ‖ pre-edit) (the original's 1).

    Example:
        >>> editor = EnnEditor({"fc": (2, 3)})
        >>> sorted(name for name, _ in editor.named_parameters())
        ['edit_rates', 'resting.0']
        >>> editor.base_deltas()["fc"].dense().shape
        torch.Size([1, 3, 2])
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[int, int]],
        edit_rate: float = 1e-2,
        steps: int = 1,
        first_order: bool = False,
        c_base: float = 1.0,
    ) -> None:
        super().__init__(layers, edit_rate=edit_rate, steps=steps, first_order=first_order, c_base=c_base)
        if steps < 1:
            raise ConfigError(f"steps is the number of gradient steps of an edit; it must be at least 1, not {steps}.")
        if c_base < 0:
            raise ConfigError(f"c_base is the weight of a loss; it must not be negative, and it is {c_base}.")
        self.steps, self.first_order, self.c_base = steps, first_order, c_base
        self.edit_rates = nn.Parameter(torch.full((len(self.layers),), float(edit_rate)))
        # In the order of `layers`: a parameter's name may not have the dots of a layer's.
        self.resting = nn.ParameterList(torch.zeros(d_out, d_in) for d_in, d_out in self.layers.values())

    def base_deltas(self) -> dict[str, Delta]:
        """name -> ΔW⁰."""
        # A view of a parameter requires grad also where gradients are disabled.
        weights = self.resting if torch.is_grad_enabled() else [weight.detach() for weight in self.resting]
        return {name: DenseDelta(weight[None]) for name, weight in zip(self.layers, weights)}

    def make_deltas(
        self, model: nn.Module, z_edit: Rows, trunk: TrunkOutputs | None = None, x_keep: Rows | None = None
    ) -> Made:
        """ΔW⁰ and `steps` gradient steps of each task on its own edit; see `Editor.make_deltas`.

        Where gradients are enabled and `first_order` is off, the deltas hold the graph of the inner steps.
        """
        layers = self.modules_in(model)
        # The trunk lies below every edited layer, so it does not depend on ΔW⁰.
        trunk = trunk or run_trunk(model, z_edit, layers)
        keep_graph = torch.is_grad_enabled() and not self.first_order
        deltas: dict[str, Delta] = self.base_deltas()
        for step in range(self.steps):
            factors, *measured = edit_factors(model, layers, z_edit, trunk, deltas, keep_graph)
            if step == 0:
                inner, skipped = measured
            deltas = self._stepped(deltas, factors)
        return Made(deltas, inner, skipped)

    def _stepped(self, deltas: Mapping[str, Delta], factors: Mapping[str, Factors]) -> dict[str, Delta]:
        """The deltas after one more gradient step."""
        rates = dict(zip(self.layers, self.edit_rates))
        steps = {name: descent(each.u, each.delta, each, rates[name]) for name, each in factors.items()}
        return {name: SumDelta((delta, steps[name])) for name, delta in deltas.items()}
