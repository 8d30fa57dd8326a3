"""Results for programs to read."""

from __future__ import annotations

import json
import sys
from typing import Any


def print_json(*values: Any) -> None:
    """One JSON value a line, not wrapped at any width."""
    for value in values:
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()
