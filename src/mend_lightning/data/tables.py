"""Tables through the `datasets` library: CSV, TSV and Parquet files, folders, and sets of the hub."""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mend_lightning.errors import DataFileError

# Files that this library reads; every other file is JSON or JSONL, read by `sources` for errors that name the line.
TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def read_table(source: str, config: str = "", split: str = "train") -> Iterator[dict[str, Any]]:
    """Every row of a table.

    Args:
        source: a CSV, TSV or Parquet file, a folder of data files or one that `save_to_disk` wrote, or a hub id.
        config: of a hub set that has several.
        split: which part, slices included ("train[:100]").

    Raises:
        DataFileError: the library cannot load it.
    """
    # Tables of one's own are converted into a folder that goes away again: no stale cache, nothing left behind.
    with tempfile.TemporaryDirectory() as cache:
        yield from _load_table(source, config, split, cache)


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
            options = _csv_options(path)
            return datasets.load_dataset(kind, data_files=str(path), split=split, cache_dir=cache, **options)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            return saved if isinstance(saved, datasets.Dataset) else saved[split]
        # Hub sets stay in the library's own cache: that is what makes them usable offline. No code of a set is run.
        options = {"cache_dir": cache} if path.is_dir() else {}
        return datasets.load_dataset(str(path) if path.is_dir() else source, config or None, split=split, **options)
    except (DatasetsError, OSError, ValueError, KeyError) as error:
        raise DataFileError(
            f"The datasets library cannot load {source!r} (config {config or 'default'}, split {split}; looked in "
            f"{Path.cwd()} first): {error}. Expected a CSV, TSV or Parquet file, a folder of such files, or a hub id "
            "(owner/name) that is cached or can be downloaded."
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
