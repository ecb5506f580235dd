"""Box and Muller's transform of pairs of uniform numbers into normal ones, bit for bit as torch's on the CPU.

float32: the logarithm, sine and cosine are Cephes polynomials (S. Moshier) in the form that torch compiles,
avx_mathfun.h: "AVX implementation of sin, cos, sincos, exp and log", Copyright (C) 2012 Giovanni Garberoglio, based on
sse_mathfun.h by Julien Pommier, zlib licence. This is an altered version: their formulas and constants, other code.
float64: they are the C library's, called for one number at a time; NumPy's sometimes differ in the last bit.

Both end in a fused multiply-add, a * b + c rounded once, as torch's compiler generates it.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def fma64(x: list[float], y: float, c: float) -> list[float]:
    """x * y + c for each x, all finite float64, rounded once, as math.fma does from Python 3.13 on.

    Every float is a ratio of integers, which Python computes with exactly; it rounds their quotient once.
    """
    (y_top, y_bottom), (c_top, c_bottom) = y.as_integer_ratio(), c.as_integer_ratio()
    factor, term, bottom = y_top * c_bottom, c_top * y_bottom, y_bottom * c_bottom

    def one(x: float) -> float:
        x_top, x_bottom = x.as_integer_ratio()
        top = x_top * factor + x_bottom * term
        try:
            return top / (x_bottom * bottom) if top else x * y + c  # which gives a zero its sign
        except OverflowError:
            return math.inf if top > 0 else -math.inf

    return [one(value) for value in x]


def box_muller64(u: Doubles) -> None:
    """Transform u (16 k,), uniform on [0, 1), to standard normal in place, in box_muller's order."""
    u1, u2 = u.reshape(-1, 2, 8).swapaxes(0, 1)  # views, (k, 8) each
    radius = np.sqrt([-2 * math.log(v) for v in (1 - u1).ravel().tolist()])  # sqrt rounds exactly everywhere
    angles = (2 * math.pi * u2).ravel().tolist()
    for part, wave in ((u1, math.cos), (u2, math.sin)):
        part[:] = (radius * [wave(angle) for angle in angles]).reshape(-1, 8)


def fma(a: Floats, b: np.float32, c: np.float32, wide: Doubles) -> None:
    """a = a * b + c in place, rounded once, to float32. wide (4, >= n) is scratch.

    The product of two float32 is exact in float64. The sum may not be: TwoSum (Knuth) finds its error, and a rounded
    sum is moved to the odd one of its two float64 neighbours, so that rounding to float32 never sees a false tie
    (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", IEEE Transactions on Computers 57, 2008).
    """
    product, total, part, error = wide[:, : a.size]
    product[:] = a
    product *= b
    np.add(product, c, out=total)
    if c != 0:
        np.subtract(total, product, out=part)  # the part of c that the sum kept
        np.subtract(c, part, out=error)
        product -= np.subtract(total, part, out=part)
        error += product
        bits = total.view(np.int64)  # increase with the magnitude
        even = np.flatnonzero(error)
        even = even[bits[even] % 2 == 0]
        bits[even] += np.where((error[even] > 0) == (total[even] > 0), 1, -1)
    a[:] = total


# float32 values as Python floats, which keep a float32 array float32
_LN = np.array(
    [
        *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
        *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
    ],
    np.float32,
).tolist()
_LN2_LOW, _LN2_HIGH = np.array([-2.12194440e-4, 0.693359375], np.float32).tolist()
_COS = np.array([2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2], np.float32).tolist()
_SIN = np.array([-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1], np.float32).tolist()
_PI4_HIGH, _PI4_MID, _PI4_LOW = np.array(
    [-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8], np.float32
).tolist()
_FOUR_OVER_PI, _TWO_PI = np.array([1.27323954473516, 2 * math.pi], np.float32).tolist()
_SQRT_HALF = 0x3F3504F3  # the bits of float32 sqrt(1/2)
_EIGHT = np.dtype("V32")  # eight float32 as one item, copied at once


