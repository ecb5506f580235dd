"""Tests of the suite: every fault of the museum must fail its check with a message that names the tensor."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest

from numpy_gpt import GPT, AdamW
from parity_tests.__main__ import PAGE
from parity_tests.judge import compare, models
from parity_tests.tools.exhibition import naive_verdict
from parity_tests.tools.museum import (
    DK,
    DROPPED,
    FAULTS,
    UNTIED,
    dv_before_dropout,
    find,
    gelu_with,
    layernorm_without,
    naive_difference,
    tanh_cdf,
)


@pytest.fixture(autouse=True)
def not_recorded(monkeypatch):
    """Keep a broken model's shares out of the summary."""
    monkeypatch.setattr(compare, "record", lambda *_: None)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_fails_its_check(fault, monkeypatch):
    fault.check()
    fault.apply(monkeypatch)
    with pytest.raises((AssertionError, ValueError, IndexError), match=f"^({fault.message})"):
        fault.check()


def rows(page):
    """Rows of museum.md: the fault, the naive check's colour, and the failing test, without its parameters."""
    cells = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    return [(fault, naive[:3], test.strip("`").partition("[")[0]) for fault, naive, test, *_ in cells]


@pytest.mark.slow
def test_museum_page_is_up_to_date(tmp_path):
    command = [sys.executable, "-m", "parity_tests", "museum", "--out", str(tmp_path / "museum.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "museum.md").read_text(encoding="utf-8")
    assert len(rows(page)) == len(FAULTS)
    assert rows(page) == rows(PAGE.read_text(encoding="utf-8")), f"regenerate the page: museum --out {PAGE}"


def test_readme_counts_match_the_page():
    faults, found, naive = re.search(
        r"^(\d+) faults: this suite finds (\d+), the naive check (\d+)\.$",
        PAGE.read_text(encoding="utf-8"),
        re.MULTILINE,
    ).groups()
    readme = PAGE.parents[1].joinpath("README.md").read_text(encoding="utf-8")
    assert f"[{faults} faults](parity_tests/museum.md)" in readme
    assert found == faults, "every fault must fail the suite"
    assert re.search(rf"a naive check like those of such projects[^|]*\sfinds {naive}\.\n", readme)


def test_naive_check_misses_in_place_writes_and_sees_nan():
    """It does not detect an argument that is written into, which only this suite checks."""
    assert naive_verdict(find("our own: an argument written into")).startswith("green")
    assert math.isnan(naive_difference({"a": np.array([np.nan]), "b": np.ones(1)}, {"a": np.ones(1), "b": np.ones(1)}))


EXHIBIT = """
from dataclasses import replace
from parity_tests import profiles
profiles.load(expect_failure=True)
from numpy_gpt.ops import linear
from parity_tests.tools import exhibition, museum

def applied_once(monkeypatch):
    monkeypatch.undo()
    if not tried:
        tried.append(1)
        raise OSError("cannot be put in place")

tried, real = [], linear.linear_backward
if {broken}:
    linear.linear_backward = lambda dy, cache: tuple(g * 2 for g in real(dy, cache) if g is not None)
museum.FAULTS[:] = [replace(museum.FAULTS[0], apply=applied_once)]
print(exhibition.exhibit(museum.FAULTS[0]))
"""


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (True, "RuntimeError: test_operations.py is red without a fault: "),
        (False, "RuntimeError: pytest could not run"),
    ],
)
def test_failing_baseline_or_unusable_fault_is_an_error(broken, message):
    command = [sys.executable, "-c", EXHIBIT.replace("{broken}", str(broken))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert message in done.stderr


def test_unknown_fault_suggests_the_nearest_names():
    with pytest.raises(KeyError, match=r"no fault .*dropped.* near it: tied head: the head.s gradient dropped,"):
        find("tied head: dropped")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gelu", ["gelu: 0.0044715 for 0.044715", "gelu: the exact erf for tanh", "gelu: a six-digit constant"]),
        ("dQ and dK exchanged", ["our own: dQ and dK exchanged"]),
        ("nope", [": "]),
        ("", ["gelu: "]),
    ],
)
def test_partial_name_suggests_matching_faults(name, near):
    with pytest.raises(KeyError) as error:
        find(name)
    suggested = error.value.args[0].partition("near it: ")[2]
    assert all(name in suggested for name in near), suggested


@pytest.mark.parametrize(
    ("apply", "case", "first", "spared"),
    [
        (
            DK,
            UNTIED,
            "att.W_key.weight",
            ("att.W_query.weight", "att.W_value.weight", "att.out_proj.weight", "norm2.scale"),
        ),
        (dv_before_dropout, DROPPED, "att.W_value.weight", ("att.W_query.weight", "att.W_key.weight", "norm2.scale")),
        (layernorm_without(1), UNTIED, "ff.layers.2.weight", ()),
        (layernorm_without(2), UNTIED, "ff.layers.2.weight", ()),
    ],
)
def test_check_model_shows_where_a_gradient_goes_wrong(apply, case, first, spared, monkeypatch):
    """The backward pass begins in the last block: gradients above the fault are correct and not reported."""
    apply(monkeypatch)
    with pytest.raises(AssertionError) as error:
        models.check_model(case)
    message, last = str(error.value), f"d trf_blocks.{case.config.n_layers - 1}."
    assert f"{last}{first}[" in message
    assert "d tok_emb.weight[" in message, "gradients below the fault are wrong too"
    for name in (*(f"{last}{parameter}" for parameter in spared), "d final_norm.scale", "d out_head.weight"):
        assert f"{name}[" not in message


