"""Where the random generators stand: kept in checkpoints, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states(devices: Iterable[torch.device] | None = None) -> dict[str, Any]:
    """Where torch's (the CPU's and those of `devices`), numpy's and Python's generators stand.

    Args:
        devices: accelerators, CUDA's or MPS; None: this process's CUDA device, where there is one.

    Returns:
        Tensors and builtins only, so that a file with them loads with `weights_only=True`.

    Example:
        >>> states = random_states()
        >>> first = torch.rand(1)
        >>> set_random_states(states)
        >>> torch.equal(first, torch.rand(1))
        True
    """
    if devices is None:
        devices = [torch.device("cuda")] if torch.cuda.is_available() else []
    numpy_state: Any = np.random.get_state()
    name, keys, *rest = numpy_state
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
    }
    for device in devices:
        states[str(device)] = torch.mps.get_rng_state() if device.type == "mps" else torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Puts the generators back to where `random_states` found them; a GPU's only where there was one and is one."""
    torch.set_rng_state(states["torch"])
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    for name in states.keys() - {"torch", "python", "numpy"}:
        if name == "mps":
            torch.mps.set_rng_state(states[name])
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(states[name], name)


@contextmanager
def kept_random_states(devices: Iterable[torch.device] | None = None) -> Iterator[None]:
    """What is drawn inside is not missing afterwards, also where an exception ends it.

    Lightning's `isolate_rng` puts nothing back after an exception, and does not know MPS.

    Args:
        devices: see `random_states`.

    Example:
        >>> with kept_random_states():
        ...     first = torch.rand(1)
        >>> torch.equal(first, torch.rand(1))
        True
    """
    states = random_states(devices)
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
