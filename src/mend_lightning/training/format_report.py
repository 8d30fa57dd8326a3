"""The part of a test's report that is about formats: edits made in each and asked in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.evaluation.format_plot import plot_formats
from mend_lightning.evaluation.format_table import Held, formats_table, means_lines, measure_formats, shares_of
from mend_lightning.training.module import MendModule
from mend_lightning.training.progress.console import console

PICTURE = "formats.png"


@dataclass(frozen=True)
class FormatReport:
    """What became of edits in several formats.

    Attributes:
        held: number of a test record -> what held, see `measure_formats`; empty where there is one format.
        left_out: names of formats that no test record can be asked in.
    """

    held: Mapping[int, Held] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def about(self) -> dict[str, Any]:
        """What `results.json` says of it."""
        return {"formats": shares_of(list(self.held.values()))} if self.held else {}

    def note(self, records: list[dict[str, Any]]) -> None:
        """Writes into the records of single edits, in the order of the data, what became of each."""
        for index, held in self.held.items():
            records[index]["made_and_asked_in"] = held

    def show(self, folder: Path) -> None:
        """Prints the table, and draws it in `folder`."""
        for name in self.left_out:
            console().print(
                f"No test record has statements, so nothing is asked in the format {name}.", highlight=False
            )
        if self.held:
            table = shares_of(list(self.held.values()))
            console().print(formats_table(table))
            for line in means_lines(table):
                console().print(line, highlight=False)
            console().print(f"Written: {plot_formats(table, folder / PICTURE)}", highlight=False)


def report_formats(data: EditDataModule, module: MendModule) -> FormatReport:
    """Makes and asks the test's first edits in every format, each edit alone; every process must call it."""
    edits = data.format_tasks()
    if not edits:
        return FormatReport()
    names = list(next(iter(edits.values())))
    numbers, size = list(edits), data.eval_batch_size
    held: dict[int, Held] = {}
    for start in range(0, len(numbers), size):
        some = numbers[start : start + size]
        tasks = [edits[number] for number in some]
        held |= zip(some, measure_formats(module.base_model, module.editor, data.encoder, tasks))
    left_out = tuple(each.name for each in data.formats.evaluation if each.name not in names)
    return FormatReport(held, left_out)
