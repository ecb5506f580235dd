"""The commands' errors before any work begins."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from parity_tests import profiles
from parity_tests.__main__ import PAGE, main
from parity_tests.tools import exhibition, museum, report

INSTALL = f"{sys.executable} -m pip install -e"


def run_without(package, *command):
    """Run a command in a process that cannot import this package."""
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = {['', *command[1:]]!r}; "
    code += f"runpy.run_module({command[0]!r}, run_name='__main__', alter_sys=False)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("package", "command", "line"),
    [
        ("torch", ("torch_gpt", "--help"), f"torch-gpt needs PyTorch: {INSTALL} '.[torch]'"),
        ("torch", ("torch_gpt", "pretrain"), f"torch-gpt needs PyTorch: {INSTALL} '.[torch]'"),
        ("torch", ("parity_tests", "report", "--out", "."), f"parity_tests needs torch: {INSTALL} '.[test]'"),
        ("hypothesis", ("parity_tests", "check", "--help"), f"parity_tests needs hypothesis: {INSTALL}"),
        ("pytest", ("parity_tests", "museum"), f"parity_tests needs pytest: {INSTALL} '.[test]'"),
    ],
)
def test_missing_package_is_reported_in_one_line(package, command, line):
    done = run_without(package, *command)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(line)


def test_help_needs_no_test_package():
    done = run_without("hypothesis", "parity_tests", "--help")
    assert (done.returncode, "museum" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("command", [[], ["museum"], ["report"]])
def test_help_is_not_truncated(command):
    result = CliRunner().invoke(main, [*command, "--help"], terminal_width=80)
    assert result.exit_code == 0, result.output
    assert not [line for line in result.output.splitlines()[1:] if line.endswith("...")]


def never(*_):
    pytest.fail("work was done before the path was checked")


@pytest.mark.parametrize(("command", "out"), [("museum", "/nonexistent/x.md"), ("report", "/proc/nope")])
def test_unwritable_path_is_refused_before_any_work(monkeypatch, command, out):
    monkeypatch.setattr(profiles, "load", lambda **_: None)
    monkeypatch.setattr(exhibition, "exhibit", never)
    monkeypatch.setattr(report, "cases", never)
    result = CliRunner().invoke(main, [command, "--out", out])
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith(
        f"Error: Invalid value for '--out': {out} cannot be written: No such"
    )


@pytest.fixture
def one_fault(monkeypatch):
    """A museum of one fault, with a test name as long as any."""
    fault = museum.find("our own: dQ and dK exchanged")
    shown = exhibition.Exhibit(fault, "red, 6e-04", f"test_operations.py::test_{'x' * 60}_matches_torch", "dq: wrong")
    monkeypatch.setattr(profiles, "load", lambda **_: None)
    monkeypatch.setattr(museum, "FAULTS", [fault])
    monkeypatch.setattr(exhibition, "exhibit", lambda _: shown)
    return shown


def test_museum_writes_only_to_out(one_fault, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("pathlib.Path.write_text", lambda path, *_, **__: written.append(path))
    assert CliRunner().invoke(main, ["museum"]).exit_code == 0
    assert written == []
    assert CliRunner().invoke(main, ["museum", "--out", str(tmp_path / "page.md")]).exit_code == 0
    assert written == [tmp_path / "page.md"]
    assert PAGE.name == "museum.md"


def test_museum_table_does_not_truncate_names(one_fault):
    result = CliRunner().invoke(main, ["museum"], env={"COLUMNS": "80"})
    assert "…" not in result.output
    assert "matches_torch" in "".join(
        line.rpartition("│")[0].rpartition("│")[2].strip() for line in result.output.splitlines()
    )
