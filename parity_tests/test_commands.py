"""The commands themselves: what they say where they cannot begin."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from parity_tests import profiles
from parity_tests.__main__ import PAGE, main
from parity_tests.tools import exhibition, museum, report


def run_without(package, *command):
    """A command in a process that cannot import this package."""
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = {['', *command[1:]]!r}; "
    code += f"runpy.run_module({command[0]!r}, run_name='__main__', alter_sys=False)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("package", "command", "line"),
    [
        ("torch", ("torch_gpt", "--help"), "torch-gpt needs PyTorch: pip install -e '.[torch]'"),
        ("torch", ("torch_gpt", "pretrain"), "torch-gpt needs PyTorch: pip install -e '.[torch]'"),
        ("torch", ("parity_tests", "report", "--out", "."), "parity_tests needs torch: pip install -e '.[test]'"),
        ("hypothesis", ("parity_tests", "check", "--help"), "parity_tests needs hypothesis: pip install"),
        ("pytest", ("parity_tests", "museum"), "parity_tests needs pytest: pip install -e '.[test]'"),
    ],
)
def test_a_missing_package_is_said_in_one_line(package, command, line):
    done = run_without(package, *command)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(line)


def test_help_of_the_bench_needs_no_test_package():
    done = run_without("hypothesis", "parity_tests", "--help")
    assert (done.returncode, "museum" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("command", [[], ["museum"], ["report"]])
def test_no_help_is_cut_off(command):
    result = CliRunner().invoke(main, [*command, "--help"], terminal_width=80)
    assert result.exit_code == 0, result.output
    assert not [line for line in result.output.splitlines()[1:] if line.endswith("...")]


def never(*_):
    pytest.fail("work was done before the path was looked at")


@pytest.mark.parametrize(("command", "out"), [("museum", "/nonexistent/x.md"), ("report", "/proc/nope")])
def test_a_path_that_cannot_be_written_is_said_before_any_work(monkeypatch, command, out):
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
    """A museum of one fault, whose test has a name as long as they get."""
    fault = museum.find("our own: dQ and dK exchanged")
    shown = exhibition.Exhibit(fault, "red, 6e-04", f"test_operations.py::test_{'x' * 60}_matches_torch", "dq: wrong")
    monkeypatch.setattr(profiles, "load", lambda **_: None)
    monkeypatch.setattr(museum, "FAULTS", [fault])
    monkeypatch.setattr(exhibition, "exhibit", lambda _: shown)
    return shown


def test_the_museum_writes_only_where_it_is_told_to(one_fault, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("pathlib.Path.write_text", lambda path, *_, **__: written.append(path))
    assert CliRunner().invoke(main, ["museum"]).exit_code == 0
    assert written == []
    assert CliRunner().invoke(main, ["museum", "--out", str(tmp_path / "page.md")]).exit_code == 0
    assert written == [tmp_path / "page.md"]
    assert PAGE.name == "museum.md"


def test_the_museums_table_cuts_no_name(one_fault):
    result = CliRunner().invoke(main, ["museum"], env={"COLUMNS": "80"})
    assert "…" not in result.output
    assert "matches_torch" in "".join(
        line.rpartition("│")[0].rpartition("│")[2].strip() for line in result.output.splitlines()
    )
