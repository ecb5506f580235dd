"""Every operation, forward and every gradient, against torch's own operations and autograd.

The check_X functions are what is tested here and what test_mutants.py turns red; each takes one case and compares every
output and every gradient. float64 is DESIGN's contract, against torch in float64. float32 is held to the same 64 eps S
with its own eps, against torch's float64 answer on the same numbers.
"""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from numpy_gpt.ops import attention, cross_entropy, dropout, embedding, gelu, layernorm, linear
from parity_tests import compare, strategies
from parity_tests.compare import check, check_exact
from parity_tests.strategies import OperationCase


def leaf(a):
    """A float64 torch copy that collects a gradient."""
    return torch.from_numpy(np.array(a, dtype=np.float64, order="C")).requires_grad_()


@contextmanager
def unchanged(operation, **arrays):
    """Fail if an operation writes into one of these arguments (None is passed over)."""
    before = {name: a.tobytes() for name, a in arrays.items() if a is not None}
    yield
    for name, bits in before.items():
        assert arrays[name].tobytes() == bits, f"{operation} wrote into its argument {name}"


def check_all(operation, case, got, want, scales):
    """check every tensor, under operation.tensor; each of the three must name the same tensors."""
    assert got.keys() == want.keys() == scales.keys(), f"{operation}: {list(got)}, {list(want)}, {list(scales)}"
    for name, value in got.items():
        answer = want[name].detach().numpy().astype(case.dtype)
        check(f"{operation}.{name}", value, answer, scales[name])


def check_linear(case):
    s, n = case.source(), case.shape
    x, w, dy = s.x(n["B"], n["T"], n["I"]), s.normal(n["O"], n["I"]), s.upstream(n["B"], n["T"], n["O"])
    b = s.normal(n["O"]) if case.options.get("bias", True) else None
    with unchanged("linear", x=x, w=w, b=b, dy=dy):
        y, cache = linear.linear_forward(x, w, b)
        dx, dw, db = linear.linear_backward(dy, cache)
    tx, tw, tb = leaf(x), leaf(w), None if b is None else leaf(b)
    ty = F.linear(tx, tw, tb)
    ty.backward(leaf(dy))
    got, want = {"y": y, "dx": dx, "dw": dw}, {"y": ty, "dx": tx.grad, "dw": tw.grad}
    if b is None:
        assert db is None, "linear: a bias gradient without a bias"
    else:
        got, want = got | {"db": db}, want | {"db": tb.grad}
    check_all("linear", case, got, want, compare.linear_scales(x, w, b, dy))


def check_layernorm(case):
    s, n = case.source(), case.shape
    shape = (n["B"], n["T"], n["C"])
    x, scale, shift, dy = s.x(*shape), s.normal(n["C"]), s.normal(n["C"]), s.upstream(*shape)
    with unchanged("layernorm", x=x, scale=scale, shift=shift, dy=dy):
        y, cache = layernorm.layernorm_forward(x, scale, shift)
        dx, dscale, dshift = layernorm.layernorm_backward(dy, cache)
    tx, tscale, tshift = leaf(x), leaf(scale), leaf(shift)
    ty = F.layer_norm(tx, (n["C"],), tscale, tshift, eps=1e-5)
    ty.backward(leaf(dy))
    got = {"y": y, "dx": dx, "dscale": dscale, "dshift": dshift}
    want = {"y": ty, "dx": tx.grad, "dscale": tscale.grad, "dshift": tshift.grad}
    check_all("layernorm", case, got, want, compare.layernorm_scales(x, scale, shift, dy))


def check_gelu(case):
    s, n = case.source(), case.shape
    x, dy = s.x(n["B"], n["T"], n["C"]), s.upstream(n["B"], n["T"], n["C"])
    with unchanged("gelu", x=x, dy=dy):
        y, cache = gelu.gelu_forward(x)
        dx = gelu.gelu_backward(dy, cache)
    tx = leaf(x)
    ty = F.gelu(tx, approximate="tanh")
    ty.backward(leaf(dy))
    check_all("gelu", case, {"y": y, "dx": dx}, {"y": ty, "dx": tx.grad}, compare.gelu_scales(x, dy))


