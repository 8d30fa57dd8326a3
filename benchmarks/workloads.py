"""What is measured: a training step and one edit, by the package, the reference and bare torch, on the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.floor import Floor
from benchmarks.models import make_batch, make_editor, make_model
from benchmarks.reference import ReferenceMend, row_inputs
from mend_lightning.data.batch import EditBatch
from mend_lightning.editors import MendEditor
from mend_lightning.models.forward.hooks import applied
from mend_lightning.training.step import edit_step

C_EDIT, LEARNING_RATE = 0.1, 1e-6
# What ours can be compared with.
OTHERS = ("reference", "floor")


@dataclass(frozen=True)
class Settings:
    """One run of the benchmark; plain values, so that a fresh process can be given them."""

    command: str
    model: str
    edits: int = 8
    tokens: int = 24
    rank: int = 1920
    threads: int = 2
    reference_gradients: str = "all"
    dtype: str = "float32"
    device: str = "cpu"


@dataclass
class Bench:
    """A model, an editor whose parameters all variants use, and a batch."""

    model: nn.Module
    editor: MendEditor
    reference: ReferenceMend
    batch: EditBatch


def build(settings: Settings) -> Bench:
    """The same for the same settings, in every process."""
    model = make_model(settings.model, dtype=settings.dtype, device=settings.device)
    editor = make_editor(model, settings.rank)
    edits = settings.edits if settings.command == "step" else 1
    batch = make_batch(model, edits, settings.tokens)
    reference = ReferenceMend(model, editor, C_EDIT, settings.reference_gradients == "all")
    return Bench(model, editor, reference, batch)


def workload(bench: Bench, command: str, variant: str) -> Callable[[], object]:
    """A function without arguments that does it once; gradients and Adam's state exist and are touched."""
    makers = {
        ("step", "ours"): _our_step, ("step", "reference"): _reference_step, ("step", "floor"): _floor_step,
        ("apply", "ours"): _our_apply, ("apply", "reference"): _reference_apply, ("apply", "floor"): _floor_apply,
    }  # fmt: skip
    bench.editor.train(command == "step")
    return makers[command, variant](bench)


def _our_step(bench: Bench) -> Callable[[], None]:
    optimizer = _optimizer(bench.editor, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        edit_step(bench.model, bench.editor, bench.batch).total(C_EDIT).backward()
        optimizer.step()

    return step


def _reference_step(bench: Bench) -> Callable[[], None]:
    optimizer = _optimizer(bench.editor)

    def step() -> None:
        optimizer.zero_grad()
        bench.reference.step(bench.batch)
        optimizer.step()

    return step


def _floor_step(bench: Bench) -> Callable[[], None]:
    optimizer = _optimizer(bench.editor, fused=True)
    floor = Floor(bench.model, bench.editor, bench.batch, C_EDIT)

    def step() -> None:
        optimizer.zero_grad()
        floor.step()
        optimizer.step()

    return step


def _floor_apply(bench: Bench) -> Callable[[], Tensor]:
    return Floor(bench.model, bench.editor, bench.batch, C_EDIT).apply


def _optimizer(editor: MendEditor, **settings) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(editor.parameters(), lr=LEARNING_RATE, **settings)
    for parameter in editor.parameters():
        # Written, not only allocated: pages that nobody touched take no memory. A step along a zero gradient
        # makes Adam's state and moves nothing.
        parameter.grad = torch.full_like(parameter, 0.0)
    optimizer.step()
    return optimizer


def _our_apply(bench: Bench) -> Callable[[], Tensor]:
    layers = bench.editor.modules_in(bench.model)

    @torch.no_grad()
    def apply() -> Tensor:
        deltas = bench.editor.make_deltas(bench.model, bench.batch.z_edit).deltas
        with applied(layers, deltas):
            return bench.model(**bench.batch.x_in.inputs).logits

    return apply


def _reference_apply(bench: Bench) -> Callable[[], Tensor]:
    @torch.no_grad()
    def apply() -> Tensor:
        weights, _ = bench.reference.edited_weights(bench.batch.z_edit, 0, training=False)
        return functional_call(bench.model, weights, kwargs=row_inputs(bench.batch.x_in, 0)[0]).logits

    return apply


@torch.no_grad()
def warm_up_statistics(bench: Bench) -> None:
    """Ours and the reference take in the same tokens, each with its own code; in sum their statistics are then equal."""
    bench.editor.train()
    bench.editor.make_deltas(bench.model, bench.batch.z_edit)
    for index in range(bench.batch.tasks):
        bench.reference.edited_weights(bench.batch.z_edit, index, training=True)
    bench.editor.eval()


@torch.no_grad()
def compare_losses(bench: Bench) -> dict[str, dict[str, float]]:
    """Loss name -> means over the edits of ours and the reference, and the largest difference of one edit.

    With the statistics frozen; call `warm_up_statistics` first.
    """
    bench.editor.eval()
    ours = edit_step(bench.model, bench.editor, bench.batch)
    theirs = bench.reference.step(bench.batch, training=False, backward=False)
    return {name: _compared(getattr(ours, name), getattr(theirs, name)) for name in ("edit", "locality", "inner")}


def compare_logits(bench: Bench) -> dict[str, dict[str, float]]:
    """The same for the edited model's logits on the rephrase."""
    bench.editor.eval()
    return {"logits": _compared(_our_apply(bench)(), _reference_apply(bench)())}


def _compared(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    difference = float((ours - theirs).abs().max())
    return {"ours": float(ours.mean()), "reference": float(theirs.mean()), "difference": difference}
