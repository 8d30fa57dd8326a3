"""Where the random generators stand: kept in checkpoints, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Of torch (CPU, and this process's GPU), numpy and Python; tensors and builtins only.

    Example:
        >>> states = random_states()
        >>> first = torch.rand(1)
        >>> set_random_states(states)
        >>> torch.equal(first, torch.rand(1))
        True
    """
    name, keys, *rest = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Puts the generators back to where `random_states` found them; a GPU's only where there was one and is one."""
    torch.set_rng_state(states["torch"])
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def kept_random_states() -> Iterator[None]:
    """What is drawn inside is not missing afterwards.

    Example:
        >>> with kept_random_states():
        ...     first = torch.rand(1)
        >>> torch.equal(first, torch.rand(1))
        True
    """
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def gathered_random_states() -> list[dict[str, Any]]:
    """`random_states` of every process, in the order of their ranks. Every process must call it."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return [random_states()]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, random_states())
    return states


def set_own_random_states(states: Sequence[dict[str, Any]], rank: int) -> None:
    """Puts back one process's of `gathered_random_states`; more processes than there were share them in turn."""
    set_random_states(states[rank % len(states)])
