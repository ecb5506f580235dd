"""Affine map of the last axis.

Computes the same as linear_forward and linear_backward in numpy_gpt/plain.py, but backward's two products share the
cores, and results can be written into existing arrays, because the system has to clear newly allocated memory.
"""

from functools import partial

import numpy as np

from numpy_gpt.parallel.sums import sum_rows
from numpy_gpt.parallel.threads import Product, as_rows, in_blocks, matmul, matmuls
from numpy_gpt.typing import Array

Cache = tuple[Array, Array, bool]


def linear_forward(x: Array, w: Array, b: Array | None, out: Array | None = None) -> tuple[Array, Cache]:
    """y = x @ w.T + b, in torch.nn.functional.linear's layout.

    x (..., I), w (O, I), b (O,) or None -> y (..., O), in x's dtype.
    cache: x for dw, w for dx. out (N, O), N the product of the leading axes: where to write y, if given.
    Raises ValueError if the feature counts differ.

    With y_no = Σ_i x_ni w_oi + b_o:  dx = dy @ w,  dw = dyᵀ @ x,  db = Σ_n dy_n.
    """
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"linear: x has {x.shape[-1]} features, w expects {w.shape[1]}")
    y = matmul(x.reshape(-1, w.shape[1]), w.T, out)  # (N, O): every leading axis is batch
    if b is not None:

        def add_bias(y: Array) -> None:
            y += b

        in_blocks(add_bias, y)
    return y.reshape(*x.shape[:-1], len(w)), (x, w, b is not None)


def linear_backward(
    dy: Array, cache: Cache, dw: Array | None = None, add: bool = False
) -> tuple[Array, Array, Array | None]:
    """dy (..., O) -> dx (..., I), dw (O, I), db (O,) or None without a bias.

    dw: the array to write into, or to add to with `add`, if given.
    """
    x, w, has_bias = cache
    dy2, x2 = as_rows(dy, x)  # (N, O), (N, I)
    dx = np.empty(x2.shape, x2.dtype)
    dw = np.empty(w.shape, dy.dtype) if dw is None else dw
    db = np.empty(len(w), dy.dtype) if has_bias else None
    matmuls(
        [
            Product(dy2, w, out=dx),  # dx = dy @ w
            Product(dy2.T, x2, out=dw, add=add),  # dw = dyᵀ @ x
        ],
        also=[partial(sum_rows, dy2, db)] if has_bias else [],  # db = Σ_n dy_n
    )
    return dx.reshape(x.shape), dw, db
