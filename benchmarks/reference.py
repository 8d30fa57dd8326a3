"""MEND as the original computes it: one edit at a time, dense weight updates, every forward through the whole model.

This is what a user would write after the paper. It shares an editor's *parameters* with the package (the same
tensors, so the losses can be compared and one start serves both) and nothing else of it: no factor capture, no
low-rank hooks, no trunk replay, no task dimension.

What differs on purpose: this updates the running statistics edit after edit, the package with all edits of a
batch before it normalises any of them. So losses are compared with the statistics frozen, after both have seen the
same tokens (their order does not matter then); times are taken in training mode.

The edit's own backward pass reaches every weight of the model, as the original's `loss.backward()` does: it never switches
`requires_grad` off, and throws all gradients away but what its hooks caught. `all_gradients=False` is a leaner reference
that computes the edited weights' gradients alone. The outer backward pass is lean either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors import MendEditor
from mend_lightning.models.inputs.rows import Rows

EPSILON = 1e-7


class RunningStatistics:
    """Mean and standard deviation of every row seen so far (Welford's, several rows at once)."""

    def __init__(self, width: int) -> None:
        self.count, self.mean, self.m2 = 0, torch.zeros(width), torch.zeros(width)

    def update(self, rows: Tensor) -> None:
        """Takes in `rows` `[n, width]`."""
        if not len(rows):
            return
        total = self.count + len(rows)
        difference = rows.mean(0) - self.mean
        deviations = (rows - rows.mean(0)).square().sum(0)
        self.m2 = self.m2 + deviations + difference.square() * (self.count * len(rows) / total)
        self.mean = self.mean + difference * (len(rows) / total)
        self.count = total

    def normalize(self, rows: Tensor) -> Tensor:
        """`(rows - mean) / std`; a unit that never varied is only centred, as in the package."""
        if self.count < 2:
            return rows
        std = (self.m2 / (self.count - 1)).sqrt()
        return (rows - self.mean) / torch.where(std > 0, std + EPSILON, torch.ones_like(std))


@dataclass(frozen=True)
class Losses:
    """Of every edit: `[edits]` each."""

    edit: Tensor
    locality: Tensor
    inner: Tensor


class ReferenceMend:
    """The original algorithm over the parameters of a `MendEditor` (combined networks, shared by shape).

    Args:
        model: the frozen base model.
        editor: whose parameters are used and, in `step`, get gradients.
        c_edit: weight of the edit loss.
        all_gradients: whether the edit's backward pass computes the gradients of all weights, as in the original, or
            of the edited layers' only.
    """

    def __init__(self, model: nn.Module, editor: MendEditor, c_edit: float = 0.1, all_gradients: bool = True) -> None:
        self.model, self.editor, self.c_edit = model, editor, c_edit
        modules = dict(model.named_modules())
        self.layers = {name: modules[name] for name in editor.layers}
        self.trainable = list(model.parameters()) if all_gradients else [x.weight for x in self.layers.values()]
        self.networks, self.statistics = {}, {}
        for transform, group in zip(editor.transforms, editor.groups):
            statistics = RunningStatistics(transform.d_in), RunningStatistics(transform.d_out)
            for mode, name in enumerate(group):
                self.networks[name] = transform.nets["combined"].layers, mode
                self.statistics[name] = statistics

    def step(self, batch: EditBatch, training: bool = True, backward: bool = True) -> Losses:
        """One meta-learning step, edit after edit; gradients add up to those of the mean over edits.

        Args:
            batch: one row of each kind for every edit.
            training: whether the statistics are updated.
            backward: whether the editor's parameters get gradients.
        """
        found = [self._step_of(batch, index, training, backward) for index in range(batch.tasks)]
        return Losses(*(torch.stack(values) for values in zip(*found)))

    def _step_of(self, batch: EditBatch, index: int, training: bool, backward: bool) -> tuple[Tensor, Tensor, Tensor]:
        x_out, mask = row_inputs(batch.x_out, index)
        weights, inner = self.edited_weights(batch.z_edit, index, training)
        with torch.no_grad():
            base_logits = self.model(**x_out).logits
        edited = functional_call(self.model, weights, kwargs=row_inputs(batch.x_in, index)[0]).logits
        edit = nll(edited, batch.x_in.labels[index : index + 1])
        locality = kl(base_logits, functional_call(self.model, weights, kwargs=x_out).logits, mask)
        if backward:
            ((self.c_edit * edit + locality) / batch.tasks).backward()
        return edit.detach(), locality.detach(), inner

    def edited_weights(self, z_edit: Rows, index: int, training: bool) -> tuple[dict[str, Tensor], Tensor]:
        """`W + ΔW` of every edited layer by the name of its weight, and the inner loss."""
        factors, inner = self._factors(z_edit, index)
        weights = {}
        for name, rate in zip(self.layers, self.editor.edit_rates):
            u, delta = self._transformed(name, *factors[name], training)
            layer = self.layers[name]
            update = (-rate * (delta.T @ u)).to(layer.weight.dtype)
            weights[f"{name}.weight"] = layer.weight + (update.T if isinstance(layer, Conv1D) else update)
        return weights, inner

    def _factors(self, z_edit: Rows, index: int) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """(x, δ) of every layer at the tokens where neither is all zero, and the inner loss."""
        with self._watched() as (inputs, deltas), torch.enable_grad():
            logits = self.model(**row_inputs(z_edit, index)[0]).logits
            loss = nll(logits, z_edit.labels[index : index + 1])
            # As in the original, this computes the gradients of weights too, which nobody reads.
            loss.backward()
        factors = {}
        for name in self.layers:
            u, delta = inputs[name].flatten(0, 1), deltas[name].flatten(0, 1)
            kept = (u != 0).any(-1) & (delta != 0).any(-1)
            factors[name] = u[kept].float(), delta[kept].float()
        return factors, loss.detach()

    @contextmanager
    def _watched(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Keeps the layers' inputs and the gradients at their outputs while the weights are trainable."""
        inputs, deltas, handles = {}, {}, []

        def watch(name: str):
            def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
                inputs[name] = args[0].detach()
                output.register_hook(lambda gradient: deltas.__setitem__(name, gradient))

            return keep

        try:
            for weight in self.trainable:
                weight.requires_grad_(True)
            for name, layer in self.layers.items():
                handles.append(layer.register_forward_hook(watch(name)))
            yield inputs, deltas
        finally:
            for handle in handles:
                handle.remove()
            for weight in self.trainable:
                weight.requires_grad_(False).grad = None

    def _transformed(self, name: str, u: Tensor, delta: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        u_statistics, delta_statistics = self.statistics[name]
        if training:
            u_statistics.update(u)
            delta_statistics.update(delta)
        h = torch.cat([u_statistics.normalize(u), delta_statistics.normalize(delta)], -1)
        layers, mode = self.networks[name]
        for layer in layers:
            z = (h @ layer.v.T) @ layer.u.T + layer.bias
            h = h + (layer.scale[mode] * z + layer.shift[mode]).clamp(min=0)
        return h[:, : u.shape[1]], h[:, u.shape[1] :]


def row_inputs(rows: Rows, index: int) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs of one row, and the mask of the positions its logits belong to."""
    inputs = {name: value[index : index + 1] for name, value in rows.inputs.items()}
    return inputs, inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the label tokens."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def kl(base_logits: Tensor, edited_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(base ‖ edited), the mean over real positions."""
    log_p, log_q = F.log_softmax(base_logits.float(), -1), F.log_softmax(edited_logits.float(), -1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum() / mask.sum()
