"""Settings of the whole suite: Hypothesis profiles, where the data lies, and skips that are failures in CI."""

import os

import pytest
from hypothesis import HealthCheck, settings

from parity_tests import compare

IN_CI = bool(os.environ.get("CI"))

settings.register_profile("dev", deadline=None)
settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=200, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci" if IN_CI else "dev")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI nothing may be missing: a skipped test is a failed one."""
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and in CI nothing may be missing: {report.longrepr}"
    return report


@pytest.fixture(scope="module")
def one_torch_thread():
    """torch on one thread, for modules of many tiny tensors: two threads spend their time waiting for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    """Budgets are measured, not only kept: print what was used of them, per tensor kind."""
    lines = list(compare.summary())
    if lines:
        terminalreporter.section("share of the numerical budgets used")
        for line in lines:
            terminalreporter.write_line(line)
