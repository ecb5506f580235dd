"""Every operation's output and gradients against torch's operations and autograd.

In float64 the judge is torch in float64. float32 must meet the same 64 eps S, with its own eps, against torch's float64
result for the same numbers.
"""

import math
import re
import tracemalloc
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from numpy_gpt.ops import attention, cross_entropy, dropout, embedding, gelu, layernorm, linear
from numpy_gpt.parallel import threads
from parity_tests.judge import strategies
from parity_tests.judge.compare import check_exact
from parity_tests.judge.operations import OPERATIONS, check_operation, our_answer
from parity_tests.judge.strategies import OperationCase


@given(case=strategies.linear_cases())
@example(OperationCase({"B": 1, "T": 1, "I": 1, "O": 1}, fill="huge"))
@example(OperationCase({"B": 3, "T": 4, "I": 7, "O": 5}, options={"bias": False}))
def test_linear_matches_torch(case):
    check_operation("linear", case)


@given(case=strategies.layernorm_cases())
@example(OperationCase({"B": 2, "T": 3, "C": 8}, fill="constant rows"))
@example(OperationCase({"B": 2, "T": 3, "C": 8}, scale=1e-2))  # eps is as large as the variance
@example(OperationCase({"B": 1, "T": 1, "C": 1}))
def test_layernorm_matches_torch(case):
    check_operation("layernorm", case)


@given(case=strategies.gelu_cases())
@example(OperationCase({"B": 1, "T": 2, "C": 3}, fill="huge"))
def test_gelu_matches_torch(case):
    check_operation("gelu", case)


@given(case=strategies.dropout_cases() | strategies.dropout_cases("float32"))
def test_dropout_matches_torch_exactly(case):
    check_operation("dropout", case)


@given(case=strategies.embedding_cases())
@example(OperationCase({"B": 4, "T": 9, "V": 2, "C": 3}))
@example(OperationCase({"B": 1, "T": 1, "V": 1, "C": 1}))
def test_embedding_matches_torch(case):
    check_operation("embedding", case)


@given(case=strategies.position_embedding_cases())
def test_position_embedding_matches_torch(case):
    check_operation("position_embedding", case)


@given(case=strategies.attention_cases())
@example(OperationCase({"B": 1, "NH": 1, "T": 1, "past": 0, "HS": 1}, fill="huge"))
@example(OperationCase({"B": 2, "NH": 2, "T": 1, "past": 6, "HS": 4}))  # cached decoding
@example(OperationCase({"B": 2, "NH": 2, "T": 3, "past": 5, "HS": 4}, options={"rate": 0.5}))
@example(OperationCase({"B": 2, "NH": 2, "T": 6, "past": 0, "HS": 4}, fill="huge", scale=3.0))
@example(OperationCase({"B": 2, "NH": 2, "T": 6, "past": 0, "HS": 4}, fill="zeros"))
def test_attention_matches_torch(case):
    check_operation("attention", case)


@given(case=strategies.cross_entropy_cases())
@example(OperationCase({"B": 1, "T": 1, "V": 2}, fill="huge"))
@example(OperationCase({"B": 2, "T": 3, "V": 5}, fill="constant rows"))
def test_cross_entropy_matches_torch(case):
    check_operation("cross_entropy", case)


@pytest.mark.parametrize(("operation", "case"), strategies.LARGE)
def test_larger_shapes_match_torch(operation, case):
    check_operation(operation, case)


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=40)
@given(data=st.data())
def test_float32_stays_float32_within_the_same_budget(operation, data):
    check_operation(operation, data.draw(OPERATIONS[operation].cases("float32")))


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_memory_layout_matches_torch(operation, layout):
    names = ("B", "T", "C", "I", "O", "V", "NH", "HS", "past", "start", "rest")
    check_operation(operation, OperationCase(dict.fromkeys(names, 3), layout=layout, options={"rate": 0.5}))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=500)
@given(data=st.data())
def test_operation_matches_torch_over_many_cases(operation, dtype, data):
    check_operation(operation, data.draw(OPERATIONS[operation].cases(dtype)))


def test_dropout_without_a_mask_returns_the_same_array():
    x = np.arange(6.0).reshape(2, 3)
    y, cache = dropout.dropout_forward(x, None)
    assert y is x
    assert dropout.dropout_backward(x, cache) is x


