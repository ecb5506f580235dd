"""The judge: budgets and their scales, defined once and independently of numpy_gpt. Needs no torch.

A budget is a number of eps (of the dtype under test) times a scale. For one operation the scale S is the operation's
own formula on absolute values, with every subtraction turned into a sum: the magnitudes that get rounded, whether or
not they cancel. The rule is max|numpy − torch| <= 64 · eps · S over a tensor. Every S below is elementwise, the
stricter reading: an error in a small element cannot hide behind a large element. Two factors keep that fair:

* exp(a) turns an error of a into a relative error of exp(a), so a softmax probability carries (1 + |exponent|) · eps.
  For attention it is (1 + max|score|), for the entire tensor. For cross-entropy it is p · (1 + |log p|) per element,
  which is never above 1, and the result is capped at the plain max S: the elementwise budget never exceeds the rule's.
* below the smallest normal number rounding is absolute: eps of that number is the spacing there. So it is added to
  every nonzero scale, and to factors that can underflow: probabilities and their gradients.

A scale of None means that numbers are only moved or multiplied once, so the bits must match.
"""

import math
import re
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

LAYERNORM_EPS = 1e-5  # GPT-2's


class Budget(NamedTuple):
    """A heading of the summary, and the multiple of eps · scale it allows."""

    title: str
    factor: float


OPERATION = Budget("one operation", 64)
MODEL = Budget("whole model", 2**16)

_largest: dict[str, dict[str, float]] = {}
_whose = ""


def kind(name):
    """A tensor's kind: its name without the block index, so that all blocks share one line of the summary.

    "a law: tensor" has the law as its kind.
    """
    return re.sub(r"trf_blocks\.\d+\.", "trf_blocks.*.", name).partition(":")[0]


@contextmanager
def recorded_for(whose):
    """Record under separate headings, prefixed with `whose`, within the block."""
    global _whose
    before, _whose = _whose, f"{whose}: "
    try:
        yield
    finally:
        _whose = before


def record(title, name, value):
    """Keep the largest value seen for this tensor kind, for the summary."""
    table = _largest.setdefault(_whose + title, {})
    table[kind(name)] = float(np.maximum(value, table.get(kind(name), 0.0)))  # a NaN stays one


def summary():
    """The terminal summary: per heading, every tensor kind and its largest value, NaNs first, then descending."""
    for title in sorted(_largest):
        yield ""
        yield title
        for name, value in sorted(_largest[title].items(), key=lambda item: (not math.isnan(item[1]), -item[1])):
            yield f"  {value:10.3g}  {name}"


def check(name, got, want, scale, budget=OPERATION):
    """Fail unless |got − want| <= budget.factor · eps · scale everywhere; return the largest share of the budget used.

    got and want are arrays (or scalars) of one shape and one dtype, which sets eps; scale (>= 0) broadcasts to them.
    A NaN on either side fails, and so does a non-finite scale: under an infinite scale everything would pass. The
    message names the tensor, the index, both values and the share.
    """
    __tracebackhide__ = True
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, should be {want.shape}"
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, should be {want.dtype}"
    if not got.size:
        return 0.0
    scale, limits = np.asarray(scale, np.float64), np.finfo(got.dtype)
    usable = (scale >= 0) & (scale < np.inf)
    assert usable.all(), f"{name}: a scale cannot be {scale[~usable][0]}"
    allowed = budget.factor * float(limits.eps) * np.where(scale > 0, scale + float(limits.tiny), scale)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        error = np.abs(got.astype(np.float64) - want.astype(np.float64))
        share = np.where(error == 0, 0.0, error / allowed)
    at = np.unravel_index(share.argmax(), share.shape)  # argmax returns the first NaN, if any
    used = float(share[at])
    index = [int(i) for i in at]
    assert used <= 1, f"{name}{index}: {got[at]:.9e} vs {want[at]:.9e}, {used:.3g}x the budget"
    record(f"{budget.title}, {got.dtype}: largest share of {budget.factor:g} eps S used", name, used)
    return used


def check_exact(name, got, want):
    """Fail unless shape, dtype and bytes are equal: stricter than ==, for which −0 equals 0."""
    __tracebackhide__ = True
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, should be {want.shape}"
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, should be {want.dtype}"
    if got.tobytes() != want.tobytes():
        bits = f"u{got.dtype.itemsize}"
        other = (np.ascontiguousarray(got).view(bits) != np.ascontiguousarray(want).view(bits)).reshape(got.shape)
        at = np.unravel_index(other.argmax(), other.shape)
        index = [int(i) for i in at]
        raise AssertionError(f"{name}{index}: {got[at]!r} vs {want[at]!r}, {int(other.sum())} of {got.size} differ")


# The scales. Arguments are an operation's inputs and its upstream gradient; the result is tensor name -> S in float64,
# or None where the bits must match.


def _absolute(*arrays):
    return [None if a is None else np.abs(np.asarray(a, np.float64)) for a in arrays]


