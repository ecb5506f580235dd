"""Files crafted to use many times their size: each is refused, or read within the README's memory bound."""

import json
import subprocess
import sys

import pytest

TIMES = 2.5
SLACK = 2 << 20
"""Bytes allowed for any file: for short files and for the reader's imports."""


def check_crafted(folder, size):
    command = [sys.executable, "-m", "parity_tests.tools.crafted", str(folder), str(size)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert len(found) >= 20
    for name, (length, grown, answer) in found.items():
        assert answer == "read" or answer.startswith("InputError: "), f"{name}: {answer}"
        assert len(answer) < 2000, name
        assert grown <= TIMES * length + SLACK, f"{name}: {grown:,} bytes of memory for {length:,}"
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the largest size of a process is read from /proc")
def test_crafted_files_stay_within_the_memory_bound(tmp_path):
    found = check_crafted(tmp_path, 9_000_000)
    for name in ("empty tensors.safetensors", "axes.safetensors", "metadata keys.safetensors", "nested lists.json"):
        assert "InputError" in found[name][2], f"{name} was read: nothing was measured"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the largest size of a process is read from /proc")
def test_large_crafted_files_stay_within_the_memory_bound(tmp_path):
    check_crafted(tmp_path, 40_000_000)
