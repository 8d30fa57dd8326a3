"""Measures an editor on the model as it is now."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mend_lightning.data.order import repeated
from mend_lightning.editors.editor import Editor
from mend_lightning.evaluation.evaluate import evaluate_batch, hard_rows
from mend_lightning.evaluation.metric_collection import Scoreboard
from mend_lightning.models.inputs.rows import EditBatch


@torch.no_grad()
def measure_editor(model: nn.Module, editor: Editor, batches: Iterable[EditBatch]) -> dict[str, float]:
    """name -> value of every metric of `Scoreboard`, over the batches of all processes.

    Args:
        model: the host's, borrowed (`manners.borrowed`).
        editor: in eval mode.
        batches: a loader of evaluation tasks.
    """
    device = next(model.parameters()).device
    scoreboard = Scoreboard().to(device)
    for index, batch in enumerate(batches):
        batch = batch.to(device)
        scores = evaluate_batch(model, editor, batch)
        if not repeated(batches, index):
            scoreboard.update(scores, hard_rows(batch))
    return scoreboard.compute()
