"""The museum on show: runs a complete test file, and the naive check, on each fault."""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from parity_tests.tools.museum import NAIVE_ATOL, Fault

INTRODUCTION = f"""# The museum of faults

Errors that published GPTs shipped, most of them under a green test suite. `museum.py` makes each of them by
deliberately changing our own code; the table shows how two suites respond:

* **the naive check** is what those projects had: weights times 0.02, B = 1, every token id once, no dropout, the
  gradient of `.sum()`, and any difference up to {NAIVE_ATOL:g} is a match. The number is the largest difference it saw.
* **this suite**: its first test to fail, and the message.

`python -m parity_tests museum --out parity_tests/museum.md` regenerates this page; `pytest parity_tests --fault NAME`
runs the suite with one fault in place. Faults named "our own" are not known from any project.
"""


@dataclass(frozen=True)
class Exhibit:
    """Both suites' results for a fault. killed_by: a pytest node id, or None if no test failed."""

    fault: Fault
    naive: str
    killed_by: str | None
    message: str

    @property
    def naive_is_green(self):
        return self.naive.startswith("green")


def naive_verdict(fault):
    """green or red, with the largest difference that the naive check sees with the fault in place."""
    with pytest.MonkeyPatch.context() as patch:
        fault.apply(patch)
        try:
            difference = fault.naive()
        except Exception as error:  # a crash is red too
            return f"red: {type(error).__name__}"
    if math.isnan(difference):
        return "red: another shape, or NaN"
    return f"{'green' if difference < NAIVE_ATOL else 'red'}, {difference:.0e}" if difference else "green, 0"


class FirstFailure:
    """A pytest plugin that keeps the first failed test; failing fixtures do not count, since they test nothing."""

    def __init__(self):
        self.report = None

    def pytest_runtest_logreport(self, report):
        if report.failed and report.when == "call" and self.report is None:
            self.report = report

    @property
    def message(self):
        crash = getattr(self.report.longrepr, "reprcrash", None)
        return (crash.message if crash else str(self.report.longrepr)).splitlines()[0]


def first_failure(suite, fault=""):
    """Run a test file with this fault ("": none) up to its first failure. Raises RuntimeError if it cannot be run."""
    first = FirstFailure()
    options = ["-x", "--assert=plain", "-p", "no:terminal", "-p", "no:cacheprovider", "--fault", fault]
    code = pytest.main([*options, str(Path(__file__).parents[1] / suite)], plugins=[first])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code != (pytest.ExitCode.OK if first.report is None else pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest could not run {suite} on the fault {fault!r}: {code!r}")
    return first


@cache
def check_green(suite):
    """Raise RuntimeError if a test file fails without a fault: its failures would then prove nothing."""
    first = first_failure(suite)
    if first.report is not None:
        raise RuntimeError(f"{suite} is red without a fault: {first.report.nodeid}: {first.message}")


def exhibit(fault):
    """Run the fault's test file on it, up to the first failure; and once per file, first, without a fault."""
    check_green(fault.suite)
    first = first_failure(fault.suite, str(fault))
    if first.report is None:
        return Exhibit(fault, naive_verdict(fault), None, "")
    return Exhibit(fault, naive_verdict(fault), first.report.nodeid, first.message)


def page(shown):
    """The text of museum.md."""
    killed, green = sum(e.killed_by is not None for e in shown), sum(e.naive_is_green for e in shown)
    lines = [
        INTRODUCTION,
        f"{len(shown)} faults: this suite finds {killed}, the naive check {len(shown) - green}.",
        "",
        "| the fault: where, and what is wrong | the naive check | this suite: the first failing test | its message |",
        "|---|---|---|---|",
    ]
    for exhibited in shown:
        test = "**none**" if exhibited.killed_by is None else f"`{exhibited.killed_by.removeprefix('parity_tests/')}`"
        lines.append(f"| {exhibited.fault} | {exhibited.naive} | {test} | {_cell(exhibited.message)} |")
    return "\n".join(lines) + "\n"


def _cell(text):
    """A message as a table cell: shortened, and without Markdown's special characters."""
    text = text.removeprefix("AssertionError: ").replace("|", "\\|").replace("`", "'")
    return f"`{text if len(text) <= 110 else text[:109] + '…'}`"
