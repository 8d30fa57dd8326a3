"""Every shipped config, through the command line."""

from __future__ import annotations

import contextlib
import io

import pytest
import yaml
from bases import REMARKS

from mend_lightning.cli import main
from mend_lightning.configs import config_folder, config_names
from mend_lightning.overlays import read_config

pytest_plugins = ["bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
FILES = sorted(config_folder().rglob("*.yaml"))


def test_what_is_found():
    assert sorted(path.stem for path in config_folder().glob("*.yaml")) == config_names()
    assert len({path.name for path in FILES}) == len(FILES) > 4


@pytest.mark.parametrize("name", config_names())
def test_the_parser_gets_what_is_written(name):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as end:
        main(["fit", "--config", name, "--print_config"])
    assert end.value.code == 0
    parsed = yaml.safe_load(shown.getvalue())
    missing = [key for key, leaf in read_config(name).leaves() if at(parsed, key) != leaf.value and key != "trainer.callbacks"]
    assert missing == []


def at(data: dict, key: str):
    """The value under a dotted key."""
    for part in key.split("."):
        data = data[part]
    return data
