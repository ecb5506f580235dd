"""Layer normalisation over the last axis (Ba, Kiros, Hinton 2016).

The same as the textbook's layernorm_forward and layernorm_backward (numpy_gpt/plain.py), but in blocks of rows that
stay in a core's cache from one step to the next: reading and writing memory takes longer than the arithmetic.
"""

import numpy as np

from numpy_gpt.sums import sum_rows
from numpy_gpt.threads import dots, in_blocks
from numpy_gpt.typing import Array

EPS = 1e-5
"""GPT-2's, added to the variance inside the root."""

Cache = tuple[Array, Array, Array]


def layernorm_forward(x: Array, scale: Array, shift: Array) -> tuple[Array, Cache]:
    """y = x̂ · scale + shift,  x̂ = (x − mean(x)) · rstd,  rstd = 1 / sqrt(var(x) + eps), var with divisor C.

    x (..., C), scale (C,), shift (C,) -> y (..., C), in x's dtype.
    cache: x̂ (..., C) and rstd (..., 1), from which dx follows without x itself.

    Through x̂, with g = dy · scale: x̂ has mean 0 and mean square var / (var + eps), so a change of x along 1 does
    nothing and one along x̂ only rescales; what is left of g is
        dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),   dscale = Σ dy · x̂,   dshift = Σ dy.

    The mean is taken off twice, the second time that of what is left: in a row of equal numbers the first leaves the
    mean's rounding behind, and rstd = 1 / sqrt(eps) = 316 would enlarge it.
    """
    C = x.shape[-1]
    y, x_hat, rstd = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype), np.empty((*x.shape[:-1], 1), x.dtype)
    flat = [each.reshape(-1, each.shape[-1]) for each in (x, y, x_hat, rstd)]
    ones = np.ones(C, x.dtype)

    def some(rows: slice) -> None:
        xb, yb, centred, rb = (each[rows] for each in flat)
        np.subtract(xb, _row_mean(xb, ones), out=centred)
        centred -= _row_mean(centred, ones)
        rb[...] = 1 / np.sqrt(_row_mean(centred, centred) + EPS)
        centred *= rb  # x_hat
        np.multiply(centred, scale, out=yb)
        yb += shift

    in_blocks(some, x.size // C, row=C)
    return y, (x_hat, rstd, scale)


def layernorm_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """dy (..., C) -> dx (..., C), dscale (C,), dshift (C,)."""
    x_hat, rstd, scale = cache
    C = dy.shape[-1]
    dx, dy_x_hat = np.empty_like(x_hat), np.empty_like(x_hat)
    flat = [each.reshape(-1, each.shape[-1]) for each in (dy, x_hat, rstd, dx, dy_x_hat)]
    ones = np.ones(C, x_hat.dtype)

    def some(rows: slice) -> None:
        db, xb, rb, g, along = (each[rows] for each in flat)
        np.multiply(db, scale, out=g)  # dL/dx_hat
        np.multiply(xb, _row_mean(g, xb), out=along)
        g -= _row_mean(g, ones)
        g -= along
        g *= rb
        np.multiply(db, xb, out=along)

    in_blocks(some, x_hat.size // C, row=C)
    return dx, sum_rows(flat[4]), sum_rows(flat[0])


def _row_mean(a: Array, b: Array) -> Array:
    """The mean of each row of a · b, (N, 1): as dot products, which BLAS reads twice as fast as NumPy's sum does."""
    mean: Array = dots(a, b)[:, None] / a.shape[1]
    return mean
