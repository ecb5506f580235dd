"""Damaged files through every reader and kills at any instant, and tests that both tools detect faults."""

import random

import numpy as np
import pytest

from numpy_gpt.errors import InputError
from numpy_gpt.runs import folder as run
from numpy_gpt.weights import tensors
from numpy_gpt.weights.checkpoint import save_params
from parity_tests.tools import fuzz
from parity_tests.tools.fuzz import SPECIMENS, Specimen, fuzz_part
from parity_tests.tools.kills import STEPS, DifferentError, kill_and_resume

QUICK = {"run": 120, "pth": 120, "vocabulary": 800}
"""Mutants in the quick suite, where 400 take too long or too few of them load."""

PLACES = ("header", "data")


def check_damaged(reader, mutants, seed=0):
    found = fuzz_part(reader, mutants, seed)
    assert not found.faults, "\n".join(found.faults[:5])
    tried = found.errors + found.loaded
    assert tried.total() == mutants
    assert max(tried.values()) - min(tried.values()) <= 1, "kinds of places were not tried equally often"
    return found


@pytest.mark.parametrize("reader", SPECIMENS)
def test_damaged_files_are_read_correctly_or_refused(reader):
    found = check_damaged(reader, QUICK.get(reader, 400))
    assert found.errors.total() > 50
    assert found.loaded.total() > 10, "too few mutants load: nothing was compared"


@pytest.mark.slow
@pytest.mark.parametrize("reader", SPECIMENS)
def test_thousands_of_damaged_files(reader):
    check_damaged(reader, 6000, seed=1000)


def test_fuzzer_detects_an_unchecked_checksum(monkeypatch):
    monkeypatch.setattr(tensors, "_crc32", lambda array: next(iter({0})))
    monkeypatch.setattr(tensors, "_read", partial_without_checksum(tensors._read))
    assert any("differs" in fault for fault in fuzz_part("checkpoint", 200, 0).faults)


def partial_without_checksum(real):
    def read(file, stat, name, kind, shape, start, checksum):
        return real(file, stat, name, kind, shape, start, None)

    return read


def test_fuzzer_detects_crash_hang_and_wrong_answer(monkeypatch, tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "x").write_bytes(bytes(1 << 17))
    places = {place: [("x", 0, 1 << 17)] for place in PLACES}

    def findings(read, check=lambda place, answer: None):
        specimen = Specimen(tmp_path / "original", places, read, check)
        return fuzz.fuzz(specimen, 4, 0, tmp_path / "mutant").faults

    def refuse(place):
        raise InputError("it is damaged")

    def refuse_at_length(place):
        raise InputError("it is damaged" * 1000)

    assert findings(refuse) == []
    assert all("not a sentence" in fault for fault in findings(refuse_at_length))
    assert all("ZeroDivisionError" in fault for fault in findings(lambda place: 1 // 0))
    assert all("bytes of memory" in fault for fault in findings(lambda place: np.ones(5 << 17, np.uint8)))

    def other(place, answer):
        raise AssertionError("another")

    assert all("it loads, but AssertionError: another" in fault for fault in findings(lambda place: 1, other))

    def hang(place):
        while True:
            pass

    monkeypatch.setattr(fuzz, "HANG", 0.05)  # safe on any machine: hang() never ends
    hung = findings(hang)
    assert len(hung) == 4
    assert all("HangError: no answer in" in fault for fault in hung)


@pytest.mark.slow
def test_killed_run_resumes_exactly(tmp_path):
    assert len(list(kill_and_resume(12, tmp_path, random.randrange(10**6)))) == 12


@pytest.mark.slow
def test_kills_detect_an_unrestored_random_state(tmp_path, monkeypatch):
    from numpy_gpt.random.generator import Generator

    monkeypatch.setattr(Generator, "set_state", lambda self, state: None)
    with pytest.raises(DifferentError, match="differs from the undisturbed run"):
        list(kill_and_resume(5, tmp_path, 1))


@pytest.mark.slow
def test_kills_detect_a_missing_save(tmp_path, monkeypatch):
    """Skip all saves but the first and last: every resumed run would still end with the right bits."""

    def seldom(config, params, path, *, training, about):
        if about["step"] in ("0", str(STEPS)):
            save_params(config, params, path, training=training, about=about)

    monkeypatch.setattr(run, "save_params", seldom)
    with pytest.raises(DifferentError, match=r"a save of step \d+ was completed, but the checkpoint is of step 0"):
        list(kill_and_resume(5, tmp_path, 1))