def test_adamw_fault_keeps_optimisers_separate(monkeypatch):
    """Two optimisers at once, as for a run and its resumed copy, must not share moments."""
    find("AdamW: eps inside the root").apply(monkeypatch)
    grads = np.random.default_rng(0).standard_normal((2, 3, 4))

    def after(*steps, beside=None):
        params = {"w": np.ones(4)}
        optimiser = AdamW(params)
        for g in steps:
            optimiser.step({"w": g})
            if beside is not None:
                beside.step({"w": -7 * g})
        return params["w"]

    alone = after(*grads[0])
    compare.check_exact("w", after(*grads[0], beside=AdamW({"w": np.ones(4)})), alone)


def test_float32_rule_detects_a_four_digit_constant(monkeypatch):
    """√(2/π) is off by a relative 2e-5 and the loss by far less: a tolerance of 1e-4 would miss it."""
    gelu_with(tanh_cdf(0.044715, 0.7979))(monkeypatch)
    with pytest.raises(AssertionError, match=r"float32 worse than torch's: .*'logits'"):
        models.check_float32(map(models.float32_case, range(32)))


def test_float32_rule_detects_nan_in_the_first_block(monkeypatch):
    """A tensor kind collects the errors of all blocks: later values must not hide a NaN."""
    real = GPT.loss_and_grads

    def wrong(self, *args):
        loss, grads = real(self, *args)
        grads["trf_blocks.0.norm1.scale"][0] = np.nan
        return loss, grads

    monkeypatch.setattr(GPT, "loss_and_grads", wrong)
    cases = [case for case in map(models.float32_case, range(8)) if case.config.n_layers > 1]
    with pytest.raises(AssertionError, match=r"float32 worse than torch's: \{'d trf_blocks\.\*\.norm1\.scale': nan\}"):
        models.check_float32(cases)


# The judge itself


@pytest.mark.parametrize("sign", [1, -1])
def test_check_message_names_tensor_index_values_and_share(sign):
    want = np.zeros((2, 3))
    got = want.copy()
    got[1, 2] = sign * 100 * np.finfo(np.float64).eps
    assert compare.check("x", got, want, 2.0) == pytest.approx(100 / 128)
    with pytest.raises(AssertionError, match=r"^x\[1, 2\]: -?2\.220446049e-14 vs 0\.000000000e\+00, 1\.56x the budget"):
        compare.check("x", got, want, 1.0)


def test_check_uses_each_elements_scale():
    want = np.array([1.0, 1e-9])
    got = want + np.array([0, 1e-12])
    with pytest.raises(AssertionError, match=r"^x\[1\]"):
        compare.check("x", got, want, np.abs(want))
    assert compare.check("x", got, want, 1e3) < 1


@pytest.mark.parametrize(
    ("got", "want", "scale"),
    [
        (np.nan, 1.0, 1.0),
        (1.0, np.nan, 1.0),
        (np.nan, np.nan, 1.0),
        (1.0, 1.0, np.nan),
        (np.inf, 1.0, 1.0),
        (np.inf, np.inf, 1.0),
        (1.0, 1.0 + 1e-15, 0.0),
    ],
)
def test_check_fails_on_nan_infinity_and_errors_at_scale_0(got, want, scale):
    with pytest.raises(AssertionError, match=r"x the budget|nan"):
        compare.check("x", np.array([0.0, got]), np.array([0.0, want]), scale)


@pytest.mark.parametrize("scale", [np.inf, np.nan, -1.0, [1e9, np.inf]])
def test_check_refuses_unusable_scales(scale):
    with pytest.raises(AssertionError, match=r"x: a scale cannot be (inf|nan|-1\.0)"):
        compare.check("x", np.array([1.0, 2.0]), np.array([1.1, 2.1]), scale)


def test_check_fails_on_other_shape_or_dtype():
    with pytest.raises(AssertionError, match=r"x: shape \(1, 2\), should be \(2,\)"):
        compare.check("x", np.zeros((1, 2)), np.zeros(2), 1.0)
    with pytest.raises(AssertionError, match="x: dtype float32, should be float64"):
        compare.check("x", np.zeros(2, np.float32), np.zeros(2), 1.0)


def test_check_exact_detects_minus_zero_and_one_ulp():
    one = np.array([0.0, 1.0])
    compare.check_exact("x", one, one.copy())
    for other in (np.array([-0.0, 1.0]), np.array([0.0, np.nextafter(1, 2)])):
        with pytest.raises(AssertionError, match=r"^x\[[01]\]: .* 1 of 2 differ"):
            compare.check_exact("x", other, one)


def test_summary_keeps_the_largest_share_of_each_kind(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(compare, "_largest", {})
    got, eps = np.zeros(1), np.finfo(np.float64).eps
    for block, error in ((0, 8.0), (1, 32.0), (2, 16.0)):
        compare.check(f"d trf_blocks.{block}.norm1.scale", got + error * eps, got, 1.0)
    assert [line.split() for line in compare.summary()][-1] == ["0.5", "d", "trf_blocks.*.norm1.scale"]


def test_summary_lists_nan_first(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(compare, "_largest", {})
    for name, value in (("a", 0.5), ("b", np.nan), ("b", 0.25), ("c", 0.75)):
        compare.record("a heading", name, value)
    assert [line.split() for line in compare.summary()][2:] == [["nan", "b"], ["0.75", "c"], ["0.5", "a"]]
