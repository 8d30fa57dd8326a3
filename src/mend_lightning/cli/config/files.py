"""Finds configs by path, or by the name of one that travels with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from mend_lightning.errors import ConfigError

# Where a run goes whose config does not say it.
DEFAULT_ROOT = "runs/mend"


def config_folder() -> Path:
    """The folder of the shipped configs: inside the wheel, or `configs/` of a checkout."""
    inside = Path(__file__).parents[2] / "configs"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[4] / "configs"


def config_names() -> list[str]:
    """Names of the shipped configs that can be run; what they share lies in `shared/`."""
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


def comparison_names() -> list[str]:
    """Names of the shipped configs of `mend-lightning compare`."""
    return sorted(f"compare/{path.stem}" for path in config_folder().glob("compare/*.yaml"))


def find_config(name: str) -> str:
    """A path as it is, or the path of the shipped config of that name.

    Raises:
        ConfigError: neither exists.

    Example:
        >>> find_config("quickstart").endswith("quickstart.yaml")
        True
    """
    if Path(name).expanduser().is_file():
        return name
    shipped = config_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return str(shipped)
    raise ConfigError(f"Config {name!r} is no file (looked in {Path.cwd()}) and no shipped config.{near_config(name)}")


def near_config(name: str) -> str:
    """What an error about an unknown config says at its end.

    Example:
        >>> near_config("quikstart")
        ' Did you mean quickstart? `mend-lightning show-config` lists the shipped ones.'
    """
    folder = config_folder()
    known = config_names() + [f"{path.parent.name}/{path.stem}" for path in folder.glob("*/*.yaml")]
    near = difflib.get_close_matches(name.lower().removesuffix(".yaml"), known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{hint} `mend-lightning show-config` lists the shipped ones."
