"""Configs that build on other configs: `base_config` names them, and every merged value keeps its source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mend_lightning.cli.config.files import config_folder, find_config, near_config
from mend_lightning.cli.config.moved_classes import has_old_names, with_current_names
from mend_lightning.cli.config.tree import Leaf, Tree, leaves, merge_trees, plain, read_tree, to_yaml
from mend_lightning.errors import ConfigError

# The key of a config that names what it builds on; it never reaches the parser.
BASE_KEY = "base_config"
# Of a run's config; Lightning's parser breaks where one of these is no mapping.
SECTIONS = ("model", "data", "trainer")


@dataclass(frozen=True)
class MergedConfig:
    """A config and all it builds on.

    Attributes:
        files: what was merged, in this order; the last one is the config itself.
        tree: nested dicts of `Leaf`.
    """

    files: tuple[Path, ...]
    tree: Tree

    def values(self) -> dict[str, Any]:
        """The merged config as plain data."""
        return plain(self.tree)

    def text(self) -> str:
        """The merged config as YAML."""
        return to_yaml(self.values())

    def leaves(self) -> Iterator[tuple[str, Leaf]]:
        """(dotted key, leaf) of every value."""
        yield from leaves(self.tree)


def read_config(name: str | Path) -> MergedConfig:
    """Reads a config with everything it builds on.

    A config may start with `base_config: NAME`, or a list of names: files beside it, or shipped configs. Later
    ones win over earlier ones, and the config itself over all. Mappings are merged key by key, anything else (a list
    too) is replaced. A mapping with another `class_path` is replaced as well: its arguments are another class's.

    Args:
        name: path of a YAML file, or name of a shipped config.

    Raises:
        ConfigError: a file is missing, is no YAML mapping, gives a key twice, or builds on itself.

    Example:
        >>> config = read_config("smollm2-world-facts")
        >>> [file.stem for file in config.files]
        ['trainer', 'world-facts', 'one-layer', 'smollm2-world-facts']
        >>> config.values()["model"]["confidence"]
        0.77
    """
    files: dict[Path, Tree] = {}
    _collect(Path(find_config(str(name))).expanduser().resolve(), (), files)
    tree: Tree = {}
    for own in files.values():
        tree = merge_trees(tree, {key: value for key, value in own.items() if key != BASE_KEY})
    return MergedConfig(tuple(files), tree)


def _collect(file: Path, above: tuple[Path, ...], files: dict[Path, Tree]) -> None:
    """Adds a file behind those it builds on; one that two others build on is read once."""
    if file in above:
        chain = " -> ".join(path.name for path in (*above, file))
        raise ConfigError(f"Config {above[0]} builds on itself: {chain}. Remove one {BASE_KEY}.")
    if file in files:
        return
    own = read_tree(file)
    for name in _base_names(own, file):
        _collect(_find_base(name, file), (*above, file), files)
    files[file] = own


def _base_names(tree: Tree, file: Path) -> list[str]:
    leaf = tree.get(BASE_KEY, [])
    value = leaf.value if isinstance(leaf, Leaf) else leaf
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        shown = plain(value) if isinstance(value, dict) else value
        raise ConfigError(f"{file}: {BASE_KEY} must be the name of a config or a list of names, got {shown!r}.")
    return names


def _find_base(name: str, file: Path) -> Path:
    names = (name, f"{name}.yaml")
    # First what lies beside the file, then what travels with the package.
    for folder in (file.parent, config_folder()):
        for path in (folder / Path(name).expanduser() for name in names):
            if path.is_file():
                return path.resolve()
    raise ConfigError(
        f"{file} builds on {name!r}, which is no file (looked in {file.parent}) and no shipped config."
        f"{near_config(name)}"
    )


def resolved_configs(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Command-line arguments with every `--config NAME` turned into what the parser can read.

    A config that stands alone becomes its path; one that builds on others (`base_config`), or names a class by where
    it was in version 0.1, becomes YAML text.

    Returns:
        The arguments, and the files that were merged into them, later ones winning over earlier ones.

    Raises:
        ConfigError: as `read_config`, or `model`, `data` or `trainer` is no mapping.
    """
    resolved: list[str] = []
    files: list[Path] = []
    names = iter(arguments)
    for argument in names:
        if argument in ("--config", "-c"):
            value = next(names, None)
            if value is None:
                return [*resolved, argument], files
        elif argument.startswith("--config="):
            value = argument.removeprefix("--config=")
        else:
            resolved.append(with_current_names(argument))
            continue
        content, merged = _resolved(value)
        resolved += ["--config", content]
        files += merged
    return resolved, files


def _resolved(name: str) -> tuple[str, list[Path]]:
    config = read_config(name)
    if "compare" in config.tree:
        raise ConfigError(f"{name} compares several editors. Give it to `mend-lightning compare --config {name}`.")
    for section in SECTIONS:
        leaf = config.tree.get(section)
        if isinstance(leaf, Leaf) and leaf.value != {}:
            raise ConfigError(
                f"{leaf.file}, line {leaf.line}: {section} must hold keys with values, got {leaf.value!r}."
            )
    as_written = len(config.files) == 1 and not has_old_names(config.files[0])
    return (str(config.files[0]) if as_written else config.text()), list(config.files)
