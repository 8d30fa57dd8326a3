"""Whether the numbers of training steps are finite, asked without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Devices whose results are there when an operation returns. Elsewhere the answer to a question comes when all that was asked
# for before is done, and until then the device gets nothing new to do.
AT_ONCE = frozenset({"cpu"})


def answers_at_once(device: torch.device) -> bool:
    """Whether a question to the device costs no waiting.

    Example:
        >>> answers_at_once(torch.device("cpu")), answers_at_once(torch.device("cuda"))
        (True, False)
    """
    return device.type in AT_ONCE


class Copied:
    """A copy of `flags` on the CPU; on CUDA it is made while the device goes on, and `read` waits for it alone."""

    def __init__(self, flags: Tensor) -> None:
        self._flags, self._made = flags, None
        if flags.is_cuda:
            self._flags = torch.empty_like(flags, device="cpu", pin_memory=True).copy_(flags, non_blocking=True)
            self._made = torch.cuda.Event()
            self._made.record()

    def read(self) -> Tensor:
        if self._made is not None:
            self._made.synchronize()
        return self._flags.cpu()


class FiniteChecks:
    """Checks of flags that a step makes: at once where the device answers at once, else when `settle` is called, a step later.

    Example:
        >>> def tell(finite):
        ...     if not bool(finite.all()):
        ...         raise ArithmeticError("not finite")
        >>> checks = FiniteChecks()
        >>> checks.add(torch.tensor([True]), tell)
        >>> checks.add(torch.tensor([False]), tell)
        Traceback (most recent call last):
        ArithmeticError: not finite
    """

    def __init__(self) -> None:
        self._open: list[tuple[Copied, Callable[[Tensor], None]]] = []

    def add(self, flags: Tensor, tell: Callable[[Tensor], None]) -> None:
        """Notes flags of any shape, true where a number is finite, and what is called with them on the CPU: it raises."""
        if answers_at_once(flags.device):
            tell(flags)
        else:
            self._open.append((Copied(flags), tell))

    def settle(self) -> None:
        """Calls what was noted and not yet called, in order."""
        noted, self._open = self._open, []
        for copied, tell in noted:
            tell(copied.read())
