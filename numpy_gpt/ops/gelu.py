"""GELU in GPT-2's tanh form (Hendrycks, Gimpel 2016).

Computes the same as gelu_forward and gelu_backward in numpy_gpt/plain.py, but block by block. Forward also computes
the slope, while x and tanh u (from an exp) are in a core's cache, so backward is one product of two arrays.
"""

import math

import numpy as np

from numpy_gpt.parallel.threads import in_blocks
from numpy_gpt.typing import Array

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715

Cache = Array


def gelu_forward(x: Array) -> tuple[Array, Cache]:
    """y = ½ x (1 + tanh u),  u = √(2/π) (x + 0.044715 x³), elementwise, in x's dtype.

    cache: the slope. With σ = 1 / (1 + exp(−2u)), which is ½ (1 + tanh u), σ′ = 2 σ (1 − σ) u′ and
    2u′ = √(2/π) (2 + 6 · 0.044715 x²):
        y = x σ,   dy/dx = σ + y (1 − σ) 2u′.
    It is computed here because x and σ are still in a core's cache.
    """
    y, slope = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)

    @np.errstate(over="ignore")  # for very negative x, exp(−2u) = ∞ and σ is 0
    def activate(x: Array, y: Array, slope: Array) -> None:
        square = x * x
        sigma = square * (-2 * SQRT_2_OVER_PI * CUBIC)
        sigma -= 2 * SQRT_2_OVER_PI
        sigma *= x
        np.exp(sigma, out=sigma)  # exp(−2u)
        sigma += 1
        np.divide(1, sigma, out=sigma)
        np.multiply(x, sigma, out=y)
        np.multiply(square, 6 * SQRT_2_OVER_PI * CUBIC, out=slope)
        slope += 2 * SQRT_2_OVER_PI  # 2u′
        np.subtract(1, sigma, out=square)
        square *= y  # y (1 − σ): for large |x| one factor is 0, and multiplying by 2u′ first would give ∞ · 0
        slope *= square
        slope += sigma

    in_blocks(activate, x.ravel(), y.ravel(), slope.ravel())
    return y, slope


def gelu_backward(dy: Array, cache: Cache) -> Array:
    """dy -> dx = dy · slope, of x's shape."""
    return dy * cache
