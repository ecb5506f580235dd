"""Mathematical laws: nothing is compared with torch, and this module runs without it.

A law compares two of our own numbers within the budgets of judge/compare.py, or bit for bit where both come from
exactly the same calculation.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numpy_gpt import GPT, Generator, GPTConfig
from numpy_gpt.ops import attention, cross_entropy, dropout, layernorm
from parity_tests.judge import compare, strategies
from parity_tests.judge.compare import check, check_exact
from parity_tests.judge.laws import (
    MODEL,
    check_batch_is_the_mean,
    check_first_query,
    check_gradients_are_slopes,
    check_model_slopes,
    check_tied_is_the_sum,
    largest,
)
from parity_tests.judge.strategies import ModelCase, OperationCase

CONFIG = GPTConfig(vocab_size=17, context_length=8, emb_dim=12, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True)
OPERATION = compare.OPERATION._replace(title="laws of one operation")


# Causality


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@settings(max_examples=25)
@given(data=st.data())
def test_token_does_not_change_earlier_logits(dtype, data):
    case = replace(data.draw(strategies.model_cases()), dtype=dtype)
    t = data.draw(st.integers(0, case.T - 1))
    model, (tokens, _) = case.model(), case.batch()
    other = tokens.copy()
    other[:, t:] = (other[:, t:] + 1) % case.config.vocab_size
    before, after = model(tokens), model(other)
    check_exact("logits before the change", after[:, :t], before[:, :t])
    assert (after[:, t] != before[:, t]).any(), "nothing depends on the token"


@settings(max_examples=25)
@given(data=st.data())
def test_target_does_not_change_later_gradients(data):
    """Row s of the position table feeds the losses at s and later, so a target at t affects only rows up to t."""
    case = data.draw(strategies.model_cases(scales=st.sampled_from((0.1, 0.5, 1.0))))
    t = data.draw(st.integers(0, case.T - 1))
    model, (tokens, targets) = case.model(), case.batch()
    other = targets.copy()
    other[0, t] = (other[0, t] + 1) % case.config.vocab_size  # in one row only: changes in two rows could cancel
    before = model.loss_and_grads(tokens, targets)[1]["pos_emb.weight"].copy()
    after = model.loss_and_grads(tokens, other)[1]["pos_emb.weight"]
    check_exact("d pos_emb.weight after the target", after[t + 1 :], before[t + 1 :])
    assert (after[t] != before[t]).any(), "nothing depends on the target"
    check_exact("d pos_emb.weight beyond T", after[case.T :], np.zeros_like(after[case.T :]))


@settings(max_examples=50)
@given(case=strategies.attention_cases(), data=st.data())
def test_attention_sends_no_gradient_into_the_future(case, data):
    s, n = case.source(), case.shape
    B, NH, T, HS = n["B"], n["NH"], n["T"], n["HS"]
    S = n["past"] + T
    q, k, v = s.x(B, NH, T, HS), s.normal(B, NH, S, HS), s.normal(B, NH, S, HS)
    t = data.draw(st.integers(0, T - 1))
    dy = np.zeros((B, NH, T, HS))
    dy[:, :, t] = s.upstream(B, NH, HS)
    dq, dk, dv = attention.attention_backward(dy, attention.attention_forward(q, k, v)[1])
    last = t + n["past"]  # the last key that query t sees
    for name, grad, seen in (("dq", dq, slice(t, t + 1)), ("dk", dk, slice(last + 1)), ("dv", dv, slice(last + 1))):
        unseen = np.ones(grad.shape[2], bool)
        unseen[seen] = False
        assert not grad[:, :, unseen].any(), f"{name} is not 0 outside positions {seen}"
    assert dv[:, :, : last + 1].any()


# Laws of one operation


@settings(max_examples=100)
@given(case=strategies.cross_entropy_cases(), shift=st.sampled_from((-1e4, -3.0, 0.7, 1e4)))
def test_loss_is_invariant_to_a_shift_of_logits(case, shift):
    s, n = case.source(), case.shape
    z, targets = s.x(n["B"], n["T"], n["V"]), s.ids(n["V"], n["B"], n["T"])
    (a, cache_a), (b, cache_b) = (cross_entropy.cross_entropy_forward(logits, targets) for logits in (z, z + shift))
    scales = [compare.cross_entropy_scales(logits, targets, 1.0) for logits in (z, z + shift)]
    moved = np.abs(z + shift).max()  # z + shift is rounded by eps of its size, which becomes p's relative error
    check("shifted logits: loss", b, a, scales[0]["loss"] + scales[1]["loss"], OPERATION)
    got, want = (cross_entropy.cross_entropy_backward(1.0, cache) for cache in (cache_b, cache_a))
    check("shifted logits: dlogits", got, want, scales[0]["dlogits"] * (1 + moved), OPERATION)


@settings(max_examples=100)
@given(case=strategies.cross_entropy_cases())
def test_rows_of_dlogits_sum_to_zero(case):
    s, n = case.source(), case.shape
    z, targets = s.x(n["B"], n["T"], n["V"]), s.ids(n["V"], n["B"], n["T"])
    dz = cross_entropy.cross_entropy_backward(-2.5, cross_entropy.cross_entropy_forward(z, targets)[1])
    scale = compare.cross_entropy_scales(z, targets, -2.5)["dlogits"].sum(axis=-1)
    check("rows of dlogits sum to 0", dz.sum(axis=-1), np.zeros(dz.shape[:-1]), scale, OPERATION)
    wrong = np.arange(z.shape[-1]) != targets[..., None]
    assert (dz[wrong] <= 0).all(), "a negative upstream gradient raises every logit but the target's"
    assert (dz[~wrong] >= 0).all()


@settings(max_examples=100)
@given(case=strategies.layernorm_cases())
def test_layernorm_dx_is_orthogonal_to_1_and_x_hat(case):
    """Σ dx = 0, and Σ dx x̂ = rstd Σ g x̂ · eps / (var + eps), not 0, because mean(x̂²) = var / (var + eps)."""
    s, n = case.source(), case.shape
    shape = (n["B"], n["T"], n["C"])
    x, scale, shift, dy = s.x(*shape), s.normal(n["C"]), s.normal(n["C"]), s.upstream(*shape)
    dx = layernorm.layernorm_backward(dy, layernorm.layernorm_forward(x, scale, shift)[1])[0]
    rstd = 1 / np.sqrt(x.var(axis=-1) + compare.LAYERNORM_EPS)
    x_hat, g = (x - x.mean(axis=-1, keepdims=True)) * rstd[..., None], dy * scale
    S = compare.layernorm_scales(x, scale, shift, dy)["dx"]
    S_hat = (np.abs(x) + np.abs(x).mean(axis=-1, keepdims=True)) * rstd[..., None]
    check("layernorm: Σ dx", dx.sum(axis=-1), np.zeros(shape[:2]), S.sum(axis=-1), OPERATION)
    want = rstd * (g * x_hat).sum(axis=-1) * compare.LAYERNORM_EPS * rstd**2
    check("layernorm: Σ dx x̂", (dx * x_hat).sum(axis=-1), want, (S * S_hat).sum(axis=-1), OPERATION)


@settings(max_examples=50)
@given(case=strategies.layernorm_cases())
def test_layernorm_normalises(case):
    """With scale 1 and shift 0 a row's mean is 0 and its mean square var / (var + eps), where var divides by C."""
    s, n = case.source(), case.shape
    x = s.x(n["B"], n["T"], n["C"])
    y, _ = layernorm.layernorm_forward(x, np.ones(n["C"]), np.zeros(n["C"]))
    var = x.var(axis=-1)
    S = (np.abs(x) + np.abs(x).mean(axis=-1, keepdims=True)) / np.sqrt(var + compare.LAYERNORM_EPS)[..., None]
    check("normalised rows: mean", y.mean(axis=-1), np.zeros(var.shape), S.mean(axis=-1), OPERATION)
    want = var / (var + compare.LAYERNORM_EPS)
    check("normalised rows: mean square", (y * y).mean(axis=-1), want, (S * S).mean(axis=-1), OPERATION)


