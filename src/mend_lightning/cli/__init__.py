"""The command line, `mend-lightning`: nothing heavy is imported before a command runs."""

from mend_lightning.cli.main import main

__all__ = ["main"]
