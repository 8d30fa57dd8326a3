"""Writes the table of docs/models.md: every shipped config with its model, task and memory.

    python scripts/model_table.py          # prints the table
    python scripts/model_table.py --write  # puts it into docs/models.md

Sizes are counted on models without weights (torch's meta device), in the shapes of the published checkpoints, with the
layers and the editor that the config chooses.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from mend_lightning.cli.config.files import config_names
from mend_lightning.cli.config.overlays import read_config
from mend_lightning.editors.mend import MendEditor
from mend_lightning.models.known_shapes import shipped_config
from mend_lightning.models.random_weights import empty_model

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BYTES = {"float32": 4, "bfloat16": 2, "auto": 2}
RUN_BY_US = {"quickstart", "smollm2-world-facts", "small-t5-world-facts", "small-bert-statements"}


# The order of the table: what we ran, the paper's models, models of today.
ORDER = (
    "quickstart", "smollm2-world-facts", "small-t5-world-facts", "small-bert-statements",
    "bert-base", "bart-base", "distilgpt2", "gpt-neo-2.7b", "gpt-j", "t5-small", "t5-large", "t5-xl", "t5-xxl",
    "llama-3.2-1b", "llama-3.2-3b", "llama-3-8b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-72b",
    "qwen3-0.6b", "qwen3-8b", "mistral-7b", "gemma-2-2b", "gemma-3-1b", "gemma-3-4b", "phi-2", "phi-3.5-mini",
    "phi-4-mini", "smollm2-360m", "smollm2-1.7b", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "opt-1.3b", "opt-6.7b",
    "pythia-1.4b", "pythia-6.9b",
)  # fmt: skip


def sizes(name: str) -> tuple[int, int]:
    """Parameters of a config's base model and of its editor."""
    values = read_config(name).values()["model"]
    # Not a folder or a cached config of this machine: the table must be the same on all.
    model = empty_model(shipped_config(values["base"]["name"]), torch.bfloat16)
    with torch.device("meta"):
        editor = MendEditor.for_model(model, values.get("layers"), values.get("last_blocks"), rank=values["rank"])
    base, small = (sum(p.numel() for p in module.parameters()) for module in (model, editor))
    return base, small


def row(name: str) -> str:
    """A config's line of the table."""
    values = read_config(name).values()
    base, editor = sizes(name)
    dtype = values["model"]["base"].get("dtype", "auto")
    weights, training = base * BYTES[dtype] / 2**30, 16 * editor / 2**30
    shown = "bfloat16" if dtype == "auto" else dtype
    cells = [
        f"`{name}`", f"`{values['model']['base']['name']}`", task(values["data"]), f"{base / 1e6:,.0f} M, {shown}",
        f"{editor / 1e6:,.0f} M", f"{weights:.1f} + {training:.1f} = {weights + training:.1f}",
        "yes" if name in RUN_BY_US else "no",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def task(data: dict) -> str:
    if "statements" in data["train"]:
        return "statements"
    return {"kilt": "zsRE", "fever": "FEVER", "wikitext": "Wikitext"}.get(data.get("format", ""), "world_facts")


def table() -> str:
    columns = ("config", "model", "task", "its weights", "editor", "memory in GiB", "run on real weights")
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    order = sorted(config_names(), key=ORDER.index)
    return "\n".join([head, *map(row, order)])


def written(page: str, text: str) -> str:
    """The page with the table between its marks."""
    begin, end = "<!-- table:begin -->\n", "\n<!-- table:end -->"
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}{text}{end}", page, flags=re.DOTALL)


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), table()), encoding="utf-8")
    else:
        sys.stdout.write(table() + "\n")
