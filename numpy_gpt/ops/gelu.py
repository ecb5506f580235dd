"""GELU in GPT-2's tanh form (Hendrycks, Gimpel 2016)."""

import math

import numpy as np

from numpy_gpt.threads import in_blocks
from numpy_gpt.typing import Array

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715

Cache = Array


def gelu_forward(x: Array) -> tuple[Array, Cache]:
    """y = ½ x (1 + tanh u),  u = √(2/π) (x + 0.044715 x³), elementwise, in x's dtype.

    cache: the slope. With t = tanh u, dt/du = 1 − t² and du/dx = √(2/π) (1 + 3 · 0.044715 x²):
        dy/dx = ½ (1 + t) + ½ x (1 − t²) du/dx.
    It is made while x and t are at hand, in blocks that stay in a core's cache: backward is then one product.
    """
    y, slope = np.empty_like(x, order="C"), np.empty_like(x, order="C")
    flat = [each.reshape(-1) for each in (x, y, slope)]

    def block(part: slice) -> None:
        xb, yb, sb = (each[part] for each in flat)
        square = xb * xb
        t = square * (SQRT_2_OVER_PI * CUBIC)
        t += SQRT_2_OVER_PI
        t *= xb
        np.tanh(t, out=t)
        np.multiply(square, 3 * CUBIC * SQRT_2_OVER_PI, out=sb)
        sb += SQRT_2_OVER_PI  # du/dx
        sb *= xb
        np.multiply(t, t, out=square)
        np.subtract(1, square, out=square)
        sb *= square
        t += 1
        sb += t
        sb *= 0.5  # ½ (1 + t) + ½ x (1 − t²) du/dx
        t *= 0.5
        np.multiply(t, xb, out=yb)

    in_blocks(block, x.size)
    return y, slope


def gelu_backward(dy: Array, cache: Cache) -> Array:
    """dy -> dx = dy · slope, of x's shape."""
    return dy * cache
