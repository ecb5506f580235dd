"""torch's CPU random streams, bit for bit: a seed here gives the weights that torch.manual_seed gives.

After torch's sources in ATen: core/MT19937RNGEngine.h, core/TransformationHelper.h, native/DistributionTemplates.h,
native/cpu/DistributionTemplates.h, native/cpu/MultinomialKernel.cpp, native/Distributions.cpp, CPUGeneratorImpl.cpp.
Below, r32 is a raw word of mt19937 and r64 two of them, first << 32 | second; u24 = (r32 mod 2^24) / 2^24 and
u53 = (r64 mod 2^53) / 2^53 are uniform on [0, 1). Elements are drawn one by one in memory order, whatever the number
of threads. PLATFORMS lists where torch draws the same.
"""

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from numpy_gpt.errors import InputError
from numpy_gpt.random.box_muller import box_muller, box_muller64, fma, fma64
from numpy_gpt.typing import Array, Float

Ints = npt.NDArray[np.int64]
Shape = int | Sequence[int]

PLATFORMS = """\
On any machine these draws equal those of PyTorch 2.7 and later on an x86-64 CPU with AVX2. One exception: float64
normals and exponentials, and fewer than 16 normals at a time, use the logarithms, sines and cosines of the machine's C
library, in PyTorch as here. Elsewhere PyTorch's draws differ:

* up to 2.6 on x86-64, dropout, exponential_ and multinomial use another generator (MKL's MCG31);
* up to 2.12, a draw of uniform_(a, b) that rounds to b stays b; from 2.13 on, and here, it becomes a (with the bounds
  of the layers' weights, no draw rounds to b);
* on CUDA and MPS, dropout and all other draws on the device use its own generator; weights and shuffles, drawn on the
  CPU, are the same;
* without AVX2 (old x86; ARM and Apple processors) float32 weights differ in the last bits of 2 to 5 in 10 elements,
  measured with AVX2 switched off; dropout, shuffles and multinomial are the same.

Equal draws do not give equal sums: a loss differs between machines, and from PyTorch's, by about 1e-6, and by up to
1e-5 after the book's ten epochs."""
"""Where torch draws the same numbers, as text for users."""

_BLOCK = 1 << 16  # elements at a time, a multiple of 16: their scratch stays in the cache
_WORDS = 624  # words in mt19937's state
_MASK53 = (1 << 53) - 1
_CATEGORIES = 1 << 24  # torch's limit
_LARGEST = {dtype: float(np.finfo(dtype).max) for dtype in (np.dtype(np.float32), np.dtype(np.float64))}
_STATE = np.dtype(
    [
        ("seed", "<u8"),
        ("left", "<i4"),  # the draw that decrements it to 0 twists the words again
        ("seeded", "<i4"),
        ("next", "<u8"),  # index of the next word
        ("words", "<u8", _WORDS),
        ("normal_x", "<f8"),  # unused, as is normal_rho
        ("normal_y", "<f8"),  # the second of a pair of scalar normals, kept for the next call
        ("normal_rho", "<f8"),
        ("normal_is_valid", "<i8"),  # an int and its padding
        ("float_normal", "<f4"),  # never set by a CPU draw
        ("float_normal_is_valid", "<u4"),  # a bool and its padding
    ]
)
"""CPUGeneratorImplState with torch's field names: the 5,056 bytes of torch.get_rng_state()."""


