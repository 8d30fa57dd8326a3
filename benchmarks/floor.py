"""The floor: a step's tensors through bare torch. What a step costs beyond it is ours to explain.

One trunk pass over all tokens, forward and backward of the edited blocks, the head at the positions that are needed, the
transforms' own matrix products, and Adam: no hook and no module of ours. Left out is what is neither: normalising factors, clamps,
scales and shifts of the transforms, running statistics, losses by task, the search for layers and tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.blocks import plain, recorded_calls, run_block
from mend_lightning.data.batch import EditBatch
from mend_lightning.editors import MendEditor
from mend_lightning.models.inputs.rows import Rows

Calls = dict[nn.Module, tuple[Tensor, dict]]


@dataclass
class EditedLinear:
    """Calls an MLP's linear layers: notes what edited ones read and give out, or adds each row's `ΔW` to them.

    Attributes:
        names: edited layer -> its name.
        down, up: name -> `[rows, rank, d_in]`, `[rows, rank, d_out]`; without, layers are noted.
        u, outputs: name -> what the layer read, and what it gave out.
    """

    names: dict[nn.Module, str]
    down: dict[str, Tensor] = field(default_factory=dict)
    up: dict[str, Tensor] = field(default_factory=dict)
    u: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        output, name = layer(x), self.names.get(layer)
        if name is None:
            return output
        if name in self.down:
            product = torch.bmm(torch.bmm(x.float(), self.down[name].mT), self.up[name])
            return output + product.to(output.dtype)
        self.u[name] = x.detach()
        self.outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
        return self.outputs[name]


class Floor:
    """A step of MEND on one batch, whose rows are equally long; everything but arithmetic is done when it is built."""

    def __init__(self, model: nn.Module, editor: MendEditor, batch: EditBatch, c_edit: float) -> None:
        self.model, self.editor, self.batch, self.c_edit = model, editor, batch, c_edit
        modules = dict(model.named_modules())
        self.names = {modules[name]: name for name in editor.layers}
        self.encoder, self.decoder = _stacks(model)
        rows = {"edit": batch.z_edit.inputs, "out": batch.x_out.inputs, "rephrase": batch.x_in.inputs}
        rows["outer"] = _joined(batch.x_out, batch.x_in)
        rows["all"] = _joined(batch.z_edit, batch.x_out, batch.x_in)
        self.calls = {name: recorded_calls(model, inputs) for name, inputs in rows.items()}
        stack = self.encoder or self.decoder
        self.edited_from = next(i for i, block in enumerate(stack) if any(m in self.names for m in block.modules()))
        self.places = [where.row * rows.labels.shape[1] + where.column for rows, where in _positions(batch)]
        self.targets = [where.take(rows.labels) for rows, where in _positions(batch)]
        self.kept = self._kept_tokens()

    def step(self) -> Tensor:
        """Losses of a step, backward included; the gradients are the editor's."""
        trunk, edits = self._trunk(), len(self.batch.z_edit)
        factors = self._factors(trunk[:edits])
        down, up = self._transformed(factors, copies=2)
        at_out, at_in = self.places[1], self.places[2]
        out = len(self.batch.x_out)
        with torch.no_grad():
            unedited = self._logits(self._top(trunk[edits : edits + out], "out", plain), at_out)
        h = self._top(trunk[edits:], "outer", EditedLinear(self.names, down, up))
        logits = self._logits(h, torch.cat([at_out, at_in + out * h.shape[1]]))
        edited, answers = logits.split([len(at_out), len(at_in)])
        kl = F.kl_div(_log_p(edited), _log_p(unedited), log_target=True, reduction="none").sum(-1).mean()
        loss = self.c_edit * F.cross_entropy(answers.float(), self.targets[2]) + kl
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def apply(self) -> Tensor:
        """An edit, and the edited model's logits on the rephrase."""
        with torch.enable_grad():
            factors = self._factors(self._trunk_of("edit"))
        down, up = self._transformed(factors, copies=1)
        h = self._top(self._trunk_of("rephrase"), "rephrase", EditedLinear(self.names, down, up))
        return self.model.get_output_embeddings()(h)

    def inner_loss(self) -> Tensor:
        """The edits' loss before the edit, as a check: ours is the same."""
        edits = len(self.batch.z_edit)
        with torch.no_grad():
            logits = self._logits(self._top(self._trunk()[:edits], "edit", plain), self.places[0])
            return F.cross_entropy(logits.float(), self.targets[0])

    @torch.no_grad()
    def _trunk(self) -> Tensor:
        return self._trunk_of("all")

    def _trunk_of(self, rows: str) -> Tensor:
        stack, calls = self.encoder or self.decoder, self.calls[rows]
        h = calls[stack[0]][0]
        for block in stack[: self.edited_from]:
            h = run_block(block, h, plain, calls[block][1])
        return h

    def _top(self, h: Tensor, rows: str, linear) -> Tensor:
        """From the trunk's output to what the head reads, of the last stack."""
        calls = self.calls[rows]
        for block in (self.encoder or self.decoder)[self.edited_from :]:
            h = run_block(block, h, linear, calls[block][1])
        if not self.encoder:
            return _final_norm(self.model.base_model)(h)
        read, h = self.model.encoder.final_layer_norm(h), calls[self.decoder[0]][0]
        for block in self.decoder:
            h = run_block(block, h, linear, {**calls[block][1], "encoder_hidden_states": read})
        h = self.model.decoder.final_layer_norm(h)
        return h * self.model.model_dim**-0.5 if self.model.config.scale_decoder_outputs else h

    def _logits(self, h: Tensor, places: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(h.flatten(0, 1).index_select(0, places))

    def _factors(self, trunk: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        noted = EditedLinear(self.names)
        loss = F.cross_entropy(self._logits(self._top(trunk, "edit", noted), self.places[0]).float(), self.targets[0])
        # The sum over the edits of each one's mean, all with equally many label tokens.
        deltas = torch.autograd.grad(loss * self.batch.tasks, list(noted.outputs.values()))
        return {name: (noted.u[name], delta) for name, delta in zip(noted.outputs, deltas)}

    def _transformed(
        self, factors: dict[str, tuple[Tensor, Tensor]], copies: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """name -> factors of the edits' ΔW, `copies` times: for the rows of `x_out`, then of `x_in`."""
        down, up = {}, {}
        rates = dict(zip(self.editor.layers, self.editor.edit_rates))
        for transform, group in zip(self.editor.transforms, self.editor.groups):
            pairs = [[x.flatten(0, 1).index_select(0, self.kept[n]).float() for x in factors[n]] for n in group]
            h = torch.cat([torch.cat(pair, -1) for pair in pairs])
            for layer in transform.nets["combined"].layers:
                h = h + F.linear(h @ layer.v.T, layer.u, layer.bias)
            for name, rows in zip(group, h.split([len(pair[0]) for pair in pairs])):
                # Every edit has equally many tokens here.
                u, delta = rows.unflatten(0, (self.batch.tasks, -1)).split([transform.d_in, transform.d_out], -1)
                down[name], up[name] = (x.repeat(copies, 1, 1) for x in (u, -rates[name] * delta))
        return down, up

    def _kept_tokens(self) -> dict[str, Tensor]:
        """The tokens of each layer whose gradient is not zero: found out beforehand, and equally many in every edit."""
        factors = self._factors(self._trunk()[: len(self.batch.z_edit)])
        return {name: (delta != 0).any(-1).flatten().nonzero()[:, 0] for name, (_, delta) in factors.items()}


def _log_p(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), -1)


def _joined(*rows: Rows) -> dict[str, Tensor]:
    return {name: torch.cat([each.inputs[name] for each in rows]) for name in rows[0].inputs}


def _positions(batch: EditBatch) -> Iterable:
    return [
        (batch.z_edit, batch.z_edit.label_positions), (batch.x_out, batch.x_out.attended_positions),
        (batch.x_in, batch.x_in.label_positions),
    ]  # fmt: skip


def _stacks(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Blocks of the encoder (none in a causal model) and of the decoder."""
    if model.config.is_encoder_decoder:
        return list(model.encoder.block), list(model.decoder.block)
    backbone = model.base_model
    return [], list(backbone.h if hasattr(backbone, "h") else backbone.layers)


def _final_norm(backbone: nn.Module) -> nn.Module:
    return backbone.ln_f if hasattr(backbone, "ln_f") else backbone.norm
