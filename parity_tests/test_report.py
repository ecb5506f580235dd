"""The report's numbers are measured: an error in an operation, or a NaN in a model, shows in them."""

import json
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from numpy_gpt import GPT
from numpy_gpt.ops import gelu
from parity_tests.__main__ import main
from parity_tests.judge.operations import OPERATIONS
from parity_tests.tools.report import model_rows, operation_rows, worst_rows

ROOT = Path(__file__).parent.parent


def test_report_covers_every_operation_and_writes_files(tmp_path):
    result = CliRunner().invoke(main, ["report", "--quick", "--out", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "report.json").read_text())
    assert {row["operation"] for row in figures["rows"]} == {*OPERATIONS, "model"} - {"dropout"}
    assert all(row["share"] <= 1 for row in figures["rows"] if row["share"] is not None)
    assert all(row["torch"] is not None for row in figures["rows"] if row["dtype"] == "float32")
    assert set(figures["float32 rule"]) == {"dropout 0", "dropout 0.1"}
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    measured = [*sorted({*OPERATIONS} - {"dropout"}), "models, float32", "models, float64", "the float32 rule"]
    assert sorted(result.stderr.splitlines()) == sorted(f"measuring {name} …" for name in measured)
    assert "attention.dv" in result.output
    assert "too few cases for the float32 rule: 95th percentile of NumPy's error / torch's" in result.output
    assert "at most 2" not in result.output
    assert "d trf_blocks.*.att.W_key.weight" in result.output


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_report_shows_an_injected_error(monkeypatch, dtype):

    forward = gelu.gelu_forward

    def off_by_a_thousandth(x):
        y, cache = forward(x)
        return y * x.dtype.type(1.001), cache

    monkeypatch.setattr(gelu, "gelu_forward", off_by_a_thousandth)
    rows = {row.tensor: row for row in operation_rows("gelu", dtype, 8, 0.3)}
    np.testing.assert_allclose(rows["y"].numpy, 1e-3, rtol=1e-3)
    assert rows["y"].share > 1 > rows["dx"].share
    if dtype == "float32":
        assert rows["y"].ratio == rows["y"].numpy / rows["y"].torch > 1e3


@pytest.mark.parametrize(("dtype", "worst"), [("float32", "ratio"), ("float64", "share")])
def test_table_shows_the_worst_row(dtype, worst):
    rows = [row for T in (8, 64, 16) for row in operation_rows("linear", dtype, T, 0.3)]
    largest = max(
        (row for row in rows if row.tensor == "y"), key=attrgetter(worst, "numpy")
    )  # among equals the largest error
    assert next(row for row in worst_rows(rows) if row.tensor == "y") == largest


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_counts_as_the_worst(monkeypatch, dtype):
    """In an operation's numbers, in a model's gradients, and in the table's rows."""
    lengths, (forward, backward) = (8, 64, 16), (gelu.gelu_forward, GPT.loss_and_grads)

    def nan_at_64(x):
        y, cache = forward(x)
        return np.where((np.arange(y.size) == 5).reshape(y.shape) & (x.shape[1] == 64), np.nan, y), cache

    def nan_in_the_first_block(self, *args):
        loss, grads = backward(self, *args)
        grads["trf_blocks.0.norm1.scale"][0] = np.nan
        return loss, grads

    with monkeypatch.context() as patch:
        patch.setattr(gelu, "gelu_forward", nan_at_64)
        rows = [row for T in lengths for row in operation_rows("gelu", dtype, T, 0.3)]
    bad = next(row for row in rows if (row.T, row.tensor) == (64, "y"))
    assert np.isnan(bad.numpy)
    assert np.isnan(bad.share)
    assert next(row for row in worst_rows(rows) if row.tensor == "y") == bad
    monkeypatch.setattr(GPT, "loss_and_grads", nan_in_the_first_block)
    assert [row.tensor for row in model_rows(dtype, 2, 8, 0.3) if np.isnan(row.numpy)] == ["gradients"]


FAILING = """
import numpy as np
from parity_tests.judge.compare import check_exact
from parity_tests.judge.operations import check_tensor

def test_with_a_name_so_long_that_it_fills_a_terminal_of_eighty_columns():
    check_tensor("gelu.y", np.ones(3), np.array([1, 2.0, 1]), 1.0)

def test_bits():
    check_exact("dropout.mask", np.ones(3), np.array([1, 2.0, 1]))
"""


def test_failing_number_is_printed_in_the_summary(tmp_path):
    """On a separate line, without the source of the comparing functions."""
    (tmp_path / "test_failing.py").write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-p", "parity_tests.conftest", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"COLUMNS": "80"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    shown, _, after = done.stdout.partition("= failed tests =")
    first, second = after.splitlines()[1:3]
    assert re.fullmatch(r"test_with_a_name\w+: gelu\.y\[1\]: 1\.0\d*e\+00 vs 2\.0\d*e\+00, \d\S*x the budget", first), (
        done.stdout
    )
    assert second == "test_bits: dropout.mask[1]: np.float64(1.0) vs np.float64(2.0), 1 of 3 differ"
    assert "def test_bits" in shown
    assert "np.unravel_index" not in done.stdout
    assert "def check" not in done.stdout
