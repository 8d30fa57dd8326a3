"""Which of the Trainer's precisions an editor can be trained in; checked before anything loads."""

from __future__ import annotations

import torch
from lightning.pytorch.plugins import BitsandbytesPrecision, MixedPrecision, Precision

from mend_lightning.errors import ConfigError

_REASONS = {
    "mixed": "reduces the editor's gradients, and keeps its running statistics, in half precision under FSDP",
    "true": "casts the editor, whose gradients and running statistics must stay float32,",
    "transformer-engine": "casts the editor to half precision, and computes it in 8 bit,",
}


def check_trainer_precision(plugin: Precision) -> None:
    """Raises ConfigError if the Trainer's precision would compute or store the editor in anything but float32.

    "32-true" leaves every dtype as it is, and under "bf16-mixed" and "16-mixed" the base alone is autocast.
    """
    if isinstance(plugin, BitsandbytesPrecision):
        raise ConfigError(
            "Trainer(plugins=BitsandbytesPrecision(...)) quantises the editor's layers as well. Leave it out; "
            "model.base.quantize quantises the base alone."
        )
    if plugin.precision == "32-true" or isinstance(plugin, MixedPrecision):
        return
    reason = next((text for end, text in _REASONS.items() if plugin.precision.endswith(end)), None)
    reason = reason or _REASONS["transformer-engine"]
    raise ConfigError(
        f"Trainer(precision={plugin.precision!r}) {reason} and cannot be used. Leave precision at '32-true' and choose the "
        "base model's dtype with model.base.dtype (by default bfloat16 where the device computes in it), or its bits with "
        "model.base.quantize."
    )


def loss_scaler(plugin: Precision) -> torch.amp.GradScaler | None:
    """What scales the training loss and skips steps whose gradient overflowed: "16-mixed" has one, nothing else."""
    return getattr(plugin, "scaler", None)
