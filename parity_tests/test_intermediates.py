"""Each activation and each activation's gradient against torch's hooks: a failure names the first that diverges."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings

from numpy_gpt import GPTConfig
from numpy_gpt.ops import gelu
from parity_tests.judge import compare, strategies
from parity_tests.judge.models import DROP_RATES, RecordedMasks, dropout_factors, reject_cancelled, reject_certain
from parity_tests.judge.strategies import ModelCase
from parity_tests.judge.trace import check_traces, numpy_trace, steps, torch_trace
from parity_tests.tools.museum import DK, DROPPED, ONE_ROW, UNTIED, around, dv_before_dropout, layernorm_without
from torch_gpt.model import from_params


def check_intermediates(case):
    """One case, with dropout where its configuration has any."""
    rng = RecordedMasks(case.seed) if case.config.drop_rate else None
    got = numpy_trace(case.model(), *case.batch(), rng)
    reference = from_params(case.config, case.params(), attention="plain")
    factors = dropout_factors(case, rng.drawn) if rng else None
    want = torch_trace(reference, *case.batch(), factors)
    reject_certain(want.activations["loss"])  # as test_model does: gradients that are rounding on both sides
    grads = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    reject_cancelled(case, want.activations["out_head"], case.batch()[1], grads)
    check_traces(case.config, got, want)


@settings(max_examples=60)
@given(case=strategies.model_cases(drop_rates=(0.0, *DROP_RATES)))
@example(ModelCase(GPTConfig(2, 1, 4, 2, 1, 0.0), B=1, T=1))
@example(replace(DROPPED, config=replace(DROPPED.config, tie_weights=True)))
def test_every_activation_and_its_gradient_is_torchs(case):
    check_intermediates(case)


@pytest.mark.slow
@settings(max_examples=500)
@given(case=strategies.model_cases(drop_rates=(0.0, *DROP_RATES)))
def test_every_activation_and_its_gradient_is_torchs_over_many_cases(case):
    check_intermediates(case)


def test_a_trace_has_every_operation_of_the_model():
    """Three before the blocks, twelve out of ten operations in each, the last LayerNorm and the head.

    Besides, the stream that each LayerNorm reads.
    """
    trace = numpy_trace(UNTIED.model(), *UNTIED.batch())
    assert len(steps(UNTIED.config)) == 3 + 10 * 2 + 2  # one for the queries, keys and values
    assert len(trace.gradients) == 3 + 12 * 2 + 2
    assert len(trace.activations) == len(trace.gradients) + 5 + 1
    assert {a.dtype.name for a in (*trace.activations.values(), *trace.gradients.values())} == {"float64"}


@pytest.mark.parametrize(
    ("apply", "case", "message"),
    [
        (
            around(gelu, "gelu_forward", lambda real, x: (real(x)[0] * (1 + 1e-6), real(x)[1])),
            UNTIED,
            r"trf_blocks\.0\.ff\.layers\.1\[",
        ),
        (DK, UNTIED, r"d trf_blocks\.1\.att\.W_key\[.* made by the backward of trf_blocks\.1\.att\.heads$"),
        (dv_before_dropout, DROPPED, r"d trf_blocks\.1\.att\.W_value\[.* backward of trf_blocks\.1\.att\.heads$"),
        (layernorm_without(1), UNTIED, r"d trf_blocks\.1\.drop_shortcut\.2\[.* made by the backward of final_norm$"),
        (
            around(gelu, "gelu_backward", lambda real, dy, cache: -real(dy, cache)),
            UNTIED,
            r"d trf_blocks\.1\.ff\.layers\.0\[.* made by the backward of trf_blocks\.1\.ff\.layers\.1$",
        ),
    ],
)
def test_the_first_operation_that_diverges_is_named(apply, case, message, monkeypatch):
    monkeypatch.setattr(compare, "record", lambda *_: None)
    check_intermediates(case)
    apply(monkeypatch)
    with pytest.raises(AssertionError, match=f"^{message}"):
        check_intermediates(case)


def test_a_gradient_that_no_activation_sees_is_not_the_traces_business(monkeypatch):
    """The position table's own gradient is a parameter's: test_model.py compares those."""
    ONE_ROW(monkeypatch)
    check_intermediates(UNTIED)