def linear_scales(x, w, b, dy):
    """y = x wᵀ + b;  dx = dy w,  dw = dyᵀ x,  db = Σ dy."""
    x, w, b, dy = _absolute(x, w, b, dy)
    rows = dy.reshape(-1, w.shape[0])
    scales = {"y": x @ w.T, "dx": dy @ w, "dw": rows.T @ x.reshape(-1, w.shape[1])}
    if b is not None:
        scales |= {"y": scales["y"] + b, "db": rows.sum(axis=0)}
    return scales


def layernorm_scales(x, scale, shift, dy):
    """y = x̂ scale + shift with x̂ = (x − mean) rstd;  dx = rstd (g − mean(g) − x̂ mean(g x̂)) with g = dy scale.

    rstd is positive and contains no subtraction, so it stays unchanged; |x̂| becomes (|x| + mean|x|) rstd.
    """
    rstd = 1 / np.sqrt(np.asarray(x, np.float64).var(axis=-1, keepdims=True) + LAYERNORM_EPS)
    x, scale, shift, dy = _absolute(x, scale, shift, dy)
    x_hat = (x + x.mean(axis=-1, keepdims=True)) * rstd
    g = dy * scale
    rows = tuple(range(dy.ndim - 1))
    return {
        "y": x_hat * scale + shift,
        "dx": rstd * (g + g.mean(axis=-1, keepdims=True) + x_hat * (g * x_hat).mean(axis=-1, keepdims=True)),
        "dscale": (dy * x_hat).sum(axis=rows),
        "dshift": dy.sum(axis=rows),
    }


def gelu_scales(x, dy):
    """y = ½ x (1 + t),  t = tanh u;  dx = dy (½ (1 + t) + ½ x (1 − t²) du/dx)."""
    x, dy = _absolute(x, dy)
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return {"y": 0.5 * x * (1 + t), "dx": dy * (0.5 * (1 + t) + 0.5 * x * (1 + t**2) * slope)}


def attention_scales(q, k, v, mask, dy):
    """y = (p mask) v,  p = softmax(s);  ds = p (dp − Σ dp p);  dq = ds k / √HS, dk = dsᵀ q / √HS, dv = (p mask)ᵀ dy.

    All times (1 + max|s|), with s the true scores, not those of |q| and |k|: again the stricter reading.
    """
    tiny = float(np.finfo(q.dtype).tiny)
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    T, S, root = q.shape[-2], k.shape[-2], math.sqrt(q.shape[-1])
    s = q @ k.swapaxes(-1, -2) / root
    seen = np.arange(S) <= np.arange(T)[:, None] + S - T
    exponent = 1 + np.abs(np.where(seen, s, 0)).max()
    s = np.where(seen, s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p = np.where(seen, p / p.sum(axis=-1, keepdims=True) + tiny, 0)
    q, k, v, dy = _absolute(q, k, v, dy)
    mask = np.ones_like(p) if mask is None else np.asarray(mask, np.float64)
    dp = mask * (dy @ v.swapaxes(-1, -2))
    ds = np.where(seen, p * (dp + (dp * p).sum(axis=-1, keepdims=True)) + tiny, 0)
    scales = {
        "y": (p * mask) @ v,
        "dq": ds @ k / root,
        "dk": ds.swapaxes(-1, -2) @ q / root,
        "dv": (p * mask).swapaxes(-1, -2) @ dy,
    }
    return {name: exponent * scale for name, scale in scales.items()}


def embedding_scales(ids, w, dy):
    """y = w[ids] moves numbers;  dw_v = Σ dy where ids == v."""
    dw = np.zeros(w.shape)
    for n, row in zip(ids.reshape(-1), np.abs(dy).reshape(-1, w.shape[1]), strict=True):
        dw[n] += row
    return {"y": None, "dw": dw}


def position_embedding_scales(x, w, start, dy):
    """y = x + w[start : start + T];  dx = dy moves numbers;  dw = Σ_b dy."""
    x, w, dy = _absolute(x, w, dy)
    dw = np.zeros(w.shape)
    dw[start : start + x.shape[1]] = dy.sum(axis=0)
    return {"y": x + w[start : start + x.shape[1]], "dx": None, "dw": dw}


def cross_entropy_scales(logits, targets, dloss):
    """loss = mean(max z + log Σ exp(z − max z) − z_target);  dz = (p − onehot) dloss / N, with the module's factor."""
    z = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1])
    N = len(z)
    top = z.max(axis=-1, keepdims=True)
    log_total = np.log(np.exp(z - top).sum(axis=-1, keepdims=True))
    log_p = z - top - log_total
    p = np.exp(log_p)
    onehot = np.zeros_like(z)
    onehot[np.arange(N), targets.reshape(-1)] = 1
    at_target = np.abs(z[np.arange(N), targets.reshape(-1)])
    tiny = float(np.finfo(logits.dtype).tiny)
    dz = np.minimum(p * (1 + np.abs(log_p)) + tiny + onehot, (p + onehot).max())
    return {
        "loss": (np.abs(top[:, 0]) + log_total[:, 0] + at_target).mean(),
        "dlogits": dz.reshape(logits.shape) * abs(float(dloss)) / N,
    }
