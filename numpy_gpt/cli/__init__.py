"""The command line: numpy-gpt and its subcommands."""

from numpy_gpt.cli.main import main

__all__ = ["main"]
