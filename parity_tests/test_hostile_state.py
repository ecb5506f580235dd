"""Impossible training states: each is refused by name, and nothing changes."""

import json

import numpy as np
import pytest
import torch

from numpy_gpt import AdamW, GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.runs.batches import Batches
from numpy_gpt.runs.folder import Run
from numpy_gpt.runs.settings import for_tiny
from numpy_gpt.train import Position
from parity_tests.tools.fuzz import reseal_run
from torch_gpt.train import TorchLearner

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
def test_invalid_counters_are_refused(what):
    state = {} if COUNTERS[what] is None else {"loop.counters": COUNTERS[what]}
    with pytest.raises(InputError, match="has no valid position of its run"):
        Position.restored(state)


@pytest.mark.parametrize("what", ORDERS)
def test_order_that_is_not_a_permutation_is_refused(what):
    with pytest.raises(InputError, match="order of windows is not a permutation of them"):
        Position.restored({"loop.counters": np.array([3, 0, 3, 96]), "loop.order": ORDERS[what]})


@pytest.mark.parametrize("order", [None, np.array([2, 0, 1]), np.array([2, 0, 1], np.int32), np.zeros(0, np.int64)])
def test_position_round_trip(order):
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
def test_invalid_optimiser_state_is_refused_unchanged(what):
    optimizer = AdamW({"w": np.ones((2, 3), np.float32)})
    optimizer.step({"w": np.full((2, 3), 0.5, np.float32)})
    before = {name: array.copy() for name, array in optimizer.state().items()}
    (name,) = STATES[what]
    with pytest.raises(InputError, match=rf"has (no )?{name}"):
        optimizer.restore(before | STATES[what])
    assert {name: array.tobytes() for name, array in optimizer.state().items()} == {
        name: array.tobytes() for name, array in before.items()
    }


def test_optimiser_state_round_trip():
    optimizer, again = (AdamW({"w": np.ones((2, 3), np.float32)}) for _ in range(2))
    optimizer.step({"w": np.full((2, 3), 0.5, np.float32)})
    again.restore(optimizer.state())
    assert again.t == 1
    assert again.m["w"].tobytes() == optimizer.m["w"].tobytes()


SETTINGS = {
    "epochs": [True, -1, 1.5, "2", None, 2**63, float("nan")],
    "batch_size": [0, False, "4", 10**30, [4]],
    "eval_freq": [0, True, None],
    "eval_iter": [-3, 2.0],
    "stride": [0, "16", True],
    "max_steps": [-1, float("inf")],
    "seed": [True, "1", 2**64, -(2**63) - 1, 0.5],
    "lr": [0, -1e-3, float("nan"), float("inf"), "1e-3", True, 10**400, None],
    "clip": [0.0, float("nan"), "1"],
    "weight_decay": [-0.1, float("inf"), None],
    "drop_rate": [1.5, -0.1, float("nan"), False],
    "tie_weights": [0, 1, "yes", None],
    "prompt": [None, 3, ["a"]],
    "model": [None, 124],
}


def reseal(run, **changes):
    whole = json.loads((run / "run.json").read_text())
    whole["settings"] |= changes
    content = bytearray(json.dumps(whole).encode())
    reseal_run("run.json", content)
    (run / "run.json").write_bytes(content)


@pytest.fixture
def begun(tmp_path):
    with Run.create(tmp_path / "run", for_tiny, Batches(for_tiny)) as run:
        return run.folder


@pytest.mark.parametrize("name", SETTINGS)
def test_invalid_setting_with_valid_checksum_is_refused(begun, name):
    for value in SETTINGS[name]:
        reseal(begun, **{name: value})
        with pytest.raises(InputError, match=rf"its {name} is "):
            Run.open(begun)


def test_settings_at_their_limits_are_accepted(begun):
    least = {"epochs": 0, "max_steps": 0, "warmup_steps": 0, "weight_decay": 0, "drop_rate": 1, "lr": 1, "clip": 5e-324}
    most = {"seed": 2**64 - 1, "batch_size": 2**63 - 1, "stride": 1, "eval_freq": 2**63 - 1}
    for changes in (least, most, {"seed": -(2**63), "clip": None, "stride": None, "max_steps": None}):
        reseal(begun, **changes)
        settings = Run.open(begun).settings
        assert {name: getattr(settings, name) for name in changes} == changes


@pytest.mark.parametrize(
    "position",
    [
        Position(3, 0, 3, 96, np.arange(6)),  # wrong number of windows
        Position(3, 0, 3, 96, np.arange(0)),
        Position(3, 0, 3, 96, None),  # mid-epoch without its order
        Position(7, 0, 7, 224, np.arange(28)),  # past the epoch's last batch
        Position(9, 0, 3, 96, np.arange(28)),  # step does not match the batch
        Position(2**61, 0, 3, 96, np.arange(28)),
    ],
)
def test_position_outside_the_text_is_refused(position):
    with pytest.raises(InputError, match="its text has 28 windows in 7 batches"):
        position.check_fits(28, 7)


@pytest.mark.parametrize(
    "position",
    [Position(), Position(7, 1, 0, 224), Position(7, 1, 0, 224, np.arange(28)), Position(9, 1, 2, 288, np.arange(28))],
)
def test_position_inside_the_text_is_accepted(position):
    position.check_fits(28, 7)


def torch_learner():
    config = GPTConfig(257, 8, 8, 2, 1, 0.0)
    learner = TorchLearner(config, for_tiny, 10, device=torch.device("cpu"))
    x = np.arange(16).reshape(2, 8)
    learner.train_step(x, x, 0)
    return learner


TORCH_STATES = {
    "rng of zeros": {"rng": np.zeros(5056, np.uint8)},
    "rng too short": {"rng": np.zeros(16, np.uint8)},
    "rng of another type": {"rng": np.zeros(5056, np.int64)},
    "t NaN": {"optimizer.t": np.array([np.nan])},
    "t negative": {"optimizer.t": np.array([-1])},
    "t of no axis": {"optimizer.t": np.array(1)},
    "t none": {"optimizer.t": np.zeros(0, np.int64)},
    "m NaN": {"optimizer.m.pos_emb.weight": np.full((8, 8), np.nan, np.float32)},
    "m complex": {"optimizer.m.pos_emb.weight": np.zeros((8, 8), np.complex64)},
    "m of another shape": {"optimizer.m.pos_emb.weight": np.zeros((1, 8, 8), np.float32)},
    "m beyond float32": {"optimizer.m.pos_emb.weight": np.full((8, 8), 1e300)},
    "v negative": {"optimizer.v.pos_emb.weight": np.full((8, 8), -1e-30, np.float32)},
    "v of uint64": {"optimizer.v.pos_emb.weight": np.zeros((8, 8), np.uint64)},
}


@pytest.mark.parametrize("what", TORCH_STATES)
def test_torch_learner_refuses_invalid_state_unchanged(what):
    learner = torch_learner()
    before = learner.state()
    with pytest.raises(InputError):
        learner.restore(before | TORCH_STATES[what])
    assert {name: array.tobytes() for name, array in learner.state().items()} == {
        name: array.tobytes() for name, array in before.items()
    }


def test_torch_learner_state_round_trip():
    learner = torch_learner()
    state = learner.state()
    again = torch_learner()
    torch.rand(3)
    again.restore(state)
    assert all(np.array_equal(array, state[name]) for name, array in again.state().items())
