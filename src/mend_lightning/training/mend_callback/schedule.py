"""When an editor takes its steps, counted in the steps of its host."""

from __future__ import annotations

from typing import Any

import torch

from mend_lightning.training.mend_callback.clock import Clock
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
