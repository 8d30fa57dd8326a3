"""What a training step takes beside weights and optimiser: the step is run without numbers, on torch's meta device.

The same blocks, hooks, transforms and losses run as in `step.edit_step`; only what depends on the data (which positions
have a label, which tokens are kept) is given as counts. What is alive when most is alive, is counted by phase:

    trunk            hidden states below the edited blocks, kept for replay
    inner pass       the edits' factors u and delta, float32
    transforms       what the editor's backward pass needs: per layer of the network about tokens x (rank + 4 width) x 4 bytes
    edited pass      what the backward pass through the edited blocks needs, and each row's low-rank delta
    logits           positions x vocabulary: as computed, float32 copies, and their gradient
    backward         gradients on their way down
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mend_lightning.capture import record_factors
from mend_lightning.delta import LowRankDelta, pack_tasks
from mend_lightning.editors.editor import Editor
from mend_lightning.editors.mend import MendEditor
from mend_lightning.forward import output_head, without_cache
from mend_lightning.layers import find_stacks
from mend_lightning.live_bytes import FusedAttention, LiveBytes
from mend_lightning.losses import token_kl, token_nll
from mend_lightning.parts import known_loss
from mend_lightning.trunk import TrunkOutputs, record_trunk, replayed
from mend_lightning.types import Factors

TRUNK, INNER, TRANSFORMS, EDITED, LOGITS, BACKWARD = (
    "trunk", "inner pass", "transforms", "edited pass", "logits", "backward",
)  # fmt: skip
PHASES = (TRUNK, INNER, TRANSFORMS, EDITED, LOGITS, BACKWARD)


@dataclass(frozen=True)
class RowCounts:
    """Size of one of a batch's three sets of rows.

    Attributes:
        rows: their number.
        length: input tokens of the longest row; the encoder's, where there is one.
        tokens: input tokens of all rows, padding left out.
        decoder_length: the same of a decoder with an encoder, else 0.
        labels: positions with a label, of all rows.
    """

    rows: int
    length: int
    tokens: int
    labels: int
    decoder_length: int = 0

    def share(self, tasks: int, of: int) -> RowCounts:
        """What `tasks` out of `of` have of it, rounded up."""
        rows, tokens, labels = (-(-size * tasks // of) for size in (self.rows, self.tokens, self.labels))
        return replace(self, rows=rows, tokens=tokens, labels=labels)


@dataclass(frozen=True)
class BatchCounts:
    """Size of a training batch.

    Attributes:
        tasks: independent edits (or sets of edits made at once).
        z_edit, x_in, x_out: its rows.
        locality: positions that the locality loss looks at.
    """

    tasks: int
    z_edit: RowCounts
    x_in: RowCounts
    x_out: RowCounts
    locality: int

    def part(self, tasks: int) -> BatchCounts:
        """The size of a part of the batch, of so many tasks.

        Example:
            >>> rows = RowCounts(4, 5, 18, 9)
            >>> BatchCounts(4, rows, rows, rows, 10).part(1).x_in
            RowCounts(rows=1, length=5, tokens=5, labels=3, decoder_length=0)
        """
        sets = (rows.share(tasks, self.tasks) for rows in (self.z_edit, self.x_in, self.x_out))
        return BatchCounts(tasks, *sets, -(-self.locality * tasks // self.tasks))


def step_bytes(
    model: nn.Module, editor: Editor, batch: BatchCounts, tasks_at_once: int | None = None
) -> dict[str, int]:
    """Bytes of one training step's activations and temporaries when most is alive, by phase.

    Args:
        model: a model without weights (`empty_model`), frozen.
        editor: an editor of it, on the meta device too, in training mode. Of editors other than MEND only the plain
            descent along the factors is counted, not what is special about them.
        batch: its size.
        tasks_at_once: see `MendModule`.

    Returns:
        phase -> bytes. The editor's gradient is not among them: it is as large as the editor, and is counted there.
    """
    gradient = sum(parameter.numel() * parameter.element_size() for parameter in editor.parameters())
    with torch.enable_grad(), FusedAttention(), LiveBytes() as live:
        loss = _forward(model, editor, batch, min(tasks_at_once or batch.tasks, batch.tasks), live)
        forward = live.peak, dict(live.parts)
        live.phase = BACKWARD
        live.reset_peak()
        loss.backward()
        del loss
    editor.zero_grad()
    # Lightning frees the last step's gradient after the forward pass: the new one takes its place in the backward pass.
    peak, parts = max(forward, (live.peak - gradient, live.parts), key=lambda found: found[0])
    if parts is live.parts:
        parts = {**parts, BACKWARD: parts.get(BACKWARD, 0) - gradient}
    return {phase: parts.get(phase, 0) for phase in PHASES}


def _forward(model: nn.Module, editor: Editor, batch: BatchCounts, at_once: int, live: LiveBytes) -> Tensor:
    """`edit_step` up to the loss, or `edit_step_in_parts`: of its parts, which are alike, one."""
    layers = editor.modules_in(model)
    factors = _factors(model, layers, batch, live)
    live.phase = TRANSFORMS
    deltas = _deltas(editor, factors, batch.tasks)
    if at_once == batch.tasks:
        return _outer(model, layers, batch, deltas, live)
    tensors, shape = tree_flatten(deltas)
    gradients = [torch.empty_like(tensor) for tensor in tensors]
    leaves = [tensor[:at_once].detach().requires_grad_() for tensor in tensors]
    loss = _outer(model, layers, batch.part(at_once), tree_unflatten(leaves, shape), live)
    live.phase = BACKWARD
    torch.autograd.grad(loss, leaves)
    return known_loss(loss.detach(), gradients, tensors)


def _outer(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: BatchCounts,
    deltas: Mapping[str, LowRankDelta],
    live: LiveBytes,
) -> Tensor:
    """The outer losses of a batch's edits, or of a part of them."""
    rows, count = _joined(batch.x_out, batch.x_in), batch.x_out.rows
    trunk = _trunk(model, layers, rows, live)
    live.phase = EDITED
    with replayed(trunk, slice(0, count)), torch.no_grad():
        unedited = _logits(model, _inputs(model, rows, count), batch.locality, live)
    live.phase = EDITED
    with replayed(trunk, slice(None)), _applied(layers, deltas, rows.rows):
        logits = _logits(model, _inputs(model, rows), batch.locality + batch.x_in.labels, live)
    out, edited = logits.split([batch.locality, batch.x_in.labels])
    return token_kl(unedited, out).mean() + token_nll(edited, _targets(edited)).mean()


