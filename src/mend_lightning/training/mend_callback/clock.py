"""What a guest costs its host: a share of the wall time, and how often it may work within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def steps_between(own: float, host: float, budget: float) -> int:
    """The fewest of the host's steps to every one of ours that keep our share of the time within `budget`.

    Args:
        own: seconds that one step of ours takes; host: one of the host's.
        budget: largest share, between 0 and 1.

    Example:
        >>> steps_between(own=1.0, host=0.5, budget=0.2)
        8
    """
    return max(1, math.ceil(own * (1 - budget) / (budget * max(host, 1e-9)) - 1e-9))


class Clock:
    """Seconds of a training: all of it, the host's steps, and ours.

    Attributes:
        guest: seconds spent by us, in all.
        steps: ours; step_seconds: what they took, without the first, which warms up.
        host_steps, host_seconds: the same of the host's steps.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._began, self._ended = time.perf_counter(), None
        self.guest = self.step_seconds = self.host_seconds = 0.0
        self.steps = self.host_steps = 0

    def now(self) -> float:
        """After what was asked of the device is done: whose work is waited for is whose cost it is."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def ours(self, step: bool = False) -> Iterator[None]:
        """Counts what runs inside as ours; `step` says that it is one of the steps."""
        start = self.now()
        try:
            yield
        finally:
            seconds = self.now() - start
            self.guest += seconds
            if step:
                self.steps += 1
                self.step_seconds += seconds if self.steps > 1 else 0.0

    def host_step(self, seconds: float) -> None:
        """Takes in a step of the host's."""
        self.host_steps += 1
        self.host_seconds += seconds if self.host_steps > 1 else 0.0

    def stop(self) -> None:
        """The training is over."""
        self._ended = time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds since the training began."""
        return (self._ended or time.perf_counter()) - self._began

    @property
    def share(self) -> float:
        """Our part of the wall time so far, 0 to 1."""
        return self.guest / max(self.total, 1e-9)

    def spacing(self, budget: float) -> int:
        """`steps_between` by what was measured so far; 1 until there is something to go by."""
        if self.steps < 2 or self.host_steps < 2:
            return 1
        return steps_between(self.step_seconds / (self.steps - 1), self.host_seconds / (self.host_steps - 1), budget)
