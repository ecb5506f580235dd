"""A transformer block out of the operations: attention and feed-forward, each normed before and added after."""

from typing import Any

import numpy as np

from numpy_gpt.config import GPTConfig
from numpy_gpt.ops import attention, dropout, gelu, layernorm, linear
from numpy_gpt.random import Generator
from numpy_gpt.typing import Array, Float, Params

Cache = tuple[Any, ...]


class KVCache:
    """The keys and values of the tokens seen so far, per layer, so that a new token costs one position's work."""

    def __init__(self, config: GPTConfig, batch_size: int, dtype: Float):
        """Room for context_length positions: 2 · L · B · context_length · C numbers."""
        shape = (config.n_layers, batch_size, config.n_heads, config.context_length, config.head_size)
        self._k, self._v = np.empty(shape, dtype), np.empty(shape, dtype)
        self.length = 0

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """k, v (B, NH, T, HS) of the new positions -> those of all positions so far (B, NH, length + T, HS)."""
        start, stop = self.length, self.length + k.shape[2]
        self._k[layer, :, :, start:stop] = k
        self._v[layer, :, :, start:stop] = v
        return self._k[layer, :, :, :stop], self._v[layer, :, :, :stop]


class Dropout:
    """Draws one pass's dropout masks, in the order in which the pass asks for them."""

    def __init__(self, rate: float, rng: Generator | None, dtype: Float):
        self._rate, self._rng, self._dtype = rate, rng, dtype

    def mask(self, shape: tuple[int, ...]) -> Array | None:
        """The factors of an array of this shape, or None where nothing is dropped; rates 0 and 1 draw nothing."""
        if self._rng is None or self._rate == 0:
            return None
        if self._rate == 1:
            return np.zeros(shape, self._dtype)
        return dropout.dropout_mask(self._rng.bernoulli(shape, 1 - self._rate), self._rate, self._dtype)


