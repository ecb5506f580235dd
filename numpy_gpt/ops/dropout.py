"""Inverted dropout (Srivastava et al. 2014): zero at random, and rescale the rest to keep the mean.

The same as dropout_mask, dropout_forward and dropout_backward in numpy_gpt/plain.py, because one product is already
fast. Only the mask is divided in place, to avoid a second array of its size.
"""

from numpy_gpt.typing import Array, Float


def dropout_mask(keep: Array, drop_rate: float, dtype: Float) -> Array:
    """Each element's factor: 0 where dropped, 1 / (1 − drop_rate) where kept, divided in dtype as in torch.

    keep: bool, any shape -> the same shape in dtype. At drop_rate 1 all factors are 0.
    """
    mask = keep.astype(dtype)
    if drop_rate < 1:
        mask /= 1 - drop_rate
    return mask


def dropout_forward(x: Array, mask: Array | None) -> tuple[Array, Array | None]:
    """y = x · mask; with mask None (evaluation, generation, drop_rate 0), y = x. cache: the mask.

    The mask does not depend on x, so dx = dy · mask, with the forward pass's mask.
    """
    return (x if mask is None else x * mask), mask


def dropout_backward(dy: Array, mask: Array | None) -> Array:
    """dy -> dx, of x's shape."""
    return dy if mask is None else dy * mask
