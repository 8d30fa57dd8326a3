"""Seconds of several variants measured in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant over all rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, seconds: list[float], per: int = 1) -> Timing:
        """Of the measured `seconds`, each divided by `per` (edits in a step).

        Example:
            >>> Timing.of([4.0, 2.0, 9.0], per=2)
            Timing(median=2.0, min=1.0, max=4.5)
        """
        return cls(statistics.median(seconds) / per, min(seconds) / per, max(seconds) / per)


def in_turn(
    variants: Mapping[str, Callable[[], object]], repeats: int, wait: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, float | None]]:
    """Runs A B A B ..., so that a machine that slows down meanwhile slows both.

    Args:
        variants: name -> function.
        repeats: rounds that count; one more comes first and does not.
        wait: for a device that works on while Python continues.

    Yields:
        (name, seconds) after every run; None for the warm-up.
    """
    # What is there already need not be searched for garbage before every run.
    gc.freeze()
    try:
        for round_ in range(repeats + 1):
            for name, run in variants.items():
                # What an earlier variant left behind must not be collected on this one's clock.
                gc.collect()
                wait()
                start = time.perf_counter()
                run()
                wait()
                seconds = time.perf_counter() - start
                yield name, seconds if round_ else None
    finally:
        gc.unfreeze()
