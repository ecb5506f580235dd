"""torch's CPU random stream, bit for bit: a GPT drawn here is the GPT that torch.manual_seed draws.

The stream is that of torch >= 2.7 on x86-64 (older ones draw dropout and multinomial elsewhere), after its sources in
ATen: core/MT19937RNGEngine.h, core/TransformationHelper.h, native/cpu/DistributionTemplates.h, CPUGeneratorImpl.cpp.
Below, r32 is a raw word of mt19937 and r64 two of them, first << 32 | second; u24 = (r32 mod 2^24) / 2^24 and
u53 = (r64 mod 2^53) / 2^53 are uniform on [0, 1).

The logarithm, sine and cosine behind `normal` are Cephes polynomials (S. Moshier) in the form that torch compiles,
avx_mathfun.h: "AVX implementation of sin, cos, sincos, exp and log", Copyright (C) 2012 Giovanni Garberoglio, based on
sse_mathfun.h by Julien Pommier, zlib licence. Formulas and constants are theirs, the code is not: an altered version.
"""

import math
import operator
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from numpy_gpt.errors import InputError
from numpy_gpt.typing import Array

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_BLOCK = 1 << 16  # elements handled at a time, a multiple of 16: their scratch stays in the cache
_WORDS = 624  # in mt19937's state
_MASK53 = (1 << 53) - 1
_FLOAT_MAX = float(np.finfo(np.float32).max)
_STATE = np.dtype(
    [
        ("seed", "<u8"),
        ("left", "<i4"),  # the draw that counts it down to 0 twists the words anew
        ("seeded", "<i4"),
        ("next", "<u8"),  # index of the next word
        ("words", "<u8", _WORDS),
        ("normal_x", "<f8"),  # unused, as is normal_rho
        ("normal_y", "<f8"),  # the second value of a scalar normal's pair, kept for the next call
        ("normal_rho", "<f8"),
        ("normal_is_valid", "<i8"),  # an int and its padding
        ("float_normal", "<f4"),  # never set by a CPU draw
        ("float_normal_is_valid", "<u4"),  # a bool and its padding
    ]
)
"""CPUGeneratorImplState, with torch's names: the 5,056 bytes of torch.get_rng_state()."""


