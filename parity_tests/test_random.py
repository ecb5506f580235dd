"""numpy_gpt.random against torch's CPU generator: the same bits from every draw, and the same state after it."""

import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from numpy_gpt.errors import InputError
from numpy_gpt.random import box_muller
from numpy_gpt.random import generator as random
from numpy_gpt.random.generator import Generator
from parity_tests import profiles

BLOCK = random._BLOCK
MAX = sys.float_info.max
FLOAT32_MAX = float(np.finfo(np.float32).max)
EDGES = [
    0,
    1,
    2,
    7,
    14,
    15,
    16,
    17,
    31,
    32,
    33,
    623,
    624,
    625,
]  # of groups of 16 normals, of engine words
EDGES += [blocks * BLOCK + beyond for blocks in (1, 2, 3) for beyond in (-17, -16, -15, -1, 0, 1, 15, 16, 17)]
SOME_STATE = Generator(5).get_state().view(random._STATE)  # (1,), with names for its fields
MOST = 20_000  # default limit of elements per draw


def check_same_bits(got, want):
    __tracebackhide__ = True
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    bits = f"u{got.itemsize}"
    wrong = np.argwhere(got.view(bits) != want.view(bits))
    assert not wrong.size, (
        f"{len(wrong)} of {got.size} differ, first {wrong[0]}: {got[*wrong[0]]} and {want[*wrong[0]]}"
    )


def check_same_state(rng):
    __tracebackhide__ = True
    wrong = np.flatnonzero(rng.get_state() != torch.get_rng_state().numpy())
    assert not wrong.size, f"state: bytes {wrong[:10]} differ"


def start(seed):
    torch.manual_seed(seed)
    return Generator(seed)


def rows(V, B, dtype, seed, zeros):
    """p (B, V) for multinomial: weights from 1e-6 to 1e6, so rows do not sum to 1; a share of them, never all, is 0."""
    rng = np.random.default_rng(seed)
    p = 10 ** rng.uniform(-6, 6, (B, V))
    p[rng.random((B, V)) < zeros] = 0
    p[:, rng.integers(V)] += 1e-3
    return p.astype(dtype)


def ours64(name):
    return lambda rng, n, *args: getattr(rng, name)((n,), *args, dtype=np.float64)


def theirs(name, dtype):
    return lambda n, *args: getattr(torch.empty(n, dtype=dtype), name)(*args).numpy()


def positive(p):
    """The smallest number of positive entries in a row."""
    return int((p > 0).sum(axis=1).min())


def ours_without(rng, share, *args):
    p = rows(*args)
    return rng.multinomial(p, math.ceil(share * positive(p)))


def theirs_without(share, *args):
    """torch's indices; equal p / q, which torch's sort may order anyhow, are ordered by index."""
    p, before = torch.from_numpy(rows(*args)), torch.get_rng_state()
    got = torch.multinomial(p, math.ceil(share * positive(p.numpy()))).numpy()
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    ratio = (p / torch.empty_like(p).exponential_()).numpy()
    torch.set_rng_state(after)
    falling = np.argsort(-ratio, axis=1, kind="stable")[:, : got.shape[1]]
    check_same_bits(np.take_along_axis(ratio, falling, 1), np.take_along_axis(ratio, got, 1))
    return falling


CALLS = {  # name: the call on our Generator, and on torch's global one (result as an array)
    "uniform": (lambda rng, n, *ab: rng.uniform((n,), *ab), theirs("uniform_", torch.float32)),
    "uniform, float64": (ours64("uniform"), theirs("uniform_", torch.float64)),
    "normal": (lambda rng, n, *ms: rng.normal((n,), *ms), theirs("normal_", torch.float32)),
    "normal, float64": (ours64("normal"), theirs("normal_", torch.float64)),
    "exponential": (lambda rng, n, lambd: rng.exponential((n,), lambd), theirs("exponential_", torch.float32)),
    "exponential, float64": (ours64("exponential"), theirs("exponential_", torch.float64)),
    "bernoulli": (lambda rng, n, p: rng.bernoulli((n,), p), theirs("bernoulli_", torch.bool)),
    "dropout's mask": (
        lambda rng, n, p_drop: rng.bernoulli((n,), 1 - p_drop),
        lambda n, p_drop: (torch.nn.functional.dropout(torch.ones(n), p_drop) != 0).numpy(),
    ),
    "permutation": (lambda rng, n: rng.permutation(n), lambda n: torch.randperm(n).numpy()),
    "loader_order": (
        lambda rng, n: rng.loader_order(n + 1),
        lambda n: next(iter(torch.utils.data.DataLoader(range(n + 1), batch_size=n + 1, shuffle=True))).numpy(),
    ),
    "multinomial": (
        lambda rng, *args: rng.multinomial(rows(*args)),
        lambda *args: torch.multinomial(torch.from_numpy(rows(*args)), 1).numpy(),
    ),
    "multinomial, k without replacement": (ours_without, theirs_without),
    "multinomial, k with replacement": (
        lambda rng, k, *args: rng.multinomial(rows(*args), k, replacement=True),
        lambda k, *args: torch.multinomial(torch.from_numpy(rows(*args)), k, replacement=True).numpy(),
    ),
    "random_": (lambda rng, n: rng.random_((n,)), theirs("random_", torch.int64)),
    "randint": (lambda rng, n, *ab: rng.randint((n,), *ab), lambda n, *ab: torch.randint(*ab, (n,)).numpy()),
    "random_uint32": (  # torch exposes r32 only as r32 mod (2^24 + 1), which depends on every bit
        lambda rng, n: (rng.random_uint32(n) % (2**24 + 1)).astype(np.float32),
        theirs("random_", torch.float32),
    ),
    "random_uint64": (
        lambda rng, n: rng.random_uint64(n),
        lambda n: torch.empty(n, dtype=torch.int64).random_(-(2**63), None).numpy().view(np.uint64),
    ),
}