def check_dropout(case):
    """Bit for bit: given which elements torch keeps, the factors, y and dx are torch's, in either dtype."""
    s, n, rate = case.source(), case.shape, case.options["rate"]
    x, dy = s.x(n["B"], n["T"], n["C"]), s.upstream(n["B"], n["T"], n["C"])
    tx = torch.from_numpy(x.copy(order="C")).requires_grad_()
    torch.manual_seed(case.seed)
    ty = F.dropout(tx, rate)
    ty.backward(torch.from_numpy(dy.copy(order="C")))
    torch.manual_seed(case.seed)
    factors = F.dropout(torch.ones_like(tx), rate).detach().numpy()
    mask = dropout.dropout_mask(factors != 0, rate, np.dtype(case.dtype))
    with unchanged("dropout", x=x, dy=dy, mask=mask):
        y, cache = dropout.dropout_forward(x, mask)
        dx = dropout.dropout_backward(dy, cache)
    check_exact("dropout.mask", mask, factors)
    check_exact("dropout.y", y, ty.detach().numpy())
    check_exact("dropout.dx", dx, tx.grad.numpy())


def check_embedding(case):
    s, n = case.source(), case.shape
    ids, w, dy = s.ids(n["V"], n["B"], n["T"]), s.normal(n["V"], n["C"]), s.upstream(n["B"], n["T"], n["C"])
    ids = strategies.arrange(ids, "C" if case.layout == "gaps" else case.layout)  # the gaps are filled with NaN
    with unchanged("embedding", ids=ids, w=w, dy=dy):
        y, cache = embedding.embedding_forward(ids, w)
        dw = embedding.embedding_backward(dy, cache)
    tw = leaf(w)
    ty = F.embedding(torch.from_numpy(ids.copy()), tw)
    ty.backward(leaf(dy))
    check_all("embedding", case, {"y": y, "dw": dw}, {"y": ty, "dw": tw.grad}, compare.embedding_scales(ids, w, dy))


def check_position_embedding(case):
    s, n = case.source(), case.shape
    start, T = n["start"], n["T"]
    x, w = s.x(n["B"], T, n["C"]), s.normal(start + T + n["rest"], n["C"])
    dy = s.upstream(n["B"], T, n["C"])
    with unchanged("position_embedding", x=x, w=w, dy=dy):
        y, cache = embedding.position_embedding_forward(x, w, start)
        dx, dw = embedding.position_embedding_backward(dy, cache)
    tx, tw = leaf(x), leaf(w)
    ty = tx + F.embedding(torch.arange(start, start + T), tw)
    ty.backward(leaf(dy))
    got, want = {"y": y, "dx": dx, "dw": dw}, {"y": ty, "dx": tx.grad, "dw": tw.grad}
    check_all("position_embedding", case, got, want, compare.position_embedding_scales(x, w, start, dy))


def torch_attention(q, k, v, mask, seen):
    """The formula in torch's own operations; without a mask, torch's fused one as a second opinion."""
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
    probs = torch.softmax(scores, dim=-1)
    yield "plain", (probs if mask is None else probs * mask) @ v
    if mask is None:
        yield "sdpa", F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        if q.shape[-2] == k.shape[-2]:
            yield "sdpa, causal", F.scaled_dot_product_attention(q, k, v, is_causal=True)


def check_attention(case):
    s, n, rate = case.source(), case.shape, case.options.get("rate")
    B, NH, T, HS = n["B"], n["NH"], n["T"], n["HS"]
    S = n["past"] + T
    q, k, v = s.x(B, NH, T, HS), s.normal(B, NH, S, HS), s.normal(B, NH, S, HS)
    dy = s.upstream(B, NH, T, HS)
    mask = None if rate is None else s.factors(rate, B, NH, T, S)
    with unchanged("attention", q=q, k=k, v=v, mask=mask, dy=dy):
        y, cache = attention.attention_forward(q, k, v, mask)
        dq, dk, dv = attention.attention_backward(dy, cache)
    got, scales = {"y": y, "dq": dq, "dk": dk, "dv": dv}, compare.attention_scales(q, k, v, mask, dy)
    tq, tk, tv = leaf(q), leaf(k), leaf(v)
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    tmask = None if mask is None else torch.from_numpy(np.array(mask, dtype=np.float64, order="C"))
    for _, ty in torch_attention(tq, tk, tv, tmask, seen):
        dtq, dtk, dtv = torch.autograd.grad(ty, (tq, tk, tv), leaf(dy))
        check_all("attention", case, got, {"y": ty, "dq": dtq, "dk": dtk, "dv": dtv}, scales)


