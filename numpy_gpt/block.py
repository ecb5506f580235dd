"""The transformer block: attention and feed-forward, each with a LayerNorm before it and a residual sum after it."""

from typing import Any

import numpy as np

from numpy_gpt.config import GPTConfig
from numpy_gpt.ops import attention, dropout, gelu, layernorm, linear
from numpy_gpt.random.generator import Generator
from numpy_gpt.typing import Array, Float, Params

Cache = tuple[Any, ...]


class KVCache:
    """Keys and values of the tokens so far, per layer, so that a new token costs one position's work."""

    def __init__(self, config: GPTConfig, batch_size: int, dtype: Float):
        """Allocate context_length positions: 2 · L · B · context_length · C numbers."""
        shape = (config.n_layers, batch_size, config.n_heads, config.context_length, config.head_size)
        self._k, self._v = np.empty(shape, dtype), np.empty(shape, dtype)
        self.length = 0

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Append the new positions' k, v (B, NH, T, HS); return all so far, (B, NH, length + T, HS) each."""
        start, stop = self.length, self.length + k.shape[2]
        self._k[layer, :, :, start:stop] = k
        self._v[layer, :, :, start:stop] = v
        return self._k[layer, :, :, :stop], self._v[layer, :, :, :stop]


class Dropout:
    """Draws the dropout masks of one forward pass, in the order it asks for them."""

    def __init__(self, rate: float, rng: Generator | None, dtype: Float):
        self._rate, self._rng, self._dtype = float(rate), rng, dtype  # a NumPy scalar would impose its dtype

    def mask(self, shape: tuple[int, ...]) -> Array | None:
        """The mask for an array of this shape, or None if nothing is dropped; rates 0 and 1 draw nothing."""
        if self._rng is None or self._rate == 0:
            return None
        if self._rate == 1:
            return np.zeros(shape, self._dtype)
        return dropout.dropout_mask(self._rng.bernoulli(shape, 1 - self._rate), self._rate, self._dtype)