seeds = st.one_of(
    st.integers(0, 1000),
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([-(2**63), -1, 2**31, 2**32 - 1, 2**32, 2**32 + 123, 2**63, 2**64 - 1]),
)
probabilities = st.one_of(
    st.floats(0, 1),
    st.sampled_from([0.0, 1.0, 1 - 0.1, 1 - 0.9, 2**-53, 1 - 2**-53, 1.5 * 2**-52, 5e-324]),
)
bounds = st.floats(-1e3, 1e3, width=32)
spans = st.one_of(
    st.integers(1, 1000),
    st.integers(1, 2**64 - 1),
    st.sampled_from([2**28 - 1, 2**28, 2**28 + 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]),
)
ranges = spans.flatmap(lambda n: st.integers(-(2**63), 2**63 - 1 - n).map(lambda low: (low, low + n)))


def sizes(most):
    """0 to most, log-uniform, plus the edges where an algorithm changes."""
    spread = st.floats(0, math.log(most + 1)).map(lambda x: min(most, int(math.exp(x)) - 1))
    return st.one_of(spread, st.sampled_from(EDGES).filter(lambda n: n <= most))


def arguments(name, most):
    """Argument tuples for CALLS[name]; the number of elements comes first."""
    n = sizes(most)
    dtypes, zeros = st.sampled_from(["float32", "float64"]), st.sampled_from([0, 0.5, 1])
    matrix = st.tuples(n.map(lambda n: n + 1), st.integers(1, 4), dtypes, st.integers(0, 2**32), zeros)
    match name.partition(",")[0]:
        case "uniform":
            symmetric = st.floats(0, 10).map(lambda b: (-b, b))  # as nn.Linear draws
            pairs = st.tuples(bounds, bounds).map(sorted)
            return st.tuples(n, st.one_of(symmetric, pairs)).map(lambda a: (a[0], *a[1]))
        case "normal":
            few_or_many = st.one_of(n, st.integers(0, 20))
            of_unit = st.just((0.0, 1.0))
            shapes = st.one_of(of_unit, st.tuples(st.floats(-10, 10), st.floats(0, 10)))
            return st.tuples(few_or_many, shapes).map(lambda a: (a[0], *a[1]))
        case "exponential":
            return st.tuples(n, st.one_of(st.just(1.0), st.floats(1e-6, 1e6)))
        case "bernoulli":
            return st.tuples(n, probabilities)
        case "dropout's mask":
            return st.tuples(n, st.floats(0, 1, exclude_min=True, exclude_max=True))
        case "randint":
            return st.tuples(n, ranges).map(lambda a: (a[0], *a[1]))
        case "multinomial" if "without" in name:
            return st.tuples(st.floats(0, 1, exclude_min=True), matrix).map(lambda a: (a[0], *a[1]))
        case "multinomial" if "with" in name:
            return st.tuples(n.map(lambda n: n + 1), matrix).map(lambda a: (a[0], *a[1]))
        case "multinomial":
            return matrix
        case _:
            return st.tuples(n)


def draws(most):
    """(name, arguments) of any call."""
    return st.sampled_from(list(CALLS)).flatmap(lambda name: st.tuples(st.just(name), arguments(name, most)))


def check_same_draw(rng, name, args):
    __tracebackhide__ = True
    ours, theirs = CALLS[name]
    check_same_bits(ours(rng, *args), theirs(*args))
    check_same_state(rng)


# --- every draw, alone and among others


