"""Sums over the rows of a matrix that keep float32's digits."""

import numpy as np

from numpy_gpt.threads import LEAST, share
from numpy_gpt.typing import Array


def sum_rows(x: Array) -> Array:
    """Σ_n x_n: x (N, C) -> (C,), in x's dtype but added up in float64.

    NumPy adds a column up one row after the other: float32 would lose a digit over 512 rows.
    """
    total = np.empty(x.shape[1], x.dtype)

    def columns(start: int, stop: int) -> None:
        total[start:stop] = x[:, start:stop].sum(axis=0, dtype=np.float64)

    share(columns, x.shape[1], least=max(1, LEAST // len(x)))
    return total
