"""Finds configs by path, or by the name of one that travels with the package."""

from __future__ import annotations

from pathlib import Path

from mend_lightning.errors import ConfigError


def config_folder() -> Path:
    """The folder of the shipped configs: inside the wheel, or `configs/` of a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "configs"


def config_names() -> list[str]:
    """Names of the shipped configs."""
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


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
    raise ConfigError(
        f"Config {name!r} is no file (looked in {Path.cwd()}) and no shipped config. Shipped: {', '.join(config_names())}."
    )


def with_config_paths(arguments: list[str]) -> list[str]:
    """Command-line arguments with every `--config NAME` turned into `--config PATH`."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] in ("--config", "-c"):
            argument = find_config(argument)
        elif argument.startswith("--config="):
            argument = "--config=" + find_config(argument.removeprefix("--config="))
        found.append(argument)
    return found
