"""The running statistics that a new editor would have: what it needs for edits that say something before it is trained.

MEND normalises factors with statistics of all tokens that it has seen in training (`RunningNormalizer`). Before the first step
it has seen none, passes factors on as they are, and its edits are of another size by orders of magnitude: measured like that,
an untrained editor does nothing, whatever its training adds. So a look at it before the first step is taken with statistics of
some training edits, which are taken away again: training starts without them, as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.editors.editor import Editor
from mend_lightning.editors.factors import edit_factors
from mend_lightning.editors.normalizer import STATISTICS_EDITS, RunningNormalizer
from mend_lightning.editors.transform import GradientTransform
from mend_lightning.models.forward.run_trunk import run_trunk
from mend_lightning.models.inputs.rows import Rows

Statistics = Mapping[RunningNormalizer, Mapping[str, Tensor]]


def without_statistics(editor: Editor) -> list[RunningNormalizer]:
    """The normalizers that an editor's edits go through and that have seen nothing yet."""
    transforms = [part for part in editor.modules() if isinstance(part, GradientTransform) and part.normalize]
    return [each for part in transforms for each in (part.u_stats, part.delta_stats) if int(each.count) < 2]


def training_edits(data: EditDataModule, rank: int, world_size: int) -> Iterator[Rows]:
    """About `STATISTICS_EDITS` edits of all processes together, from all over the training set, some at a time.

    Every process has equally many.

    Not through the training's loader, whose place in the data would move.
    """
    sampler, together = data.sampler("train"), data.edits_at_once
    groups = len(sampler) // together
    chosen = max(world_size, min(groups, STATISTICS_EDITS // together) // world_size * world_size)
    mine = [index * groups // chosen for index in range(rank, chosen, world_size)]
    for start in range(0, len(mine), data.batch_size):
        tasks = [sampler.group(0, index, together) for index in mine[start : start + data.batch_size]]
        pairs = [(edit.prompt, edit.target) for task in tasks for edit in task]
        yield data.encoder.rows(pairs, [i for i, task in enumerate(tasks) for _ in task], len(tasks))


@torch.no_grad()
def start_statistics(model: nn.Module, editor: Editor, edits: Iterable[Rows]) -> Statistics:
    """The statistics that `editor`, which is left as it is, has after it has seen `edits`; every process must ask.

    Args:
        model: the base model.
        editor: without statistics.
        edits: equally many rows of edits on every process, on the model's device.
    """
    normalizers, layers, training = without_statistics(editor), editor.modules_in(model), editor.training
    before = {each: _state(each) for each in normalizers}
    editor.train()
    try:
        for rows in edits:
            trunk = run_trunk(model, rows, layers)
            factors, _, _ = edit_factors(model, layers, rows, trunk)
            editor.from_factors(model, factors, rows, trunk)
        return {each: _state(each) for each in normalizers}
    finally:
        editor.train(training)
        _put(before)


@contextmanager
def with_statistics(statistics: Statistics) -> Iterator[None]:
    """Inside, the normalizers have these statistics; afterwards their own again."""
    before = {each: _state(each) for each in statistics}
    _put(statistics)
    try:
        yield
    finally:
        _put(before)


def _state(normalizer: RunningNormalizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in normalizer.named_buffers()}


def _put(statistics: Statistics) -> None:
    for normalizer, state in statistics.items():
        for name, value in normalizer.named_buffers():
            value.copy_(state[name])
