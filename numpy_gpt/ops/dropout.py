"""Inverted dropout (Srivastava et al. 2014): zero at random, and rescale the rest so that the mean stays.

The same as the textbook's dropout_mask, dropout_forward and dropout_backward (numpy_gpt/plain.py): one product is fast
as it is. Only the mask is divided in place, because an array that large need not exist twice.
"""

from numpy_gpt.typing import Array, Float


def dropout_mask(keep: Array, drop_rate: float, dtype: Float) -> Array:
    """The factors of the elements: 0 where dropped, 1 / (1 − drop_rate) where kept, divided in dtype as torch does.

    keep: bool, any shape -> the same shape in dtype. At drop_rate 1 nothing is kept, and the factors are all 0.
    """
    mask = keep.astype(dtype)
    if drop_rate < 1:
        mask /= 1 - drop_rate
    return mask


def dropout_forward(x: Array, mask: Array | None) -> tuple[Array, Array | None]:
    """y = x · mask; mask None (evaluation, generation, drop_rate 0) passes x on. cache: the mask.

    The mask is a constant of the pass, so dx = dy · mask, with the mask of the forward pass.
    """
    return (x if mask is None else x * mask), mask


def dropout_backward(dy: Array, mask: Array | None) -> Array:
    """dy -> dx, of x's shape."""
    return dy if mask is None else dy * mask
