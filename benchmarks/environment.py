"""Removal of variables that slow NumPy's OpenBLAS, before NumPy is loaded: so this imports no third-party package."""

import os
import subprocess
import sys
from collections.abc import Mapping

SLOW = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""OpenBLAS reads them once, when loaded: the first selects its kernels, the second how it splits products."""

REMOVED = "NUMPY_GPT_BENCHMARKS_REMOVED"
"""Passes the removed variables to the restarted process, for the report."""


def cleaned(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without SLOW; the removed ones are in REMOVED, as "NAME=value NAME=value"."""
    found = [f"{name}={environment[name]}" for name in SLOW if name in environment]
    kept = {name: value for name, value in environment.items() if name not in SLOW}
    return kept | {REMOVED: " ".join(found)} if found else kept


def removed() -> str:
    """The variables removed for this process, or an empty string."""
    return os.environ.get(REMOVED, "")


def restart_if_slowed() -> None:
    """If one of SLOW is set, run the same command in a process without them, and exit with its code."""
    environment = cleaned(os.environ)
    if environment != dict(os.environ):
        sys.exit(subprocess.call([sys.executable, *sys.orig_argv[1:]], env=environment))
