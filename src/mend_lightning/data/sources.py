"""Where records come from: JSONL and JSON files, shipped sets, and whatever the `datasets` library loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from mend_lightning.data.tables import TABLES, read_table
from mend_lightning.errors import DataFileError, RecordError

# The end of a file's name where a shipped set is too large for one file.
_PART = re.compile(r"-\d$")


@dataclass(frozen=True)
class Row:
    """One record as it stands in its source.

    Attributes:
        value: a line of JSONL, or what a JSON list or a table holds.
        line: line number (JSON lists and tables: number of the record), from 1.
        where: how errors name it.
        encoded: it is a line of JSONL.
    """

    value: Any
    line: int
    where: str
    encoded: bool = False

    def load(self) -> dict[str, Any]:
        """The record as an object.

        Raises:
            RecordError: it is none.
        """
        value = self.value
        if self.encoded:
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise RecordError(
                    f"{self.where}: not valid JSON ({error}). Expected one JSON object a line, or a file "
                    "that is one list of them."
                ) from error
        if not isinstance(value, dict):
            raise RecordError(f"{self.where}: expected a JSON object, got {type(value).__name__}.")
        return value


def read_rows(name: str | Path) -> Iterator[Row]:
    """Every record of a source, undecoded.

    Args:
        name: a JSONL or JSON file; a shipped set; a CSV, TSV or Parquet file; a folder or a hub id of the `datasets`
            library. Of the last ones `name:split` and `name:config:split` choose a part ("train" by default).

    Raises:
        DataFileError: it is missing or cannot be read.
    """
    source, config, split = split_name(name)
    path = Path(source).expanduser()
    if path.is_dir() or path.suffix.lower() in TABLES or _is_hub_id(source, config or split):
        if path.suffix.lower() in TABLES and not path.exists():
            find_data_file(path)
        rows = enumerate(read_table(source, config, split or "train"), start=1)
        return (Row(row, number, f"{source}, record {number}") for number, row in rows)
    if config or split:
        raise DataFileError(f"{name}: a JSON file has no splits. Give {source} alone; a file is one split.")
    return _numbered(_shipped_files(source) or [find_data_file(source)])


def check_source(name: str | Path) -> None:
    """Raises DataFileError where a file is missing, without reading it; what a hub has is known when it is read."""
    source, config, split = split_name(name)
    if not Path(source).expanduser().is_dir() and not _is_hub_id(source, config or split):
        find_data_file(source)


def split_name(name: str | Path) -> tuple[str, str, str]:
    """Source, config and split of `source`, `source:split` or `source:config:split`.

    Example:
        >>> split_name("wikitext:wikitext-2-raw-v1:train[:100]")
        ('wikitext', 'wikitext-2-raw-v1', 'train[:100]')
    """
    whole = str(name)
    # The colon within a slice ("train[:100]") separates nothing.
    outside, bracket, slice_ = whole.partition("[")
    parts = outside.split(":")
    if len(parts) > 3 or ":" not in outside or Path(whole).expanduser().exists():
        return whole, "", ""
    return parts[0], parts[1] if len(parts) == 3 else "", parts[-1] + bracket + slice_


def find_data_file(name: str | Path) -> Path:
    """The path of a data file: a path as it is, or a shipped one by name (`world_facts/test`).

    Of a shipped set in several files it is the first.

    Raises:
        DataFileError: neither exists.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = _shipped_files(name)
    if shipped:
        return shipped[0]
    raise DataFileError(
        f"Data file {str(name)!r} does not exist (looked in {Path.cwd()}). Give the path of a JSONL, JSON, CSV or "
        "Parquet file, a folder or hub id of the datasets library (owner/name, name:split), or one of the shipped "
        f"sets: {', '.join(shipped_names())}."
    )


def shipped_names() -> list[str]:
    """Sets that travel with the package."""
    folder = shipped_folder()
    names = (str(file.relative_to(folder).with_suffix("")) for file in folder.glob("*/*.jsonl"))
    return sorted({_PART.sub("", name) for name in names})


def _shipped_files(name: str | Path) -> list[Path]:
    """The files of a shipped set, a large one's in order (`train-1.jsonl`, `train-2.jsonl`); none of what is no such set.

    A file of one's own goes before a shipped one.
    """
    if Path(name).expanduser().is_file() or str(name) not in shipped_names():
        return []
    whole = shipped_folder() / f"{name}.jsonl"
    return [whole] if whole.is_file() else sorted(whole.parent.glob(f"{whole.stem}-[0-9].jsonl"))


def shipped_folder() -> Path:
    return Path(str(resources.files("mend_lightning.data")))


def _is_hub_id(source: str, has_split: str) -> bool:
    """`owner/name`, or any name with a split, that is no file here. A typo in a path stays a missing file."""
    path = Path(source).expanduser()
    if path.exists() or source.startswith(("/", ".", "~")) or path.suffix in (".json", ".jsonl"):
        return False
    owner, _, rest = source.partition("/")
    looks_shipped = any(name.startswith(f"{owner}/") for name in shipped_names())
    return bool(has_split) or (bool(rest) and "/" not in rest and not looks_shipped)


def _numbered(paths: list[Path]) -> Iterator[Row]:
    """The records of one set in one or more files; a record's line counts on through them, its `where` does not."""
    before = 0
    for path in paths:
        number = 0
        for row in _read_json(path):
            number = row.line
            yield replace(row, line=before + number) if before else row
        before += number


def _read_json(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            if _begins_a_list(path):
                yield from _read_list(path, file.read())
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Row(line, number, f"{path}, line {number}", encoded=True)
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"Data file {path} cannot be read as UTF-8 text: {error}") from error


def _begins_a_list(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "")
    return first.lstrip().startswith("[")


def _read_list(path: Path, text: str) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        expected = "Expected a list of objects, or one object a line"
        raise RecordError(f"{path}: not valid JSON ({error}). {expected}.") from error
    for number, value in enumerate(values, start=1):
        yield Row(value, number, f"{path}, record {number}")
