"""Mixed precision, left out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# Devices whose results are there when an operation returns. Elsewhere the answer to a question comes when all that was asked
# for before is done, and until then the device gets nothing new to do.
SYNCHRONOUS_DEVICES = frozenset({"cpu"})


def no_autocast(device: torch.device) -> AbstractContextManager:
    """What runs inside is computed in the dtypes that it has, whatever precisions a Trainer mixes.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), no_autocast(torch.device("cpu")):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    # The meta device, on which memory is planned, has no autocast.
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def is_synchronous(device: torch.device) -> bool:
    """Whether a question to the device costs no waiting.

    Example:
        >>> is_synchronous(torch.device("cpu")), is_synchronous(torch.device("cuda"))
        (True, False)
    """
    return device.type in SYNCHRONOUS_DEVICES
