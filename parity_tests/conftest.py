"""Settings of the whole suite: profiles, faults put in on purpose, threads, and skips that are failures in CI."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from parity_tests import profiles
from parity_tests.judge import compare


def pytest_addoption(parser):
    parser.addoption(
        "--fault",
        metavar="NAME",
        help="put this fault of tools/museum.py into numpy_gpt first, and watch the suite turn red; '': none, "
        "but the few cases that faults are tried on",
    )


def pytest_configure(config):
    # nohup, and a shell that runs in the background without job control, have signals ignored by all that they start
    for name, handler in {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}.items():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    profiles.load(expect_failure=config.getoption("--fault") is not None)


@pytest.fixture(scope="session", autouse=True)
def fault_in_place(request):
    """The fault asked for with --fault, in place for the whole session."""
    name = request.config.getoption("--fault")
    if not name:
        yield
        return
    from parity_tests.tools.museum import find

    try:
        fault = find(name)
    except KeyError as error:
        pytest.exit(f"--fault: {error.args[0]}", returncode=pytest.ExitCode.USAGE_ERROR)
    with pytest.MonkeyPatch.context() as patch:
        fault.apply(patch)
        patch.setattr(compare, "record", lambda *_: None)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI nothing may be missing: a skipped test is a failed one."""
    report = yield
    if profiles.IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and in CI nothing may be missing: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """torch and BLAS on one thread: with many tiny tensors, two threads spend their time waiting for each other."""
    with profiles.threads(1):
        yield


@pytest.fixture
def all_threads():
    """Every core, for a test at GPT-2's size."""
    with profiles.threads(os.cpu_count() or 1):
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text of 2,000 characters with something to learn: 28 windows of 16 bytes an epoch, 7 steps."""
    words = np.random.default_rng(1).choice(["the ", "model ", "learns ", "a ", "word\n"], 400)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(words)[:500])
    return path


@pytest.fixture
def brief_runs(monkeypatch):
    """Runs of the tiny model without what takes most of their time here: long samples, and the plot."""
    from numpy_gpt.runs import pretrain
    from numpy_gpt.runs.losses import Losses

    monkeypatch.setattr(pretrain, "for_tiny", replace(pretrain.for_tiny, sample_tokens=4))
    monkeypatch.setattr(Losses, "plot", lambda self, batches_per_epoch: self.file.with_suffix(".png"))


def first_lines(reports):
    """Of each failed test its name, and its message's first line: tensor, index, both numbers, share of the budget."""
    for each in reports:
        crash = getattr(each.longrepr, "reprcrash", None)
        said = (crash.message if crash else str(each.longrepr)).strip().partition("\n")[0]
        yield f"{each.nodeid.rpartition('::')[2]}: {said.removeprefix('AssertionError: ')}"


def pytest_terminal_summary(terminalreporter):
    """The failures in one line each: pytest cuts its own summary to the terminal's width, mostly before the number.

    Then the budgets, which are measured, not only kept: what was used of them, per tensor kind.
    """
    if failed := terminalreporter.getreports("failed"):
        terminalreporter.section("what failed")
        for line in first_lines(failed):
            terminalreporter.write_line(line)
    lines = list(compare.summary())
    if lines:
        terminalreporter.section("share of the numerical budgets used")
        for line in lines:
            terminalreporter.write_line(line)
