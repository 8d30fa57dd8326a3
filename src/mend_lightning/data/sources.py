"""Where records come from: JSONL and JSON files, shipped sets, and whatever the `datasets` library loads."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mend_lightning.errors import DataFileError, RecordError

# What the `datasets` library reads; every other file is JSON or JSONL, read here for errors that name the line.
TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


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
        return _read_table(source, config, split or "train")
    if config or split:
        raise DataFileError(f"{name}: a JSON file has no splits. Give {source} alone; a file is one split.")
    return _read_json(find_data_file(source))


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

    Raises:
        DataFileError: neither exists.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = _shipped_folder() / f"{name}.jsonl"
    if shipped.is_file():
        return shipped
    raise DataFileError(
        f"Data file {str(name)!r} does not exist (looked in {Path.cwd()}). Give the path of a JSONL, JSON, CSV or Parquet "
        f"file, a folder or hub id of the datasets library (owner/name, name:split), or one of the shipped sets: "
        f"{', '.join(shipped_names())}."
    )


def shipped_names() -> list[str]:
    """Sets that travel with the package."""
    folder = _shipped_folder()
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.glob("*/*.jsonl"))


def _shipped_folder() -> Path:
    return Path(str(resources.files("mend_lightning.data")))


def _is_hub_id(source: str, has_split: str) -> bool:
    """`owner/name`, or any name with a split, that is no file here. A typo in a path stays a missing file."""
    if Path(source).expanduser().exists() or source.startswith(("/", ".", "~")) or Path(source).suffix in (".json", ".jsonl"):
        return False
    owner, _, rest = source.partition("/")
    looks_shipped = any(name.startswith(f"{owner}/") for name in shipped_names())
    return bool(has_split) or (bool(rest) and "/" not in rest and not looks_shipped)


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
        raise RecordError(f"{path}: not valid JSON ({error}). Expected a list of objects, or one object a line.") from error
    for number, value in enumerate(values, start=1):
        yield Row(value, number, f"{path}, record {number}")


def _read_table(source: str, config: str, split: str) -> Iterator[Row]:
    # Tables of one's own are converted into a folder that goes away again: no stale cache, nothing left behind.
    with tempfile.TemporaryDirectory() as cache:
        table = _load_table(source, config, split, cache)
        for number, row in enumerate(table, start=1):
            yield Row(row, number, f"{source}, record {number}")
        del table


def _load_table(source: str, config: str, split: str, cache: str) -> Any:
    # Imported here: it takes a second, and most files are JSONL.
    import datasets
    from datasets.exceptions import DatasetsError

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = Path(source).expanduser()
    kind = TABLES.get(path.suffix.lower())
    try:
        if kind and not path.is_dir():
            file = find_data_file(path)
            return datasets.load_dataset(kind, data_files=str(file), split=split, cache_dir=cache, **_csv_options(file))
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            return saved if isinstance(saved, datasets.Dataset) else saved[split]
        # Hub sets stay in the library's own cache: that is what makes them usable offline. No code of a set is run.
        options = {"cache_dir": cache} if path.is_dir() else {}
        return datasets.load_dataset(str(path) if path.is_dir() else source, config or None, split=split, **options)
    except DataFileError:
        raise
    except (DatasetsError, OSError, ValueError, KeyError) as error:
        raise DataFileError(
            f"The datasets library cannot load {source!r} (config {config or 'default'}, split {split}; looked in {Path.cwd()} "
            f"first): {error}. Expected a CSV, TSV or Parquet file, a folder of such files, or a hub id (owner/name) that is "
            "cached or can be downloaded."
        ) from error


def _csv_options(path: Path) -> dict[str, Any]:
    """Every cell of a CSV is text: pandas would make a number of 1955, and nothing of "NA" and "None"."""
    import datasets

    if TABLES[path.suffix.lower()] != "csv":
        return {}
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "sep": separator, "encoding": "utf-8-sig"}
