"""`mend-lightning sequential`: edits one after another on one model, measured and drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from mend_lightning.cli.config.files import DEFAULT_ROOT
from mend_lightning.cli.config.overlays import read_config
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.tasks import EditTask
from mend_lightning.editors.editor import Editor
from mend_lightning.errors import ConfigError
from mend_lightning.evaluation.report import versions
from mend_lightning.evaluation.sequential import BROKEN, EditSequence, check_builds_on, edit_in_sequence
from mend_lightning.files import check_writable_file, write_json
from mend_lightning.models.base import BaseModel
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.training.checks import check_prompt_format
from mend_lightning.training.progress.console import console

RESULTS, PICTURE = "sequential.json", "sequential.png"
# Unrelated facts whose perplexity is watched.
PROBES = 128


def sequential_command(
    name: str, editor: Path | None = None, edits: int = 100, every: int = 10, out: Path | None = None
) -> None:
    """Edits one model again and again: success just after each edit and at the end, forgetting, and when the model breaks.

    Each edit is made on the model that the ones before it left. Unrelated facts are about subjects that none of them edits.

    Args:
        name: the config that the editor was trained with, which names the base model and the data (`--config NAME`).
        editor: folder of the trained editor; default: where fit with this config leaves it.
        edits: how many of the test set's facts are edited, one after another.
        every: edits between two looks at the whole.
        out: folder of sequential.json and sequential.png; default: the folder the editor is in.
    """
    if edits < 1 or every < 1:
        raise ConfigError(f"edits and every must be at least 1, not {edits} and {every}.")
    values = read_config(name).values()
    data, base = _data_and_base(values, name)
    editor = editor or Path((values.get("trainer") or {}).get("default_root_dir", DEFAULT_ROOT), "editor")
    trained, folder = Editor.from_pretrained(editor), Path(out or editor.parent)
    for result in (RESULTS, PICTURE):
        check_writable_file(folder / result)
    check_builds_on(trained)
    check_prompt_format(trained.prompt_format, asdict(data.format))
    model, tokenizer = base.load()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained.check_base(model)
    encoder = Encoder.for_model(model.to(device), tokenizer, data.format, data.max_length, data.kind)
    trained.encoder = encoder
    tasks, probes = edits_and_probes(data, edits)
    rows = encoder.rows(probes, [0] * len(probes), 1).to(device)
    shown = track(tasks, "Editing", console=console())
    found = edit_in_sequence(model, trained.to(device), encoder, shown, rows, every)
    _report(found, folder, {"base": base.name, "editor": type(trained).__name__, "test": str(data.files["test"])})


def _data_and_base(values: dict[str, Any], name: str) -> tuple[EditDataModule, BaseModel]:
    try:
        # Asked in the data's own format, which is the one that the editor's edits are made in.
        settings = {**(values.get("data") or {}), "formats": None, "eval_formats": None}
        data = EditDataModule(**settings)
        base = BaseModel(**((values.get("model") or {}).get("base") or {}))
    except TypeError as error:
        raise ConfigError(
            f"{name} is not the config of a run: {error}. Give the one the editor was trained with."
        ) from error
    if data.files["test"] is None:
        raise ConfigError(f"{name} has no data.test, whose facts are edited. Give a file, or world_facts/test.")
    return data, base


def edits_and_probes(data: EditDataModule, edits: int) -> tuple[Sequence[EditTask], list[tuple[str, str]]]:
    """Edits of the test set in a drawn order, and unrelated facts about subjects that none of them edits.

    Raises:
        ConfigError: the test set has fewer facts, or edits leave none over.
    """
    sampler = data.sampler("test")
    if edits > len(sampler):
        raise ConfigError(f"{data.files['test']} has {len(sampler)} facts, fewer than the {edits} edits asked for.")
    tasks = sampler.group(0, 0, edits)
    return tasks, list(dict.fromkeys(pair for task in tasks for pair in task.locality))[:PROBES]


def _report(found: EditSequence, folder: Path, about: dict[str, Any]) -> None:
    from mend_lightning.cli.commands.plots import draw_sequence

    summary = found.summary()
    write_json(
        folder / RESULTS, {**about, "broken_at_perplexity": f"{BROKEN} x base", **summary, "versions": versions()}
    )
    picture = draw_sequence(found.checkpoints, folder / PICTURE)
    console().print(sequence_table(found))
    for line in conclusions(summary):
        console().print(line, highlight=False)
    console().print(f"Written: {folder / RESULTS}, {picture}", highlight=False)


def sequence_table(found: EditSequence) -> Table:
    """A row for every checkpoint."""
    table = Table(title="Edits one after another on one model", title_justify="left")
    for column in ("edits", "right just after", "still right", "perplexity, unrelated", "accuracy, unrelated"):
        table.add_column(column, justify="right")
    for each in found.checkpoints:
        shares = ("" if each.edits == 0 else f"{share:.3f}" for share in (each.immediate, each.retained))
        table.add_row(str(each.edits), *shares, f"{each.perplexity:.3g}", f"{each.accuracy:.3f}")
    return table


def conclusions(summary: dict[str, Any]) -> Iterator[str]:
    """What the table says, in words."""
    yield (
        f"Just after its edit {summary['immediate_success']:.3f} of questions and rephrases are right, under the final model "
        f"{summary['retained_success']:.3f}; "
        + (
            "nothing was right, so nothing is forgotten."
            if summary["forgetting"] is None
            else f"{summary['forgetting']:.3f} of what was right is forgotten."
        )
    )
    broken = summary["broken_after"]
    yield (
        f"Perplexity on unrelated facts never reaches {BROKEN:g} times the base's."
        if broken is None
        else f"The model is broken at the look after {broken} edits: "
        f"perplexity on unrelated facts is more than {BROKEN:g} times the base's."
    )
