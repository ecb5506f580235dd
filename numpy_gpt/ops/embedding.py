"""Rows of a table, selected by token id or by position.

Computes the same as the embedding and position_embedding functions in numpy_gpt/plain.py. Here the gradients of equal
ids are sorted together and summed as one segment, which is faster than np.add.at; ids outside the table are refused.
"""

import numpy as np

from numpy_gpt.typing import Array

TokenCache = tuple[Array, tuple[int, ...]]
PositionCache = tuple[int, tuple[int, ...]]


def embedding_forward(ids: Array, w: Array) -> tuple[Array, TokenCache]:
    """y = w[ids]: each id's row of the table.

    ids (B, T) ints in [0, V), w (V, C) -> y (B, T, C). cache: the ids and w's shape.
    Raises ValueError naming an id outside the table: NumPy would count a negative one from the end.

    Row v is read wherever ids == v, so dw_v = Σ_{n: ids_n = v} dy_n: repeated ids add up.
    """
    outside = (ids < 0) | (ids >= w.shape[0])
    if outside.any():
        raise ValueError(f"embedding: id {ids[outside][0]} is outside the table's {w.shape[0]} rows")
    return w[ids], (ids, w.shape)


def embedding_backward(dy: Array, cache: TokenCache, dw: Array | None = None) -> Array:
    """dy (B, T, C) -> dw (V, C), zero in the rows that were not read; added to dw if given."""
    ids, shape = cache
    flat = ids.ravel()
    order = flat.argsort(stable=True)  # equal ids side by side, so that each row of dw is one segment of dy
    rows, starts = np.unique(flat[order], return_index=True)
    dw = np.zeros(shape, dy.dtype) if dw is None else dw
    dw[rows] += np.add.reduceat(dy.reshape(-1, shape[1])[order], starts)
    return dw


def position_embedding_forward(x: Array, w: Array, start: int = 0) -> tuple[Array, PositionCache]:
    """y_bt = x_bt + w_{start+t}: adds each position's row, the same for every sequence of the batch.

    x (B, T, C), w (T_max, C) with start + T <= T_max -> y (B, T, C). cache: start and w's shape.
    Raises ValueError if there are more positions than rows. dx = dy;  dw_{start+t} = Σ_b dy_bt.
    """
    T = x.shape[1]
    if start + T > w.shape[0]:
        raise ValueError(f"position_embedding: positions up to {start + T}, but the table has {w.shape[0]} rows")
    return x + w[start : start + T], (start, w.shape)


def position_embedding_backward(dy: Array, cache: PositionCache) -> tuple[Array, Array]:
    """dy (B, T, C) -> dx (B, T, C), dw (T_max, C), zero in the rows beyond T."""
    start, shape = cache
    dw = np.zeros(shape, dy.dtype)
    dw[start : start + dy.shape[1]] = dy.sum(axis=0)
    return dy, dw
