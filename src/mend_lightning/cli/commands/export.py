"""`mend-lightning export`: edits as PEFT LoRA adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.markup import escape

from mend_lightning.cli.commands.inputs import load_base_of, read_edits
from mend_lightning.edits.edit import Edit, combined
from mend_lightning.edits.export.peft_export import CONFIG_FILE, check_own_adapter, export_peft
from mend_lightning.errors import ConfigError
from mend_lightning.files import check_free_folder, written_folder
from mend_lightning.models.architecture import Dtype
from mend_lightning.training.progress.console import console, counted


def export_command(
    edits: list[str] = [],
    out: Path = Path("adapter"),
    format: Literal["peft"] = "peft",
    separate: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    base: str | None = None,
    dtype: Dtype = "stored",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    force: bool = False,
) -> None:
    """Writes edits as a LoRA adapter: `mend-lightning export EDIT [EDIT ...] --format peft --out FOLDER`.

    `PeftModel.from_pretrained` and transformers' own `model.load_adapter` take it; float32 factors, scaling 1. Several
    edits become one adapter, unless separate.

    Args:
        edits: edit files; may simply come first on the line.
        out: the adapter's folder.
        format: peft is the only one.
        separate: one adapter an edit, each in a folder of `out` with the name of its file.
        rank: compress to this rank first (best approximation; the error is reported). Dense edits need it, or energy.
        energy: compress to the smallest rank that keeps this share of every layer's ‖ΔW‖², such as 0.99.
        base: base model (id, folder); default: the one the edits were made for.
        dtype: the base is loaded in.
        trust_remote_code: run code that comes with the base model. Only for models you trust.
        overwrite: replace a folder that an earlier export wrote.
        force: export for other weights than the edits were made for, as long as layers and shapes are the same.
    """
    loaded = read_edits(edits)
    if separate:
        _check_names(edits)
    replaces = (f"*/{CONFIG_FILE}" if separate else CONFIG_FILE) if overwrite else None
    check_free_folder(out, replaces)
    if overwrite and out.is_dir():
        for folder in out.iterdir() if separate else [out]:
            check_own_adapter(folder)
    model, _ = load_base_of(loaded, base, dtype, trust_remote_code)
    if rank is not None or energy is not None:
        loaded = [_compressed(edit, rank, energy) for edit in (loaded if separate else [combined(loaded)])]
    if not separate:
        export_peft(loaded, model, out, overwrite=overwrite, force=force)
        console().print(
            f"LoRA adapter of {counted(len(edits), 'edit')} written to {escape(str(out))}.", highlight=False
        )
        return
    with written_folder(out, replaces) as folder:
        for path, edit in zip(edits, loaded):
            export_peft(edit, model, folder / Path(path).stem, force=force)
    console().print(
        f"A LoRA adapter of each of {counted(len(edits), 'edit')} written to folders in {escape(str(out))}.",
        highlight=False,
    )


def _compressed(edit: Edit, rank: int | None, energy: float | None) -> Edit:
    smaller, errors = edit.compressed(rank, energy)
    ranks = [delta.rank for delta in smaller.deltas.values()]
    console().print(
        f"Compressed to rank {min(ranks)} to {max(ranks)}; largest error of a layer ‖ΔW − compressed‖/‖ΔW‖ = "
        f"{max(errors.values()):.4f}.",
        highlight=False,
    )
    return smaller


def _check_names(paths: Sequence[str]) -> None:
    stems = [Path(path).stem for path in paths]
    twice = [stem for stem in stems if stems.count(stem) > 1]
    if twice:
        raise ConfigError(f"Two edit files are called {twice[0]}, so their adapters would have one folder. Rename one.")
