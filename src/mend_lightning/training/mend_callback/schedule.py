"""When an editor takes its steps, counted in the steps of its host."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mend_lightning.training.mend_callback.editor_training import from_first_process


class Schedule:
    """Every so many of the host's steps, or as often as a budget of time allows.

    Args:
        clock: measures both.
        every_n_steps: of the host's; without a budget.
        time_budget: our share of the wall time; None: `every_n_steps` says it.
        seen: the Trainer's global step now.
        total: steps of the host's whole training; may be infinite.

    Attributes:
        host_steps: batches after which the host's optimisers had stepped. (The Trainer's global step counts every optimiser.)
    """

    def __init__(
        self, clock: Clock, every_n_steps: int, time_budget: float | None, seen: int = 0, total: float = float("inf")
    ) -> None:
        self.clock, self.every_n_steps, self.time_budget = clock, every_n_steps, time_budget
        self._seen, self._total, self._seconds = seen, total, 0.0
        self.host_steps, self.next_step = 0, 1 if time_budget else every_n_steps

    @property
    def progress(self) -> float:
        """Share of the host's training that is over."""
        return min(1.0, self.host_steps / self._total)

    def is_due(self, global_step: int, seconds: float) -> bool:
        """Takes in one of the host's batches; says whether the editor's next step comes now.

        Args:
            global_step: the Trainer's, after the batch; the same as before while gradients are accumulated.
            seconds: that the batch took.
        """
        self._seconds += seconds
        if global_step == self._seen:
            return False
        self.clock.host_step(self._seconds)
        self._seen, self._seconds = global_step, 0.0
        self.host_steps += 1
        return self.host_steps >= self.next_step

    def stepped(self, device: torch.device | str) -> None:
        """The editor took its step: decides when the next one comes, the same on all processes."""
        spacing = self.every_n_steps
        if self.time_budget is not None:
            # Each process has a clock of its own.
            spacing = int(from_first_process(torch.tensor(self.clock.spacing(self.time_budget), device=device)))
        self.next_step = self.host_steps + spacing

    def state_dict(self) -> dict[str, Any]:
        return {"host_steps": self.host_steps, "next_step": self.next_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.host_steps, self.next_step = state["host_steps"], state["next_step"]


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
        editor_seconds: seconds spent by us, in all.
        steps: ours; step_seconds: what they took, without the first, which warms up.
        host_steps, host_seconds: the same of the host's steps.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._began = time.perf_counter()
        self._ended: float | None = None
        self.editor_seconds = self.step_seconds = self.host_seconds = 0.0
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
            self.editor_seconds += seconds
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
        return self.editor_seconds / max(self.total, 1e-9)

    def spacing(self, budget: float) -> int:
        """`steps_between` by what was measured so far; 1 until there is something to go by."""
        if self.steps < 2 or self.host_steps < 2:
            return 1
        return steps_between(self.step_seconds / (self.steps - 1), self.host_seconds / (self.host_steps - 1), budget)
