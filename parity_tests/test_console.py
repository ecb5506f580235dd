"""A run's output on terminals of several widths."""

import io
import re

import pytest
from rich.console import Console

from numpy_gpt.console import Report
from numpy_gpt.train import Evaluation, Step

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture(autouse=True)
def a_hundred_seconds(monkeypatch):
    """Fix the time since training began at 100 s: 240,000 tokens/s after three steps."""
    monkeypatch.setattr(Report, "seconds", property(lambda _: 100.0))


def screen(report, width):
    """Attach a terminal of this width to a report, and return the stream it writes to."""
    written = io.StringIO()
    report.console = Console(file=written, force_terminal=True, width=width, highlight=False, color_system="truecolor")
    return written


def lines(written):
    return [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", written.getvalue())) if line.strip()]


def steps(total, first=0):
    for k in range(first, first + 4):
        evaluation = Evaluation(12.3456, 9.8765) if k % 2 == 0 else None
        yield Step(k, 1, 0.1, 8_000_000 * (k + 1), 12.3456, 4e-4, evaluation, False)


def trained(width, total, first=0):
    report = Report()
    written = screen(report, width)
    with report.training(total, first, 0):
        for step in steps(total, first):
            report.step(step)
    return lines(written)


@pytest.mark.parametrize("total", [150, 123_456, 10**19])
@pytest.mark.parametrize("width", [60, 72, 80, 100, 120])
def test_lines_fit_the_terminal(width, total):
    shown = trained(width, total)
    assert max(map(len, shown)) <= width
    evaluations = [line for line in shown if line.startswith("Ep ")]
    assert len(evaluations) == 2
    assert all("Train loss 12.346, Val loss 9.877" in line for line in evaluations)
    bars = [line for line in shown if "━" in line]
    # one row per refresh: a wrapped row would leave rows without a bar
    assert len(bars) + len(evaluations) == len(shown)
    if total < 10**9:  # the remaining time has a usual length
        assert all(sum(map(line.count, "━╸╺")) >= 10 for line in bars)
        assert "loss 12.346" in bars[-1]


def test_log_lines_are_not_truncated(capsys):
    report = Report()
    with report.training(150, 0, 0):
        for step in steps(150):
            report.step(step)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"Ep 1 \(Step 000002\): .*   [\d,]+ tokens/s, \d+:\d\d:\d\d left", last)


@pytest.mark.parametrize("width", [60, 80])
def test_transfer_fits_the_terminal(width):
    report = Report()
    written = screen(report, width)
    with report.transfer("model.ckpt.data-00000-of-00001", 0, 497_759_232) as show:
        show(123_456_789)
    shown = lines(written)
    assert max(map(len, shown)) <= width
    assert all("model.ck" in line and "━" * 4 in line and "MB" in line for line in shown)


@pytest.mark.parametrize("width", [60, 80])
def test_counted_progress_fits_the_terminal(width):
    report = Report()
    written = screen(report, width)
    list(report.track(range(20), "evaluating"))
    shown = lines(written)
    assert max(map(len, shown)) <= width
    assert all("evaluating" in line and "%" in line for line in shown)
