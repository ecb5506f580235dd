"""Sums over the rows of a matrix that keep float32's digits."""

import numpy as np

from numpy_gpt.typing import Array


def sum_rows(x: Array, out: Array | None = None) -> Array:
    """Σ_n x_n: x (N, C) -> (C,), in x's dtype but added up in float64; into out if given.

    NumPy adds a column up one row after the other: float32 would lose a digit over 512 rows.
    """
    out = np.empty(x.shape[1], x.dtype) if out is None else out
    out[...] = x.sum(axis=0, dtype=np.float64)
    return out
