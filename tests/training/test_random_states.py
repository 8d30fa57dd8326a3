"""Random states: what a checkpoint holds of them brings the same numbers back."""

from __future__ import annotations

import random

import numpy
import torch

from mend_lightning.training.random_states import random_states, set_own_random_states


def draws() -> list[float]:
    return [random.gauss(0, 1), float(numpy.random.normal()), float(torch.randn(()))]


def test_states_of_a_checkpoint(tmp_path):
    """The keys are those of every version. A process that had no state of its own takes one of the others' in turn."""
    draws()
    states = random_states()
    assert set(states) - {"cuda"} == {"torch", "python", "numpy"}
    if not torch.cuda.is_available():
        # The run that is resumed here had a GPU.
        states["cuda"] = torch.zeros(16, dtype=torch.uint8)
    torch.save([states, {}], tmp_path / "states.pt")
    expected = [draws() for _ in range(3)]
    set_own_random_states(torch.load(tmp_path / "states.pt", weights_only=True), rank=2)
    assert [draws() for _ in range(3)] == expected
