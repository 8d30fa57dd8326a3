"""What a training step takes beside weights and optimiser: the step is run without numbers, on torch's meta device.

It is `parts.step_loss` itself that runs, on rows of the counted sizes. They are padded to one length, as accelerators run them;
CPUs run rows of like lengths together and take less. What is alive when most is alive, is counted by phase:

    trunk            hidden states below the edited blocks, kept for replay
    inner pass       the edits' factors u and delta, float32
    transforms       what the editor's backward pass needs: per layer of the network about tokens x (rank + 4 width) x 4 bytes
    confidence       the edited blocks on the edits, once for each scale that is tried; only of editors with `confidence`
    edited pass      what the backward pass through the edited blocks needs, and each row's low-rank delta
    logits           of a few positions at a time (`head.LOGITS_BYTES`), float32 copies, and their gradient; of all positions
                     at once where the model is sharded
    backward         gradients on their way down
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mend_lightning.data.batch import EditBatch
from mend_lightning.editors.edited_model import Made
from mend_lightning.editors.editor import Editor
from mend_lightning.editors.enn import EnnEditor
from mend_lightning.editors.factors import descent, edit_factors
from mend_lightning.editors.gradient_reach import remember_reach
from mend_lightning.editors.inner_steps import grown
from mend_lightning.editors.mend import MendEditor
from mend_lightning.models.forward.head import whole_logits
from mend_lightning.models.forward.logits import output_head, without_cache
from mend_lightning.models.forward.phases import BACKWARD, EDITED, PHASES, TRANSFORMS, TRUNK, phase
from mend_lightning.models.forward.trunk import TrunkOutputs, record_trunk
from mend_lightning.models.inputs.positions import Reach
from mend_lightning.models.inputs.rows import IGNORED_LABEL, Rows
from mend_lightning.models.layers import find_stacks
from mend_lightning.training.memory.live_bytes import FusedAttention, LiveBytes
from mend_lightning.training.step import check_chunks, edit_step, known_loss, outer_losses

# By which the longest of the wordings makes a row longer, about.
WORDING_TOKENS = 12


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


def step_bytes(
    model: nn.Module, editor: Editor, batch: BatchCounts, tasks_at_once: int | None = None, sharded: bool = False
) -> dict[str, int]:
    """Bytes of one training step's activations and temporaries when most is alive, by phase.

    Args:
        model: a model without weights (`empty_model`), frozen.
        editor: an editor of it, on the meta device too, in training mode. Of editors other than MEND and ENN only the plain
            descent along the factors is counted, not what is special about them.
        batch: its size.
        tasks_at_once: see `MendModule`.
        sharded: as a process counts that shares the base with others.

    Returns:
        phase -> bytes. The editor's gradient is not among them: it is as large as the editor, and is counted there.

    Raises:
        ConfigError: the editor cannot take a step in parts.
    """
    gradient = sum(parameter.numel() * parameter.element_size() for parameter in editor.parameters())
    remember_reach(model, assumed_reach(model, editor.modules_in(model)))
    run: Any = editor if isinstance(editor, MendEditor | EnnEditor) else _Descent(editor)
    rows, whole = (
        rows_of(model, worded(batch, editor.wordings)).to("meta"),
        whole_logits(model) if sharded else nullcontext(),
    )
    at_once = min(tasks_at_once or batch.tasks, batch.tasks)
    with _wordings_made(editor), torch.enable_grad(), FusedAttention(), whole, LiveBytes(EDITED) as live:
        loss = _loss(model, run, rows) if at_once == batch.tasks else _loss_in_chunks(model, run, rows, at_once, live)
        forward = live.peak, dict(live.parts)
        live.phase = BACKWARD
        live.reset_peak()
        loss.backward()
        del loss
    editor.zero_grad()
    # Lightning frees the last step's gradient after the forward pass: the new one takes its place in the backward pass.
    _, parts = max(forward, (live.peak - gradient, live.parts), key=lambda found: found[0])
    if parts is live.parts:
        parts = {**parts, BACKWARD: parts.get(BACKWARD, 0) - gradient}
    return {name: parts.get(name, 0) for name in PHASES}


def worded(batch: BatchCounts, wordings: int) -> BatchCounts:
    """The batch with its edits in so many wordings more, each about as much longer as the longest.

    Example:
        >>> rows = RowCounts(2, 20, 30, 4)
        >>> worded(BatchCounts(2, rows, rows, rows, 4), 1).z_edit
        RowCounts(rows=4, length=32, tokens=84, labels=8, decoder_length=0)
    """
    if not wordings:
        return batch
    own, many = batch.z_edit, 1 + wordings
    tokens = own.tokens * many + WORDING_TOKENS * own.rows * wordings
    more = RowCounts(own.rows * many, own.length + WORDING_TOKENS, tokens, own.labels * many, own.decoder_length)
    return replace(batch, z_edit=more)


@contextmanager
def _wordings_made(editor: Editor) -> Iterator[None]:
    """Inside, the editor takes its edits as they are: rows without text are in all their wordings already (`worded`)."""
    settings = editor.settings
    editor.settings = {**settings, "wordings": 0}
    try:
        yield
    finally:
        editor.settings = settings


def _loss(model: nn.Module, editor: Editor, batch: EditBatch) -> Tensor:
    return edit_step(model, editor, batch, "answer", _trunk).total(1.0)


def _loss_in_chunks(model: nn.Module, editor: Editor, batch: EditBatch, at_once: int, live: LiveBytes) -> Tensor:
    """`edit_step_in_chunks`; of its parts, which are alike, the first."""
    check_chunks(editor, at_once)
    layers = editor.modules_in(model)
    deltas = editor.make_deltas(model, batch.z_edit, _trunk(model, batch.z_edit, layers)).deltas
    tensors, shape = tree_flatten(dict(deltas))
    gradients = [torch.empty_like(tensor) for tensor in tensors]
    leaves = [tensor[:at_once].detach().requires_grad_() for tensor in tensors]
    part = batch.map_rows(lambda rows: rows.of_task_range(slice(0, at_once)))
    edit, locality = outer_losses(model, layers, part, tree_unflatten(leaves, shape), "answer", _trunk)
    live.phase = BACKWARD
    torch.autograd.grad((edit + locality).sum(), leaves)
    return known_loss(edit.detach().sum(), gradients, tensors)


@phase(TRUNK)
def _trunk(model: nn.Module, rows: Rows, layers: Mapping[str, nn.Module]) -> TrunkOutputs:
    """`run_trunk` of rows that share no beginning."""
    return record_trunk(lambda: model(**rows.inputs, **without_cache(model)), len(rows), find_stacks(model), layers)


@dataclass(frozen=True)
class _Descent:
    """Stands in for an editor that cannot run without numbers: a step down the gradient."""

    editor: Editor
    c_base: float = 0.0

    def modules_in(self, model: nn.Module) -> dict[str, nn.Module]:
        return self.editor.modules_in(model)

    def base_deltas(self) -> None:
        return None

    def make_deltas(self, model: nn.Module, z_edit: Rows, trunk: TrunkOutputs, x_keep: Rows | None = None) -> Made:
        """`Editor.make_deltas`."""
        layers = self.modules_in(model)
        factors, *measured = edit_factors(model, layers, z_edit, trunk)
        with phase(TRANSFORMS):
            rate = torch.ones((), device=z_edit.task.device, requires_grad=True)
            step = {name: descent(each.u, each.delta, each, rate) for name, each in factors.items()}
            deltas, _ = grown(model, layers, {}, step, z_edit, trunk, self.editor.confidence)
        return Made(deltas, *measured)


def assumed_reach(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Reach]:
    """Which of the edits' tokens make factors in each layer, as in models whose blocks end with their MLP.

    In the last block of all only positions with a label have a gradient, in those below it all tokens up to there, in an
    encoder or a classifier all tokens of the input.
    """
    stacks = find_stacks(model)
    last_name, last_stack = list(stacks.items())[-1]
    classifier, ends = output_head(model) is None, set(last_stack[-1].modules())
    found: dict[str, Reach] = {}
    for name, layer in layers.items():
        if layer in ends:
            found[name] = "first" if classifier else "labels"
        else:
            found[name] = "until" if not classifier and name.startswith(f"{last_name}.") else "inputs"
    return found


def rows_of(model: nn.Module, batch: BatchCounts) -> EditBatch:
    """A batch of that size. The labels of `x_out` are where the locality loss looks."""
    z_edit, x_out, x_in = (_rows(model, rows, batch.tasks) for rows in (
        batch.z_edit, replace(batch.x_out, labels=batch.locality), batch.x_in,
    ))  # fmt: skip
    return EditBatch(z_edit, x_out, x_in)


def _rows(model: nn.Module, counts: RowCounts, tasks: int) -> Rows:
    """Rows on the CPU, the first as long as the longest."""
    number, length, decoder = torch.arange(counts.rows), counts.length, counts.decoder_length
    lengths = torch.tensor([length, *_shares(counts.tokens - length, counts.rows - 1, length)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    inputs = {"input_ids": mask, "attention_mask": mask}
    if decoder:
        ids = torch.ones(counts.rows, decoder, dtype=torch.long)
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": ids}
    # A classifier's labels are one a row; others' stand at its end.
    width = 1 if output_head(model) is None else decoder or length
    labels = torch.tensor(_shares(counts.labels, counts.rows, width))
    first = ((lengths if width == length else width) - labels).clamp(min=0)[:, None]
    place = torch.arange(width)
    labels = torch.where((place >= first) & (place < first + labels[:, None]), 0, IGNORED_LABEL)
    return Rows(inputs, labels, number * tasks // counts.rows, tasks, grouped=counts.rows % tasks == 0)


def _shares(total: int, rows: int, most: int) -> list[int]:
    """`total` over `rows`, as evenly as may be, at least one and at most `most` each.

    Example:
        >>> _shares(7, 3, 5), _shares(9, 2, 4)
        ([3, 2, 2], [4, 4])
    """
    return [max(1, min(most, -(-(total - row) // rows))) for row in range(rows)]
