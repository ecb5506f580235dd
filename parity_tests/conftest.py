"""The suite's settings: Hypothesis profiles, faults, devices, threads, skips as failures in CI; a checkpoint."""

import signal
from dataclasses import replace

import numpy as np
import pytest

from numpy_gpt import GPT, GPTConfig, save
from numpy_gpt.errors import InputError
from parity_tests import profiles
from parity_tests.judge import compare


def pytest_addoption(parser):
    parser.addoption(
        "--fault",
        metavar="NAME",
        help="apply this fault of tools/museum.py to numpy_gpt and watch the suite fail; '': no fault, but the same "
        "small number of cases",
    )
    parser.addoption(
        "--device",
        metavar="NAME",
        default="cpu",
        help="torch's device in test_device.py: cuda, cuda:1 or mps  [default: cpu]",
    )


def pytest_configure(config):
    # nohup, and background shells without job control, start their children with these signals ignored
    for name, handler in {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}.items():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    profiles.load(expect_failure=config.getoption("--fault") is not None)
    if config.getoption("--device") != "cpu":
        chosen_device(config)


def chosen_device(config):
    """torch's device named by --device. Raises UsageError if it is not available."""
    from torch_gpt.train import choose_device

    try:
        return choose_device(config.getoption("--device"))
    except InputError as error:
        raise pytest.UsageError(f"--device: {error}") from error


@pytest.fixture(scope="session")
def device(request):
    return chosen_device(request.config)


@pytest.fixture(scope="session", autouse=True)
def fault_in_place(request):
    """Apply the fault named by --fault for the session."""
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a small model that reads bytes."""
    folder = tmp_path_factory.mktemp("model")
    save(GPT(GPTConfig(257, 16, emb_dim=8, n_heads=2, n_layers=1), seed=4), folder, about={"encoding": "bytes"})
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Count a skipped test as a failure in CI."""
    report = yield
    if profiles.IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which CI does not allow: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Run torch and BLAS on one thread: with many tiny tensors, two threads mostly wait for each other."""
    with profiles.threads(1):
        yield


@pytest.fixture
def all_threads(monkeypatch):
    """Use every core, or pytest-xdist's share of them, for a test at GPT-2's size and the processes it starts."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, str(profiles.SHARE))
    with profiles.threads(profiles.SHARE):
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A learnable text of 500 characters: 28 windows of 16 bytes, or 7 steps, an epoch."""
    words = np.random.default_rng(1).choice(["the ", "model ", "learns ", "a ", "word\n"], 400)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(words)[:500])
    return path


@pytest.fixture
def brief_runs(monkeypatch):
    """Shorten runs of the tiny model: short samples and no plot, which would take most of the time."""
    from numpy_gpt.runs import pretrain
    from numpy_gpt.runs.losses import Losses

    monkeypatch.setattr(pretrain, "for_tiny", replace(pretrain.for_tiny, sample_tokens=4))
    monkeypatch.setattr(Losses, "plot", lambda self, batches_per_epoch: self.file.with_suffix(".png"))


def first_lines(reports):
    """Each failed test's name and first message line: tensor, index, both numbers, share of the budget."""
    for report in reports:
        crash = getattr(report.longrepr, "reprcrash", None)
        first = (crash.message if crash else str(report.longrepr)).strip().partition("\n")[0]
        yield f"{report.nodeid.rpartition('::')[2]}: {first.removeprefix('AssertionError: ')}"


def pytest_terminal_summary(terminalreporter):
    """Print one line per failure: pytest cuts its own summary to the terminal's width, often before the number.

    Then print the largest share of the budget used, per tensor kind.
    """
    if failed := terminalreporter.getreports("failed"):
        terminalreporter.section("failed tests")
        for line in first_lines(failed):
            terminalreporter.write_line(line)
    lines = list(compare.summary())
    if lines:
        terminalreporter.section("share of the numerical budgets used")
        for line in lines:
            terminalreporter.write_line(line)