@pytest.mark.parametrize("name", CALLS)
@given(seed=seeds, data=st.data())
def test_draw(name, seed, data):
    check_same_draw(start(seed), name, data.draw(arguments(name, MOST)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@given(seed=seeds, data=st.data())
@settings(max_examples=1000)
def test_draw_at_length(name, seed, data):
    check_same_draw(start(seed), name, data.draw(arguments(name, 200_000)))


def check_sequence(seed, calls, handover):
    """Check a sequence of draws; at call number `handover` the two sides exchange states."""
    __tracebackhide__ = True
    rng = start(seed)
    check_same_state(rng)
    for i, (name, args) in enumerate(calls):
        if i == handover:
            theirs = torch.get_rng_state().numpy()
            torch.manual_seed(0)
            torch.set_rng_state(torch.from_numpy(rng.get_state()))
            rng = Generator(0)
            rng.set_state(theirs)
        check_same_draw(rng, name, args)


@given(seed=seeds, calls=st.lists(draws(1000), max_size=10), handover=st.integers(0, 10))
@example(seed=1, calls=[("normal", (1, 0.0, 1.0)), ("normal", (16, 0.0, 1.0)), ("normal", (1, 0.0, 1.0))], handover=1)
def test_sequences_of_draws(seed, calls, handover):
    check_sequence(seed, calls, handover)


@pytest.mark.slow
@given(seed=seeds, calls=st.lists(draws(20_000), max_size=30), handover=st.integers(0, 30))
@settings(max_examples=1000)
def test_long_sequences_of_draws(seed, calls, handover):
    check_sequence(seed, calls, handover)


@pytest.mark.parametrize("threads", sorted({1, profiles.ALL_THREADS}))
@pytest.mark.parametrize("n", [BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 15, BLOCK + 16, BLOCK + 17, 2 * BLOCK + 5])
def test_draws_longer_than_a_block(n, threads):
    """torch draws in memory order on one thread and on all."""
    rng = start(n)
    with profiles.threads(threads):
        assert torch.get_num_threads() == threads
        for name, args in (("uniform", (-0.02, 0.03)), ("normal", (0.1, 0.02)), ("normal", ()), ("bernoulli", (0.9,))):
            check_same_draw(rng, name, (n, *args))
        for name in ("dropout's mask", "exponential", "uniform, float64", "normal, float64"):
            check_same_draw(rng, name, (n, *((0.1, 0.3) if "6" in name else (0.1,))))


def test_shapes_and_order():
    rng = start(123)
    check_same_bits(rng.uniform((3, 4, 5), -1, 1), torch.empty(3, 4, 5).uniform_(-1, 1).numpy())
    check_same_bits(rng.normal((6, 7)), torch.empty(6, 7).normal_().numpy())
    check_same_bits(rng.normal((2, 3)), torch.empty(2, 3).normal_().numpy())
    check_same_bits(rng.bernoulli((2, 3, 4), 0.5), torch.empty(2, 3, 4, dtype=torch.bool).bernoulli_(0.5).numpy())
    check_same_bits(rng.normal(()), torch.empty(()).normal_().numpy())
    check_same_bits(rng.exponential((2, 3)), torch.empty(2, 3).exponential_().numpy())
    check_same_bits(rng.exponential((4, 5), 0.3), torch.empty(4, 5).exponential_(0.3).numpy())
    check_same_bits(rng.uniform((2, 3)), torch.empty(2, 3).uniform_().numpy())
    check_same_bits(rng.randint((2, 3), -5, 5), torch.randint(-5, 5, (2, 3)).numpy())
    check_same_bits(rng.random_((2, 3)), torch.empty(2, 3, dtype=torch.int64).random_().numpy())
    check_same_state(rng)


@pytest.mark.parametrize("scalar", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", ["uniform", "normal", "exponential", "bernoulli"])
@pytest.mark.parametrize("n", [7, 1000])
def test_numpy_scalars_equal_python_floats(n, name, scalar):
    """As in torch, which converts numbers to Python floats."""
    given = [scalar(number) for number in {"uniform": (-0.1, 0.7), "normal": (0.2, 0.7)}.get(name, (0.3,))]
    rng = start(5)
    for call in (key for key in (name, f"{name}, float64") if key in CALLS):
        ours, theirs = CALLS[call]
        check_same_bits(ours(rng, n, *given), theirs(n, *map(float, given)))
        check_same_state(rng)


WITHOUT_AVX2 = """
import json, numpy as np, torch
from numpy_gpt import Generator

def share(ours, theirs):
    torch.manual_seed(1)
    return float((ours(Generator(1)) != theirs(torch.empty(200_000)).numpy()).mean())

assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
n, b = (200_000,), 768**-0.5
weights = [share(lambda rng: rng.normal(n), lambda a: a.normal_())]
weights += [share(lambda rng, e=e: rng.uniform(n, *e), lambda a, e=e: a.uniform_(*e)) for e in ((-b, b), (0.1, 0.7))]
same = [share(lambda rng: rng.bernoulli(n, 0.9), lambda a: a.bernoulli_(0.9) != 0)]
same += [share(lambda rng: rng.permutation(n[0]), lambda a: torch.randperm(n[0]))]
same += [share(lambda rng: rng.exponential(n), lambda a: a.exponential_())]
print(json.dumps([weights, same]))
"""


def test_platform_note_matches_torch_without_avx2():
    """PLATFORMS states the measured share of float32 weights that differ; the other draws are equal."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-c", WITHOUT_AVX2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    weights, same = json.loads(done.stdout)
    low, high = map(int, re.search(r"(\d) \w+ (\d) in 10 elements", random.PLATFORMS).groups())
    tenths = [round(10 * share) for share in weights]
    assert (min(tenths), max(tenths)) == (low, high), f"{weights}: is it {low} to {high} in 10?"
    assert same == [0, 0, 0]


def test_words_have_their_own_types():
    assert Generator(0).random_uint32(3).dtype == np.uint32
    assert Generator(0).random_uint64(3).dtype == np.uint64


@given(seed=seeds, n=st.integers(0, 2000))
def test_uint64_is_two_words(seed, n):
    first, second = Generator(seed).random_uint32(2 * n).astype(np.uint64).reshape(n, 2).T
    check_same_bits(Generator(seed).random_uint64(n), first << 32 | second)


@given(seed=seeds, p_drop=st.floats(0, 1, exclude_min=True, exclude_max=True), n=st.integers(1, 5000))
@example(seed=123, p_drop=0.1, n=1_572_864)
def test_bernoulli_is_dropouts_mask(seed, p_drop, n):
    rng = start(seed)
    dropped = torch.nn.functional.dropout(torch.ones(n), p_drop)
    check_same_bits(rng.bernoulli((n,), 1 - p_drop), (dropped != 0).numpy())
    check_same_state(rng)


# --- rare roundings


def untempered(words):
    """The engine's words that yield these r32: mt19937's tempering inverted, a few bits per iteration."""
    words = words ^ words >> 18
    words ^= words << 15 & 0xEFC60000
    y = words
    for _ in range(4):
        y = words ^ y << 7 & 0x9D2C5680
    words = y
    for _ in range(2):
        y = words ^ y >> 11
    return y


def state_before(words):
    """The state, uint8 (5056,), of a generator about to give these r32: at most 608, of its 624 words."""
    state = SOME_STATE.copy()
    state["left"], state["next"] = 624, 1
    state["words"][0, 1 : 1 + len(words)] = untempered(words)
    return state.view(np.uint8)


def start_before(words):
    state = state_before(np.asarray(words, np.uint32))
    torch.set_rng_state(torch.from_numpy(state))
    rng = Generator(0)
    rng.set_state(state)
    return rng


def words_of(long):
    """r64 as pairs of r32."""
    return np.stack([np.array(long, np.uint64) >> 32, np.array(long, np.uint64) & 0xFFFFFFFF], axis=1).ravel()


@pytest.mark.parametrize("step", [6007, pytest.param(1, marks=pytest.mark.slow)])
def test_ln_cos_and_sin_for_every_u24(step):
    """Both uniforms of a normal take all 2^24 values; the quick form samples them and the octants' edges."""
    octants = np.arange(9).repeat(101) * 2**21 + np.tile(np.arange(-50, 51), 9)
    u1 = np.concatenate([np.arange(0, 2**24, step), octants % 2**24])
    u1 = np.resize(u1, len(u1) + -len(u1) % 304).astype(np.uint32)
    u2 = np.concatenate([u1[len(u1) // 3 :], u1[: len(u1) // 3]])  # pairs each u1 with another u2
    words = np.stack([u1.reshape(-1, 8), u2.reshape(-1, 8)], axis=1).ravel()
    rng, want = Generator(0), np.empty(words.size, np.float32)
    blocks = iter(np.split(words, range(BLOCK, words.size, BLOCK)))
    rng.random_uint32 = lambda n: next(blocks)
    for i in range(0, words.size, 608):
        torch.set_rng_state(torch.from_numpy(state_before(words[i : i + 608])))
        torch.from_numpy(want[i : i + 608]).normal_()
    check_same_bits(rng.normal(want.shape), want)


@pytest.mark.parametrize("low", [2.0**-60, -(2.0**-60), 0.0])
def test_uniform_rounds_once(low):
    """5/16 * (1 + 2^-22) is a tie between two float32, decided by a `low` too small for float64."""
    check_same_draw(start_before([5 << 20]), "uniform", (1, low, 1 + 2.0**-22))


@pytest.mark.parametrize("p", [1 - 0.1, 1 - 0.9, 0.5, 2**-53, 1.5 * 2**-53, 0.3 + 2**-54, 1e-300, 1 - 2**-53, 0.0, 1.0])
def test_bernoulli_at_its_threshold(p):
    """u53 one step to either side of p, with various upper bits, which must be ignored."""
    near = {min(max(math.floor(p * 2**53) + d, 0), 2**53 - 1) for d in (-1, 0, 1)}
    long = [upper << 53 | u for u in near for upper in (0, 1, 1024, 2047)]
    check_same_draw(start_before(words_of(long)), "bernoulli", (len(long), p))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_multinomial_at_ties_and_near_ties(dtype):
    """The first of equal ratios wins, and equality depends on the dtype; u53 = 0 divides by 0, in torch too."""
    half = 1 << 52
    for long, p in [
        ([half + 1, half], [1, 1]),  # the second ratio is greater, but not in float32
        ([half] * 300, [1] * 300),
        ([half] * 300, [0] * 200 + [1] * 100),
        ([half, 0, half, 0], [1, 1, 1, 1]),
        ([half, half, 0, half], [1, 1, 0, 1]),
        ([1, half], [1e38, 1e38]),  # overflows in float32
    ]:
        rng = start_before(words_of(long))
        p = np.array([p], dtype)
        check_same_bits(rng.multinomial(p), torch.multinomial(torch.from_numpy(p), 1).numpy())


@pytest.mark.parametrize("sign", [1, -1])
def test_normal_rounds_once(sign):
    """z * std is just above or below half an ulp of a mean whose last bit would break the tie the other way."""
    n = 20_000
    z = Generator(0).normal((n,)).astype(np.float64)
    std = (2.0**-24 / z.clip(1e-3)).astype(np.float32)
    beyond = sign * (z * std - 2.0**-24)
    cases = np.flatnonzero((beyond > 0) & (beyond < 2.0**-54))
    assert len(cases) > 10
    for i in cases[:10]:
        args = (1.0 if sign > 0 else 1 + 2.0**-23, float(std[i]))
        rng = start(0)
        got = rng.normal((n,), *args)
        check_same_bits(got, torch.empty(n).normal_(*args).numpy())
        assert got[i] == np.float32(1 + 2.0**-23)  # neither 1 nor 1 + 2^-22: it was not a tie


@pytest.mark.parametrize("seed", range(5))
def test_scalar_normal_rounds_once(seed):
    z = torch.empty(1, dtype=torch.float64)
    torch.manual_seed(seed)
    mean = -float(z.normal_(0, 0.3))  # what is left is the product's rounding error
    rng = start(seed)
    got = rng.normal((1,), mean, 0.3)
    assert 0 < abs(got[0]) < 1e-15
    check_same_bits(got, torch.empty(1).normal_(mean, 0.3).numpy())


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (1.0, 1 + 2**-23),
        (0.0, 0.0),
        (-0.0, 0.0),
        (3.0, 3.0),
        (-1e-45, 1e-45),
        (-FLOAT32_MAX, 0.0),
        (0.0, FLOAT32_MAX),
        (1e8, 1e8 + 8),
        (-3e38, 0.0),
        (0.0, 3e38),
    ],
)
def test_uniform_excludes_its_upper_end(low, high):
    rng = start(3)
    got = rng.uniform((1000,), low, high)
    check_same_bits(got, torch.empty(1000).uniform_(low, high).numpy())
    assert low == high or got.max() < np.float32(high)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (1.0, 1 + 2**-52),
        (-0.0, 0.0),
        (-8e307, 8e307),
        (0.0, MAX),
        (-MAX, 0.0),
        (-5e-324, 5e-324),
        (1e-310, 3e-310),
        (5e-324, 1e300),
        (-1e300, 1e-300),
        (1e16, 1e16 + 8),
        (-0.3, 0.3),
    ],
)
def test_uniform64_at_extreme_bounds(low, high):
    check_same_draw(start(3), "uniform, float64", (1000, low, high))


@pytest.mark.parametrize("n", [7, 40])
@pytest.mark.parametrize(
    ("mean", "std"),
    [
        *((0.0, 1.2e308), (1e308, 9e307), (0.0, 5e-324), (1e-310, 1e-310), (-0.0, 0.0), (1e16, 0.1)),
        *((MAX, 0.5), (-MAX, 0.0), (0.0, MAX)),
    ],
)
def test_normal64_at_extreme_parameters(n, mean, std):
    check_same_draw(start(3), "normal, float64", (n, mean, std))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponential_of_the_smallest_and_largest_u53(dtype):
    long = [0, 1, 2**53 - 1, 2**53, 2**64 - 1]
    for lambd in (1.0, 0.3, 1e300, math.inf):
        name = "exponential" if dtype == np.float32 else "exponential, float64"
        check_same_draw(start_before(words_of(long)), name, (len(long), lambd))


def test_float64_exponentials_do_not_depend_on_numpys_logarithm(monkeypatch):
    """NumPy's logarithm differs by an ulp on processors with AVX-512; torch uses the C library's."""
    real = np.log1p
    monkeypatch.setattr(np, "log1p", lambda u: np.nextafter(real(u), 0))
    check_same_draw(start(5), "exponential, float64", (1000, 1.0))


@pytest.mark.parametrize("span", [2**28 - 1, 2**28])
def test_randint_uses_uint64_from_2_to_the_28(span):
    rng = start_before(words_of([(7 << 32) + 5, (9 << 32) + 1]))
    check_same_draw(rng, "randint", (1, -3, span - 3))
    want = 7 - 3 if span < 2**28 else ((7 << 32) + 5) % span - 3
    assert start_before(words_of([(7 << 32) + 5])).randint((1,), -3, span - 3)[0] == want


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_multinomial_where_a_sum_equals_u53(dtype):
    """The first index whose running sum reaches or equals u53; never an entry of 0."""
    quarter = 1 << 51
    long = [0, 1, quarter - 1, quarter, quarter + 1, 2 * quarter, 3 * quarter, 3 * quarter + 1, 2**53 - 1]
    long += [2 * quarter + (1 << 32)]  # in float32 the running sum ignores the many small entries
    for p in ([1, 1, 2], [1, 0, 0, 1, 2, 0], [0.25, 0.25, 0.25, 0.25], [3], [1, *1000 * [2.0**-25], 1]):
        rng, p = start_before(words_of(long)), np.array(p, dtype)
        want = torch.multinomial(torch.from_numpy(p), len(long), replacement=True).numpy()
        check_same_bits(rng.multinomial(p, len(long), replacement=True), want)
        check_same_state(rng)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_multinomial_divides_its_sums(dtype):
    """u53 lies where multiplying the sums by a reciprocal would give another index."""
    for c, total in ((c, n) for n in range(3, 200) for c in range(n // 2 + 1, n)):
        a, b = dtype(c), dtype(total)
        if a / b != a * (1 / b):
            rng, p = start_before(words_of([int(max(a / b, a * (1 / b)) * 2**53), 0])), np.array([a, b - a])
            want = torch.multinomial(torch.from_numpy(p), 2, replacement=True).numpy()
            check_same_bits(rng.multinomial(p, 2, replacement=True), want)


def test_multinomial_of_one_row_has_no_rows():
    rng, p = start(4), np.array([0.2, 0.5, 0.3], np.float32)
    for args in ((), (2,), (5, True), (1, True)):
        check_same_bits(rng.multinomial(p, *args), torch.multinomial(torch.from_numpy(p), *(args or (1,))).numpy())
    check_same_state(rng)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_multinomial_without_replacement_orders_ties_by_index(dtype, monkeypatch):
    """If every q is 1, the ratios are p: in descending order, equal ones by index."""
    monkeypatch.setattr(
        Generator, "exponential", lambda self, shape, lambd=1.0, dtype=np.float32: np.ones(shape, dtype)
    )
    p = np.random.default_rng(0).integers(1, 5, (2, 100)).astype(dtype)
    want = [sorted(range(100), key=lambda i, row=row: (-row[i], i))[:70] for row in p]
    assert Generator(0).multinomial(p, 70).tolist() == want


def rounded(exact):
    """A Fraction rounded once to float32, ties to even."""
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) % 2))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("b", [1 + 2.0**-12, 1 + 3 * 2.0**-12])
def test_fma_rounds_once(b, sign):
    """a * b lies half-way between two float32, of which the lower or the upper is even; a small c decides.

    The part of a * b + c that float64 loses also decides, at the tie and one or two float64 steps from it; sums exact
    in float64, including ties, must stay unchanged.
    """
    a, b = np.float32(sign * (1 + 2.0**-12)), np.float32(b)
    assert Fraction(float(a)) * Fraction(float(b)) % Fraction(1, 2**23) == Fraction(1, 2**24)
    terms = [0.0, 2.0**-24, 2.0**-25, 2.0**-52, 2.0**-51, 2.0**-50, 2.0**-80]
    terms += [2.0**-51 * (1 - 2.0**-23), 2.0**-51 * (1 + 2.0**-22), 2.0**-52 * (1 - 2.0**-23), 2.0**-52 * 1.5, 2.0**-53]
    for c in (term * way for term in terms for way in (1, -1)):
        c = np.float32(c)
        for factors in (
            (a, b),
            (np.float32(float(a) * 2.0**-3), np.float32(8) * b),
            (np.float32(a * 1), np.float32(1)),
        ):
            got = np.array([factors[0], 1.5], np.float32)  # elements are rounded independently
            box_muller.fma(got, factors[1], c, np.empty((4, 2)))
            assert got[0] == rounded(Fraction(float(factors[0])) * Fraction(float(factors[1])) + Fraction(float(c)))
            assert got[1] == rounded(Fraction(1.5) * Fraction(float(factors[1])) + Fraction(float(c)))


# --- loaders


@pytest.mark.parametrize("shuffle", [True, False])
@given(seed=seeds, n=st.integers(1, 60), batch=st.integers(1, 8), drop_last=st.booleans(), epochs=st.integers(1, 4))
def test_loader_order(shuffle, seed, n, batch, drop_last, epochs):
    data = torch.utils.data.TensorDataset(torch.arange(n))
    loader = torch.utils.data.DataLoader(data, batch_size=min(batch, n), shuffle=shuffle, drop_last=drop_last)
    rng = start(seed)
    for _ in range(epochs):
        seen = torch.cat([ids for (ids,) in loader]).numpy()
        if shuffle:
            check_same_bits(rng.loader_order(n)[: len(seen)], seen)
        else:
            rng.start_loader()
        check_same_state(rng)
        check_same_draw(rng, "bernoulli", (10, 0.5))


@given(seed=seeds, n=st.integers(1, 60), epochs=st.integers(1, 4))
def test_order_of_a_loader_with_its_own_generator(seed, n, epochs):
    """DataLoader(generator=g) draws from g a base seed, the order, and another order at the epoch's end."""
    theirs, ours = torch.Generator().manual_seed(seed), Generator(seed)
    loader = torch.utils.data.DataLoader(range(n), batch_size=n, shuffle=True, generator=theirs)
    for _ in range(epochs):
        (seen,) = (ids.numpy() for ids in loader)
        ours.start_loader()
        check_same_bits(ours.permutation(n), seen)
        ours.permutation(n)
        check_same_bits(ours.get_state(), theirs.get_state().numpy())


def test_ln_and_fma_work_in_place():
    """Allocating new arrays would cost more than the arithmetic."""
    n = 1 << 18
    x, whole = np.linspace(0.5, 1, n, dtype=np.float32), np.arange(n, dtype=np.float32)
    scratch, wide = np.empty((4, n), np.float32), np.empty((4, n))
    tracemalloc.start()
    box_muller._ln(x, scratch, wide[:2])
    box_muller.fma(whole, np.float32(3), np.float32(1), wide)  # integers: all sums are exact
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 2


# --- the state


@given(seed=seeds, words=st.integers(0, 1300))
@example(seed=1, words=623)
@example(seed=1, words=624)
@example(seed=1, words=625)
def test_state_after_any_number_of_words(seed, words):
    rng = start(seed)
    check_same_draw(rng, "random_uint32", (words,))
    other = Generator(7)
    other.set_state(torch.get_rng_state().numpy())
    check_same_state(other)
    check_same_draw(other, "random_uint32", (5,))


@given(seed=seeds, n=st.integers(0, 15))
def test_state_keeps_half_a_pair_of_normals(seed, n):
    rng = start(seed)
    check_same_draw(rng, "normal", (n,))
    other = Generator(7)
    other.set_state(rng.get_state())
    check_same_draw(other, "normal", (1,))
    torch.set_rng_state(torch.from_numpy(rng.get_state()))
    check_same_draw(rng, "normal", (1,))
    check_same_draw(start(seed), "normal", (1,))  # a new seed forgets the other half


@pytest.mark.parametrize("words", [0, 5, 624])
@pytest.mark.parametrize("name", ["random_uint32", "random_uint64"])
def test_drawing_nothing_leaves_the_state(name, words):
    rng = start(3)
    check_same_draw(rng, "random_uint32", (words,))
    assert not getattr(rng, name)(0).size
    check_same_state(rng)


def test_state_is_a_copy():
    rng = Generator(1)
    state = rng.get_state()
    state[:] = 0
    assert rng.random_() == Generator(1).random_()


def broken_states():
    def change(field, value, index=None):
        state = SOME_STATE.copy()
        if index is None:
            state[field] = value
        else:
            state[field][0, index] = value
        return state.view(np.uint8)

    good = Generator(5).get_state()
    yield from (good[:-1], np.append(good, good[:1]), good.reshape(1, -1), good.view(np.int8), bytes(good), None)
    yield from (np.zeros_like(good), np.full_like(good, 255), change("words", 0), change("words", 2**32, 3))
    yield from (change("left", left) for left in (0, -1, 2, 624, 625))
    yield from (change("next", position) for position in (1, 623, 625, 2**32, 2**64 - 1))
    yield from (change("seeded", 0), change("float_normal_is_valid", 1))
    yield from (change("normal_is_valid", 2), change("normal_y", math.nan), change("normal_y", -math.inf))


@pytest.mark.parametrize("state", [torch.get_rng_state(), b"", None])
def test_tensor_state_error_names_the_fix(state):
    """Only a tensor's error has this hint."""
    fix = ": pass a torch tensor's .numpy()" if isinstance(state, torch.Tensor) else ""
    message = f"a random state must be a uint8 array of 5056 bytes{fix}"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        Generator(0).set_state(state)


@pytest.mark.parametrize("state", list(broken_states()))
def test_impossible_states_are_refused(state):
    rng = start(11)
    with pytest.raises(
        InputError, match=r"^(a random state must be a uint8|these bytes are not a state of torch's CPU generator:)"
    ):
        rng.set_state(state)
    check_same_state(rng)


# --- refused arguments draw nothing


def test_numpys_true_is_a_seed_like_pythons():
    check_same_bits(Generator(np.True_).random_(5), Generator(True).random_(5))


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64, 1.5, "7", None])
def test_invalid_seeds_are_refused(seed):
    with pytest.raises(InputError, match="seed"):
        Generator(seed)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("uniform", ((20,), 1.0, 0.5)),
        ("uniform", ((20,), -3e38, 3e38)),
        ("uniform", ((20,), 0.0, math.inf)),
        ("uniform", ((20,), math.nan, 1.0)),
        ("normal", ((20,), 0.0, -1.0)),
        ("normal", ((20,), 0.0, math.inf)),
        ("normal", ((2,), math.nan, 1.0)),
        ("bernoulli", ((20,), -0.1)),
        ("bernoulli", ((20,), 1.1)),
        ("bernoulli", ((20,), math.nan)),
        ("permutation", (-1,)),
        ("uniform", ((20,), 0.0, 1.0, np.float16)),
        ("uniform", ((20,), -1e308, 1e308, np.float64)),
        ("normal", ((20,), 0.0, math.inf, np.float64)),
        ("exponential", ((20,), 0.0)),
        ("exponential", ((20,), -1.0)),
        ("exponential", ((20,), math.nan)),
        ("exponential", ((20,), 1.0, np.int64)),
        ("normal", ((20,), 0.0, 1.0, np.float16)),
        ("randint", ((20,), 3, 3)),
        ("randint", ((20,), 4, 3)),
        ("randint", ((20,), 0, 2**63)),
        ("randint", ((20,), -(2**63) - 1, 0)),
        ("multinomial", (np.ones((2, 3, 4), np.float32),)),
        ("multinomial", (np.ones((3, 0), np.float32),)),
        ("multinomial", (np.ones((3, 2), np.float32), 0)),
        ("multinomial", (np.ones((3, 2), np.float32), 3)),
        ("multinomial", (np.array([1, 0, 1], np.float64), 3)),
        ("multinomial", (np.array([[1, 1], [3e38, 3e38]], np.float32), 3, True)),
        ("multinomial", (np.ones((3, 2), np.int64),)),
    ],
)
def test_invalid_arguments_are_refused(name, args):
    rng = start(11)
    with pytest.raises(ValueError, match=f"^{name}: "):
        getattr(rng, name)(*args)
    check_same_state(rng)


