"""The phases of a training step, by name: the memory plan counts by them, and torch's profiler shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function

TRUNK, INNER, TRANSFORMS, CONFIDENCE, EDITED, LOGITS, BACKWARD = (
    "trunk", "inner pass", "transforms", "confidence", "edited pass", "logits", "backward",
)  # fmt: skip
PHASES = (TRUNK, INNER, TRANSFORMS, CONFIDENCE, EDITED, LOGITS, BACKWARD)

_LABEL = "mend_lightning: "


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What runs inside is of this phase, unless a phase inside of it says otherwise; decorates functions as well.

    Example:
        >>> from torch.profiler import profile
        >>> with profile() as profiler, phase(TRUNK):
        ...     pass
        >>> [event.name for event in profiler.events()]
        ['mend_lightning: trunk']
    """
    with record_function(_LABEL + name):
        yield


def phase_of(label: str) -> str | None:
    """The phase that a label of torch's profiler names; None of anybody else's label.

    Example:
        >>> phase_of("mend_lightning: trunk"), phase_of("DataParallel.forward")
        ('trunk', None)
    """
    return label.removeprefix(_LABEL) if label.startswith(_LABEL) else None
