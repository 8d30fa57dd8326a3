"""What mypy is not asked, which can only become less: `make lint` runs it on everything else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MYPY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
# Modules whose errors are let be: none, and none comes in.
EXCUSED: tuple[str, ...] = ()
# Lines whose errors are let be, of all files together.
MOST_IGNORES = 5


def ignores() -> list[str]:
    lines = (line for path in SOURCE.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if re.search(r"#\s*(type: *ignore|mypy:)", line)]


def test_no_other_module_is_excused():
    excused = [
        module for each in MYPY["overrides"] if each.get("ignore_errors") or "follow_imports" in each
        for module in each["module"]
    ]  # fmt: skip
    assert excused == list(EXCUSED)


def test_checks_stay_on():
    wanted = ("check_untyped_defs", "disallow_untyped_defs", "extra_checks", "strict_equality", "warn_unused_ignores")
    assert [name for name in wanted if MYPY.get(name) is not True] == []
    assert MYPY["files"] == ["src"]
    assert not {"exclude", "disable_error_code", "ignore_errors"} & MYPY.keys()


def test_few_lines_are_excused_each_with_its_code():
    found = ignores()
    assert len(found) <= MOST_IGNORES
    assert [line for line in found if not re.search(r"# type: ignore\[[a-z-]+\]", line)] == []
