"""A YAML file as a tree whose values know the file and line they stand in, and how two such trees are merged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mend_lightning.cli.config.moved_classes import with_current_names
from mend_lightning.errors import ConfigError

# A tree: nested dicts of `Leaf`.
Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Reads scalars as jsonargparse does: 1e-6 is a number, 2020-01-01 is text."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as it was."""


_FLOAT = re.compile(
    r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":timestamp", ":float"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    # "A\nB" stays in one line.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _text)


@dataclass(frozen=True)
class Leaf:
    """A value of a config and where it stands.

    Attributes:
        value: anything but a mapping with entries; a list is one value. Classes that have moved have their current names.
        file, line: where it was given, the line from 1.
        comment: what the file says behind it, without the `#`.
    """

    value: Any
    file: Path
    line: int
    comment: str = ""


def read_tree(file: Path) -> Tree:
    """One file as a tree.

    Raises:
        ConfigError: it cannot be read, is no YAML mapping, or gives a key twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{file} is no config: expected keys with values (`model:` …), got a {node.id}.")
        return _tree(loader, node, file, text.splitlines())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"Config {file} cannot be read as YAML: {' '.join(str(error).split())}") from error


def _tree(loader: _Loader, node: yaml.MappingNode, file: Path, lines: list[str]) -> Tree:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for index, (key, _) in enumerate(node.value):
        if keys[index] in keys[:index]:
            raise ConfigError(f"{file}, line {key.start_mark.line + 1}: {keys[index]!r} is given twice.")
    loader.flatten_mapping(node)  # YAML's own `<<: *anchor`
    tree: Tree = {}
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode) and value.value:
            tree[loader.construct_object(key)] = _tree(loader, value, file, lines)
        else:
            # A block list's first item is on the next line: its comment stands behind the key.
            block = isinstance(value, yaml.SequenceNode) and not value.flow_style
            comment = _comment(lines, (key if block else value).end_mark)
            content = with_current_names(loader.construct_object(value, deep=True))
            tree[loader.construct_object(key)] = Leaf(content, file, key.start_mark.line + 1, comment)
    return tree


def _comment(lines: list[str], end: yaml.Mark) -> str:
    rest = lines[end.line][end.column :] if end.line < len(lines) else ""
    rest = rest.strip().removeprefix(":").strip()
    return rest.removeprefix("#").strip() if rest.startswith("#") else ""


def merge_trees(low: Tree, high: Tree) -> Tree:
    """`high` over `low`: mappings key by key, anything else replaced.

    Example:
        >>> here = Path("x.yaml")
        >>> low = {"model": {"rank": Leaf(8, here, 1), "lr": Leaf(0.1, here, 2)}}
        >>> plain(merge_trees(low, {"model": {"rank": Leaf(4, here, 1)}}))
        {'model': {'rank': 4, 'lr': 0.1}}
    """
    # Another class's arguments are not to be mixed with these.
    classes = [side["class_path"].value for side in (low, high) if isinstance(side.get("class_path"), Leaf)]
    if len(set(classes)) == 2:
        return high
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(low.get(key), dict)
        merged[key] = merge_trees(low[key], value) if both else value
    return merged


def plain(tree: Any) -> Any:
    """A tree's values without their sources."""
    if isinstance(tree, Leaf):
        return tree.value
    return {key: plain(value) for key, value in tree.items()}


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """(dotted key, leaf) of every value."""
    for key, value in tree.items():
        if isinstance(value, Leaf):
            yield f"{prefix}{key}", value
        else:
            yield from leaves(value, f"{prefix}{key}.")


def to_yaml(data: Any) -> str:
    """Data as YAML, one entry a line, in the order given."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