@pytest.mark.parametrize("C", [3, 7, 9, 768])
def test_layernorm_of_a_constant_row_is_its_shift(C):
    """Exactly, although the mean of C equal numbers is rounded and rstd would enlarge the error 316 times."""
    rng = np.random.default_rng(C)
    x = np.broadcast_to(rng.standard_normal((50, 1)) * 10.0 ** rng.integers(-2, 3, (50, 1)), (50, C))
    scale, shift = 1 + rng.standard_normal((2, C))
    check_exact("y", layernorm.layernorm_forward(x, scale, shift)[0], np.broadcast_to(shift, (50, C)))


@pytest.mark.parametrize("score", [0.0, 1.0, -1.0, 1e4, -1e4, 1e12, -1e12])
def test_first_query_sees_one_key(score):
    check_first_query(score)


@pytest.mark.parametrize("rate", [None, 0.5])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("T", [1, 2, 5, 70])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_query_with_one_key_has_no_gradient(dtype, T, scale, rate):
    """softmax over one score is always 1: dq and its contribution to dk are exactly 0, and dv is dy."""
    rng = np.random.default_rng(0)
    q, k, v, dy = (scale * rng.standard_normal((4, 2, 3, T, 7))).astype(dtype)
    mask = None if rate is None else ((rng.random((2, 3, T, T)) >= rate) / (1 - rate)).astype(dtype)
    dq, dk, dv = attention.attention_backward(dy, attention.attention_forward(q, k, v, mask)[1])
    assert not dq[:, :, 0].any()
    first = np.zeros_like(dy)
    first[:, :, 0] = dy[:, :, 0]
    dq, dk, dv = attention.attention_backward(first, attention.attention_forward(q, k, v, mask)[1])
    assert not dq.any()
    assert not dk.any()
    want = first[:, :, 0] if mask is None else first[:, :, 0] * mask[:, :, 0, :1] + 0  # −0 becomes 0
    check_exact("dv of a gradient of the first output only", dv[:, :, 0], want)
    assert not dv[:, :, 1:].any()


