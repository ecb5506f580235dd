"""Causal scaled dot-product attention (Vaswani et al. 2017), heads as a batch axis."""

import math

import numpy as np

from numpy_gpt.typing import Array

Cache = tuple[Array, Array, Array, Array, Array | None]


def attention_forward(q: Array, k: Array, v: Array, mask: Array | None = None) -> tuple[Array, Cache]:
    """y = (p · mask) @ v,  p = softmax(s),  s = q @ kᵀ / √HS, with s = −inf where the key lies in the future.

    q (B, NH, T, HS), k and v (B, NH, S, HS) -> y (B, NH, T, HS). The T queries are the last of the S positions (S = T
    in training, more with a key-value cache): query t sees keys 0 … t + S − T. mask (B, NH, T, S): dropout's factors
    for the probabilities, or None. Raises ValueError if there are fewer keys than queries.
    cache: q, k, v, p before dropout, mask.

    Softmax's Jacobian is diag(p) − p pᵀ, so with dp = mask · (dy @ vᵀ):
        ds = p · (dp − Σ dp · p),  dv = (p · mask)ᵀ @ dy,  dq = ds @ k / √HS,  dk = dsᵀ @ q / √HS.
    """
    T, S = q.shape[-2], k.shape[-2]
    if S < T:
        raise ValueError(f"attention: {T} queries but only {S} keys")
    s = (q / math.sqrt(q.shape[-1])) @ k.swapaxes(-1, -2)
    np.copyto(s, -np.inf, where=np.triu(np.ones((T, S), bool), k=1 + S - T))
    s -= s.max(axis=-1, keepdims=True)  # softmax does not change, and exp cannot overflow
    p = np.exp(s, out=s)
    p /= p.sum(axis=-1, keepdims=True)
    y = (p if mask is None else p * mask) @ v
    return y, (q, k, v, p, mask)


def attention_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """dy (B, NH, T, HS) -> dq (B, NH, T, HS), dk (B, NH, S, HS), dv (B, NH, S, HS)."""
    q, k, v, p, mask = cache
    scale = 1 / math.sqrt(q.shape[-1])
    dv = (p if mask is None else p * mask).swapaxes(-1, -2) @ dy  # y = (p · mask) @ v
    ds = dy @ v.swapaxes(-1, -2)
    if mask is not None:
        ds *= mask  # this is dp
    ds -= (ds * p).sum(axis=-1, keepdims=True)  # p = softmax(s); 0 where masked
    ds *= p
    dq = (ds @ k) * scale  # s = q @ k.T * scale
    dk = (ds.swapaxes(-1, -2) @ q) * scale
    return dq, dk, dv
