"""The package as others get it: what importing it costs, what its wheel holds, and that the wheel works alone."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import mend_lightning

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "mend_lightning"
# Outside of `training`, what loads Lightning; nothing else there may.
LIGHTNING_PARTS = {
    "data.datamodule", "cli.run_parser", "cli.trainer_settings", "cli.commands.plan", "cli.commands.sequential",
}  # fmt: skip
# Of `training`, what others use without a Trainer.
LIGHTNING_FREE_TRAINING = {
    "training", "training.step", "training.calibration", "training.optimization", "training.progress.console",
    "training.memory.plan", "training.trunk_cache.cached", "training.mend_callback.isolation",
}  # fmt: skip
# Parts that cannot be imported without an extra.
GRADIO_PARTS = {"ui.page"}

pytestmark = pytest.mark.skipif(not SOURCE.is_dir(), reason="needs the checkout")


def modules() -> list[str]:
    """Dotted names of all modules inside the package."""
    paths = [path.relative_to(SOURCE).with_suffix("") for path in SOURCE.rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    absent = GRADIO_PARTS if find_spec("gradio") is None else set()
    return sorted(names - {"__init__", "__main__"} - absent)


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )


def imported_lightning(names: list[str], folder: Path) -> list[str]:
    """Which Lightning packages a fresh interpreter has loaded after importing these modules of the package."""
    lines = ["import importlib, sys"]
    lines += [f"importlib.import_module('mend_lightning{'.' + name if name else ''}')" for name in names]
    lines.append("print(*[name for name in ('lightning', 'pytorch_lightning') if name in sys.modules])")
    result = python("\n".join(lines), folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_what_the_documents_import_is_there():
    documents = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents)
    lines = re.findall(r"^from mend_lightning import ([\w, ]+)$", text, re.M)
    names = {name.strip() for line in lines for name in line.split(",")}
    assert {"EditStack", "make_edit", "MendModule"} <= names
    assert [name for name in sorted(names) if not hasattr(mend_lightning, name)] == []


def test_the_core_does_not_import_lightning(tmp_path):
    others = {name for name in modules() if name.split(".")[0] != "training"} - LIGHTNING_PARTS
    assert {"editors.mend", "edits.edit", "evaluation.metrics", "cli.main", "cli.commands.edit"} < others
    assert LIGHTNING_PARTS < set(modules())
    assert imported_lightning(["", *sorted(others | LIGHTNING_FREE_TRAINING)], tmp_path) == []


def test_that_would_be_seen(tmp_path):
    assert "lightning" in imported_lightning(["training.module"], tmp_path)


def test_public_names():
    assert len(mend_lightning.__all__) > 15
    for name in mend_lightning.__all__:
        assert getattr(mend_lightning, name) is not None, name
    assert dir(mend_lightning) == mend_lightning.__all__
    for name, home in mend_lightning._HOME.items():
        assert getattr(mend_lightning, name) is getattr(importlib.import_module(f"mend_lightning.{home}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'MendModul'"):
        _ = mend_lightning.MendModul


def test_nothing_prints_and_nothing_asserts():
    """Output goes through the console or a logger; wrong input raises named errors, also under `python -O`."""
    paths = list(SOURCE.rglob("*.py"))
    assert len(paths) > 20
    found = [
        f"{path.name}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert) or isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert found == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        info = f"mend_lightning-{mend_lightning.__version__}.dist-info"
        metadata = file.read(f"{info}/METADATA").decode()
        assert "mend-lightning = mend_lightning.cli:main" in file.read(f"{info}/entry_points.txt").decode()
    inside = {str(path.relative_to(SOURCE.parent)) for path in SOURCE.rglob("*") if path.is_file()}
    inside = {name for name in inside if "__pycache__" not in name}
    folder = ROOT / "configs"
    configs = {f"mend_lightning/configs/{path.relative_to(folder)}" for path in folder.rglob("*.yaml")}
    assert len(configs) > 4 and "mend_lightning/py.typed" in inside
    assert {name for name in names if name.startswith("mend_lightning/")} == inside | configs
    assert {name.split("/")[0] for name in names} == {"mend_lightning", info}
    assert f"{info}/licenses/LICENSE" in names
    for folder, files in (("world_facts", 3), ("open_facts", 6)):
        assert (
            sum(name.startswith(f"mend_lightning/data/{folder}/") and name.endswith(".jsonl") for name in names)
            == files
        )
    requirement = next(line for line in metadata.splitlines() if line.startswith("Requires-Dist: lightning"))
    assert "!=2.6.2" in requirement and "!=2.6.3" in requirement


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    code = """
import mend_lightning
from mend_lightning.cli import main
from mend_lightning.cli.config.files import config_names, find_config
from mend_lightning.data.records import read_records
from mend_lightning.cli.config.overlays import read_config
print(mend_lightning.__file__)
print(find_config("quickstart"))
assert read_config("quickstart").values()["model"]["rank"] == 256
assert len(read_records("world_facts/test")) >= 300
assert "quickstart" in config_names()
try:
    main(["fit", "--config", "quickstart", "--print_config"])
except SystemExit as end:
    assert not end.code, end.code
"""
    result = python(code, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert result.returncode == 0, result.stderr
    first, second, *config = result.stdout.splitlines()
    assert Path(first).is_relative_to(tmp_path / "site") and Path(second).is_relative_to(tmp_path / "site")
    assert any(line.startswith("model:") for line in config)
