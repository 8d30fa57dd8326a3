"""The documents say what is there: links, files, functions and commands that they name exist, and README stays a page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from mend_lightning.cli.main import COMMANDS, TRAINER_COMMANDS

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
SOURCE = ROOT / "src" / "mend_lightning"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "notebooks/*.md", "benchmarks/*.md", "src/**/*.md")
    for path in ROOT.glob(pattern)
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
# What the earlier layout called its modules is history.
HISTORY = ROOT / "CHANGELOG.md"


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """What a link may point to in a document: its headings, as GitHub writes them."""
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def defined_in(path: Path) -> set[str]:
    """Functions and classes of a file, methods as `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def test_there_are_documents():
    assert {"README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/edits.md", "benchmarks/README.md"} <= set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    document, broken = ROOT / name, []
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist(name):
    shown = set(re.findall(r"^mend-lightning +([a-z][a-z0-9-]+)", text_of(name), re.MULTILINE))
    assert shown <= {*COMMANDS, *TRAINER_COMMANDS}


@pytest.mark.parametrize("name", [name for name in NAMES if ROOT / name != HISTORY])
def test_modules_exist(name):
    named = set(re.findall(r"from (mend_lightning[\w.]*) import|`(mend_lightning(?:\.[a-z]\w*)+)`", text_of(name)))
    for module in {"".join(each) for each in named}:
        path = SOURCE.joinpath(*module.split(".")[1:])
        assert path.is_dir() or path.with_suffix(".py").is_file(), module


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_of_the_package_exist(name):
    packages = "|".join(path.name for path in SOURCE.iterdir() if path.is_dir())
    paths = set(re.findall(rf"`((?:{packages})/[\w/]+\.py)`", text_of(name)))
    assert len(paths) > 8
    # "NAME" stands for what a contributor adds.
    assert [path for path in sorted(paths) if "NAME" not in path and not (SOURCE / path).is_file()] == []


def test_the_walks_name_functions_that_are_there():
    found = re.findall(r"`([A-Za-z_.]+)`\s+\(`([\w/]+\.py)`", text_of("docs/architecture.md"))
    assert len(found) > 30
    assert [(name, path) for name, path in found if name not in defined_in(SOURCE / path)] == []


def test_readme_is_a_page():
    assert len(text_of("README.md").splitlines()) <= 150


def test_the_callback_s_difference_is_that_of_the_examples():
    (shown,) = re.findall(r"```diff\n(.*?)```", text_of("README.md"), re.DOTALL)
    before, after = (text_of(f"examples/fine_tune_t5{end}.py").splitlines() for end in ("", "_with_editor"))
    lines = [(line[0], line[1:]) for line in shown.splitlines() if line != " ..."]
    assert sum(mark == "+" for mark, _ in lines) == 4
    for mark, line in lines:
        # The script imports another name in the same line.
        line = re.sub(r"^(from mend_lightning import .*)$", r"\1, read_records", line)
        assert (line in after) == (mark in "+ ") and (line in before) == (mark in "- "), line
