"""Column mapping: a file's own names for the keys of a format."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from mend_lightning.errors import RecordError

Columns = Mapping[str, str | Sequence[str]]
_MISSING = object()


def rename(data: Mapping[str, Any], columns: Columns, where: str, strict: bool = True) -> dict[str, Any]:
    """A record under a format's keys.

    Args:
        data: the record as it stands in the file.
        columns: key -> column, or key -> several columns (a list of what they hold, empty cells left out). A dotted
            column reaches into objects ("answer.value") and lists ("output.0.answer"); through a list without a
            number it takes all ("output.answer").
        where: how errors name the record.
        strict: a column that is not there is an error; else its key is left out.

    Raises:
        RecordError: a column is not there.

    Example:
        >>> record = {"q": "Capital?", "output": [{"answer": "Rome"}]}
        >>> rename(record, {"prompt": "q", "answers": "output.answer"}, "line 1")
        {'prompt': 'Capital?', 'answers': ['Rome']}
    """
    used = {_first(column) for value in columns.values() for column in _listed(value)}
    renamed = {key: value for key, value in data.items() if key not in used}
    for key, value in columns.items():
        found = [_lookup(data, column, where, strict) for column in _listed(value)]
        found = [each for each in found if each is not _MISSING]
        if isinstance(value, str) and found:
            renamed[key] = found[0]
        elif not isinstance(value, str):
            renamed[key] = [each for each in found if each not in (None, "")]
    return renamed


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _first(column: str) -> str:
    return column.partition(".")[0]


def _lookup(data: Mapping[str, Any], column: str, where: str, strict: bool) -> Any:
    if column in data:
        return data[column]
    value = _walk(data, column.split("."))
    if value is _MISSING and strict:
        near = _near(column, data)
        raise RecordError(f"{where}: there is no column {column!r}.{near} The columns: {', '.join(data)}.")
    return value


def _walk(value: Any, names: Sequence[str]) -> Any:
    if not names:
        return value
    name, *rest = names
    if isinstance(value, Mapping):
        return _walk(value[name], rest) if name in value else _MISSING
    if isinstance(value, list) and name.isdigit():
        return _walk(value[int(name)], rest) if int(name) < len(value) else _MISSING
    if isinstance(value, list):
        found = [_walk(each, names) for each in value]
        kept = [each for each in found if each is not _MISSING]
        return kept if kept or not value else _MISSING
    return None if value is None else _MISSING


def _near(column: str, data: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(column, _paths(data), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _paths(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key, value in data.items():
        paths.append(prefix + key)
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, Mapping):
            paths += _paths(inner, f"{prefix}{key}.")
    return paths
