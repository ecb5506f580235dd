"""random.keyed_order: each item once, as irregular as a uniform order, without memory for each item; in training."""

import tracemalloc
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from numpy_gpt import train
from numpy_gpt.data import Loader, sliding_windows
from numpy_gpt.errors import InputError
from numpy_gpt.random.generator import Generator
from numpy_gpt.random.keyed_order import KeyedOrder
from numpy_gpt.runs.learner import NumpyLearner
from numpy_gpt.tokens.file import TokenFile
from numpy_gpt.train import Position, epoch_order
from parity_tests.judge.learners import CONFIG, SETTINGS, STEPS
from torch_gpt.train import TorchLearner

MASK = (1 << 64) - 1


def one_by_one(n, seed):
    """The order as its docstring describes it, in Python's whole numbers."""
    half = next(b for b in range(1, 40) if n <= 4**b)
    keys = Generator(seed).random_uint64(6).tolist()

    def mixed(x):
        x = (x + 0x9E3779B97F4A7C15) & MASK
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
        return x ^ x >> 31

    def permuted(x):
        left, right = divmod(x, 2**half)
        for key in keys:
            left, right = right, left ^ mixed(right ^ key) % 2**half
        return left * 2**half + right

    for x in range(n):
        x = permuted(x)
        while x >= n:
            x = permuted(x)
        yield x


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
@example(n=4**5, seed=0)
@example(n=4**5 + 1, seed=0)
@example(n=4**5 - 1, seed=2**63 - 1)
def test_each_item_once(n, seed):
    order = KeyedOrder(n, seed)
    assert len(order) == n
    assert order[:].dtype == np.int64
    assert sorted(order[:].tolist()) == list(range(n))


def test_each_item_once_in_small_orders():
    for n in range(1, 70):
        for seed in range(20):
            assert sorted(KeyedOrder(n, seed)[:].tolist()) == list(range(n)), (n, seed)


@given(n=st.integers(1, 300), seed=st.integers(0, 2**63 - 1))
def test_numbers_are_those_of_the_description(n, seed):
    assert KeyedOrder(n, seed)[:].tolist() == list(one_by_one(n, seed))


@given(n=st.integers(1, 400), edges=st.lists(st.integers(0, 400)))
def test_parts_are_those_of_the_order(n, edges):
    order = KeyedOrder(n, 11)
    edges = [0, *sorted(edge for edge in edges if edge < n), n]
    parts = [order[a:b] for a, b in pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), order[:])


# Laws of uniform permutations of n items: mean and variance of what is counted in one, over SEEDS orders

SEEDS, N = 2000, 1000


@pytest.fixture(scope="module")
def orders():
    return np.array([KeyedOrder(N, seed)[:] for seed in range(SEEDS)])


def check_law(name, counts, mean, variance):
    """Fail unless the mean and variance of SEEDS independent counts are within 4.5 standard errors of the law's."""
    error = abs(counts.mean() - mean) / np.sqrt(variance / SEEDS)
    assert error < 4.5, f"{name}: mean {counts.mean():.4g}, expected {mean:.4g} ({error:.1f} standard errors)"
    fourth = ((counts - counts.mean()) ** 4).mean()
    spread = np.sqrt((fourth - variance**2) / SEEDS)
    error = abs(counts.var() - variance) / spread
    assert error < 4.5, f"{name}: variance {counts.var():.4g}, expected {variance:.4g} ({error:.1f} standard errors)"


def test_orders_follow_the_laws_of_uniform_ones(orders):
    place = np.arange(N)
    centred = place - (N - 1) / 2
    check_law("fixed points", (orders == place).sum(axis=1), 1, 1)
    check_law("ascents", (np.diff(orders) > 0).sum(axis=1), (N - 1) / 2, (N + 1) / 12)
    correlation = (orders - (N - 1) / 2) @ centred / (centred @ centred)
    check_law("correlation with file order", correlation, 0, 1 / (N - 1))
    check_law("neighbours that stay neighbours", (abs(np.diff(orders)) == 1).sum(axis=1), 2 - 2 / N, 2.0)
    cycles = np.array([cycle_count(order) for order in orders])
    k = np.arange(1, N + 1)
    check_law("cycles", cycles, (1 / k).sum(), ((k - 1) / k**2).sum())


def cycle_count(order):
    seen, count = np.zeros(len(order), bool), 0
    for i in range(len(order)):
        count += not seen[i]
        while not seen[i]:
            seen[i] = True
            i = order[i]
    return count


