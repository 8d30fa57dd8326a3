"""`mend-lightning layers`: which layers of a model would be edited."""

from __future__ import annotations

from rich.table import Table

from mend_lightning.models.architecture import Dtype
from mend_lightning.models.base import load_base
from mend_lightning.models.layers import find_stacks, layer_shape, select_layers
from mend_lightning.training.progress.console import console


def layers_command(
    model: str, layers: list[str] | None = None, last_blocks: int | None = None, dtype: Dtype = "auto"
) -> None:
    """Shows which layers of a model would be edited, and why.

    Args:
        model: Hugging Face id, local folder, or smollm2-135m-instruct.
        layers: names or patterns to try instead of the default choice.
        last_blocks: how many blocks of each stack (default: 3; an encoder-decoder: 2 + 2).
        dtype: of the loaded weights.
    """
    base, _ = load_base(model, dtype)
    chosen = select_layers(base, layers, last_blocks)
    table = Table(title=f"Layers of {model} ({type(base).__name__}) that would be edited", title_justify="left")
    for column in ("layer", "type", "d_in", "d_out"):
        table.add_column(column)
    for name, layer in chosen.items():
        d_in, d_out = layer_shape(layer)
        table.add_row(name, type(layer).__name__, str(d_in), str(d_out))
    console().print(table)
    for name, stack in find_stacks(base).items():
        console().print(f"Stack {name}: {len(stack)} blocks", highlight=False)
    reason = (
        f"they match {layers}" if layers else "the paper's choice: the MLP matrices of the last blocks of every stack"
    )
    console().print(f"Why these: {reason}.", highlight=False)