def box_muller(u: Floats, rows: Floats, wide: Doubles) -> None:
    """Transform u (16 k,), uniform on [0, 1), to standard normal in place.

    sqrt(-2 ln(1 - u1)) times cos(2 pi u2) and sin(2 pi u2), where u1 is the first half of every 16 and u2 the second.
    rows (6, >= 8 k) and wide (>= 2, >= 8 k) are scratch: allocating at each step would cost more than the arithmetic.
    """
    pairs, half = u.view(_EIGHT).reshape(-1, 2), u.size // 2
    (radius, angle), rows, wide = rows[:2, :half], rows[2:, :half], wide[:2, :half]
    radius.view(_EIGHT)[:], angle.view(_EIGHT)[:] = pairs[:, 0], pairs[:, 1]
    np.subtract(1, radius, out=radius)
    _ln(radius, rows, wide)
    radius *= -2
    np.sqrt(radius, out=radius)
    angle *= _TWO_PI
    cos, sin = _cos_sin(angle, rows, wide)
    cos *= radius
    sin *= radius
    pairs[:, 0], pairs[:, 1] = cos.view(_EIGHT), sin.view(_EIGHT)


def _step(y: Floats, x: Doubles, c: float | Floats, wide: Doubles) -> None:
    """y = fma(y, x, c) in place, computed in float64 and so rounded twice, which can go wrong (see fma).

    With these polynomials it never does: all 2^24 values of u24 give torch's bits (tested).
    """
    wide[:] = y
    wide *= x
    wide += c
    y[:] = wide


def _ln(x: Floats, rows: Floats, wides: Doubles) -> None:
    """x = ln x in place, as log256_ps. With x = (1 + f) 2^e and sqrt(1/2) <= 1 + f < sqrt(2):

    ln x = f - f^2 / 2 + f^3 P(f) + e ln 2, with ln 2 split into a high and a low part.
    """
    y, z, e, e_low = rows
    x_wide, wide = wides
    bits, exponent = x.view(np.int32), z.view(np.int32)
    np.subtract(bits, _SQRT_HALF, out=exponent)
    exponent >>= 23
    e[:] = exponent
    exponent <<= 23
    bits -= exponent
    x -= 1
    x_wide[:] = x
    y[:] = _LN[0]
    for coefficient in _LN[1:]:
        _step(y, x_wide, coefficient, wide)
    y *= x
    np.multiply(x, x, out=z)
    x_wide[:] = z
    _step(y, x_wide, np.multiply(e, _LN2_LOW, out=e_low), wide)
    z *= 0.5  # exact, like e * _LN2_HIGH, so that fused or not, the sum rounds once
    y -= z
    x += y
    e *= _LN2_HIGH
    x += e


def _cos_sin(x: Floats, rows: Floats, wides: Doubles) -> tuple[Floats, Floats]:
    """cos x and sin x for x in [0, 2 pi], as sincos256_ps; returned in rows, x is overwritten.

    The nearest even multiple j of pi/4 is subtracted from x in three parts. For the remaining x,
    cos x = 1 - x^2 / 2 + x^4 C(x^2) and sin x = x + x^3 S(x^2); j decides which result is which, and their signs.
    """
    cos, sin, z, octant = rows
    x_wide, wide = wides
    j = octant.view(np.int32)
    np.multiply(x, _FOUR_OVER_PI, out=z)
    j[:] = z
    j += 1
    j &= -2
    z[:] = j
    for part in (_PI4_HIGH, _PI4_MID):  # so short that j * part is exact
        x += np.multiply(z, part, out=cos)
    cos[:] = z
    x_wide[:] = _PI4_LOW
    _step(cos, x_wide, x, wide)
    x[:] = cos

    np.multiply(x, x, out=z)
    x_wide[:] = z
    for y, (first, *coefficients) in ((cos, _COS), (sin, _SIN)):
        y[:] = first
        for coefficient in coefficients:
            _step(y, x_wide, coefficient, wide)
        y *= z
    z *= -0.5
    _step(cos, x_wide, z, wide)
    cos += 1
    x_wide[:] = x
    _step(sin, x_wide, x, wide)

    # At j = 2 and 6 cos and sin are swapped, by an exclusive or with their difference. Bit 31 is the sign: cos is
    # negative at j = 2 and 4, sin at 4 and 6.
    cos_bits, sin_bits, swap = cos.view(np.int32), sin.view(np.int32), z.view(np.int32)
    np.bitwise_xor(cos_bits, sin_bits, out=swap)
    swap *= j >> 1 & 1
    cos_bits ^= swap
    sin_bits ^= swap
    sin_bits ^= j >> 2 << 31
    cos_bits ^= j + 2 >> 2 << 31
    return cos, sin