class Generator:
    """The stream after torch.manual_seed(seed): the same calls in the same order give the same bits.

    seed: a whole number from -2^63 to 2^64 - 1, of which the draws see the low 32 bits. Any other raises InputError.
    """

    # RandomState(seed) is mt19937 with init_genrand, torch's engine, and frozen by NEP 19. Only its raw words are used:
    # NumPy makes uniforms and normals from other bits than torch does.

    def __init__(self, seed: int) -> None:
        try:
            self._seed = operator.index(seed)
        except TypeError:
            raise InputError(f"a seed is a whole number, not {seed!r}") from None
        if not -(1 << 63) <= self._seed < 1 << 64:
            raise InputError(f"a seed lies between -2^63 and 2^64 - 1; {seed} does not")
        self._engine = np.random.RandomState(self._seed & 0xFFFFFFFF)
        self._fresh = True  # nothing drawn yet: only torch's `next` tells that from 624 words drawn
        self._spare_normal: float | None = None

    def random_uint32(self, n: int) -> npt.NDArray[np.uint32]:
        """The next n r32, the engine's words: uint32 (n,)."""
        self._fresh &= n == 0
        return self._engine.randint(0, 1 << 32, n, dtype=np.uint32)

    def random_uint64(self, n: int) -> npt.NDArray[np.uint64]:
        """The next n r64, two words each: uint64 (n,)."""
        self._fresh &= n == 0
        return self._engine.randint(0, 1 << 64, n, dtype=np.uint64)

    def random_(self) -> int:
        """torch.empty((), dtype=torch.int64).random_(): r64 mod 2^63."""
        return int(self.random_uint64(1)[0]) & ((1 << 63) - 1)

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Floats:
        """torch.empty(shape).uniform_(low, high): float32 of that shape, one r32 an element.

        fma(u24, high - low, low) in float32; what rounds up to `high` becomes `low` (so torch 2.13).
        Raises ValueError unless low <= high and both, and high - low, are finite in float32.
        """
        if not (-_FLOAT_MAX <= low <= high <= _FLOAT_MAX and high - low <= _FLOAT_MAX):
            raise ValueError(f"uniform: from {low} to {high} is no range of float32 numbers")
        a, b = np.float32(low), np.float32(high)
        out = np.empty(math.prod(shape), np.float32)
        wide = np.empty((4, min(out.size, _BLOCK)))
        for block in _blocks(out):
            self._fill_u24(block)
            if a == -b:  # as nn.Linear has it: u (2 b) - b = b (2 u - 1), and 2 u - 1 is exact
                block *= 2
                block -= 1
                block *= b
            else:
                _fma(block, b - a, a, wide)
            block[block == b] = a
        return out.reshape(shape)

    def normal(self, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> Floats:
        """torch.empty(shape).normal_(mean, std): float32 of that shape, by Box and Muller's transform.

        From 16 elements on: a u24 each, then in every 16 the first eight (radii) and the last eight (angles) become
        eight cosine and eight sine values. If there is a remainder, 16 new u24 redo the last 16 elements.
        Below 16: two u53 for each pair of values, in float64; an odd one leaves its partner for the next such call.
        Raises ValueError unless mean and std are finite in float32 and std >= 0.
        """
        if not (abs(mean) <= _FLOAT_MAX and 0 <= std <= _FLOAT_MAX):
            raise ValueError(f"normal: mean {mean} and std {std} must be finite, and std not negative")
        n = math.prod(shape)
        if n < 16:
            return np.array([self._scalar_normal(mean, std) for _ in range(n)], np.float32).reshape(shape)
        out = np.empty(n, np.float32)
        rows, wide = np.empty((6, min(n, _BLOCK) // 2), np.float32), np.empty((4, min(n, _BLOCK)))
        for block in _blocks(out):
            self._fill_u24(block)
            whole = block[: block.size & -16]
            _box_muller(whole, rows, wide)
            _fma(whole, np.float32(std), np.float32(mean), wide)
        if n % 16:
            tail = out[-16:]
            self._fill_u24(tail)
            _box_muller(tail, rows, wide)
            _fma(tail, np.float32(std), np.float32(mean), wide)
        return out.reshape(shape)

    def permutation(self, n: int) -> Ints:
        """torch.randperm(n): int64 (n,), one r32 for each element but the last (Fisher and Yates, from the front)."""
        if n < 0:
            raise ValueError(f"permutation: n is {n}, and must not be negative")
        order = list(range(n))
        steps = self.random_uint32(max(n - 1, 0)) % np.arange(n, 1, -1)
        for i, step in enumerate(steps.tolist()):
            order[i], order[i + step] = order[i + step], order[i]
        return np.array(order, np.int64)

    def start_loader(self) -> None:
        """What iter(DataLoader(...)) takes from the stream, shuffling or not: the workers' base seed, one r64."""
        self.random_()

    def loader_order(self, n: int) -> Ints:
        """The order of n samples that iter(DataLoader(..., shuffle=True)) and its first next() draw: int64 (n,).

        Takes two r64, the base seed and the sampler's seed; the latter's own generator draws the permutation.
        """
        self.start_loader()
        return Generator(self.random_()).permutation(n)

    def bernoulli(self, shape: tuple[int, ...], p: float) -> npt.NDArray[np.bool_]:
        """torch.empty(shape).bernoulli_(p): bool of that shape, True where u53 < p; one r64 an element, in order.

        p = 0 is False and p = 1 True everywhere, and both draw like any other p. What dropout keeps is
        bernoulli(shape, 1 - p_drop), but for p_drop = 0 and 1 torch's dropout draws nothing: the caller's rule.
        Raises ValueError unless 0 <= p <= 1.
        """
        if not 0 <= p <= 1:
            raise ValueError(f"bernoulli: {p} is no probability")
        threshold = math.ceil(math.ldexp(p, 53))  # u53 < p in whole numbers
        out = np.empty(math.prod(shape), np.bool_)
        for block in _blocks(out):
            draws = self.random_uint64(block.size)
            draws &= _MASK53
            np.less(draws, threshold, out=block)
        return out.reshape(shape)

    def multinomial(self, p: Array) -> Ints:
        """torch.multinomial(p, 1)[:, 0]: p (B, V), float32 or float64 -> one index a row, int64 (B,).

        One r64 an entry, row after row: q = -ln(1 - u53) in p's dtype, and the id is the first of the greatest p / q.
        np.log1p may miss the C library's by a float64's last bit; that moves an id only where two p / q agree so far.
        Raises ValueError, naming the row, where an entry is negative, infinite or nan, or none is above 0.
        """
        if p.ndim != 2 or p.shape[1] == 0 or p.dtype not in (np.float32, np.float64):
            raise ValueError(f"multinomial: p must be float32 or float64 (B, V), not {p.dtype} {p.shape}")
        top = p.max(axis=1)
        bad = ~((top > 0) & (top < np.inf) & (p.min(axis=1) >= 0))  # nan fails every comparison
        if bad.any():
            raise ValueError(f"multinomial: row {bad.argmax()} has a negative, infinite or nan entry, or none above 0")
        ids = np.empty(len(p), np.int64)
        for i, row in enumerate(p):
            q = -np.log1p(-self._u53(row.size)).astype(p.dtype)
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # u53 = 0 makes q = 0, in torch too
                ids[i] = (row / q).argmax()
        return ids

    def get_state(self) -> npt.NDArray[np.uint8]:
        """What torch.get_rng_state() holds at this point of the stream: uint8 (5056,), for torch.set_rng_state too."""
        engine: dict[str, Any] = self._engine.get_state(legacy=False)["state"]
        state = np.zeros(1, _STATE)
        state["seed"], state["seeded"], state["words"] = self._seed & ((1 << 64) - 1), 1, engine["key"]
        state["left"], state["next"] = (1, 0) if self._fresh else (_WORDS + 1 - engine["pos"], engine["pos"])
        if self._spare_normal is not None:
            state["normal_y"], state["normal_is_valid"] = self._spare_normal, 1
        return state.view(np.uint8)

    def set_state(self, state: npt.NDArray[np.uint8]) -> None:
        """Go on from what get_state or torch.get_rng_state() returned: uint8 (5056,).

        Raises InputError, and changes nothing, for another size or type or for bytes that no generator holds.
        """
        if not isinstance(state, np.ndarray) or state.dtype != np.uint8 or state.shape != (_STATE.itemsize,):
            raise InputError(f"a random state is a uint8 array of {_STATE.itemsize} bytes; this is none")
        new = np.frombuffer(state.tobytes(), _STATE)[0]
        left, position, words = int(new["left"]), int(new["next"]), new["words"]
        fresh = (left, position) == (1, 0)
        possible = fresh or (1 <= left <= _WORDS and left + position == _WORDS + 1)
        possible &= bool(new["seeded"] == 1 and words.any() and words.max() < 1 << 32)
        possible &= bool(new["normal_is_valid"] in (0, 1) and np.isfinite(new["normal_y"]))
        if not possible or new["float_normal_is_valid"]:
            raise InputError("these bytes are no state of torch's CPU generator: its fields contradict each other")
        self._engine.set_state(("MT19937", words.astype(np.uint32), _WORDS if fresh else position, 0, 0.0))
        self._seed, self._fresh = int(new["seed"]), fresh
        self._spare_normal = float(new["normal_y"]) if new["normal_is_valid"] else None

    def _u53(self, n: int) -> Doubles:
        return (self.random_uint64(n) & _MASK53).astype(np.float64) * 2.0**-53

    def _fill_u24(self, out: Floats) -> None:
        words = self.random_uint32(out.size)
        words &= 0xFFFFFF
        out[:] = words
        out *= 2.0**-24

    def _scalar_normal(self, mean: float, std: float) -> float:
        z, self._spare_normal = self._spare_normal, None
        if z is None:
            u1, u2 = self._u53(2).tolist()
            radius, angle = math.sqrt(-2 * math.log1p(-u2)), 2 * math.pi * u1
            z, self._spare_normal = radius * math.cos(angle), radius * math.sin(angle)
        fused = Fraction(z) * Fraction(std) + Fraction(mean)  # what math.fma does from Python 3.13 on
        return float(fused) if fused else z * std + mean  # a zero has its sign from here


def _blocks(out: Array) -> Iterator[Array]:
    """Consecutive views of out (n,), _BLOCK elements or what is left."""
    return (out[start : start + _BLOCK] for start in range(0, out.size, _BLOCK))


def _fma(a: Floats, b: np.float32, c: np.float32, wide: Doubles) -> None:
    """a = a * b + c in place, rounded once, to float32. wide (4, >= n) is scratch.

    The product of two float32 is exact in float64. The sum may not be: TwoSum (Knuth) finds its error, and a sum that
    was rounded then moves to the odd one of its two float64 neighbours, where no second rounding takes it for a tie
    (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", IEEE Transactions on Computers 57, 2008).
    """
    product, total, part, error = wide[:, : a.size]
    product[:] = a
    product *= b
    np.add(product, c, out=total)
    if c != 0:
        np.subtract(total, product, out=part)  # what arrived of c
        np.subtract(c, part, out=error)
        product -= np.subtract(total, part, out=part)
        error += product
        bits = total.view(np.int64)  # they grow with the magnitude
        even = np.flatnonzero(error)
        even = even[bits[even] % 2 == 0]
        bits[even] += np.where((error[even] > 0) == (total[even] > 0), 1, -1)
    a[:] = total


def _float32(*values: float) -> list[float]:
    """The float32 nearest to each value, as Python floats: beside a float32 array they leave it float32."""
    return [float(np.float32(value)) for value in values]


_LN = _float32(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1)
_LN += _float32(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
_LN2_LOW, _LN2_HIGH = _float32(-2.12194440e-4, 0.693359375)
_COS = _float32(2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_SIN = _float32(-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_PI4_HIGH, _PI4_MID, _PI4_LOW = _float32(-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)
_FOUR_OVER_PI, _TWO_PI = _float32(1.27323954473516, 2 * math.pi)
_SQRT_HALF = 0x3F3504F3  # the bits of float32 sqrt(1/2)
_EIGHT = np.dtype("V32")  # eight float32 as one item: moved in one go, not in a loop of eight


def _box_muller(u: Floats, rows: Floats, wide: Doubles) -> None:
    """u (16 k,), uniform on [0, 1), becomes standard normal in place.

    sqrt(-2 ln(1 - u1)) times cos(2 pi u2) and sin(2 pi u2), where u1 is the first half of every 16 and u2 the second.
    rows (6, >= 8 k) and wide (>= 2, >= 8 k) are scratch: arrays made for each step would cost more than the arithmetic.
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
    """y = fma(y, x, c) in place, by way of float64: rounded twice, which _fma explains can go wrong.

    With the polynomials here it never does: all 2^24 values of u24 give torch's bits (a test goes through them).
    """
    wide[:] = y
    wide *= x
    wide += c
    y[:] = wide


def _ln(x: Floats, rows: Floats, wides: Doubles) -> None:
    """x = ln x in place, as log256_ps. With x = (1 + f) 2^e and sqrt(1/2) <= 1 + f < sqrt(2):

    ln x = f - f^2 / 2 + f^3 P(f) + e ln 2, where ln 2 has a high part and a low one.
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
    z *= 0.5  # exact, like e * _LN2_HIGH: fused or not, the sum rounds once
    y -= z
    x += y
    e *= _LN2_HIGH
    x += e


def _cos_sin(x: Floats, rows: Floats, wides: Doubles) -> tuple[Floats, Floats]:
    """cos x and sin x for x in [0, 2 pi], as sincos256_ps; they lie in rows, and x is lost.

    The nearest even multiple j of pi/4 is taken off x in three parts. For the x that is left,
    cos x = 1 - x^2 / 2 + x^4 C(x^2) and sin x = x + x^3 S(x^2); j says which of the two is which, and their signs.
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

    # At j = 2 and 6 the two change places: an exclusive or with their difference does it, where wanted. Bit 31 is the
    # sign: cos is negative at j = 2 and 4, sin at 4 and 6.
    cos_bits, sin_bits, swap = cos.view(np.int32), sin.view(np.int32), z.view(np.int32)
    np.bitwise_xor(cos_bits, sin_bits, out=swap)
    swap *= (j & 2) >> 1
    cos_bits ^= swap
    sin_bits ^= swap
    sin_bits ^= (j & 4) << 29
    cos_bits ^= ((j + 2) & 4) << 29
    return cos, sin
