"""Variables that slow NumPy's OpenBLAS, taken out before NumPy is loaded; for that reason standard library only."""

import os
import subprocess
import sys
from collections.abc import Mapping

SLOW = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""OpenBLAS reads them once, as it is loaded: one chooses its kernels, one how it cuts products into blocks."""

REMOVED = "NUMPY_GPT_BENCHMARKS_REMOVED"
"""Tells the restarted process what there was, for the report."""


def cleaned(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without SLOW; what was taken out stands in REMOVED, as "NAME=value NAME=value"."""
    found = [f"{name}={environment[name]}" for name in SLOW if name in environment]
    kept = {name: value for name, value in environment.items() if name not in SLOW}
    return kept | {REMOVED: " ".join(found)} if found else kept


def removed() -> str:
    """What was taken out for this process, or an empty string."""
    return os.environ.get(REMOVED, "")


def restart_if_slowed() -> None:
    """If one of SLOW is set, run this same command in a process without them, and exit with its code."""
    environment = cleaned(os.environ)
    if environment != dict(os.environ):
        sys.exit(subprocess.call([sys.executable, *sys.orig_argv[1:]], env=environment))
