"""Training states that no run can have reached: each is refused by name, and nothing is changed."""

import numpy as np
import pytest

from numpy_gpt import AdamW
from numpy_gpt.errors import InputError
from numpy_gpt.train import Position

COUNTERS = {
    "missing": None,
    "NaN": np.array([np.nan, 0, 0, 0]),
    "fractions": np.array([1.5, 0, 0, 0]),
    "negative": np.array([1, 0, -1, 0]),
    "2^63 - 1": np.array([2**63 - 1, 0, 0, 0]),
    "2^64 - 1": np.array([2**64 - 1, 0, 0, 0], np.uint64),
    "three": np.zeros(3, np.int64),
    "a matrix": np.zeros((4, 1), np.int64),
    "complex": np.zeros(4, np.complex64),
    "bool": np.zeros(4, bool),
    "text": np.array(["1", "0", "0", "0"]),
    "no axis": np.array(4),
}
ORDERS = {
    "a window twice": np.array([0, 1, 1]),
    "one beyond": np.array([1, 2, 3]),
    "negative": np.array([0, 1, -1]),
    "floating point": np.array([0.0, 1.0]),
    "NaN": np.array([np.nan, 0]),
    "a matrix": np.array([[0, 1]]),
    "bool": np.array([False, True]),
    "no axis": np.array(0),
}


@pytest.mark.parametrize("what", COUNTERS)
def test_a_position_of_hostile_counts_is_refused(what):
    state = {} if COUNTERS[what] is None else {"loop.counters": COUNTERS[what]}
    with pytest.raises(InputError, match="does not say where its run stood"):
        Position.restored(state)


@pytest.mark.parametrize("what", ORDERS)
def test_an_order_that_is_no_permutation_is_refused(what):
    with pytest.raises(InputError, match="order of windows does not name each of them once"):
        Position.restored({"loop.counters": np.array([3, 0, 3, 96]), "loop.order": ORDERS[what]})


@pytest.mark.parametrize("order", [None, np.array([2, 0, 1]), np.array([2, 0, 1], np.int32), np.zeros(0, np.int64)])
def test_a_position_comes_back_as_it_was(order):
    again = Position.restored(Position(7, 1, 2, 224, order).state())
    assert (again.step, again.epoch, again.batch, again.tokens_seen) == (7, 1, 2, 224)
    assert order is None or again.order.tolist() == order.tolist()


def moments(value, dtype=np.float32):
    array = np.ones((2, 3), dtype)
    array[1, 2] = value
    return array


STATES = {
    "t NaN": {"t": np.array([np.nan])},
    "t a fraction": {"t": np.array([1.5])},
    "t negative": {"t": np.array([-1])},
    "t 2^63 - 1": {"t": np.array([2**63 - 1])},
    "t bool": {"t": np.array([True])},
    "t complex": {"t": np.array([1j])},
    "t of no axis": {"t": np.array(1)},
    "m NaN": {"m.w": moments(np.nan)},
    "m infinite": {"m.w": moments(-np.inf)},
    "m beyond float32": {"m.w": moments(1e300, np.float64)},
    "m complex": {"m.w": moments(1, np.complex64)},
    "m integers": {"m.w": moments(1, np.int64)},
    "m bool": {"m.w": moments(1, bool)},
    "m text": {"m.w": np.full((2, 3), "1")},
    "m of another shape": {"m.w": np.ones((3, 2), np.float32)},
    "v NaN": {"v.w": moments(np.nan)},
    "v infinite": {"v.w": moments(np.inf)},
    "v negative": {"v.w": moments(-1e-30)},
}


@pytest.mark.parametrize("what", STATES)
def test_a_hostile_optimiser_state_is_refused_and_nothing_changes(what):
    optimizer = AdamW({"w": np.ones((2, 3), np.float32)})
    optimizer.step({"w": np.full((2, 3), 0.5, np.float32)})
    before = {name: array.copy() for name, array in optimizer.state().items()}
    (name,) = STATES[what]
    with pytest.raises(InputError, match=rf"has (no )?{name}"):
        optimizer.restore(before | STATES[what])
    assert {name: array.tobytes() for name, array in optimizer.state().items()} == {
        name: array.tobytes() for name, array in before.items()
    }


def test_an_optimisers_state_comes_back_as_it_was():
    optimizer, again = (AdamW({"w": np.ones((2, 3), np.float32)}) for _ in range(2))
    optimizer.step({"w": np.full((2, 3), 0.5, np.float32)})
    again.restore(optimizer.state())
    assert again.t == 1
    assert again.m["w"].tobytes() == optimizer.m["w"].tobytes()