SHAPED = {  # name: the arguments after the shape
    "random_": (),
    "randint": (0, 5),
    "uniform": (),
    "normal": (),
    "bernoulli": (0.5,),
    "exponential": (),
}


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize(
    ("shape", "error"),
    [
        (-1, ValueError),
        ((-2, -3), ValueError),
        ((-5, -5), ValueError),
        ((0, -1), ValueError),
        (2.0, TypeError),
        ((2, 2.5), TypeError),
        ((2, True), TypeError),
        ((2, np.True_), TypeError),
        (True, TypeError),
        (None, TypeError),
        ("23", TypeError),
    ],
)
def test_shapes_are_checked_before_anything_is_drawn(name, shape, error):
    rng = start(11)
    with pytest.raises(error, match=rf"^{name}: a size of shape .* must "):
        getattr(rng, name)(shape, *SHAPED[name])
    check_same_state(rng)


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("n", [0, 3, 20, np.int64(20)])
def test_shape_may_be_a_number_or_a_list(name, n):
    ours = getattr(Generator(1), name)
    check_same_bits(ours(n, *SHAPED[name]), getattr(Generator(1), name)((n,), *SHAPED[name]))
    check_same_bits(
        getattr(Generator(1), name)([n, 2], *SHAPED[name]), getattr(Generator(1), name)((n, 2), *SHAPED[name])
    )


