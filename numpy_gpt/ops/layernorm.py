"""Layer normalisation over the last axis (Ba, Kiros, Hinton 2016)."""

import numpy as np

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
    centred = x - x.mean(axis=-1, keepdims=True)
    centred -= centred.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + EPS)
    x_hat = np.multiply(centred, rstd, out=centred)
    return x_hat * scale + shift, (x_hat, rstd, scale)


def layernorm_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """dy (..., C) -> dx (..., C), dscale (C,), dshift (C,)."""
    x_hat, rstd, scale = cache
    rows = tuple(range(dy.ndim - 1))
    # float64 sums: NumPy adds a column up one row after the other
    dshift = dy.sum(axis=rows, dtype=np.float64).astype(dy.dtype)
    dscale = (dy * x_hat).sum(axis=rows, dtype=np.float64).astype(dy.dtype)
    g = dy * scale  # dL/dx_hat
    along_x_hat = (g * x_hat).mean(axis=-1, keepdims=True)
    g -= g.mean(axis=-1, keepdims=True)
    g -= x_hat * along_x_hat
    g *= rstd
    return g, dscale, dshift
