"""The cost of an edit, of an editor whose seconds and megabytes are known."""

from __future__ import annotations

import time

import pytest
import torch
from helpers.models import make_rows, tiny_model

from mend_lightning.editors import Editor
from mend_lightning.editors.edited_model import DeltaEdits
from mend_lightning.evaluation.cost import RESET, measure_cost

SECONDS, MEGABYTES = 0.05, 64


class Costly(Editor):
    made, now = 0, 0.0

    def edited(self, model, z_edit):
        self.made += 1
        # The first is ten times as slow, as a first one is; it must not count.
        self.now += 10 * SECONDS if self.made == 1 else SECONDS
        torch.ones(MEGABYTES * 250_000).sum()
        return DeltaEdits({}, {})


@pytest.mark.skipif(not RESET.exists(), reason="the peak is read from Linux's /proc")
def test_seconds_and_megabytes_of_single_edits(monkeypatch):
    editor = Costly({})
    # A clock of its own: the machine may be busy.
    monkeypatch.setattr(time, "perf_counter", lambda: editor.now)
    cost = measure_cost(tiny_model("llama"), editor, [make_rows("llama", [0], 1)] * 3)
    assert cost.seconds == pytest.approx(SECONDS)
    assert cost.megabytes == pytest.approx(MEGABYTES, rel=0.2)
    assert (cost.edits, editor.made) == (3, 5)