def _split_heads(x: Array, n_heads: int) -> Array:
    B, T, C = x.shape
    return x.reshape(B, T, n_heads, C // n_heads).swapaxes(1, 2)  # (B, NH, T, HS)


def _merge_heads(x: Array) -> Array:
    B, NH, T, HS = x.shape
    return x.swapaxes(1, 2).reshape(B, T, NH * HS)  # (B, T, C)


def _without_none(grads: dict[str, Array | None]) -> Params:
    return {name: grad for name, grad in grads.items() if grad is not None}  # a linear without bias has no db


def attention_branch_forward(
    x: Array, p: Params, n_heads: int, drop: Dropout, past: KVCache | None, layer: int
) -> tuple[Array, Cache]:
    """Multi-head causal self-attention: x (B, T, C) -> (B, T, C)."""
    q, c_q = linear.linear_forward(x, p["att.W_query.weight"], p.get("att.W_query.bias"))
    k, c_k = linear.linear_forward(x, p["att.W_key.weight"], p.get("att.W_key.bias"))
    v, c_v = linear.linear_forward(x, p["att.W_value.weight"], p.get("att.W_value.bias"))
    qh, kh, vh = (_split_heads(each, n_heads) for each in (q, k, v))
    if past is not None:
        kh, vh = past.extend(layer, kh, vh)
    mask = drop.mask((*qh.shape[:3], kh.shape[2]))  # (B, NH, T, S): dropout on the probabilities
    heads, c_att = attention.attention_forward(qh, kh, vh, mask)
    y, c_out = linear.linear_forward(_merge_heads(heads), p["att.out_proj.weight"], p["att.out_proj.bias"])
    return y, (c_q, c_k, c_v, c_att, c_out, n_heads)


def attention_branch_backward(dy: Array, cache: Cache) -> tuple[Array, Params]:
    """dy (B, T, C) -> dx (B, T, C) and the branch's parameter gradients."""
    c_q, c_k, c_v, c_att, c_out, n_heads = cache
    dmerged, dw_out, db_out = linear.linear_backward(dy, c_out)
    dqh, dkh, dvh = attention.attention_backward(_split_heads(dmerged, n_heads), c_att)
    dx_v, dw_v, db_v = linear.linear_backward(_merge_heads(dvh), c_v)
    dx_k, dw_k, db_k = linear.linear_backward(_merge_heads(dkh), c_k)
    dx_q, dw_q, db_q = linear.linear_backward(_merge_heads(dqh), c_q)
    grads = {
        "att.W_query.weight": dw_q,
        "att.W_query.bias": db_q,
        "att.W_key.weight": dw_k,
        "att.W_key.bias": db_k,
        "att.W_value.weight": dw_v,
        "att.W_value.bias": db_v,
        "att.out_proj.weight": dw_out,
        "att.out_proj.bias": db_out,
    }
    return dx_q + dx_k + dx_v, _without_none(grads)  # x fed all three


def mlp_forward(x: Array, p: Params) -> tuple[Array, Cache]:
    """Linear (C -> 4C), GELU, linear (4C -> C): x (B, T, C) -> (B, T, C)."""
    h, c_0 = linear.linear_forward(x, p["ff.layers.0.weight"], p["ff.layers.0.bias"])
    a, c_gelu = gelu.gelu_forward(h)
    y, c_2 = linear.linear_forward(a, p["ff.layers.2.weight"], p["ff.layers.2.bias"])
    return y, (c_0, c_gelu, c_2)


def mlp_backward(dy: Array, cache: Cache) -> tuple[Array, Params]:
    """dy (B, T, C) -> dx (B, T, C) and the branch's parameter gradients."""
    c_0, c_gelu, c_2 = cache
    da, dw_2, db_2 = linear.linear_backward(dy, c_2)
    dh = gelu.gelu_backward(da, c_gelu)
    dx, dw_0, db_0 = linear.linear_backward(dh, c_0)
    grads = {"ff.layers.0.weight": dw_0, "ff.layers.0.bias": db_0, "ff.layers.2.weight": dw_2, "ff.layers.2.bias": db_2}
    return dx, _without_none(grads)


def block_forward(
    x: Array, p: Params, n_heads: int, drop: Dropout, past: KVCache | None, layer: int
) -> tuple[Array, Cache]:
    """x + attention(norm1(x)), then + mlp(norm2(·)): x (B, T, C) -> (B, T, C). p: the block's own parameters."""
    h, c_norm1 = layernorm.layernorm_forward(x, p["norm1.scale"], p["norm1.shift"])
    a, c_branch = attention_branch_forward(h, p, n_heads, drop, past, layer)
    a, c_drop1 = dropout.dropout_forward(a, drop.mask(a.shape))
    mid = x + a
    h, c_norm2 = layernorm.layernorm_forward(mid, p["norm2.scale"], p["norm2.shift"])
    m, c_mlp = mlp_forward(h, p)
    m, c_drop2 = dropout.dropout_forward(m, drop.mask(m.shape))
    return mid + m, (c_norm1, c_branch, c_drop1, c_norm2, c_mlp, c_drop2)


def block_backward(dy: Array, cache: Cache) -> tuple[Array, Params]:
    """dy (B, T, C) -> dx (B, T, C) and the block's parameter gradients."""
    c_norm1, c_branch, c_drop1, c_norm2, c_mlp, c_drop2 = cache
    dm = dropout.dropout_backward(dy, c_drop2)  # y = mid + dropout(mlp(norm2(mid)))
    dh, grads = mlp_backward(dm, c_mlp)
    dmid, dscale2, dshift2 = layernorm.layernorm_backward(dh, c_norm2)
    dmid = dmid + dy  # residual: dy takes both paths
    da = dropout.dropout_backward(dmid, c_drop1)  # mid = x + dropout(attention(norm1(x)))
    dh, grads_att = attention_branch_backward(da, c_branch)
    dx, dscale1, dshift1 = layernorm.layernorm_backward(dh, c_norm1)
    grads |= grads_att
    grads |= {"norm1.scale": dscale1, "norm1.shift": dshift1, "norm2.scale": dscale2, "norm2.shift": dshift2}
    return dx + dmid, grads
