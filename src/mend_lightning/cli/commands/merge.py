"""`mend-lightning merge`: edits into the weights of a full model folder."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from mend_lightning.cli.commands.inputs import load_base_of, read_edits
from mend_lightning.edits.export.merging import EDITS_FILE, MergeReport, merge
from mend_lightning.files import check_free_folder
from mend_lightning.models.architecture import Dtype
from mend_lightning.training.progress.console import console, counted


def merge_command(
    edits: list[str] = [],
    out: Path = Path("merged"),
    base: str | None = None,
    dtype: Dtype = "stored",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    force: bool = False,
) -> None:
    """Writes a full model with edits in its weights: `mend-lightning merge EDIT [EDIT ...] --out FOLDER`.

    Plain transformers loads it, the tokenizer is in it, and the base stays as it is. The sum is computed in float32 and
    rounded once; the table says what that lost. Edits of a quantised base are merged into the weights it was made of.

    Args:
        edits: edit files; may simply come first on the line.
        out: the new model's folder.
        base: base model (id, folder); default: the one the edits were made for.
        dtype: of the model that is written; "stored" is what the base's files have, "float32" loses nothing of the edit.
        trust_remote_code: run code that comes with the base model. Only for models you trust.
        overwrite: replace a folder that an earlier merge wrote.
        force: merge into other weights than the edits were made for, as long as layers and shapes are the same.
    """
    loaded = read_edits(edits)
    check_free_folder(out, EDITS_FILE if overwrite else None)
    # What an edit of a quantised base is merged into are the weights that were quantised.
    model, tokenizer = load_base_of(loaded, base, dtype, trust_remote_code, dense=True)
    report = merge(loaded, model, out, tokenizer, overwrite, force)
    console().print(rounding_table(report))
    console().print(
        f"Model with {counted(len(loaded), 'edit')} written to {escape(str(out))} ({report.dtype}); {100 * report.lost:.1f} % of "
        "the changed entries are stored as they were. It loads with transformers alone.",
        highlight=False,
    )


def rounding_table(report: MergeReport) -> Table:
    """What rounding did to each layer."""
    table = Table(title=f"Rounding of W + ΔW to {report.dtype}", title_justify="left")
    table.add_column("layer")
    for column in ("entries", "changed by the edit", "of these lost", "error in parts of ‖ΔW‖"):
        table.add_column(column, justify="right")
    for name, layer in report.layers.items():
        numbers = (f"{layer.entries:,}", f"{layer.changed:,}", f"{layer.lost:,}", f"{layer.relative_error:.4f}")
        table.add_row(name, *numbers)
    return table