@pytest.mark.parametrize("lag", [1, 2, 32, 500])
def test_pairs_of_positions_are_uniform(orders, lag):
    """chi² of the items at positions i and i + lag, in 8 x 8 equal cells, over all orders and ten i."""
    at = np.arange(10) * 40
    a, b = (orders[:, places].ravel() * 8 // N for places in (at, at + lag))
    cells = np.bincount(a * 8 + b, minlength=64)
    expected = len(a) / 64
    chi2 = ((cells - expected) ** 2 / expected).sum()
    assert 63 - 5 * np.sqrt(126) < chi2 < 63 + 5 * np.sqrt(126), chi2


def test_other_seeds_give_other_orders():
    first, second, far = (KeyedOrder(10**9, seed)[:1000] for seed in (0, 1, 2**31))
    assert len({*first, *second, *far}) > 2990
    assert first.max() < 10**9
    assert first.max() > 9e8


# In training


def learners():
    return NumpyLearner(CONFIG, SETTINGS, STEPS), TorchLearner(
        CONFIG, SETTINGS, STEPS, device=torch.device("cpu"), attention="plain"
    )


def test_both_backends_draw_the_same_seed_and_go_on_alike(monkeypatch):
    ours, theirs = learners()
    assert epoch_order(ours, 9).tolist() == epoch_order(theirs, 9).tolist()
    monkeypatch.setattr(train, "LONGEST_PERMUTATION", 8)
    for _ in range(3):
        mine, other = epoch_order(ours, 9), epoch_order(theirs, 9)
        assert mine.seed == other.seed
        assert mine[:].tolist() == other[:].tolist()
    assert np.array_equal(ours.state()["rng"], theirs.state()["rng"])


def test_a_seed_takes_the_draws_of_a_permutation():
    (ours, _), (again, _) = learners(), learners()
    seed = ours.shuffle_seed()
    order = again.shuffled_order(50)
    assert np.array_equal(ours.state()["rng"], again.state()["rng"])
    assert np.array_equal(Generator(seed).permutation(50), order)


def test_permutations_up_to_2_to_the_20_are_torchs():
    class Asked(NumpyLearner):
        def shuffled_order(self, windows):
            return np.array([windows])

    learner = Asked(CONFIG, SETTINGS, STEPS)
    assert epoch_order(learner, 2**20).tolist() == [2**20]
    assert isinstance(epoch_order(learner, 2**20 + 1), KeyedOrder)


@pytest.mark.parametrize("key", [[9, 5], [2**62, 2**63 - 1]])
def test_position_keeps_the_key(key):
    state = Position(7, 1, 2, 224, KeyedOrder(*key)).state()
    assert sum(array.nbytes for array in state.values()) == 48
    again = Position.restored(state)
    assert (len(again.order), again.order.seed) == tuple(key)
    assert np.array_equal(again.order[:3], KeyedOrder(*key)[:3])


KEYS = {
    "negative": np.array([9, -1]),
    "no windows": np.array([-9, 1]),
    "2^64 - 1": np.array([9, 2**64 - 1], np.uint64),
    "one number": np.array([9]),
    "no number": np.array([], np.int64),
    "fractions": np.array([9.0, 1.0]),
    "a matrix": np.array([[9, 1]]),
    "no axis": np.array(9),
    "bool": np.array([True, True]),
    "text": np.array(["9", "1"]),
}


@pytest.mark.parametrize("what", KEYS)
def test_invalid_key_is_refused(what):
    with pytest.raises(InputError, match="key of its order of windows is not valid"):
        Position.restored({"loop.counters": np.array([3, 0, 3, 96]), "loop.key": KEYS[what]})


def test_key_beside_an_order_is_refused():
    state = {"loop.counters": np.array([3, 0, 3, 96]), "loop.order": np.arange(9), "loop.key": np.array([9, 1])}
    with pytest.raises(InputError, match="key of its order of windows is not valid"):
        Position.restored(state)


def test_position_of_another_number_of_windows_is_refused():
    with pytest.raises(InputError, match="an order of 9 windows; its text has 28 windows in 7 batches"):
        Position(3, 0, 3, 96, KeyedOrder(9, 1)).check_fits(28, 7)
    Position(3, 0, 3, 96, KeyedOrder(28, 1)).check_fits(28, 7)
    loader = Loader(*sliding_windows(np.arange(30), 2, 2), 2, True)
    with pytest.raises(InputError, match="an order of 9 windows does not fit this text, which has 14 windows"):
        loader.batches(KeyedOrder(9, 1))


def test_epoch_has_each_window_once():
    loader = Loader(*sliding_windows(np.arange(60), 3, 3), 2, True)
    order = KeyedOrder(19, 4)
    windows = np.concatenate([x for x, _ in loader.batches(order)])
    assert np.array_equal(windows[:, 0] // 3, order[:18])
    later = np.concatenate([x for x, _ in loader.batches(order, 5)])
    assert np.array_equal(later, windows[10:])


def test_1e8_windows_take_little_memory(tmp_path):
    """An epoch's order, its saved position and its first batches: under a megabyte, where a permutation takes 800."""
    file = tmp_path / "train.bin"
    with file.open("wb") as f:
        f.truncate(2 * (10**8 + 1))  # a sparse file of zeros
    learner, _ = learners()
    loader = Loader(*TokenFile(file, np.dtype(np.uint16)).windows(1, 1), 8, True)
    tracemalloc.start()
    try:
        order = epoch_order(learner, loader.windows)
        position = Position.restored(Position(1, 0, 1, 8, order).state())
        position.check_fits(loader.windows, len(loader))
        for batches in (loader.batches(position.order, 12_000_000), loader.batches(None)):
            assert [x.shape for x, _ in islice(batches, 20)] == [(8, 1)] * 20
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert loader.windows == 10**8
    assert peak < 1e6, f"{peak / 1e6:.1f} MB"
