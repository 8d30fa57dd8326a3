"""Models without memory (on the meta device), and memory for them unit by unit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mend_lightning.models.sharding.weights import WeightSource


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without values; buffers (masks, rotary frequencies) are real.

    `torch.device("meta")` would take the values of the buffers as well, and no file holds those.

    Example:
        >>> with parameters_on_meta():
        ...     layer = nn.BatchNorm1d(2)
        >>> layer.weight.device.type, layer.running_var.tolist()
        ('meta', [1.0, 1.0])
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # One that is there already is being tied to a second name, and must stay itself.
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def allocate(
    prefix: str, module: nn.Module, source: WeightSource, device: torch.device | str = "cpu"
) -> list[nn.Parameter]:
    """Gives the parameters of `module` that are on the meta device memory on `device`, and values from `source`.

    Returns:
        Those parameters.
    """
    # A tied weight has several names and is one parameter: all its owners get the same.
    made: dict[nn.Parameter, nn.Parameter] = {}
    names = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
                owner._parameters[name] = made[parameter]
    source.fill(prefix, module, names)
    return list(made.values())