class Generator:
    """The stream after torch.manual_seed(seed): the same calls in the same order give the same bits.

    seed: a whole number from -2^63 to 2^64 - 1, of which the draws use the low 32 bits. Any other raises InputError.
    """

    # RandomState(seed) is mt19937 with init_genrand, torch's engine, and frozen by NEP 19. Only its raw words are used:
    # NumPy's uniforms and normals use the bits differently from torch's.

    def __init__(self, seed: int) -> None:
        try:
            self._seed = operator.index(bool(seed) if isinstance(seed, np.bool_) else seed)
        except TypeError:
            raise InputError(f"a seed must be a whole number, not {seed!r}") from None
        if not -(1 << 63) <= self._seed < 1 << 64:
            raise InputError(f"a seed must be from -2^63 to 2^64 - 1, not {seed}")
        self._engine = np.random.RandomState(self._seed & 0xFFFFFFFF)
        self._fresh = True  # nothing drawn yet: only torch's `next` distinguishes that from 624 words drawn
        self._spare_normal: float | None = None

    def random_uint32(self, n: int) -> npt.NDArray[np.uint32]:
        """The next n r32, the engine's words: uint32 (n,)."""
        n = _whole("random_uint32: n", n)
        words = self._engine.randint(0, 1 << 32, n, dtype=np.uint32)
        self._fresh &= n == 0
        return words

    def random_uint64(self, n: int) -> npt.NDArray[np.uint64]:
        """The next n r64, two words each: uint64 (n,)."""
        n = _whole("random_uint64: n", n)
        words = self._engine.randint(0, 1 << 64, n, dtype=np.uint64)
        self._fresh &= n == 0
        return words

    def random_(self, shape: Shape = ()) -> Ints:
        """torch.empty(shape, dtype=torch.int64).random_(): int64 of that shape, r64 mod 2^63."""
        shape = _sizes("random_", shape)
        words = self.random_uint64(math.prod(shape))
        words &= (1 << 63) - 1
        return words.view(np.int64).reshape(shape)

    def randint(self, shape: Shape, low: int, high: int) -> Ints:
        """torch.randint(low, high, shape): int64 of that shape, from low to high - 1.

        low + r mod (high - low), where r is an r32 for a range below 2^28, else an r64 (torch >= 2.7).
        Raises ValueError unless -2^63 <= low < high < 2^63, TypeError unless both are whole numbers.
        """
        low, high = operator.index(low), operator.index(high)
        if not -(1 << 63) <= low < high < 1 << 63:
            raise ValueError(f"randint: from {low} to {high} (excluded) is not a range of int64 numbers")
        shape = _sizes("randint", shape)
        span, n = high - low, math.prod(shape)
        words = self.random_uint64(n) if span >= 1 << 28 else self.random_uint32(n).astype(np.uint64)
        words %= np.uint64(span)
        return (words.view(np.int64) + low).reshape(shape)  # wraps like a sum of two uint64

    def uniform(self, shape: Shape, low: float = 0.0, high: float = 1.0, dtype: Float = np.float32) -> Array:
        """torch.empty(shape, dtype=dtype).uniform_(low, high): float32, one r32 an element, or float64, one r64.

        fma(u, high - low, low) with u24 or u53, in dtype; a value that rounds up to `high` becomes `low`, as in torch
        from 2.13 on; up to 2.12 it stays `high` in torch.
        Raises ValueError unless low <= high and both, and high - low, are finite in dtype.
        """
        dtype, most = _dtype_and_largest("uniform", dtype)
        low, high = float(low), float(high)  # like torch: a NumPy float32 would round high - low
        if not (-most <= low <= high <= most and high - low <= most):
            raise ValueError(f"uniform: from {low} to {high} is not a range of {dtype} numbers")
        shape = _sizes("uniform", shape)
        out = np.empty(math.prod(shape), dtype)
        a, b = dtype.type(low), dtype.type(high)
        wide = np.empty((4, min(out.size, _BLOCK)))
        for block in _blocks(out):
            self._fill_uniform(block)
            if dtype == np.float64:
                block[:] = fma64(block.tolist(), high - low, low)
            elif a == -b:  # nn.Linear's case: u (2 b) - b = b (2 u - 1), and 2 u - 1 is exact
                block *= 2
                block -= 1
                block *= b
            else:
                fma(block, b - a, a, wide)
            block[block == b] = a
        return out.reshape(shape)

    def normal(self, shape: Shape, mean: float = 0.0, std: float = 1.0, dtype: Float = np.float32) -> Array:
        """torch.empty(shape, dtype=dtype).normal_(mean, std): float32 or float64, by Box and Muller's transform.

        From 16 elements on: one u24 (float64: u53) per element, then in every 16 the first eight (radii) and the last
        eight (angles) become eight cosine and eight sine values. If there is a remainder, the last 16 elements are
        drawn again. Each value is then fma(z, std, mean).
        Below 16: two u53 for each pair of values, in float64; an unused second value is kept for the next such call.
        Raises ValueError unless mean and std are finite in dtype and std >= 0.
        """
        dtype, most = _dtype_and_largest("normal", dtype)
        mean, std = float(mean), float(std)
        if not (abs(mean) <= most and 0 <= std <= most):
            raise ValueError(f"normal: mean {mean} and std {std} must be finite, and std not negative")
        shape = _sizes("normal", shape)
        n = math.prod(shape)
        if n < 16:
            with np.errstate(over="ignore"):  # to inf, as in torch
                return np.array([self._scalar_normal(mean, std) for _ in range(n)], dtype).reshape(shape)
        out = np.empty(n, dtype)
        rows, wide = np.empty((6, min(n, _BLOCK) // 2), np.float32), np.empty((4, min(n, _BLOCK)))

        def transform(u: Array) -> None:
            if dtype == np.float32:
                box_muller(u, rows, wide)
                with np.errstate(over="ignore"):
                    fma(u, np.float32(std), np.float32(mean), wide)
            else:
                box_muller64(u)
                u[:] = fma64(u.tolist(), std, mean)

        for block in _blocks(out):
            self._fill_uniform(block)
            transform(block[: block.size & -16])
        if n % 16:
            self._fill_uniform(out[-16:])
            transform(out[-16:])
        return out.reshape(shape)

    def permutation(self, n: int) -> Ints:
        """torch.randperm(n): int64 (n,), one r32 per element but the last (Fisher and Yates, from the front)."""
        n = _whole("permutation: n", n)
        order = list(range(n))
        steps = self.random_uint32(max(n - 1, 0)) % np.arange(n, 1, -1)
        for i, step in enumerate(steps.tolist()):
            order[i], order[i + step] = order[i + step], order[i]
        return np.array(order, np.int64)

    def start_loader(self) -> None:
        """Draw what iter(DataLoader(...)) draws, shuffling or not: the workers' base seed, one r64."""
        self.random_()

    def loader_order(self, n: int) -> Ints:
        """The order of n samples that iter(DataLoader(..., shuffle=True)) and its first next() draw: int64 (n,).

        Draws two r64, the base seed and the sampler's seed; a generator with the latter draws the permutation.
        """
        n = _whole("loader_order: n", n)
        self.start_loader()
        return Generator(int(self.random_())).permutation(n)

    def bernoulli(self, shape: Shape, p: float) -> npt.NDArray[np.bool_]:
        """torch.empty(shape).bernoulli_(p): bool of that shape, True where u53 < p; one r64 an element, in order.

        p = 0 gives False and p = 1 True everywhere, and both draw like any other p. Dropout keeps
        bernoulli(shape, 1 - p_drop), but for p_drop = 0 and 1 torch's dropout draws nothing; the caller handles that.
        Raises ValueError unless 0 <= p <= 1.
        """
        if not 0 <= p <= 1:
            raise ValueError(f"bernoulli: p must be from 0 to 1, not {p}")
        threshold = math.ceil(math.ldexp(p, 53))  # u53 < p in whole numbers
        shape = _sizes("bernoulli", shape)
        out = np.empty(math.prod(shape), np.bool_)
        for block in _blocks(out):
            draws = self.random_uint64(block.size)
            draws &= _MASK53
            np.less(draws, threshold, out=block)
        return out.reshape(shape)

    def exponential(self, shape: Shape, lambd: float = 1.0, dtype: Float = np.float32) -> Array:
        """torch.empty(shape, dtype=dtype).exponential_(lambd): float32 or float64, one r64 an element.

        (-1 / lambd) ln(1 - u53) in float64, rounded to dtype. For float64 the logarithm is the C library's; for
        float32 NumPy's gives the same after rounding (checked on 20 million draws).
        Raises ValueError unless lambd > 0.
        """
        dtype, _ = _dtype_and_largest("exponential", dtype)
        lambd = float(lambd)
        if not lambd > 0:
            raise ValueError(f"exponential: lambd must be above 0, not {lambd}")
        shape = _sizes("exponential", shape)
        u = -self._u53(math.prod(shape))
        logs = np.log1p(u) if dtype == np.float32 else np.array([math.log1p(value) for value in u.tolist()])
        with np.errstate(over="ignore"):  # to inf, as in torch
            logs *= -1 / lambd
            return logs.astype(dtype).reshape(shape)

    def multinomial(self, p: Array, num_samples: int = 1, replacement: bool = False) -> Ints:
        """torch.multinomial(p, num_samples, replacement): p (V,) or (B, V), float32 or float64 -> int64 (k,) or (B, k).

        k is num_samples; p need not sum to 1. Without replacement, and for one sample: q = exponential, one per entry,
        and the indices are those of the k greatest p / q in falling order (a race of V exponential clocks). q is drawn
        in p's memory order, as in torch: row by row, or column by column if p is Fortran-ordered.
        Of equal p / q the lower index comes first; torch's sort may order them otherwise. Ties do occur in float32 with
        k in the thousands.
        With replacement: the running sum of the row in p's dtype, divided by its last value; each sample is the first
        index whose sum reaches a u53.
        Raises ValueError, naming the row, if an entry is negative, infinite or nan, or too few are above 0.
        """
        if not isinstance(p, np.ndarray):
            raise TypeError(
                f"multinomial: p must be an array, because its dtype affects the draw; not a {type(p).__name__}"
            )
        if p.ndim not in (1, 2) or p.shape[-1] == 0 or p.dtype not in _LARGEST:
            fix = "" if p.dtype.isnative else ": its byte order is not native; use p.astype(p.dtype.newbyteorder())"
            raise ValueError(f"multinomial: p must be float32 or float64, (V,) or (B, V), not {p.dtype} {p.shape}{fix}")
        if p.shape[-1] > _CATEGORIES:
            raise ValueError(f"multinomial: {p.shape[-1]} categories are more than 2^24, torch's limit")
        num_samples = _whole("multinomial: num_samples", num_samples)
        if num_samples < 1:
            raise ValueError(f"multinomial: num_samples must be at least 1, not {num_samples}")
        rows = p.reshape(-1, p.shape[-1])
        bad = ~((rows >= 0) & (rows < np.inf)).all(axis=1)  # nan fails every comparison
        if bad.any():
            raise ValueError(f"multinomial: row {bad.argmax()} has a negative, infinite or nan entry")
        one_by_one = replacement and num_samples > 1
        needed = 1 if one_by_one else num_samples
        few = (rows > 0).sum(axis=1) < needed
        if few.any():
            raise ValueError(f"multinomial: row {few.argmax()} has fewer than {needed} entries above 0")
        draw = self._with_replacement if one_by_one else self._without_replacement
        return draw(rows, num_samples).reshape(*p.shape[:-1], num_samples)

    def get_state(self) -> npt.NDArray[np.uint8]:
        """The state that torch.get_rng_state() returns at this point: uint8 (5056,), also for torch.set_rng_state."""
        engine: Any = self._engine.get_state()
        words, position = engine[1:3]
        state = np.zeros(1, _STATE)
        state["seed"], state["seeded"], state["words"] = self._seed & ((1 << 64) - 1), 1, words
        state["left"], state["next"] = (1, 0) if self._fresh else (_WORDS + 1 - position, position)
        if self._spare_normal is not None:
            state["normal_y"], state["normal_is_valid"] = self._spare_normal, 1
        return state.view(np.uint8)

    def set_state(self, state: npt.NDArray[np.uint8]) -> None:
        """Continue from a state of get_state or torch.get_rng_state(): uint8 (5056,).

        Raises InputError, and changes nothing, for another size or type or for bytes that are not a valid state.
        """
        if not isinstance(state, np.ndarray) or state.dtype != np.uint8 or state.shape != (_STATE.itemsize,):
            fix = ": pass a torch tensor's .numpy()" if hasattr(state, "numpy") else ""
            raise InputError(f"a random state must be a uint8 array of {_STATE.itemsize} bytes{fix}")
        new = np.frombuffer(state.tobytes(), _STATE)[0]
        left, position, words = int(new["left"]), int(new["next"]), new["words"]
        fresh = (left, position) == (1, 0)
        possible = fresh or (1 <= left <= _WORDS and left + position == _WORDS + 1)
        possible &= bool(new["seeded"] == 1 and words.any() and words.max() < 1 << 32)
        possible &= bool(new["normal_is_valid"] in (0, 1) and np.isfinite(new["normal_y"]))
        if not possible or new["float_normal_is_valid"]:
            raise InputError("these bytes are not a state of torch's CPU generator: its fields contradict each other")
        position = _WORDS if fresh else position
        self._engine.set_state({"bit_generator": "MT19937", "state": {"key": words, "pos": position}})
        self._seed, self._fresh = int(new["seed"]), fresh
        self._spare_normal = float(new["normal_y"]) if new["normal_is_valid"] else None

    def _u53(self, n: int) -> Array:
        return (self.random_uint64(n) & _MASK53) * 2.0**-53

    def _fill_uniform(self, out: Array) -> None:
        """Fill out (n,) with u24 if it is float32, u53 if float64."""
        if out.dtype == np.float64:
            out[:] = self._u53(out.size)
            return
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
        return fma64([z], std, mean)[0]

    def _without_replacement(self, p: Array, k: int) -> Ints:
        B, V = p.shape
        down, across = map(abs, p.strides)
        by_column = down > 0 and (across, V) > (down, B)  # torch's TensorIterator decides so for any strides
        columns = self.exponential((V, B), dtype=p.dtype) if by_column else None
        ids = np.empty((B, k), np.int64)
        for i, row in enumerate(p):
            q = self.exponential(V, dtype=p.dtype) if columns is None else columns[:, i]
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # u53 = 0 makes q = 0, in torch too
                ratio = row / q
            if k == 1:
                ids[i] = ratio.argmax()
            else:
                rising = ratio[::-1].argsort(stable=True)  # reversed, so that of equals the first comes first
                ids[i] = len(row) - 1 - rising[: -k - 1 : -1]
        return ids

    def _with_replacement(self, p: Array, k: int) -> Ints:
        with np.errstate(over="ignore"):
            sums = p.cumsum(axis=1)
        total = sums[:, -1:].copy()
        if not np.isfinite(total).all():
            raise ValueError(f"multinomial: row {np.isinf(total).argmax()} adds up to more than {p.dtype} can hold")
        sums /= total
        ids = np.empty((len(p), k), np.int64)
        for i, row in enumerate(sums):
            ids[i] = row.searchsorted(self._u53(k))
        return ids


def _whole(what: str, n: int) -> int:
    """n as an int. Raises TypeError if it is not a whole number, ValueError below 0."""
    try:
        whole = None if isinstance(n, (bool, np.bool_)) else operator.index(n)
    except TypeError:
        whole = None
    if whole is None:
        raise TypeError(f"{what} must be a whole number, not {n!r}")
    if whole < 0:
        raise ValueError(f"{what} must not be negative, but is {n}")
    return whole


def _sizes(what: str, shape: Shape) -> tuple[int, ...]:
    """shape as a tuple; a number is one axis, as in torch. Raises like _whole."""
    sizes = shape if isinstance(shape, Iterable) else (shape,)
    return tuple(_whole(f"{what}: a size of shape {shape}", size) for size in sizes)


def _blocks(out: Array) -> Iterator[Array]:
    """Consecutive views of out (n,), of _BLOCK elements (the last may be shorter)."""
    return (out[start : start + _BLOCK] for start in range(0, out.size, _BLOCK))


def _dtype_and_largest(what: str, dtype: Float) -> tuple[np.dtype[Any], float]:
    """dtype as a np.dtype, and its largest number; ValueError if it is neither float32 nor float64."""
    if (dtype := np.dtype(dtype)) not in _LARGEST:
        raise ValueError(f"{what}: dtype must be float32 or float64, not {dtype}")
    return dtype, _LARGEST[dtype]
