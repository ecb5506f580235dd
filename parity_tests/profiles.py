"""How the suite runs: on how many threads, and Hypothesis profiles, registered once.

dev: new cases at every run. ci: the same cases at every run of the same tests (Hypothesis takes constants from whatever
modules are loaded) under the same Hypothesis, and 200 where a test names no number of its own. broken: few, the same,
and no shrinking, for runs of which a failure is expected (the museum, mutation testing).
"""

import os
from contextlib import contextmanager
from importlib.util import find_spec

from hypothesis import HealthCheck, Phase, settings
from threadpoolctl import threadpool_limits

IN_CI = bool(os.environ.get("CI"))

ALL_THREADS = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
"""What BLAS and torch begin with. Under mutation testing one: a process that has forked from one where OpenMP had
threads waits for them for ever, and mutmut takes that for a mutant that was noticed."""

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
    """Choose for this process. MUTANT_UNDER_TEST is mutmut's."""
    if expect_failure or "MUTANT_UNDER_TEST" in os.environ:
        settings.load_profile("broken")
    else:
        settings.load_profile("ci" if IN_CI else "dev")


@contextmanager
def threads(count):
    """BLAS on so many threads meanwhile, and torch as well where it is installed."""
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
