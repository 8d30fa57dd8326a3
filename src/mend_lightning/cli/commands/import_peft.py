"""`mend-lightning import-peft`: a LoRA adapter as an edit file."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from mend_lightning.edits.export.peft_import import import_peft
from mend_lightning.files import check_writable_file
from mend_lightning.training.progress.console import console, counted


def import_peft_command(adapter: Path, out: Path = Path("edit.safetensors")) -> None:
    """Makes an edit file of a PEFT LoRA adapter.

    An adapter that `mend-lightning export` wrote comes back as it was. A plain LoRA of somebody else becomes an edit too; it
    does not say which weights it is for, so that is not checked when it is applied.

    Args:
        adapter: the adapter's folder.
        out: where the edit is saved.
    """
    check_writable_file(out)
    edit = import_peft(adapter)
    path = edit.save(out)
    known = edit.about.get("weights") or edit.about.get("base_fingerprint")
    doubt = "" if known else " It does not say which weights it was made for."
    console().print(
        f"Edit of {counted(len(edit.deltas), 'layer')} saved to {escape(str(path))}.{doubt}", highlight=False
    )
