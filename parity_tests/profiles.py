"""How the suite runs: thread counts, and Hypothesis profiles, registered once.

dev: new cases in every run. ci: the same cases in every run of the same tests under the same Hypothesis (which takes
constants from the loaded modules), 200 unless a test sets its own number. broken: few fixed cases and no shrinking, for
runs that are expected to fail (the museum, mutation testing).
"""

import os
from contextlib import contextmanager
from importlib.util import find_spec

from hypothesis import HealthCheck, Phase, settings
from threadpoolctl import threadpool_limits

IN_CI = bool(os.environ.get("CI"))

ALL_THREADS = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
"""Threads of BLAS and torch at the start. Mutation testing sets 1: a process forked from one with OpenMP threads hangs
waiting for them, and mutmut counts the hang as a killed mutant."""

SHARE = max(1, ALL_THREADS // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
"""This process's part of them: threads of two processes on the same cores mostly wait for each other."""

settings.register_profile("dev", deadline=None)
settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=200, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "broken",
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    max_examples=12,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def load(expect_failure=False):
    """Load this process's profile. mutmut sets MUTANT_UNDER_TEST."""
    if expect_failure or "MUTANT_UNDER_TEST" in os.environ:
        settings.load_profile("broken")
    else:
        settings.load_profile("ci" if IN_CI else "dev")


@contextmanager
def threads(count):
    """Run BLAS, and torch if installed, on `count` threads within the block."""
    if find_spec("torch") is None:
        with threadpool_limits(count, user_api="blas"):
            yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)
