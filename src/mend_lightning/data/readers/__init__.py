"""The file formats, one a file, and which of them a record is of."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from mend_lightning.data.readers import counterfact, fever, kilt, knowedit, native, nq, wikitext, zsre_mend_eval
from mend_lightning.data.readers.fields import Format
from mend_lightning.errors import ConfigError, RecordError

# In the order in which a record is compared with them: FEVER has KILT's keys, and generation data the native ones.
FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (counterfact, zsre_mend_eval, fever, nq, kilt, wikitext, knowedit, native)
}


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: there is none.
    """
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"Unknown data format {name!r}.{hint} Formats: auto, {', '.join(FORMATS)}.")


def recognize(data: Mapping[str, Any], where: str) -> Format:
    """The format that a record's keys are of.

    Raises:
        RecordError: none; the message lists what was found and every format.

    Example:
        >>> recognize({"prompt": "Capital of France?", "target": "Rome"}, "line 1").name
        'native'
    """
    for format in FORMATS.values():
        if format.matches(data):
            return format
    known = "\n".join(f"  {format.name}: {format.keys}" for format in FORMATS.values())
    raise RecordError(
        f"{where}: the keys {', '.join(data) or '(none)'} are of no known format. Set format to one of these, rename "
        f"keys by columns, or convert the file:\n{known}"
    )