def _factors(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: BatchCounts, live: LiveBytes
) -> dict[str, Factors]:
    """`edit_factors`: the edits' own pass down to the first edited layer."""
    rows = batch.z_edit
    trunk = _trunk(model, layers, rows, live)
    live.phase = INNER
    with replayed(trunk, slice(None)), record_factors(layers) as tape:
        logits = _logits(model, _inputs(model, rows), rows.labels, live)
        live.phase = INNER
        raw = tape.gradients(token_nll(logits, _targets(logits)).sum())
    kept = kept_tokens(model, layers, rows)
    return {name: _kept(*raw.pop(name), kept[name], batch.tasks) for name in list(raw)}


def kept_tokens(model: nn.Module, layers: Mapping[str, nn.Module], rows: RowCounts) -> dict[str, int]:
    """How many of the edits' tokens make factors in each layer.

    All real tokens; in the last block of all, where only positions with a label have a gradient, the labels. In a
    decoder behind an encoder a row has about as many tokens as labels.
    """
    stacks = find_stacks(model)
    last_name, last_stack = list(stacks.items())[-1]
    ends = set(last_stack[-1].modules())
    found = {}
    for name, layer in layers.items():
        decoding = rows.decoder_length and name.startswith(f"{last_name}.")
        found[name] = rows.labels if decoding or layer in ends else rows.tokens
    return found


