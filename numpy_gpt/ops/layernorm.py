"""Layer normalisation over the last axis (Ba, Kiros, Hinton 2016).

Computes the same as layernorm_forward and layernorm_backward in numpy_gpt/plain.py, but in blocks of rows that stay in
a core's cache between steps, because reading and writing memory takes longer than the arithmetic.
"""

import numpy as np

from numpy_gpt.parallel.sums import sum_rows
from numpy_gpt.parallel.threads import as_rows, dots, in_blocks
from numpy_gpt.typing import Array

EPS = 1e-5
"""GPT-2's value, added to the variance under the root."""

Cache = tuple[Array, Array, Array]


def layernorm_forward(x: Array, scale: Array, shift: Array) -> tuple[Array, Cache]:
    """y = x̂ · scale + shift,  x̂ = (x − mean(x)) · rstd,  rstd = 1 / sqrt(var(x) + eps), var with divisor C.

    x (..., C), scale (C,), shift (C,) -> y (..., C), in x's dtype.
    cache: x̂ (..., C) and rstd (..., 1), from which dx follows without x.

    With g = dy · scale: x̂ has mean 0 and mean square var / (var + eps), so a change of x along 1 does nothing and one
    along x̂ only rescales. Removing both components from g gives
        dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),   dscale = Σ dy · x̂,   dshift = Σ dy.

    The mean is subtracted twice, the second time that of the remainder: in a row of equal numbers the first leaves the
    mean's rounding error, which rstd = 1 / sqrt(eps) = 316 would enlarge.
    """
    y, x_hat, rstd = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype), np.empty((*x.shape[:-1], 1), x.dtype)

    def normalise(x: Array, y: Array, x_hat: Array, rstd: Array) -> None:
        np.subtract(x, _mean(x), out=x_hat)
        x_hat -= _mean(x_hat)
        rstd[...] = 1 / np.sqrt(_mean_product(x_hat, x_hat) + EPS)
        x_hat *= rstd
        np.multiply(x_hat, scale, out=y)
        y += shift

    in_blocks(normalise, *as_rows(x, y, x_hat, rstd))
    return y, (x_hat, rstd, scale)


def layernorm_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """dy (..., C) -> dx (..., C), dscale (C,), dshift (C,)."""
    x_hat, rstd, scale = cache
    dx, dy_x_hat = np.empty_like(x_hat), np.empty_like(x_hat)

    def project(dy: Array, x_hat: Array, rstd: Array, dx: Array, dy_x_hat: Array) -> None:
        g = np.multiply(dy, scale, out=dx)  # dL/dx̂
        along = np.multiply(x_hat, _mean_product(g, x_hat), out=dy_x_hat)
        g -= _mean(g)  # x̂ keeps mean 0 and (up to eps) length: drop g's parts along 1 and along x̂
        g -= along
        g *= rstd  # dx
        np.multiply(dy, x_hat, out=dy_x_hat)

    in_blocks(project, *as_rows(dy, x_hat, rstd, dx, dy_x_hat))
    dscale, dshift = (sum_rows(d) for d in as_rows(dy_x_hat, dy))  # y = x̂ · scale + shift
    return dx, dscale, dshift


def _mean(x: Array) -> Array:
    """The mean of each row: x (N, C) -> (N, 1)."""
    return _mean_product(x, np.ones(x.shape[1], x.dtype))


def _mean_product(a: Array, b: Array) -> Array:
    """The mean of each row of a · b: (N, C), (N, C) -> (N, 1), by BLAS dot products, twice as fast as NumPy's sum."""
    mean: Array = dots(a, b)[:, None] / a.shape[1]
    return mean
