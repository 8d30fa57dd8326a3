"""`mend-lightning show-config`: what a config amounts to, and where each of its values comes from."""

from __future__ import annotations

from pathlib import Path

from mend_lightning.cli.config.files import comparison_names, config_folder, config_names
from mend_lightning.cli.config.overlays import MergedConfig, read_config
from mend_lightning.cli.config.tree import Leaf, Tree, to_yaml
from mend_lightning.training.progress.console import console


def show_config_command(name: str | None = None) -> None:
    """Shows a config with all it builds on, each value with the file and line it comes from.

    Args:
        name: a YAML file, or a shipped config by name; default: lists the shipped ones.
    """
    lines = list_lines() if name is None else config_lines(read_config(name))
    # As it is: this is YAML, which a terminal's width must not break.
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def config_lines(config: MergedConfig) -> list[str]:
    """The merged config as YAML that can be saved and run, with a source behind every value.

    Example:
        >>> [line.split("  #")[0] for line in config_lines(read_config("quickstart")) if "rank:" in line]
        ['  rank: 256']
    """
    return [*(f"# from {_shown(file)}" for file in config.files), *_tree_lines(config.tree, 0)]


def _tree_lines(tree: Tree, depth: int) -> list[str]:
    lines = []
    for key, value in tree.items():
        if isinstance(value, Leaf):
            first, *rest = to_yaml({key: value.value}).splitlines()
            comment = f": {value.comment}" if value.comment else ""
            new = [f"{first}  # {_shown(value.file)}, line {value.line}{comment}", *rest]
        else:
            new = [f"{key}:", *_tree_lines(value, 2)]
        lines += [" " * depth + line for line in new]
    return lines


def _shown(file: Path) -> str:
    """A shipped file by its name in the folder of configs, another one as it is."""
    folder = config_folder().resolve()
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)


def list_lines() -> list[str]:
    """Name and first sentence of every shipped config."""
    names = [*config_names(), *comparison_names()]
    width = max(map(len, names))
    return [f"{name:<{width}}  {headline(config_folder() / f'{name}.yaml')}" for name in names]


def headline(file: Path) -> str:
    """The first line of a config's opening comment."""
    first = file.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip()
