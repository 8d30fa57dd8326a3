"""Whether the numbers of training steps are finite, asked without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mend_lightning.data.batch import EditBatch
from mend_lightning.errors import (
    NonFiniteError,
)
from mend_lightning.models.forward.device import is_synchronous

_UNTOUCHED, _SAVED = "its parameters are as they were", "the last checkpoint is from before this step"


class Copied:
    """A copy of `flags` on the CPU; on CUDA it is made while the device works on, and `read` waits for it alone."""

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
    """Checks of flags that a step makes: at once where the device answers at once, else when `flush` is called, a step later.

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
        if is_synchronous(flags.device):
            tell(flags)
        else:
            self._open.append((Copied(flags), tell))

    def flush(self) -> None:
        """Calls what was noted and not yet called, in order."""
        noted, self._open = self._open, []
        for copied, tell in noted:
            tell(copied.read())


def check_finite(losses: dict[str, Tensor], batch: EditBatch, step: int, checks: FiniteChecks) -> None:
    """Has `checks` raise NonFiniteError naming the tasks whose loss is NaN or infinite.

    Args:
        losses: name -> `[tasks]`.
        batch: the tasks.
        step: number of the step.
        checks: says when: at once, or a step later.
    """
    finite = torch.stack([values.detach().isfinite() for values in losses.values()])
    checks.add(finite, partial(_raise_unless_finite, list(losses), batch.texts, step))


def _raise_unless_finite(names: Sequence[str], texts: Sequence[Any], step: int, finite: Tensor) -> None:
    """`finite`: `[names, tasks]` bool, on the CPU."""
    for name, flags in zip(names, finite.tolist()):
        bad = [task for task, flag in enumerate(flags) if not flag]
        if bad:
            raise NonFiniteError(
                f"The {name} loss is not finite in step {step} for {_describe(texts, len(flags), bad)}. The last checkpoint "
                "is from before this step. Usual causes: a base in float16 (use bfloat16 or float32), an edit rate or "
                "learning rate that is too high, or weights that hold NaN."
            )


def _describe(texts: Sequence[Any], tasks: int, chosen: Iterable[int]) -> str:
    edits = len(texts) // tasks
    named = []
    for task in chosen:
        first = f" ({texts[task * edits].prompt!r} -> {texts[task * edits].target!r})" if edits else ""
        named.append(f"task {task}{first}" + (f" and {edits - 1} more" if edits > 1 else ""))
    return "; ".join(named)


def check_overflow(scaler: torch.amp.GradScaler, step: int) -> None:
    """Raises NonFiniteError unless a gradient is not finite for the scale of the loss, so that the step is skipped."""
    # Clipping by an infinite norm would write NaN into every parameter.
    if scaler.get_scale() <= 1:
        scaled = f" with the loss scaled by {scaler.get_scale():g}, which no smaller scale would mend"
        raise _not_finite(f"{step}{scaled}; {_UNTOUCHED}")


def check_gradient(step: int, device: torch.device, finite: Tensor) -> None:
    """Raises NonFiniteError unless the gradient's norm, on `device`, was `finite` (a flag on the CPU) in `step`."""
    if not bool(finite):
        raise _not_finite(f"{step}; {_UNTOUCHED if is_synchronous(device) else _SAVED}")


def _not_finite(where: str) -> NonFiniteError:
    return NonFiniteError(
        f"The editor's gradient is not finite in step {where}. Usual causes: a base in float16 or precision '16-mixed' "
        "(use bfloat16 or float32), or a learning rate that is too high."
    )


def skips_step(norm: Tensor, scaler: torch.amp.GradScaler | None, step: int, checks: FiniteChecks) -> bool:
    """Whether a loss scaler will leave a step out because its gradient overflowed.

    Args:
        norm: of the gradient.
        scaler: of the Trainer's precision; None: `checks` raises NonFiniteError where the norm is not finite.
        step: number of the step.
        checks: says when.

    Raises:
        NonFiniteError: the scaler cannot help: its scale is as small as it can be.
    """
    if scaler is None:
        checks.add(norm.isfinite(), partial(check_gradient, step, norm.device))
        return False
    # A scaler synchronizes host and device itself.
    if norm.isfinite():
        return False
    check_overflow(scaler, step)
    return True