def test_query_after_cached_keys_has_a_gradient():
    """The first of these queries sees more than one key."""
    q, k, v, dy = np.random.default_rng(0).standard_normal((4, 1, 1, 3, 5))
    dq, dk, _ = attention.attention_backward(dy[:, :, 1:], attention.attention_forward(q[:, :, 1:], k, v)[1])
    assert (np.abs(dq) > 1e-6).all()
    assert dk.all()


@settings(max_examples=20)
@given(case=strategies.model_cases(qkv_bias=True, context_length=1, drop_rates=(0.0, 0.5)))
def test_one_token_sends_no_gradient_to_queries_and_keys(case):
    grads = case.model().loss_and_grads(*case.batch(), rng=Generator(0))[1]
    for name, grad in grads.items():
        if "W_query" in name or "W_key" in name:
            assert not grad.any(), name


def test_vocabulary_of_one_token_has_no_loss():
    for dtype in (np.float32, np.float64):
        z = np.random.default_rng(0).standard_normal((2, 3, 1)).astype(dtype)
        loss, cache = cross_entropy.cross_entropy_forward(z, np.zeros((2, 3), int))
        check_exact("loss", loss, dtype(0))
        check_exact("dlogits", cross_entropy.cross_entropy_backward(0.7, cache), np.zeros_like(z))


def test_layernorm_of_one_number_has_only_a_shift_gradient():
    for dtype in (np.float32, np.float64):
        x, dy = np.random.default_rng(0).standard_normal((2, 3, 1)).astype(dtype)
        scale, shift = np.full(1, 3, dtype), np.full(1, 0.3, dtype)
        dx, dscale, _ = layernorm.layernorm_backward(dy, layernorm.layernorm_forward(x, scale, shift)[1])
        assert not dx.any()
        assert not dscale.any()


def test_attention_over_equal_keys_averages_the_values():
    rng = np.random.default_rng(0)
    q, v = rng.standard_normal((2, 3, 5, 4)), rng.standard_normal((2, 3, 5, 4))
    k = np.broadcast_to(rng.standard_normal((2, 3, 1, 4)), v.shape)
    y, _ = attention.attention_forward(q, k, v)
    want = np.cumsum(v, axis=2) / np.arange(1, 6)[:, None]
    check("attention over equal keys: y", y, want, compare.attention_scales(q, k, v, None, y)["y"], OPERATION)


def test_dropout_keeps_the_mean():
    """Factors are 0 or 1 / (1 − rate): keeping a share of 1 − rate gives a mean factor of 1."""
    for rate in (0.1, 0.25, 0.5, 0.9):
        keep = np.arange(1000) >= round(1000 * rate)
        mask = dropout.dropout_mask(keep, rate, np.float64)
        check("dropout keeps the mean", mask.mean(), np.float64(1), 1.0, OPERATION)
        check_exact("dropped factors", mask[~keep], np.zeros(int((~keep).sum())))


# Finite differences


@pytest.mark.parametrize("seed", range(5))
def test_operation_gradients_match_finite_differences(seed):
    check_gradients_are_slopes(seed)


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
@pytest.mark.parametrize("tied", [False, True])
def test_model_gradients_match_finite_differences(tied, drop_rate):
    config = replace(CONFIG, tie_weights=tied, drop_rate=drop_rate)
    check_model_slopes(ModelCase(config, B=2, T=8, scale=0.5, seed=3))


