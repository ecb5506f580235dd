"""Sums over the rows of a matrix, accurate to float32."""

import numpy as np

from numpy_gpt.typing import Array


def sum_rows(x: Array, out: Array | None = None) -> Array:
    """Σ_n x_n: x (N, C) -> (C,), summed in float64, returned in x's dtype; into out if given.

    NumPy sums a column row by row: float32 would lose a digit over 512 rows.
    """
    out = np.empty(x.shape[1], x.dtype) if out is None else out
    out[...] = x.sum(axis=0, dtype=np.float64)
    return out
