"""The picture of a sequence of edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mend_lightning.evaluation.sequential import BROKEN, Checkpoint
from mend_lightning.files import written


def draw_sequence(checkpoints: Sequence[Checkpoint], target: Path) -> Path:
    """Draws success, and perplexity on unrelated facts, over the number of edits as one PNG."""
    # Not pyplot: that would choose a window system for whoever imports this package.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    success, unrelated = figure.subplots(1, 2)
    edited = [each for each in checkpoints if each.edits]
    edits = [each.edits for each in edited]
    success.plot(edits, [each.immediate for each in edited], "o-", label="right just after the edit")
    success.plot(edits, [each.retained for each in edited], "o-", label="still right")
    success.plot([each.edits for each in checkpoints], [each.accuracy for each in checkpoints], "o-", label="unrelated facts")
    success.set_ylim(-0.02, 1.05)
    success.set_title("edit success (question and rephrases), and accuracy elsewhere")
    success.legend()
    unrelated.plot([each.edits for each in checkpoints], [each.perplexity for each in checkpoints], "o-", color="C2")
    unrelated.axhline(BROKEN * checkpoints[0].perplexity, color="C3", linestyle="--", label=f"{BROKEN:g} × base: broken")
    unrelated.set_yscale("log")
    unrelated.set_title("perplexity on unrelated facts")
    unrelated.legend()
    for axes in (success, unrelated):
        axes.set_xlabel("edits made one after another")
        axes.grid(alpha=0.3)
    with written(target) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return target
