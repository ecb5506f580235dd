"""Affine map of the last axis."""

import numpy as np

from numpy_gpt.typing import Array

Cache = tuple[Array, Array, bool]


def linear_forward(x: Array, w: Array, b: Array | None) -> tuple[Array, Cache]:
    """y = x @ w.T + b, in torch.nn.functional.linear's layout.

    x (..., I), w (O, I), b (O,) or None -> y (..., O), in x's dtype.
    cache: x for dw, w for dx. Raises ValueError if the feature counts differ.

    With y_no = Σ_i x_ni w_oi + b_o:  dx = dy @ w,  dw = dyᵀ @ x,  db = Σ_n dy_n.
    """
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"linear: x has {x.shape[-1]} features, w expects {w.shape[1]}")
    y = x @ w.T
    if b is not None:
        y += b
    return y, (x, w, b is not None)


def linear_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array | None]:
    """dy (..., O) -> dx (..., I), dw (O, I), db (O,) or None where there was no bias."""
    x, w, has_bias = cache
    dy2 = dy.reshape(-1, w.shape[0])  # (N, O): every leading axis is batch
    dw = dy2.T @ x.reshape(-1, w.shape[1])
    # NumPy adds a column up one row after the other: float32 would lose a digit over 512 rows
    db = dy2.sum(axis=0, dtype=np.float64).astype(dy.dtype) if has_bias else None
    return dy @ w, dw, db