@pytest.mark.parametrize("name", ["random_uint32", "random_uint64", "permutation", "loader_order"])
@pytest.mark.parametrize(("n", "error"), [(-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)])
def test_counts_are_checked_before_anything_is_drawn(name, n, error):
    rng = start(11)
    with pytest.raises(error, match=f"^{name}: n must "):
        getattr(rng, name)(n)
    check_same_state(rng)


@pytest.mark.parametrize(
    ("p", "rest", "error", "message"),
    [
        ([0.5, 0.5], (), TypeError, "p must be an array, .* not a list"),
        (
            np.ones(2, np.dtype(np.float32).newbyteorder()),
            (),
            ValueError,
            r"not >f4 \(2,\): its byte order is not native; use p\.astype\(p\.dtype\.newbyteorder\(\)\)",
        ),
        (np.ones(2, np.int64), (), ValueError, r"not int64 \(2,\)"),
        (np.broadcast_to(np.float32(1), 2**24 + 1), (), ValueError, r"16777217 categories are more than 2\^24, .*"),
        (np.ones(2), (1.0,), TypeError, "num_samples must be a whole number, not 1.0"),
        (np.ones(2), (True,), TypeError, "num_samples must be a whole number, not True"),
    ],
    ids=["list", "byte order", "int64", "categories", "1.0 samples", "True samples"],
)
def test_multinomial_errors_name_the_problem(p, rest, error, message):
    rng = start(11)
    with pytest.raises(error, match=f"^multinomial: .*{message}$"):
        rng.multinomial(p, *rest)
    check_same_state(rng)


