"""The command numpy-gpt."""

from numpy_gpt.cli.main import main

__all__ = ["main"]