# Laws of the model


@settings(max_examples=40)
@given(case=strategies.model_cases())
def test_tied_gradient_is_the_sum_of_the_untied_two(case):
    check_tied_is_the_sum(case)


@settings(max_examples=40)
@given(case=strategies.model_cases())
def test_batch_gradient_is_the_mean_of_its_rows(case):
    check_batch_is_the_mean(case)


@settings(max_examples=40)
@given(case=strategies.model_cases(qkv_bias=True))
def test_key_bias_has_no_gradient(case):
    """It shifts all scores of a query alike, which softmax ignores: the gradient is 0 up to rounding."""
    grads = case.model().loss_and_grads(*case.batch())[1]
    for name, grad in grads.items():
        if name.endswith("W_key.bias"):
            check("key bias: d", grad, np.zeros_like(grad), largest(grads), MODEL)


def permuted_heads(params, config, order):
    """The model with its heads reordered: rows of W_query, W_key, W_value; columns of out_proj."""
    index = np.arange(config.emb_dim).reshape(config.n_heads, -1)[order].reshape(-1)
    out = dict(params)
    for name, a in params.items():
        if ".att.W_" in name:
            out[name] = a[index]
        elif name.endswith("att.out_proj.weight"):
            out[name] = a[:, index]
    return out


@settings(max_examples=40)
@given(case=strategies.model_cases(), data=st.data())
def test_permuting_the_heads_permutes_the_gradients(case, data):
    config, params, (tokens, targets) = case.config, case.params(), case.batch()
    order = data.draw(st.permutations(range(config.n_heads)))
    loss, grads = GPT.from_params(config, params).loss_and_grads(tokens, targets)
    other = GPT.from_params(config, permuted_heads(params, config, order))
    got_loss, got = other.loss_and_grads(tokens, targets)
    check("permuted heads: loss", got_loss, loss, max(float(loss), 1.0), MODEL)
    G = largest(grads)
    for name, want in permuted_heads(grads, config, order).items():
        check(f"permuted heads: d {name}", got[name], want, G, MODEL)


@settings(max_examples=40)
@given(case=strategies.model_cases(), data=st.data())
def test_permuting_the_batch_changes_nothing(case, data):
    model, (tokens, targets) = case.model(), case.batch()
    order = data.draw(st.permutations(range(case.B)))
    logits = model(tokens)
    check("permuted batch: logits", model(tokens[order]), logits[order], np.abs(logits).max(), MODEL)
    loss, grads = model.loss_and_grads(tokens, targets)
    grads = {name: g.copy() for name, g in grads.items()}
    G = max(largest(model.loss_and_grads(tokens[b : b + 1], targets[b : b + 1])[1]) for b in range(case.B))
    got_loss, got = model.loss_and_grads(tokens[order], targets[order])
    check("permuted batch: loss", got_loss, loss, max(float(loss), 1.0), MODEL)
    for name, g in got.items():
        check(f"permuted batch: d {name}", g, grads[name], G, MODEL)


def test_unread_table_rows_have_zero_gradient():
    case = ModelCase(CONFIG, B=2, T=5)
    tokens, targets = case.batch()
    grads = case.model().loss_and_grads(tokens, targets)[1]
    unread = np.setdiff1d(np.arange(CONFIG.vocab_size), tokens)
    assert unread.size
    assert not grads["tok_emb.weight"][unread].any()
    assert grads["tok_emb.weight"][np.unique(tokens)].any(axis=1).all()
    assert not grads["pos_emb.weight"][5:].any()
    assert grads["pos_emb.weight"][:5].any(axis=1).all()


def test_equal_logits_give_the_loss_log_v():
    case = ModelCase(CONFIG)
    params = case.params() | {"out_head.weight": np.zeros((CONFIG.vocab_size, CONFIG.emb_dim))}
    model = GPT.from_params(CONFIG, params)
    want = np.float64(math.log(CONFIG.vocab_size))
    check("equal logits: loss", model.loss(*case.batch()), want, want, MODEL)


def test_operation_cases_are_rebuilt_from_their_seed():
    """A case printed by a failure must reproduce it."""
    case = OperationCase({"B": 2}, seed=9)
    check_exact("x", case.source().x(2, 3), case.source().x(2, 3))
    check_exact("parameter", ModelCase(CONFIG).params()["tok_emb.weight"], ModelCase(CONFIG).params()["tok_emb.weight"])