def check_cross_entropy(case):
    s, n = case.source(), case.shape
    logits, targets = s.x(n["B"], n["T"], n["V"]), s.ids(n["V"], n["B"], n["T"])
    dloss = float(s.upstream(1)[0])  # not 1: the loss need not be the end of the line
    with unchanged("cross_entropy", logits=logits, targets=targets):
        loss, cache = cross_entropy.cross_entropy_forward(logits, targets)
        dlogits = cross_entropy.cross_entropy_backward(dloss, cache)
    tz = leaf(logits)
    tloss = F.cross_entropy(tz.flatten(0, 1), torch.from_numpy(targets).flatten())
    tloss.backward(torch.tensor(dloss, dtype=torch.float64))
    got, want = {"loss": loss, "dlogits": dlogits}, {"loss": tloss, "dlogits": tz.grad}
    check_all("cross_entropy", case, got, want, compare.cross_entropy_scales(logits, targets, dloss))


OPERATIONS = {
    "linear": (check_linear, strategies.linear_cases),
    "layernorm": (check_layernorm, strategies.layernorm_cases),
    "gelu": (check_gelu, strategies.gelu_cases),
    "dropout": (check_dropout, strategies.dropout_cases),
    "embedding": (check_embedding, strategies.embedding_cases),
    "position_embedding": (check_position_embedding, strategies.position_embedding_cases),
    "attention": (check_attention, strategies.attention_cases),
    "cross_entropy": (check_cross_entropy, strategies.cross_entropy_cases),
}

LARGE = [  # what is worked off in blocks has a first, a middle and a last one here
    ("linear", OperationCase({"B": 2, "T": 130, "I": 96, "O": 384})),
    ("layernorm", OperationCase({"B": 2, "T": 300, "C": 96})),
    ("layernorm", OperationCase({"B": 1, "T": 130, "C": 768}, fill="constant rows")),
    ("gelu", OperationCase({"B": 2, "T": 130, "C": 1031})),
    ("embedding", OperationCase({"B": 4, "T": 150, "V": 2000, "C": 24})),
    ("position_embedding", OperationCase({"B": 3, "T": 200, "C": 24, "start": 3, "rest": 50})),
    ("attention", OperationCase({"B": 2, "NH": 3, "T": 63, "past": 0, "HS": 16})),
    ("attention", OperationCase({"B": 1, "NH": 2, "T": 64, "past": 0, "HS": 16}, fill="huge")),
    ("attention", OperationCase({"B": 2, "NH": 1, "T": 65, "past": 0, "HS": 16}, options={"rate": 0.1})),
    ("attention", OperationCase({"B": 1, "NH": 2, "T": 200, "past": 0, "HS": 64}, scale=3.0)),
    ("attention", OperationCase({"B": 2, "NH": 2, "T": 129, "past": 70, "HS": 8}, options={"rate": 0.5})),
    ("attention", OperationCase({"B": 2, "NH": 2, "T": 1, "past": 255, "HS": 64})),
    ("cross_entropy", OperationCase({"B": 2, "T": 70, "V": 1031}, scale=3.0)),
    ("cross_entropy", OperationCase({"B": 1, "T": 3, "V": 50257})),
]


@given(case=strategies.linear_cases())
@example(OperationCase({"B": 1, "T": 1, "I": 1, "O": 1}, fill="huge"))
@example(OperationCase({"B": 3, "T": 4, "I": 7, "O": 5}, options={"bias": False}))
def test_linear_matches_torch(case):
    check_linear(case)


@given(case=strategies.layernorm_cases())
@example(OperationCase({"B": 2, "T": 3, "C": 8}, fill="constant rows"))
@example(OperationCase({"B": 2, "T": 3, "C": 8}, scale=1e-2))  # eps counts as much as the variance
@example(OperationCase({"B": 1, "T": 1, "C": 1}))
def test_layernorm_matches_torch(case):
    check_layernorm(case)


@given(case=strategies.gelu_cases())
@example(OperationCase({"B": 1, "T": 2, "C": 3}, fill="huge"))
def test_gelu_matches_torch(case):
    check_gelu(case)


