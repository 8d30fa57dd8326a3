"""Runs notebooks in a kernel of this Python and saves them with their outputs, in a form that git can compare.

python scripts/run_notebooks.py notebooks/*.ipynb
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class ThisPython(AsyncKernelManager):
    """Starts the kernel with the Python that runs this: a kernel of that name may be installed for another one."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def with_parameters(notebook: Any, values: Mapping[str, Any]) -> Any:
    """The notebook with other values in the cell tagged `parameters`.

    Args:
        notebook: is not changed.
        values: name -> value; each name must be one that the cell sets.

    Raises:
        KeyError: no cell has the tag, or it does not set a name.
    """
    notebook = nbformat.from_dict(notebook)
    cell = next((cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])), None)
    if cell is None:
        raise KeyError("No cell is tagged `parameters`.")
    lines = cell.source.splitlines()
    for name, value in values.items():
        where = [i for i, line in enumerate(lines) if line.startswith(f"{name} = ")]
        if not where:
            raise KeyError(f"The cell tagged `parameters` does not set {name}.")
        lines[where[0]] = f"{name} = {value!r}"
    cell.source = "\n".join(lines)
    return notebook


def execute(notebook: Any, folder: Path, timeout: int = 1800) -> Any:
    """Runs every cell in a fresh kernel whose working folder is `folder`; returns the notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    notebook = nbformat.from_dict(notebook)
    # Timings would be another change in every run.
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    # Without ipywidgets tqdm says at its import that it would draw another bar; it draws none here.
    return client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"})


def cleaned(notebook: Any) -> Any:
    """The notebook without what depends on the machine that ran it: metadata of the kernel, of cells and of pictures."""
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", type=Path, nargs="+")
    for path in parser.parse_args().notebooks:
        print(path, flush=True)
        notebook = cleaned(execute(nbformat.read(path, 4), path.parent))
        nbformat.validate(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