def test_category_limit_matches_torch():
    """torch accepts one category fewer, and so does numpy_gpt."""
    with pytest.raises(RuntimeError, match="number of categories cannot exceed"):
        torch.multinomial(torch.ones(1).expand(2**24 + 1), 1)
    p = torch.ones(1).expand(2**24)
    check_same_bits(start(3).multinomial(p.numpy()), torch.multinomial(p, 1).numpy())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [7, 20, 100])
def test_overflow_gives_infinity_without_a_warning(n, dtype):
    """As in torch. These tests turn warnings into errors."""
    theirs, most = torch.empty(n, dtype=getattr(torch, np.dtype(dtype).name)), float(np.finfo(dtype).max)
    rng = start(11)
    got = rng.normal((n,), 0.9 * most, 0.9 * most, dtype)
    check_same_bits(got, theirs.normal_(0.9 * most, 0.9 * most).numpy())
    assert np.isinf(got).any()
    got = rng.exponential((n,), 0.2 / most, dtype)
    check_same_bits(got, theirs.exponential_(0.2 / most).numpy())
    assert np.isinf(got).any()
    check_same_state(rng)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [-1.0, -1e-30, math.nan, math.inf, -math.inf, 0.0])
def test_multinomial_names_the_invalid_row(bad, dtype):
    p = np.ones((4, 3), dtype)
    p[2] = 0 if bad == 0 else [1, bad, 1]
    rng = start(11)
    with pytest.raises(RuntimeError):
        torch.multinomial(torch.from_numpy(p), 1)
    with pytest.raises(ValueError, match="row 2"):
        rng.multinomial(p)
    check_same_state(rng)


