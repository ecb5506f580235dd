"""Causal scaled dot-product attention (Vaswani et al. 2017), heads as a batch axis, in O(T) memory.

Computes the same as attention_forward and attention_backward in numpy_gpt/plain.py, but 64 queries at a time, and
backward recomputes p: no (T, T) array is stored, and most of the masked products are skipped.
"""

import math
from collections.abc import Iterator

import numpy as np

from numpy_gpt.parallel.threads import LEAST, product, share
from numpy_gpt.typing import Array

ROWS = 64
"""Queries in a block: their scores stay in a core's cache, and only half a diagonal block is computed in vain."""

Cache = tuple[Array, Array, Array, Array, Array, Array | None]


def attention_forward(q: Array, k: Array, v: Array, mask: Array | None = None) -> tuple[Array, Cache]:
    """y = (p · mask) @ v,  p = softmax(s),  s = q @ kᵀ / √HS, with s = −inf where the key is later than the query.

    q (B, NH, T, HS), k and v (B, NH, S, HS) -> y (B, NH, T, HS). The T queries are the last of the S positions (S = T
    in training, more with a key-value cache): query t sees keys 0 … t + S − T. mask (B, NH, T, S): dropout's factors
    for the probabilities, or None. Raises ValueError if there are fewer keys than queries.
    cache: q, k, v, y, mask, and lse = log Σ exp s (B, NH, T, 1), from which backward recomputes p = exp(s − lse), so no
    (T, S) array outlives its block of rows (Dao et al. 2022, FlashAttention).

    Softmax's Jacobian is diag(p) − p pᵀ, so with dp = mask · (dy @ vᵀ):
        ds = p · (dp − Σ dp · p),  dv = (p · mask)ᵀ @ dy,  dq = ds @ k / √HS,  dk = dsᵀ @ q / √HS,
    and Σ dp · p over the keys is dy · y, up to rounding: where a query sees only one key, ds is set to exactly 0.
    """
    T, S = q.shape[2], k.shape[2]
    if S < T:
        raise ValueError(f"attention: {T} queries but only {S} keys")
    B, NH, _, HS = q.shape
    y = np.empty((B, T, NH, HS), q.dtype).swapaxes(1, 2)  # heads side by side in memory, as out_proj reads them
    lse = np.empty((B, NH, T, 1), q.dtype)

    def attend(start: int, stop: int) -> None:
        heads = slice(start, stop)
        buffer = np.empty((B, stop - start, min(T, ROWS), S), q.dtype)
        for rows, seen in _blocks(T, S):
            s = _scores(q[:, heads, rows], k[:, heads, seen], buffer)
            largest = s.max(axis=-1, keepdims=True)
            s -= largest  # softmax does not change, and exp cannot overflow
            e = np.exp(s, out=s)
            total = e.sum(axis=-1, keepdims=True)
            lse[:, heads, rows] = np.log(total) + largest
            if mask is not None:
                e *= mask[:, heads, rows, seen]
            y[:, heads, rows] = product(e, v[:, heads, seen]) / total  # (p · mask) @ v, p = e / total

    share(attend, NH, least=_heads_for_a_thread(B, T, S))
    return y, (q, k, v, y, lse, mask)


def attention_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """dy (B, NH, T, HS) -> dq (B, NH, T, HS), dk (B, NH, S, HS), dv (B, NH, S, HS)."""
    q, k, v, y, lse, mask = cache
    (B, NH, T, HS), S = q.shape, k.shape[2]
    dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    scale = 1 / math.sqrt(HS)

    def attend_backward(start: int, stop: int) -> None:
        heads = slice(start, stop)
        scores, dscores = np.empty((2, B, stop - start, min(T, ROWS), S), q.dtype)
        for rows, seen in _blocks(T, S):
            s = _scores(q[:, heads, rows], k[:, heads, seen], scores)
            s -= lse[:, heads, rows]
            p = np.exp(s, out=s)  # softmax(s); 0 where masked
            dyr = dy[:, heads, rows]
            dp = product(dyr, v[:, heads, seen].mT, out=dscores[..., : s.shape[2], : s.shape[-1]])
            if mask is None:
                dv[:, heads, seen] += product(p.mT, dyr)  # y = (p · mask) @ v
            else:
                factors = mask[:, heads, rows, seen]
                dv[:, heads, seen] += product((p * factors).mT, dyr)
                dp *= factors
            ds = np.subtract(dp, (dyr * y[:, heads, rows]).sum(axis=-1, keepdims=True), out=dp)
            ds *= p
            ds *= scale  # s = q @ kᵀ · scale
            if rows.start == T - S:  # the first query sees one key: p = 1, whatever the score
                ds[:, :, 0] = 0
            dq[:, heads, rows] = product(ds, k[:, heads, seen])
            dk[:, heads, seen] += product(ds.mT, q[:, heads, rows])

    share(attend_backward, NH, least=_heads_for_a_thread(B, T, S))
    return dq, dk, dv


def _heads_for_a_thread(B: int, T: int, S: int) -> int:
    return max(1, LEAST // max(1, 4 * B * T * S))  # a score takes about four times as long as an element elsewhere


def _blocks(T: int, S: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of ROWS queries, each with the keys that its last query sees: the lower triangle."""
    for start in range(0, T, ROWS):
        stop = min(start + ROWS, T)
        yield slice(start, stop), slice(stop + S - T)


def _scores(q: Array, k: Array, buffer: Array) -> Array:
    """q @ kᵀ / √HS for a block of queries and the keys up to the last query; −inf for keys later than a query.

    buffer: where to write them, at least as large.
    """
    R, N = q.shape[2], k.shape[2]
    s: Array = product(q / math.sqrt(q.shape[-1]), k.mT, out=buffer[..., :R, :N])
    if R > 1:  # the last query sees every key
        np.copyto(s[..., -R:], -np.inf, where=np.triu(np.ones((R, R), bool), k=1))
    return s
