"""The commands themselves: what they say where they cannot begin."""

import subprocess
import sys

import pytest


def run_without(package, *command):
    """A command in a process that cannot import this package."""
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = {['', *command[1:]]!r}; "
    code += f"runpy.run_module({command[0]!r}, run_name='__main__', alter_sys=False)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("package", "command", "line"),
    [
        ("torch", ("torch_gpt", "--help"), "torch-gpt needs PyTorch: pip install 'numpy-gpt[torch]'"),
        ("torch", ("torch_gpt", "pretrain"), "torch-gpt needs PyTorch: pip install 'numpy-gpt[torch]'"),
        ("torch", ("parity_tests", "report"), "parity_tests needs torch: pip install 'numpy-gpt[test]'"),
        ("hypothesis", ("parity_tests", "check", "--help"), "parity_tests needs hypothesis: pip install"),
        ("pytest", ("parity_tests", "museum"), "parity_tests needs pytest: pip install 'numpy-gpt[test]'"),
    ],
)
def test_a_missing_package_is_said_in_one_line(package, command, line):
    done = run_without(package, *command)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(line)


def test_help_of_the_bench_needs_no_test_package():
    done = run_without("hypothesis", "parity_tests", "--help")
    assert (done.returncode, "museum" in done.stdout) == (0, True), done.stderr