@pytest.mark.parametrize("high", [5 - 2**63, 0, 2**63 - 1])
def test_randint_reaches_the_lowest_int64(high):
    check_same_draw(start(5), "randint", (6, -(2**63), high))


@pytest.mark.parametrize("ends", [(0.5, 3), (0, 3.0)])
def test_randint_accepts_only_integers(ends):
    rng = start(11)
    with pytest.raises(TypeError):
        torch.randint(*ends, (2,))
    with pytest.raises(TypeError, match="integer"):
        rng.randint((2,), *ends)
    check_same_state(rng)


def test_multinomial_of_no_rows():
    check_same_bits(Generator(1).multinomial(np.ones((0, 4), np.float32), 3), np.empty((0, 3), np.int64))


def windows(p):
    """(B, V) whose steps along both axes are one element."""
    return np.lib.stride_tricks.sliding_window_view(p.ravel()[: sum(p.shape) - 1], p.shape[1])


LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "rows with gaps": lambda p: np.repeat(p, 2, axis=1)[:, ::2],
    "columns with gaps": lambda p: np.repeat(np.repeat(p.T, 2, axis=0), 3, axis=1)[::2, ::3].T,
    "part of a Fortran array": lambda p: np.asfortranarray(np.tile(p, (3, 2)))[len(p) : 2 * len(p), : p.shape[1]],
    "one row for all": lambda p: np.broadcast_to(p[0], p.shape),
    "one column for all": lambda p: np.broadcast_to(p[:, :1], p.shape),
    "windows": windows,
}


