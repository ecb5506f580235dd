"""Setup: the README's two lines, and the errors for missing packages and compilers."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.environment import SLOW
from numpy_gpt.errors import InputError
from torch_gpt.train import check_compiler

ROOT = Path(__file__).parent.parent
BENCHMARKS = ("step", "forward", "decode", "ops", "scaling", "load", "memory", "all", "streams", "compare")


def two_lines():
    return [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 -m venv ")]


def test_readme_setup_lines():
    first, second = two_lines()
    assert first.endswith("/numpy-gpt pretrain")
    assert second.endswith(" pytest")
    for line in (first, second):
        assert " -e " in line, "the commands must follow changes of the code"
        assert not re.search(r" (-q|--quiet)\b", line), "an installation of minutes must show progress"


def test_readme_offers_pytorch_without_cuda():
    before = (ROOT / "README.md").read_text().partition(two_lines()[1])[0]
    assert re.search(r"^export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu$", before, re.MULTILINE)


@pytest.fixture
def unslowed(monkeypatch):
    """Without the variables for which the benchmarks restart in another process, out of a test's reach."""
    for name in SLOW:
        monkeypatch.delenv(name, raising=False)


def without_torch(monkeypatch, *arguments):
    """Run python -m benchmarks where torch cannot be imported; return the exit code."""
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("benchmarks", "torch_gpt"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("benchmarks", run_name="__main__")
    return stopped.value.code


@pytest.mark.usefixtures("unslowed")
@pytest.mark.parametrize(
    "arguments", [["--help"], [], *([name] for name in BENCHMARKS), ["compare", "--help"]], ids=str
)
def test_benchmarks_name_the_missing_package(monkeypatch, capsys, arguments):
    assert without_torch(monkeypatch, *arguments) == 2
    assert capsys.readouterr() == ("", f"benchmarks needs torch: {sys.executable} -m pip install -e '.[test]'\n")


@pytest.mark.usefixtures("unslowed")
def test_own_import_error_is_raised(monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks.cli", None)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    with pytest.raises(ModuleNotFoundError, match=r"benchmarks\.cli"):
        runpy.run_module("benchmarks", run_name="__main__")


COMPILER_FAULTS = {
    "no such compiler": (RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet ..."), "InvalidCxx"),
    "no headers": (
        RuntimeError("CppCompileError: C++ compile error\n\nCommand: g++ …\nx.cpp:1:10: fatal error: Python.h: no\n"),
        "(fatal error: Python.h: no)",
    ),
    "not executable": (PermissionError(13, "Permission denied"), "Permission denied"),
}


@pytest.mark.parametrize("kind", COMPILER_FAULTS)
def test_failing_compiler_is_a_one_line_error(monkeypatch, kind):
    fault, words = COMPILER_FAULTS[kind]

    def compiled(_):
        raise fault

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda _: compiled)
    with pytest.raises(InputError) as error:
        check_compiler(torch.device("cpu"))
    assert words in str(error.value)
    assert str(error.value).endswith("install g++ and python3-dev, correct $CXX, or omit --compile")


BROKEN_COMPILERS = {"fails": "exit 1", "does nothing": "exit 0", "lacks headers": 'echo "g++ (GCC) 12"; exit 0'}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*BROKEN_COMPILERS, "missing"])
def test_compiling_with_a_broken_compiler_is_a_one_line_error(tmp_path, monkeypatch, kind):
    compiler = tmp_path / "compiler"
    if kind in BROKEN_COMPILERS:
        compiler.write_text(f"#!/bin/sh\n{BROKEN_COMPILERS[kind]}\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "torch_gpt", "pretrain", "--compile", "--device", "cpu", "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: --compile needs a C++ compiler"), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