def split_heads(x: Array, n_heads: int) -> Array:
    B, T, C = x.shape
    return x.reshape(B, T, n_heads, C // n_heads).swapaxes(1, 2)  # (B, NH, T, HS)


def merge_heads(x: Array) -> Array:
    B, NH, T, HS = x.shape
    return x.swapaxes(1, 2).reshape(B, T, NH * HS)  # (B, T, C)


def attention_branch_forward(
    x: Array, p: Params, n_heads: int, drop: Dropout, past: KVCache | None, layer: int
) -> tuple[Array, Cache]:
    """Multi-head causal self-attention: x (B, T, C) -> (B, T, C)."""
    qkv, c_qkv = linear.linear_forward(x, p["att.W_qkv.weight"], p.get("att.W_qkv.bias"))  # (B, T, 3C)
    q, k, v = (split_heads(third, n_heads) for third in np.split(qkv, 3, axis=-1))  # each (B, NH, T, HS)
    if past is not None:
        k, v = past.extend(layer, k, v)  # (B, NH, S, HS)
    mask = drop.mask((*q.shape[:3], k.shape[2]))  # (B, NH, T, S): dropout on the probabilities
    heads, c_att = attention.attention_forward(q, k, v, mask)  # (B, NH, T, HS)
    merged = merge_heads(heads)  # (B, T, C)
    y, c_out = linear.linear_forward(merged, p["att.out_proj.weight"], p["att.out_proj.bias"])
    return y, (c_qkv, c_att, c_out, n_heads)


def attention_branch_backward(dy: Array, cache: Cache, grads: Params, add: bool = False) -> Array:
    """dy (B, T, C) -> dx (B, T, C); the branch's parameter gradients go into grads, see block_backward."""
    c_qkv, c_att, c_out, n_heads = cache
    dmerged = linear_into(grads, "att.out_proj", dy, c_out, add)  # (B, T, C)
    dheads = split_heads(dmerged, n_heads)  # (B, NH, T, HS)
    dq, dk, dv = attention.attention_backward(dheads, c_att)  # each (B, NH, T, HS)
    dqkv = np.concatenate([merge_heads(d) for d in (dq, dk, dv)], axis=-1)  # (B, T, 3C)
    return linear_into(grads, "att.W_qkv", dqkv, c_qkv, add)


def linear_into(grads: Params, name: str, dy: Array, cache: linear.Cache, add: bool = False) -> Array:
    """dy (..., O) -> dx (..., I); the weight's and the bias's gradients go into grads, see block_backward."""
    dx, grads[f"{name}.weight"], db = linear.linear_backward(dy, cache, grads.get(f"{name}.weight"), add)
    if db is not None:
        grads[f"{name}.bias"] = db
    return dx


def mlp_forward(x: Array, p: Params) -> tuple[Array, Cache]:
    """Linear (C -> 4C), GELU, linear (4C -> C): x (B, T, C) -> (B, T, C)."""
    h, c_0 = linear.linear_forward(x, p["ff.layers.0.weight"], p["ff.layers.0.bias"])  # (B, T, 4C)
    a, c_gelu = gelu.gelu_forward(h)  # (B, T, 4C)
    y, c_2 = linear.linear_forward(a, p["ff.layers.2.weight"], p["ff.layers.2.bias"])  # (B, T, C)
    return y, (c_0, c_gelu, c_2)


def mlp_backward(dy: Array, cache: Cache, grads: Params, add: bool = False) -> Array:
    """dy (B, T, C) -> dx (B, T, C); the branch's parameter gradients go into grads, see block_backward."""
    c_0, c_gelu, c_2 = cache
    da = linear_into(grads, "ff.layers.2", dy, c_2, add)  # (B, T, 4C)
    dh = gelu.gelu_backward(da, c_gelu)  # (B, T, 4C)
    return linear_into(grads, "ff.layers.0", dh, c_0, add)


def block_forward(
    x: Array, p: Params, n_heads: int, drop: Dropout, past: KVCache | None, layer: int
) -> tuple[Array, Cache]:
    """x + attention(norm1(x)), then + mlp(norm2(·)): x (B, T, C) -> (B, T, C).

    p: the block's parameters under its own names, with query, key and value joined as att.W_qkv.
    """
    h, c_norm1 = layernorm.layernorm_forward(x, p["norm1.scale"], p["norm1.shift"])
    a, c_branch = attention_branch_forward(h, p, n_heads, drop, past, layer)
    a, c_drop1 = dropout.dropout_forward(a, drop.mask(a.shape))
    mid = x + a
    h, c_norm2 = layernorm.layernorm_forward(mid, p["norm2.scale"], p["norm2.shift"])
    m, c_mlp = mlp_forward(h, p)
    m, c_drop2 = dropout.dropout_forward(m, drop.mask(m.shape))
    return mid + m, (c_norm1, c_branch, c_drop1, c_norm2, c_mlp, c_drop2)


def block_backward(dy: Array, cache: Cache, grads: Params, add: bool = False) -> Array:
    """dy (B, T, C) -> dx (B, T, C); the block's parameter gradients go into grads, under the names of block_forward.

    A weight's gradient is written into the array that grads already holds under its name, or added to it with `add`,
    else into a new one.
    """
    c_norm1, c_branch, c_drop1, c_norm2, c_mlp, c_drop2 = cache
    dm = dropout.dropout_backward(dy, c_drop2)  # y = mid + dropout(mlp(norm2(mid)))
    dh = mlp_backward(dm, c_mlp, grads, add)
    dmid, grads["norm2.scale"], grads["norm2.shift"] = layernorm.layernorm_backward(dh, c_norm2)
    dmid += dy  # residual: dy takes both paths
    da = dropout.dropout_backward(dmid, c_drop1)  # mid = x + dropout(attention(norm1(x)))
    dh = attention_branch_backward(da, c_branch, grads, add)
    dx, grads["norm1.scale"], grads["norm1.shift"] = layernorm.layernorm_backward(dh, c_norm1)
    dx += dmid
    return dx