def same_memory(a):
    """A tensor with an array's strides and numbers."""
    strides = [step // a.itemsize for step in a.strides]
    places = sum(np.arange(n)[(slice(None), *[None] * (a.ndim - 1 - i))] * strides[i] for i, n in enumerate(a.shape))
    memory = np.zeros(places.max() + 1, a.dtype)
    memory[places] = a
    return torch.from_numpy(memory).as_strided(a.shape, strides)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("B", "V"), [(3, 7), (7, 3), (4, 4), (1, 5), (40, 300)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_multinomial_draws_in_memory_order(layout, B, V, dtype):
    p = LAYOUTS[layout](rows(V, B, dtype, 5, 0.0))
    tensor, rng = same_memory(p), start(7)
    np.testing.assert_array_equal(tensor.numpy(), p)
    for k, replacement in ((1, False), (1, True), (3, False), (3, True)):
        check_same_bits(rng.multinomial(p, k, replacement), torch.multinomial(tensor, k, replacement).numpy())
    check_same_state(rng)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_multinomial_draws_clocks_in_the_dtype_of_p(order, dtype):
    """Compared with a stable sort of torch's clocks: of 20,000 in float32 some are equal, in float64 none."""
    p, rng = np.ones((2, 20_000), dtype, order=order), start(7)
    clocks = torch.empty(p.shape if order == "C" else p.T.shape, dtype=getattr(torch, dtype)).exponential_()
    clocks = clocks if order == "C" else clocks.T
    assert (len(clocks[0].unique()) < p.shape[1]) == (dtype == "float32")
    want = torch.sort(1 / clocks, dim=1, descending=True, stable=True).indices
    check_same_bits(rng.multinomial(p, p.shape[1]), want.numpy())


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("flip", [(0,), (1,), (0, 1)])
def test_multinomial_of_reversed_views(flip, order):
    """torch lacks reversed views: compare with torch.flip."""
    p = np.array(rows(7, 3, np.float32, 5, 0.0), order=order)
    rng = start(7)
    check_same_bits(
        rng.multinomial(np.flip(p, flip)), torch.multinomial(torch.flip(torch.from_numpy(p), flip), 1).numpy()
    )


@pytest.mark.parametrize("step", [1, 2, -1])
def test_multinomial_of_a_vector_with_gaps(step):
    p = rows(9, 1, np.float32, 5, 0.0)[0]
    rng = start(7)
    check_same_bits(rng.multinomial(p[::step]), torch.multinomial(torch.from_numpy(p[::step].copy()), 1).numpy())


def test_state_in_any_memory_layout_is_accepted():
    state = Generator(5).get_state()
    rng = Generator(1)
    rng.set_state(np.repeat(state, 2)[::2])
    check_same_bits(rng.random_((9,)), Generator(5).random_((9,)))
    rng.set_state(state[::-1].copy()[::-1])
    check_same_bits(rng.random_((9,)), Generator(5).random_((9,)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_upper_bound_note_matches_torchs_version(dtype):
    """Up to torch 2.12 the bound can be drawn, and PLATFORMS and the docstring say so."""
    low, high = dtype(1), np.nextafter(dtype(1), dtype(2))
    torch.manual_seed(3)
    drawn = torch.empty(1000, dtype=dtype_of(dtype)).uniform_(float(low), float(high)).numpy()
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    assert (high in drawn) == (version <= (2, 12))
    for text in (random.PLATFORMS, Generator.uniform.__doc__):
        assert re.search(r"up to 2\.12", text)
        assert re.search(r"from\s+2\.13 on", text)


def dtype_of(dtype):
    return torch.from_numpy(np.zeros(0, dtype)).dtype
