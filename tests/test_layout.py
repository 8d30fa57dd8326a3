"""The layout of the package cannot rot: imports run one way, without circles, and no place grows too large.

Every import counts, also one inside a function or for the type checker alone, so a circle cannot hide in a function.
"""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mend_lightning"
PACKAGE = SOURCE.name
# A package imports only from those in rows above its own; the two of a row do not import each other.
FLOORS = [["errors"], ["files", "models"], ["data", "edits"], ["editors"], ["evaluation"], ["training", "ui"], ["cli"]]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MOST_FLOORS, MOST_ENTRIES, MOST_LINES = 7, 12, 300
# Below `training`, where Lightning is the data's business as well.
LIGHTNING_BELOW = {"data.datamodule"}


def read_modules(source: Path) -> dict[str, ast.Module]:
    """Name inside the package ("" is its root) -> contents."""
    paths = {path.relative_to(source).with_suffix(""): path for path in source.rglob("*.py")}
    names = {".".join(path.parts).removesuffix("__init__").removesuffix("."): path for path in paths}
    return {name: ast.parse(paths[path].read_text(encoding="utf-8")) for name, path in names.items()}


def imported_names(tree: ast.Module) -> set[str]:
    """Everything that a file imports anywhere, `from a import b` as "a.b"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def import_graph(source: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, and the names that it takes from the root."""
    modules = read_modules(source)
    graph: dict[str, set[str]] = {}
    for importer, tree in modules.items():
        own = {name for name in imported_names(tree) if name.split(".")[0] == PACKAGE}
        inside = {name.removeprefix(PACKAGE).removeprefix(".") for name in own} - {"", "__version__"}
        graph[importer] = {name if name in modules else name.rpartition(".")[0] or name for name in inside}
    return graph


def package_of(module: str) -> str:
    return module.split(".")[0]


def wrong_directions(source: Path) -> list[str]:
    """Imports of a package on the same floor or above, and of what is on no floor; those that hide it are wrong too.

    The root's public names and relative imports do. The root itself, which imports names when they are used, is on top.
    """
    arrows = [(a, b) for a, found in import_graph(source).items() for b in found if package_of(a) != package_of(b)]
    floors = {**FLOOR_OF, "": len(FLOORS)}
    bad = [(a, b) for a, b in arrows if floors.get(package_of(a), -1) <= floors.get(package_of(b), len(FLOORS))]
    relative = [(a, b) for a, tree in read_modules(source).items() for b in imported_names(tree) if b.startswith(".")]
    return sorted(f"{a} -> {b}" for a, b in bad + relative)


def circle(source: Path) -> list[str]:
    """The modules of a circle of imports; [] where there is none."""
    try:
        TopologicalSorter(import_graph(source)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def crowded(source: Path) -> list[str]:
    """The root where it has too many entries, and files that are too long."""
    entries = [path.name for path in source.iterdir() if path.name != "__pycache__"]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source.rglob("*.py")}
    long = sorted(f"{path.relative_to(source)}: {count}" for path, count in lengths.items() if count > MOST_LINES)
    return ([f"{len(entries)} entries"] if len(entries) > MOST_ENTRIES else []) + long


def lightning_below_training(source: Path) -> set[str]:
    """Modules below `training` that import Lightning."""
    modules = {name: tree for name, tree in read_modules(source).items() if package_of(name) not in ("training", "cli")}
    libraries = {"lightning", "pytorch_lightning"}
    return {name for name, tree in modules.items() if libraries & {n.split(".")[0] for n in imported_names(tree)}}


def test_every_package_has_its_floor():
    assert {name for name in map(package_of, import_graph(SOURCE)) if name} == set(FLOOR_OF)
    assert len(FLOORS) <= MOST_FLOORS


def test_the_documentation_has_the_same_floors():
    text = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| ([`\w, ]+) \|", text, re.MULTILINE)
    assert [(int(floor), sorted(re.findall(r"\w+", names))) for floor, names in rows] == [
        (floor, sorted(names)) for floor, names in reversed(list(enumerate(FLOORS, start=1)))
    ]


def test_imports_point_downwards():
    assert wrong_directions(SOURCE) == []


def test_no_imports_run_in_a_circle():
    assert circle(SOURCE) == []


def test_no_place_is_crowded():
    assert crowded(SOURCE) == []


def test_lightning_begins_at_training():
    assert lightning_below_training(SOURCE) == LIGHTNING_BELOW


def made(folder: Path, files: dict[str, str]) -> Path:
    """A package of such files."""
    for name, text in files.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / PACKAGE


GOOD = {
    "__init__.py": "",
    "models/base.py": "from mend_lightning.errors import MendError\nfrom mend_lightning import __version__",
    "errors.py": "import torch",
    "data/datamodule.py": "import lightning as L\nfrom mend_lightning.models import base",
    "data/__init__.py": "from mend_lightning.data.datamodule import EditDataModule",
}
IN_A_FUNCTION = "def late():\n    from mend_lightning.{} import a\n"
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mend_lightning.{}\n"


def test_a_good_tree_passes(tmp_path):
    source = made(tmp_path, GOOD)
    assert (wrong_directions(source), circle(source), crowded(source)) == ([], [], [])
    assert lightning_below_training(source) == LIGHTNING_BELOW


@pytest.mark.parametrize(
    "files, found",
    [
        ({"models/base.py": "from mend_lightning.data import datamodule"}, "models.base -> data.datamodule"),
        ({"models/base.py": IN_A_FUNCTION.format("editors"), "editors/__init__.py": ""}, "models.base -> editors"),
        ({"edits/edit.py": FOR_TYPES.format("data.datamodule")}, "edits.edit -> data.datamodule"),
        ({"ui/page.py": "import mend_lightning.training.step", "training/step.py": ""}, "ui.page -> training.step"),
        ({"durable.py": "", "models/base.py": "from mend_lightning import durable"}, "models.base -> durable"),
        ({"durable.py": "from mend_lightning.errors import MendError"}, "durable -> errors"),
        ({"edits/edit.py": "from mend_lightning import MendEditor"}, "edits.edit -> MendEditor"),
        ({"edits/edit.py": "from ..data import datamodule"}, "edits.edit -> ..data.datamodule"),
    ],
)
def test_a_wrong_direction_is_seen(files, found, tmp_path):
    assert wrong_directions(made(tmp_path, {**GOOD, **files})) == [found]


@pytest.mark.parametrize("back", ["from mend_lightning.{} import a", IN_A_FUNCTION, FOR_TYPES])
def test_a_circle_is_seen(back, tmp_path):
    files = {"data/order.py": "from mend_lightning.data.tasks import a", "data/tasks.py": back.format("data.order")}
    assert set(circle(made(tmp_path, {**GOOD, **files}))) == {"data.order", "data.tasks"}


@pytest.mark.parametrize(
    "files, found",
    [
        ({f"part{i}.py": "" for i in range(9)}, ["13 entries"]),
        ({"models/base.py": "\n" * MOST_LINES}, []),
        ({"models/base.py": "\n" * (MOST_LINES + 1)}, [f"models/base.py: {MOST_LINES + 1}"]),
    ],
)
def test_a_crowd_is_seen(files, found, tmp_path):
    assert crowded(made(tmp_path, {**GOOD, **files})) == found


@pytest.mark.parametrize(
    "text",
    ["import lightning.pytorch as L", "from pytorch_lightning import Trainer", "def late():\n    import lightning"],
)
def test_lightning_below_is_seen(text, tmp_path):
    assert "models.base" in lightning_below_training(made(tmp_path, {**GOOD, "models/base.py": text}))
