"""GELU in GPT-2's tanh form (Hendrycks, Gimpel 2016)."""

import math

import numpy as np

from numpy_gpt.typing import Array

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715

Cache = tuple[Array, Array]


def gelu_forward(x: Array) -> tuple[Array, Cache]:
    """y = ½ x (1 + tanh u),  u = √(2/π) (x + 0.044715 x³), elementwise, in x's dtype.

    cache: x and t = tanh u. With dt/du = 1 − t² and du/dx = √(2/π) (1 + 3 · 0.044715 x²):
        dy/dx = ½ (1 + t) + ½ x (1 − t²) du/dx.
    """
    u = x * x
    u *= CUBIC
    u += 1
    u *= x
    u *= SQRT_2_OVER_PI
    t = np.tanh(u, out=u)
    y = t + 1
    y *= x
    y *= 0.5
    return y, (x, t)


def gelu_backward(dy: Array, cache: Cache) -> Array:
    """dy -> dx, of x's shape."""
    x, t = cache
    slope = x * x
    slope *= 3 * CUBIC
    slope += 1
    slope *= SQRT_2_OVER_PI  # du/dx
    slope *= x
    slope *= 1 - t * t
    slope += t
    slope += 1
    slope *= 0.5  # ½ (1 + t) + ½ x (1 − t²) du/dx
    slope *= dy
    return slope