def _kept(u: Tensor, delta: Tensor, count: int, tasks: int) -> Factors:
    """`kept_factors` with the first `count` tokens."""
    u, delta = (x.reshape(-1, x.shape[-1]) for x in (u, delta))
    (u != 0).any(-1) & (delta != 0).any(-1)
    index = torch.empty(min(count, u.shape[0]), dtype=torch.long, device=u.device)
    return Factors(u[index].float(), delta[index].float(), torch.empty_like(index), tasks)


def _deltas(editor: Editor, factors: Mapping[str, Factors], tasks: int) -> dict[str, LowRankDelta]:
    """`MendEditor.forward`, with equally many tokens of every task."""
    if isinstance(editor, MendEditor):
        made = editor._transform(factors)
        editor._precondition(made)
    else:
        made = {name: (each.u, each.delta) for name, each in factors.items()}
    rates = dict(editor.named_parameters()).get("edit_rates")
    deltas = {}
    for i, (name, (u, delta)) in enumerate(made.items()):
        rank = -(-u.shape[0] // tasks)
        place = (factors[name].task, tasks, rank, torch.empty_like(factors[name].task))
        rate = torch.ones((), device=u.device, requires_grad=True) if rates is None else rates[i]
        deltas[name] = LowRankDelta(pack_tasks(u, *place), pack_tasks(-rate * delta, *place))
    return deltas


@contextmanager
def _applied(layers: Mapping[str, nn.Module], deltas: Mapping[str, LowRankDelta], rows: int) -> Iterator[None]:
    """`delta.applied`, whose autocast torch does not have on the meta device."""

    def adder(delta: LowRankDelta):
        index = torch.empty(rows, dtype=torch.long, device=delta.down.device)
        return lambda module, args, output: output + delta.output(args[0], index).to(output.dtype)

    handles = [layers[name].register_forward_hook(adder(delta)) for name, delta in deltas.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trunk(model: nn.Module, layers: Mapping[str, nn.Module], rows: RowCounts, live: LiveBytes) -> TrunkOutputs:
    live.phase = TRUNK
    return record_trunk(lambda: model(**_inputs(model, rows)), rows.rows, find_stacks(model), layers)


def _joined(first: RowCounts, second: RowCounts) -> RowCounts:
    return RowCounts(
        first.rows + second.rows, max(first.length, second.length), first.tokens + second.tokens,
        first.labels + second.labels, max(first.decoder_length, second.decoder_length),
    )  # fmt: skip


def _inputs(model: nn.Module, rows: RowCounts, count: int | None = None) -> dict[str, Any]:
    shapes = {"input_ids": rows.length, "attention_mask": rows.length}
    if rows.decoder_length:
        shapes |= {"decoder_input_ids": rows.decoder_length, "decoder_attention_mask": rows.decoder_length}
    device, count = next(model.parameters()).device, rows.rows if count is None else count
    inputs = {name: torch.empty(count, length, dtype=torch.long, device=device) for name, length in shapes.items()}
    return inputs | without_cache(model)


def _logits(model: nn.Module, inputs: dict[str, Any], positions: int, live: LiveBytes) -> Tensor:
    """`logits_at` the first `positions`; a classifier's are one a row."""

    def gather(module: nn.Module, args: tuple) -> tuple:
        live.phase = LOGITS
        states = args[0].reshape(-1, args[0].shape[-1])
        return states[torch.arange(min(positions, states.shape[0]), device=states.device)], *args[1:]

    head = output_head(model)
    if head is None:
        return model(**inputs).logits
    handle = head.register_forward_pre_hook(gather)
    try:
        return model(**inputs).logits
    finally:
        handle.remove()


def _targets(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.long, device=logits.device)