@given(case=strategies.dropout_cases() | strategies.dropout_cases("float32"))
def test_dropout_is_torchs_bit_for_bit(case):
    check_dropout(case)


@given(case=strategies.embedding_cases())
@example(OperationCase({"B": 4, "T": 9, "V": 2, "C": 3}))
@example(OperationCase({"B": 1, "T": 1, "V": 1, "C": 1}))
def test_embedding_matches_torch(case):
    check_embedding(case)


@given(case=strategies.position_embedding_cases())
def test_position_embedding_matches_torch(case):
    check_position_embedding(case)


@given(case=strategies.attention_cases())
@example(OperationCase({"B": 1, "NH": 1, "T": 1, "past": 0, "HS": 1}, fill="huge"))
@example(OperationCase({"B": 2, "NH": 2, "T": 1, "past": 6, "HS": 4}))  # cached decoding
@example(OperationCase({"B": 2, "NH": 2, "T": 3, "past": 5, "HS": 4}, options={"rate": 0.5}))
@example(OperationCase({"B": 2, "NH": 2, "T": 6, "past": 0, "HS": 4}, fill="huge", scale=3.0))
@example(OperationCase({"B": 2, "NH": 2, "T": 6, "past": 0, "HS": 4}, fill="zeros"))
def test_attention_matches_torch(case):
    check_attention(case)


@given(case=strategies.cross_entropy_cases())
@example(OperationCase({"B": 1, "T": 1, "V": 2}, fill="huge"))
@example(OperationCase({"B": 2, "T": 3, "V": 5}, fill="constant rows"))
def test_cross_entropy_matches_torch(case):
    check_cross_entropy(case)


@pytest.mark.parametrize(("operation", "case"), LARGE)
def test_larger_shapes_match_torch(operation, case):
    check_operation, _ = OPERATIONS[operation]
    check_operation(case)


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=40)
@given(data=st.data())
def test_float32_stays_float32_and_within_the_same_budget(operation, data):
    check_operation, cases = OPERATIONS[operation]
    check_operation(data.draw(cases("float32")))


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_memory_layout_matches_torch(operation, layout):
    check_operation, _ = OPERATIONS[operation]
    names = ("B", "T", "C", "I", "O", "V", "NH", "HS", "past", "start", "rest")
    check_operation(OperationCase(dict.fromkeys(names, 3), layout=layout, options={"rate": 0.5}))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=500)
@given(data=st.data())
def test_operation_matches_torch_over_many_cases(operation, dtype, data):
    check_operation, cases = OPERATIONS[operation]
    check_operation(data.draw(cases(dtype)))


def test_dropout_without_a_mask_passes_on_the_same_array():
    x = np.arange(6.0).reshape(2, 3)
    y, cache = dropout.dropout_forward(x, None)
    assert y is x
    assert dropout.dropout_backward(x, cache) is x


def test_an_unread_row_of_a_table_has_gradient_zero():
    ids, w, dy = np.array([[1, 3, 1]]), np.ones((5, 2)), np.full((1, 3, 2), 7.0)
    dw = embedding.embedding_backward(dy, embedding.embedding_forward(ids, w)[1])
    check_exact("embedding.dw", dw, np.array([[0, 0], [14, 14], [0, 0], [7, 7], [0, 0.0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear.linear_forward(np.ones((2, 3)), np.ones((4, 5)), None), "x has 3 features, w expects 5"),
        (lambda: embedding.embedding_forward(np.array([[0, 4]]), np.ones((4, 2))), "id 4 is outside the table's 4"),
        (lambda: embedding.embedding_forward(np.array([[-1]]), np.ones((4, 2))), "id -1 is outside the table's 4"),
        (lambda: embedding.position_embedding_forward(np.ones((1, 3, 2)), np.ones((4, 2)), 2), "positions up to 5"),
        (
            lambda: attention.attention_forward(np.ones((1, 1, 3, 2)), np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2))),
            "3 queries but only 2 keys",
        ),
        (
            lambda: cross_entropy.cross_entropy_forward(np.ones((2, 3, 4)), np.ones((2, 4), int)),
            r"need targets \(2, 3\)",
        ),
        (lambda: cross_entropy.cross_entropy_forward(np.ones((0, 4)), np.ones(0, int)), "need targets"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