def test_unread_table_row_has_zero_gradient():
    ids, w, dy = np.array([[1, 3, 1]]), np.ones((5, 2)), np.full((1, 3, 2), 7.0)
    dw = embedding.embedding_backward(dy, embedding.embedding_forward(ids, w)[1])
    check_exact("embedding.dw", dw, np.array([[0, 0], [14, 14], [0, 0], [7, 7], [0, 0.0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: linear.linear_forward(np.ones((2, 7, 3)), np.ones((4, 5)), None),
            "linear: x has 3 features, w expects 5",
        ),
        (
            lambda: embedding.embedding_forward(np.array([[0, 4]]), np.ones((4, 2))),
            "embedding: id 4 is outside the table's 4 rows",
        ),
        (
            lambda: embedding.embedding_forward(np.array([[-1]]), np.ones((4, 2))),
            "embedding: id -1 is outside the table's 4 rows",
        ),
        (
            lambda: embedding.position_embedding_forward(np.ones((1, 3, 2)), np.ones((4, 2)), 2),
            "position_embedding: positions up to 5, but the table has 4 rows",
        ),
        (
            lambda: attention.attention_forward(np.ones((1, 1, 3, 2)), np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2))),
            "attention: 3 queries but only 2 keys",
        ),
        (
            lambda: cross_entropy.cross_entropy_forward(np.ones((2, 3, 4)), np.ones((2, 4), int)),
            "cross_entropy: logits (2, 3, 4) need targets (2, 3), not (2, 4)",
        ),
        (
            lambda: cross_entropy.cross_entropy_forward(np.ones((0, 4)), np.ones(0, int)),
            "cross_entropy: logits (0, 4) need targets (0,), not (0,)",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def peak(call):
    """The peak number of bytes NumPy allocates during the call, including the result."""
    call()
    tracemalloc.start()
    try:
        kept = call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        del kept


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


X, DY, ONE, IDS = numbers(128, 512), numbers(128, 512), numbers(512), np.zeros(128, int)
HEADS, DHEADS, MASK = numbers(3, 1, 16, 64, 4), numbers(1, 16, 64, 4), numbers(1, 16, 64, 64)
NEEDED = {  # the call, and its number of arrays of X's size; each is one block, so one thread does it
    "gelu forward: y, slope, x² and σ": (lambda: partial(gelu.gelu_forward, X), 4),
    "layernorm forward: y, x̂": (lambda: partial(layernorm.layernorm_forward, X, ONE, ONE), 2),
    "layernorm backward: dx, dy · x̂": (
        lambda: partial(layernorm.layernorm_backward, DY, layernorm.layernorm_forward(X, ONE, ONE)[1]),
        2,
    ),
    "cross_entropy forward: exp": (lambda: partial(cross_entropy.cross_entropy_forward, X, IDS), 1),
    "cross_entropy forward in place": (lambda: partial(cross_entropy.cross_entropy_forward, X, IDS, X.copy()), 0),
    "cross_entropy backward: dlogits": (
        lambda: partial(cross_entropy.cross_entropy_backward, 1.0, cross_entropy.cross_entropy_forward(X, IDS)[1]),
        1,
    ),
    "cross_entropy backward in place": (
        lambda: partial(
            cross_entropy.cross_entropy_backward, 1.0, cross_entropy.cross_entropy_forward(X, IDS)[1], X.copy()
        ),
        0,
    ),
    "attention forward: scores": (lambda: partial(attention.attention_forward, *HEADS, MASK), 1),
    "attention backward: p, dp": (
        lambda: partial(attention.attention_backward, DHEADS, attention.attention_forward(*HEADS)[1]),
        2,
    ),
    "attention backward: p, dp, p · mask": (
        lambda: partial(attention.attention_backward, DHEADS, attention.attention_forward(*HEADS, MASK)[1]),
        3,
    ),
}


@pytest.mark.parametrize("what", NEEDED)
def test_operations_allocate_no_extra_arrays(what):
    """Operations work in place where possible and never widen float32."""
    make, arrays = NEEDED[what]
    assert peak(make()) < (arrays + 0.6) * X.nbytes


@pytest.mark.parametrize("operation", ["layernorm", "gelu", "cross_entropy", "linear"])
def test_work_is_split_by_element_count(operation, monkeypatch):
    """Not by rows, a few of which may exceed a cache."""
    module, seen = (
        {"layernorm": layernorm, "gelu": gelu, "cross_entropy": cross_entropy, "linear": linear}[operation],
        [],
    )

    def watched(work, *arrays):
        seen.append(max(a.size for a in arrays))
        threads.in_blocks(work, *arrays)

    monkeypatch.setattr(module, "in_blocks", watched)
    case = OperationCase({"B": 2, "T": 3, "C": 8, "V": 8, "I": 5, "O": 8})
    our_answer(operation, OPERATIONS[operation].inputs(case))
    assert seen
    assert set(seen) == {2 * 3 * 8}


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("T", [5, 70])
def test_heads_computed_separately_match_torch(T, rate, monkeypatch):
    """Compute each head separately, one after the other, as threads would."""

    def apart(work, n, least):
        for i in range(n):
            work(i, i + 1)

    monkeypatch.setattr(attention, "share", apart)
    check_operation("attention", OperationCase({"B": 2, "NH": 3, "T": T, "past": 2, "HS": 4}, options={"rate": rate}))


@pytest.mark.parametrize(("B", "T", "past"), [(1, 16, 0), (3, 31, 5), (1, 256, 0), (2, 256, 300)])
def test_threads_get_enough_heads(B, T, past, monkeypatch):
    """A thread's minimum is as many heads as have LEAST / 4 scores, or one head."""
    least = []
    monkeypatch.setattr(
        attention, "share", lambda work, n, **given: least.append(given["least"]) or threads.share(work, n, **given)
    )
    case = OperationCase({"B": B, "NH": 2, "T": T, "past": past, "HS": 1})
    our_answer("attention", OPERATIONS["attention"].inputs(case))
    scores = B * T * (T + past)
    assert len(least) == 2
    assert set(least) == {max(1, threads.LEAST // 4 // scores)}


def test_linear_without_bias_sums_nothing(monkeypatch):
    """Summing would cost a pass over the logits' gradient."""
    monkeypatch.delattr(linear, "sum_rows")
    _, _, db = linear.linear_backward(X @ DY.T, linear.linear_forward(X, DY, None)[1])
    assert db is None


def test_row_gradient_does_not_depend_on_its_id():
    """Its terms are added in the text's order, however NumPy sorts the ids."""
    rng = np.random.default_rng(0)
    ids, dy = rng.integers(0, 3, (4, 250)), numbers(4, 250, 2)
    dw, other = (embedding.embedding_backward(dy, (rows, (3, 2))) for rows in (ids, 2 - ids))
    check_exact("embedding.dw", dw, other[::-1])


def test_positions_begin_at_0_by_default():
    x, w = np.zeros((1, 2, 3)), np.arange(12.0).reshape(4, 3)
    check_exact("position_embedding.y", embedding.position_embedding_forward(x, w)[0], w[None, :2])


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=30)
@given(data=st.data())
def test_results_do_not_depend_on_earlier_calls(operation, data):
    """Nor does a later call change it: a returned array belongs to the caller."""
    dtype = data.draw(st.sampled_from(("float64", "float32")))
    inputs, others = (OPERATIONS[operation].inputs(data.draw(OPERATIONS[operation].cases(dtype))) for _ in range(2))
    first = our_answer(operation, inputs)
    kept = {name: np.array(a) for name, a in first.items()}
    our_answer(operation, others)
    for again in (first, our_answer(operation, inputs)):
        for name, a in kept.items():
            check_exact(f"{operation}.{name}, another call later", again[name], a)


@pytest.mark.parametrize("rows", [3000, 40_000])
def test_float32_sums_over_many_rows_are_rounded_once(rows):
    """db, dshift and dscale are about half an ulp from the exact sum; adding rows in float32 would lose digits."""
    rng = np.random.default_rng(rows)
    dy, x = (rng.standard_normal((rows, 4)).astype(np.float32) + np.float32(1) for _ in range(2))
    got = {"db": linear.linear_backward(dy, linear.linear_forward(x, np.ones((4, 4), np.float32), dy[0])[1])[2]}
    y, cache = layernorm.layernorm_forward(x, np.ones(4, np.float32), np.zeros(4, np.float32))
    _, got["dscale"], got["dshift"] = layernorm.layernorm_backward(dy, cache)
    terms = {"db": dy, "dshift": dy, "dscale": dy * y}  # with scale 1 and shift 0, y is exactly x̂
    for name, sums in got.items():
        exact = np.array([math.fsum(column) for column in terms[name].T.tolist()])
        ulps = np.abs(sums - exact) / np.spacing(np.abs(sums))
        assert sums.dtype == np.float32
        assert (ulps <= 0.51).all(), f"{name}: {ulps} ulp from the exact sum"
