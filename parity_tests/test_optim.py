"""AdamW, clipping and the schedule against torch's: step by step on random gradients, and in training runs."""

import ctypes
import math
import re
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.utils import clip_grad_norm_

from numpy_gpt import GPTConfig, optim
from numpy_gpt.errors import InputError
from numpy_gpt.parallel import aliasing
from numpy_gpt.parameters import check_state, decayed_parameters
from parity_tests.judge.compare import check, check_exact
from parity_tests.judge.strategies import LAYOUTS, SEEDS, arrange
from parity_tests.judge.training import (
    AdamWScales,
    check_adamw,
    check_clipping,
    check_schedule,
    check_trajectory,
    draw_grads,
    draw_params,
)
from torch_gpt.model import GPTModel


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_adamw_matches_torch(dtype):
    @settings(max_examples=40)
    @given(
        seed=SEEDS,
        layout=st.sampled_from(LAYOUTS),
        weight_decay=st.sampled_from((0.0, 0.01, 0.1, 1.0)),
        betas=st.sampled_from(((0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.5, 0.5))),
        eps=st.sampled_from((1e-8, 1e-3)),
    )
    @example(seed=0, layout="gaps", weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    def holds(**case):
        check_adamw(dtype=dtype, **case)

    holds()


def test_adamw_has_torchs_defaults():
    ours, torchs = optim.AdamW({}), torch.optim.AdamW([torch.zeros(1)]).defaults
    for key in ("lr", "betas", "eps", "weight_decay"):
        assert getattr(ours, key) == torchs[key]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_adamw_matches_torch_on_many_blocks(dtype):
    """Larger than an update block, and not a multiple of it."""
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((611, 1021)).astype(dtype)}
    leaf, scales = torch.from_numpy(params["w"].copy()).requires_grad_(), AdamWScales(params)
    ours, torchs = optim.AdamW(params), torch.optim.AdamW([leaf])
    for _ in range(3):
        g = rng.standard_normal(params["w"].shape).astype(dtype)
        leaf.grad = torch.from_numpy(g.copy())
        ours.step({"w": g})
        torchs.step()
        scales.step({"w": g}, 1e-3, (0.9, 0.999), 1e-8, 0.01)
        check("AdamW many blocks", params["w"], leaf.detach().numpy(), scales.S["w"])


def test_decay_of_some_parameters_matches_torchs_groups():
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(5) for name in "abc"}
    leaves = {name: torch.from_numpy(p.copy()).requires_grad_() for name, p in params.items()}
    groups = [{"params": [leaves["b"]]}, {"params": [leaves["a"], leaves["c"]], "weight_decay": 0.0}]
    ours, torchs = optim.AdamW(params, weight_decay=0.5, decayed=["b"]), torch.optim.AdamW(groups, weight_decay=0.5)
    scales = AdamWScales(params)
    for _ in range(3):
        grads = {name: rng.standard_normal(5) for name in params}
        for name, leaf in leaves.items():
            leaf.grad = torch.from_numpy(grads[name].copy())
        ours.step(grads)
        torchs.step()
        scales.step(grads, 1e-3, (0.9, 0.999), 1e-8, 0.5)
        for name, p in params.items():
            check(f"AdamW decayed {name}", p, leaves[name].detach().numpy(), scales.S[name])


def test_decay_of_an_unknown_parameter_is_refused():
    with pytest.raises(InputError, match=r"^AdamW: decayed has 'w', which is not a parameter$"):
        optim.AdamW({"a": np.ones(3)}, decayed=["a", "w"])


@pytest.mark.parametrize("tied", [False, True])
def test_decays_are_those_of_nanogpt_and_mingpt(tied):
    """nanoGPT: all parameters of two dimensions; minGPT: the weights of nn.Linear alone."""
    config = GPTConfig(11, 5, emb_dim=8, n_heads=2, n_layers=2, qkv_bias=True, tie_weights=tied)
    model = GPTModel(config)
    everything = {name: p.ndim for name, p in model.named_parameters()}
    assert decayed_parameters(config, "all") == list(everything)
    assert decayed_parameters(config, "2d") == [name for name, ndim in everything.items() if ndim >= 2]
    linear = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert decayed_parameters(config, "matrices") == linear


def rows_at_times(rng, shape, step):
    """A table's gradient by step: no rows, then some, then others instead, finally all rows."""
    g = rng.standard_normal(shape)
    read = [np.zeros(shape[0]), rng.random(shape[0]) < 0.02, rng.random(shape[0]) < 0.02, np.ones(shape[0])]
    return g * read[min(step, 3)][:, None]


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_unread_rows_decay_as_in_torch(dtype, resumed):
    """Rows read once keep moving, also when the optimiser is restored in between."""
    shape, rng = (611, 1021), np.random.default_rng(0)
    params = {"w": rng.standard_normal(shape).astype(dtype)}
    leaf, scales = torch.from_numpy(params["w"].copy()).requires_grad_(), AdamWScales(params)
    ours, torchs = optim.AdamW(params), torch.optim.AdamW([leaf])
    for step in range(6):
        g = rows_at_times(rng, shape, step).astype(dtype)
        leaf.grad = torch.from_numpy(g.copy())
        if resumed and step in (2, 5):
            state = {name: array.copy() for name, array in ours.state().items()}
            ours = optim.AdamW(params)
            ours.restore(state)
        ours.step({"w": g})
        torchs.step()
        scales.step({"w": g}, 1e-3, (0.9, 0.999), 1e-8, 0.01)
        check(f"AdamW rows, step {step}", params["w"], leaf.detach().numpy(), scales.S["w"])
        state = torchs.state[leaf]
        assert np.array_equal(ours.m["w"] != 0, state["exp_avg"].numpy() != 0), "rows with a moment"


def test_rows_without_a_gradient_become_nan_at_eps_0_as_in_torch():
    """0 / (√0 + 0)."""
    params, g = {"w": np.ones((3, 2))}, np.array([[1.0, 2.0], [0.0, 0.0], [0.0, 3.0]])
    leaf = torch.ones((3, 2), dtype=torch.float64, requires_grad=True)
    leaf.grad = torch.from_numpy(g.copy())
    torch.optim.AdamW([leaf], eps=0.0).step()
    with np.errstate(invalid="ignore"):
        optim.AdamW(params, eps=0.0).step({"w": g})
    assert np.isnan(params["w"]).tolist() == torch.isnan(leaf).tolist() == [[False] * 2, [True] * 2, [True, False]]


@pytest.mark.parametrize(("first", "betas"), [(1e-30, (0.9, 0.999)), (1.0, (0.0, 0.999))])
def test_restored_row_continues_from_either_moment(first, betas):
    """A gradient so small that its square is 0, or forgotten through beta1 = 0, leaves only one moment nonzero."""
    params, same = {"w": np.ones((2, 2), np.float32)}, {"w": np.ones((2, 2), np.float32)}
    ours, other = optim.AdamW(params, betas=betas), optim.AdamW(same, betas=betas)
    for g in (first, 0.0, 0.0, 1.0):
        grads = {"w": np.array([[g, g], [0, 0]], np.float32)}
        state, ours = ours.state(), optim.AdamW(params, betas=betas)
        ours.restore(state)
        ours.step(grads)
        other.step(grads)
        for name, a in other.state().items():
            check_exact(name, ours.state()[name], a)
        check_exact("w", params["w"], same["w"])


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize(
    "betas", [(0.0, 0.999), (0.3, 0.999), (0.5, 0.9), (0.45, 0.0), (0.51, 0.3), (0.9, 0.0), (0.0, 0.0)]
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_moments_match_torch_for_every_beta(dtype, betas, eps, foreach):
    """With gradients of every size. For betas up to 0.5 torch interpolates from the gradient: equal bits in float32."""
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal(200).astype(dtype)}
    leaf = torch.from_numpy(params["w"].copy()).requires_grad_()
    ours, torchs = (
        optim.AdamW(params, betas=betas, eps=eps),
        torch.optim.AdamW([leaf], betas=betas, eps=eps, foreach=foreach),
    )
    M, V = np.zeros((2, 200))
    for _ in range(6):
        g = (rng.standard_normal(200) * 10.0 ** rng.uniform(-6, 4, 200)).astype(dtype)
        leaf.grad = torch.from_numpy(g.copy())
        ours.step({"w": g})
        torchs.step()
        M, V = betas[0] * M + (1 - betas[0]) * np.abs(g), betas[1] * V + (1 - betas[1]) * g.astype(np.float64) ** 2
        state = torchs.state[leaf]
        check("AdamW first moment", ours.m["w"], state["exp_avg"].numpy(), M)
        check("AdamW second moment", ours.v["w"], state["exp_avg_sq"].numpy(), V)
        if betas[0] in (0.0, 0.5) or (betas[0] < 0.5 and dtype == "float32"):
            check_exact("AdamW first moment", ours.m["w"], state["exp_avg"].numpy())
        if betas[1] == 0:
            check_exact("AdamW second moment", ours.v["w"], state["exp_avg_sq"].numpy())


def test_gradient_with_overflowing_square_matches_torch():
    """(1 - beta2) g² fits in float32, but g² overflows, and dividing by its root would not move the parameter."""
    params, g = {"w": np.ones(4, np.float32)}, np.full(4, 1e20, np.float32)
    leaf = torch.ones(4, requires_grad=True)
    leaf.grad = torch.from_numpy(g.copy())
    optim.AdamW(params).step({"w": g})
    torch.optim.AdamW([leaf]).step()
    check("AdamW large gradient", params["w"], leaf.detach().numpy(), 1.001)
    assert params["w"].max() < 0.9999


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, -0.1), (math.nan, 0.9), (0.9, math.inf)])
def test_betas_refused_by_torch_are_refused(betas):
    with pytest.raises(ValueError, match="Invalid beta"):
        torch.optim.AdamW([torch.ones(1)], betas=betas)
    with pytest.raises(InputError, match=f"^AdamW: betas must be at least 0 and below 1, not {re.escape(str(betas))}$"):
        optim.AdamW({"w": np.ones(1)}, betas=betas)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_moments_have_the_parameters_dtype(dtype):
    params = draw_params(0, dtype)
    ours = optim.AdamW(params)
    ours.step(draw_grads(np.random.default_rng(1), params))
    assert {a.dtype.name for name, a in ours.state().items() if name != "t"} == {dtype}


def test_parameter_with_a_new_layout_keeps_its_moments():
    """A parameter's array may be replaced by one of another layout than its moments."""
    rng = np.random.default_rng(0)
    params = {"w": np.asfortranarray(rng.standard_normal((7, 5)))}
    ours = optim.AdamW(params)
    params["w"] = np.ascontiguousarray(params["w"])
    ours.step({"w": rng.standard_normal((7, 5))})
    assert np.all(ours.m["w"] != 0)


@pytest.mark.parametrize("layout", ["C", "transposed", "gaps"])
def test_adamw_accepts_gradients_in_any_layout(layout):
    params, same = draw_params(0, "float64"), draw_params(0, "float64")
    grads = draw_grads(np.random.default_rng(1), params)
    ours, other = optim.AdamW(params), optim.AdamW(same)
    for _ in range(3):
        ours.step({name: arrange(g, layout) for name, g in grads.items()})
        other.step(grads)
    for name, p in params.items():
        check_exact(name, p, same[name])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda grads: grads.pop("one"), r"one has shape \(1,\), its gradient: no gradient"),
        (lambda grads: grads.update(bias=np.zeros(5)), r"bias has shape \(6,\), its gradient: \(5,\)"),
        (lambda grads: grads.update(weight=np.zeros((6, 4))), r"weight has shape \(4, 6\), its gradient: \(6, 4\)"),
    ],
)
def test_missing_or_misshapen_gradient_changes_nothing(spoil, message):
    params, same = draw_params(0, "float64"), draw_params(0, "float64")
    rng = np.random.default_rng(1)
    ours, other = optim.AdamW(params), optim.AdamW(same)
    for _ in range(3):
        grads = draw_grads(rng, params)
        bad = dict(grads)
        spoil(bad)
        before = {name: p.copy() for name, p in params.items()}
        with pytest.raises(ValueError, match=message):
            ours.step(bad)
        for name, p in params.items():
            check_exact(name, p, before[name])
        ours.step(grads)  # moments and step count ignore the bad call
        other.step(grads)
        for name, p in params.items():
            check_exact(name, p, same[name])


def side_by_side(*shapes):
    """Arrays that are consecutive parts of one piece of memory."""
    sizes = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(np.ones(sizes[-1]), sizes[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


TABLE, WIDE = np.ones((4, 3)), np.ones((4, 6))
CONSTANT = np.lib.stride_tricks.as_strided(np.ones(1), (4, 3), (0, 0))  # writable, unlike what broadcast_to returns
WINDOWS = np.lib.stride_tricks.sliding_window_view(np.ones(9), 3, writeable=True)


def read_only():
    a = np.ones((4, 3))
    a.setflags(write=False)
    return a


UNUSABLE = {  # parameters, and the error
    "one array twice": (
        {"a": TABLE, "x": np.ones(2), "b": TABLE},
        "a and b share memory: give each a separate array",
    ),
    "turned": ({"a": TABLE, "b": TABLE.T}, "a and b share memory"),
    "overlapping": ({"a": WIDE[:3], "x": np.ones(2), "b": WIDE[2:]}, "a and b share memory"),
    "within": ({"a": WIDE, "b": WIDE[1:2, 2:3]}, "a and b share memory"),
    "within, after another": ({"a": WIDE, "b": WIDE[3, 3:], "c": WIDE[0, 1:2]}, "a and c share memory"),
    "every third number": ({"a": WIDE[:, ::3], "b": WIDE[:, 3:]}, "a and b share memory"),
    "through a buffer": ({"a": TABLE, "b": np.frombuffer(TABLE)}, "a and b share memory"),
    "read-only": ({"x": np.ones(2), "a": read_only()}, "a is read-only: give a copy that can be written to"),
    "broadcast": ({"a": np.broadcast_to(1.0, (4, 3))}, "a is read-only"),
    "zero steps": ({"a": CONSTANT}, "elements of a share memory, as in a broadcast array: give a copy"),
    "windows": ({"a": WINDOWS}, "elements of a share memory"),
    "reversed windows": ({"a": WINDOWS[::-1, ::-1]}, "elements of a share memory"),
}
"""Parameters that cannot be updated in place."""


def foreign(a):
    """An array over a's memory that NumPy cannot trace back to it."""
    return np.ctypeslib.as_array(ctypes.cast(a.ctypes.data, ctypes.POINTER(ctypes.c_double)), a.shape)


@settings(max_examples=200)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    steps=st.lists(st.integers(-6, 12), min_size=3, max_size=3),
)
@example(shape=[2, 2], steps=[1, 1, 0])
@example(shape=[3, 2], steps=[1, 2, 0])
@example(shape=[1, 3], steps=[0, 1, 0])
@example(shape=[2], steps=[0, 0, 0])
def test_shared_elements_are_found(shape, steps):
    """By listing every address. Interleaved axes may be refused too; an axis of one element never is."""
    steps = steps[: len(shape)]
    a = np.lib.stride_tricks.as_strided(np.zeros(100)[40:], shape, [8 * step for step in steps])
    offsets = [int(np.dot(index, steps)) for index in np.ndindex(*shape)]
    if len(set(offsets)) < len(offsets):
        assert aliasing._overlaps_itself(a)
    reach, apart = 1, True
    for step, n in sorted((abs(step), n) for step, n in zip(steps, shape, strict=True) if n > 1):
        apart, reach = apart and step >= reach, step * n
    if apart:
        assert not aliasing._overlaps_itself(a)


def test_only_arrays_of_one_allocation_are_compared():
    """Memory from outside NumPy may be anywhere, so that then all are compared."""
    a, b, c = np.ones(3), np.ones((2, 2)), np.ones(4)
    with mock.patch.object(aliasing, "_check_piece") as compared:
        aliasing.check_updatable("x", {"a": a, "b": b}, {"c": c})
        assert compared.call_count == 0
        aliasing.check_updatable("x", {"a": a[:1], "b": b, "c": a[1:]})
        assert [[name for name, *_ in call.args[1]] for call in compared.call_args_list] == [["a", "c"]]
    for first, second in ((a, foreign(a)), (foreign(a), a)):
        with pytest.raises(InputError, match="share memory: give each a separate array"):
            aliasing.check_updatable("x", {"a": first, "b": b}, {"c": second})
    aliasing.check_updatable("x", {"a": a, "b": foreign(c)})


USABLE = {
    "columns of one array": [WIDE[:, :3], WIDE[:, 3:]],
    "alternate columns": [WIDE[:, ::2], WIDE[:, 1::2]],
    "side by side": side_by_side((4, 3), (2,), (5, 2)),
    "turned": [np.ones((4, 3)).T, np.ones((5, 4, 3)).transpose(1, 0, 2)],
    "reversed": [np.ones((4, 3))[::-1], np.ones((4, 3))[:, ::-2]],
    "rows with gaps": [np.ones((4, 6))[:, 1:4]],
    "empty and single": [
        np.ones((0, 3)),
        np.ones((4, 3))[:0],
        np.ones(()),
        np.ones((1, 1)),
        np.ones((3, 0, 2))[:, :, 1:],
    ],
    "one row, whatever its step": [np.lib.stride_tricks.as_strided(np.ones(3), (1, 3), (0, 8))],
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_parameters_are_named(case):
    params, message = UNUSABLE[case]
    before = {name: p.copy() for name, p in params.items()}
    with pytest.raises(InputError, match=f"^AdamW: {message}"):
        optim.AdamW(params)
    with pytest.raises(InputError, match=f"^clip_grad_norm: {message}"):
        optim.clip_grad_norm(params, 0.1)
    updated = {name: p.copy() for name, p in params.items()}
    ours = optim.AdamW(updated)
    ours.step(before)
    after = {name: p.copy() for name, p in updated.items()}
    updated.update(params)  # replaced later
    with pytest.raises(InputError, match=f"^AdamW: {message}"):
        ours.step(before)
    assert ours.t == 1
    for name, p in params.items():
        check_exact(name, p, before[name])
    updated.update(after)
    ours.step(before)
    assert ours.t == 2


@pytest.mark.parametrize("case", USABLE)
def test_parameters_in_shared_memory_are_updated_like_copies(case):
    params = {str(i): a for i, a in enumerate(USABLE[case])}
    same, rng = {name: a.copy() for name, a in params.items()}, np.random.default_rng(0)
    ours, other = optim.AdamW(params), optim.AdamW(same)
    for _ in range(2):
        grads = {name: rng.standard_normal(p.shape) for name, p in params.items()}
        ours.step(grads)
        other.step(grads)
    for name, p in params.items():
        check_exact(name, p, same[name])


def test_read_only_parameter_is_refused_before_any_change():
    params = draw_params(0, "float64")
    ours, grads = optim.AdamW(params), draw_grads(np.random.default_rng(1), params)
    ours.step(grads)
    state, before = {name: a.copy() for name, a in ours.state().items()}, {name: p.copy() for name, p in params.items()}
    params["one"].setflags(write=False)
    with pytest.raises(InputError, match=r"^AdamW: one is read-only"):
        ours.step(grads)
    for name, a in ours.state().items():
        check_exact(name, a, state[name])
    for name, p in params.items():
        check_exact(name, p, before[name])


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        (lambda p: {"a": p["a"], "b": np.ones((4, 3))}, "a and the gradient of a share memory"),
        (lambda p: {"a": p["b"], "b": np.ones((4, 3))}, "b and the gradient of a share memory"),
        (lambda p: {"a": np.ones((4, 3)), "b": p["b"][::-1]}, "b and the gradient of b share memory"),
        (lambda p: {"a": np.ones((4, 3)), "b": np.frombuffer(p["a"]).reshape(4, 3)}, "a and the gradient of b share"),
    ],
)
def test_gradient_in_a_parameters_memory_is_refused(grads, message):
    params = {"a": np.ones((4, 3)), "b": np.ones((4, 3))}
    ours = optim.AdamW(params)
    with pytest.raises(InputError, match=f"^AdamW: {message}"):
        ours.step(grads(params))
    assert ours.t == 0
    check_exact("a", params["a"], np.ones((4, 3)))


def test_gradients_are_only_read():
    """One array under two names, a broadcast array, a tensor's and one without a parameter all work."""
    params, same = ({"a": np.ones((4, 3)), "b": np.ones((4, 3))} for _ in range(2))
    ours, other = optim.AdamW(params), optim.AdamW(same)
    for g in (np.full((4, 3), 2.0), np.broadcast_to(2.0, (4, 3)), torch.full((4, 3), 2.0).double().numpy()):
        ours.step({"a": g, "b": g, "c": params["a"]})
        other.step({"a": np.full((4, 3), 2.0), "b": np.full((4, 3), 2.0)})
        check_exact("a", params["a"], same["a"])
        check_exact("b", params["b"], same["b"])


def test_memory_is_rechecked_only_if_it_may_be_shared(monkeypatch):
    calls = []
    monkeypatch.setattr(optim, "check_updatable", lambda *given: calls.append(given))
    params = {"a": np.ones((4, 3)), "b": np.ones(2)}
    ours = optim.AdamW(params)
    assert len(calls) == 1
    for _ in range(3):
        ours.step({name: np.ones(p.shape) for name, p in params.items()})
    assert len(calls) == 1
    foreign = {name: torch.ones(p.shape).double().numpy() for name, p in params.items()}
    ours.step(foreign)
    assert len(calls) == 2
    params |= {name: p.copy() for name, p in params.items()}
    for _ in range(2):
        ours.step({name: np.ones(p.shape) for name, p in params.items()})
    assert len(calls) == 3
    params |= foreign
    for _ in range(2):
        ours.step({name: np.ones(p.shape) for name, p in params.items()})
    assert len(calls) == 5


@pytest.mark.parametrize("array", [np.ones((4, 3), np.float32), np.ones((3, 4)), np.ones((4, 3), ">f8")])
def test_replacement_of_another_shape_or_dtype_is_refused(array):
    params = {"a": np.ones((4, 3)), "b": np.ones(2)}
    ours = optim.AdamW(params)
    params["b"], params["a"] = np.ones(2), array
    message = re.escape(
        f"AdamW: a is {array.dtype} {array.shape}, it was float64 (4, 3) at first: make another optimiser"
    )
    with pytest.raises(InputError, match=f"^{message}$"):
        ours.step({name: np.ones_like(p) for name, p in params.items()})
    assert ours.t == 0


def test_added_parameter_is_refused():
    params = {"a": np.ones((4, 3))}
    ours = optim.AdamW(params)
    params["b"] = np.ones(2)
    with pytest.raises(
        InputError, match=r"^AdamW: b is float64 \(2,\), it was missing at first: make another optimiser$"
    ):
        ours.step({name: np.ones_like(p) for name, p in params.items()})
    assert ours.t == 0
    check_exact("a", params["a"], np.ones((4, 3)))


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_gradient_of_another_dtype_is_refused(dtype):
    params = {"a": np.ones((4, 3)), "b": np.ones(2)}
    ours = optim.AdamW(params)
    message = f"^AdamW: b is float64, its gradient {np.dtype(dtype)}: use one dtype$"
    with pytest.raises(InputError, match=message):
        ours.step({"a": np.ones((4, 3)), "b": np.ones(2, dtype)})
    assert ours.t == 0
    check_exact("a", params["a"], np.ones((4, 3)))


def test_gradients_under_the_limit_may_share_memory():
    g = np.ones(4)
    norm = optim.clip_grad_norm({"a": g, "b": g}, 10.0)
    assert norm == pytest.approx(math.sqrt(8))
    optim.clip_grad_norm({"a": g, "b": g}, norm + 1e-6)  # a factor of exactly 1
    check_exact("a", g, np.ones(4))


@settings(max_examples=50)
@given(
    seed=SEEDS,
    dtype=st.sampled_from(("float64", "float32")),
    share=st.sampled_from((0.0, 1e-3, 0.5, 0.99, 1.0, 1.02, 50.0)),
    layout=st.sampled_from(("C", "transposed", "gaps")),
)
def test_clipping_matches_torch(seed, dtype, share, layout):
    check_clipping(seed, dtype, share, layout)


def test_gradients_of_zero_are_clipped_to_zero():
    grads = {"w": np.zeros((2, 3))}
    assert optim.clip_grad_norm(grads, 1.0) == 0
    check_exact("w", grads["w"], np.zeros((2, 3)))


def test_nan_gradient_spreads_as_in_torch():
    tensors = [torch.tensor([math.nan, 1.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)]
    for tensor in tensors:
        tensor.grad = tensor.detach().clone()
    clip_grad_norm_(tensors, 1.0)
    grads = {"a": np.array([np.nan, 1.0]), "b": np.array([2.0])}
    assert math.isnan(optim.clip_grad_norm(grads, 1.0))
    for name, tensor in zip(grads, tensors, strict=True):
        assert np.isnan(grads[name]).tolist() == torch.isnan(tensor.grad).tolist()


@settings(max_examples=40)
@given(peak=st.floats(1e-5, 1), warmup_steps=st.integers(0, 30), rest=st.integers(2, 60))  # below 2 torch has no cosine
@example(peak=4e-4, warmup_steps=0, rest=2)
def test_schedule_matches_torch(peak, warmup_steps, rest):
    check_schedule(peak, warmup_steps, warmup_steps + rest)


def test_schedule_at_its_limits():
    assert optim.warmup_cosine(0, 1.0, 4, 20) == 0.2
    assert optim.warmup_cosine(4, 1.0, 4, 20) == 1.0
    assert optim.warmup_cosine(2, 0.1, 2, 20) == 0.1, "exactly the peak, unlike 0.1 · 3 / 3"
    assert optim.warmup_cosine(19, 1.0, 4, 20) == pytest.approx(0.1, rel=1e-15)
    assert optim.warmup_cosine(500, 1.0, 4, 20) == pytest.approx(0.1, rel=1e-15), "a longer run stays at the floor"
    assert optim.warmup_cosine(0, 1.0, 0, 1) == 1.0
    assert optim.warmup_cosine(4, 1.0, 4, 5) == 1.0, "nothing is left for the cosine"


@pytest.mark.parametrize(("tied", "bias"), [(True, True), (False, True), (False, False)])
def test_training_runs_match_torch(tied, bias):
    check_trajectory(tied, bias)


@pytest.mark.slow
@settings(max_examples=50)
@given(tied=st.booleans(), bias=st.booleans(), seed=SEEDS)
def test_training_runs_match_torch_over_many_seeds(tied, bias, seed):
    check_trajectory(tied, bias, seed)


SCALARS = {
    "float64": np.float64,
    "0-d array": np.array,
    "float32": lambda x: np.float32(x) if float(np.float32(x)) == x else np.float64(x),
}


@pytest.mark.parametrize("scalar", SCALARS.values(), ids=list(SCALARS))
@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay"])
def test_numpy_scalars_give_the_same_updates(name, scalar):
    """As in torch: float32 parameters are updated in float32, even with a NumPy float64 scalar."""
    usual = {"lr": 4e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    value = tuple(map(scalar, usual[name])) if name == "betas" else scalar(usual[name])
    results = []
    for settings_ in (usual, usual | {name: value}):
        rng = np.random.default_rng(1)
        params = {"table": np.asarray(rng.standard_normal((50, 40)), np.float32), "bias": np.ones(99, np.float32)}
        ours = optim.AdamW(params, **settings_)
        for step in range(3):
            if name == "lr" and step:
                ours.lr = settings_["lr"]  # as a user's schedule does
            ours.step(draw_grads(rng, params))
        results.append(params)
    for key, want in results[0].items():
        check_exact(key, results[1][key], want)
    grads = [{"a": np.linspace(-3, 5, 1000, dtype=np.float32)} for _ in range(2)]
    norms = [optim.clip_grad_norm(g, max_norm) for g, max_norm in zip(grads, (0.7, scalar(0.7)), strict=True)]
    assert norms[0] == norms[1]
    check_exact("clipped", grads[1]["a"], grads[0]["a"])


@pytest.mark.parametrize("value", [-1.0, math.nan, "1", None, [0.1, 0.2], -math.inf], ids=repr)
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_unusable_settings_are_refused_before_a_step(name, value):
    """torch also refuses them at construction; here also when lr is changed later."""
    params = {"a": np.ones(3, np.float32)}
    with pytest.raises(InputError, match=f"^AdamW: {name} must be a number of at least 0, not "):
        optim.AdamW(params, **{name: value})
    ours = optim.AdamW(params)
    setattr(ours, name, value)
    with pytest.raises(InputError, match=f"^AdamW: {name} must be"):
        ours.step({"a": np.ones(3, np.float32)})
    assert ours.t == 0
    assert (params["a"] == 1).all()
    if isinstance(value, float):
        with pytest.raises(ValueError, match="Invalid"):
            torch.optim.AdamW([torch.zeros(1, requires_grad=True)], **{name: value})


@pytest.mark.parametrize(("put", "found"), [(None, "no gradient"), (1.0, "float"), ([1.0, 1.0, 1.0], "list")])
def test_what_is_no_array_is_named(put, found):
    params = {"a": np.ones(3), "b": np.ones(3)}
    ours = optim.AdamW(params)
    with pytest.raises(InputError, match=rf"^AdamW: b has shape \(3,\), its gradient: {found}$"):
        ours.step({"a": np.ones(3), "b": put})
    ours.step({"a": np.ones(3), "b": np.ones(3), "c": put})
    params["b"] = put
    with pytest.raises(InputError, match=f"^AdamW: b is {type(put).__name__}: give an array"):
        ours.step({"a": np.ones(3), "b": np.ones(3)})
    assert ours.t == 1


@pytest.mark.parametrize(
    "betas", [(0.9,), (0.9, 0.9, 0.9), 0.9, None, ("a", 0.9), (0.9, math.nan), (0.9, 1), (-0.1, 0.9)]
)
def test_unusable_betas_are_refused(betas):
    with pytest.raises(InputError, match=r"AdamW: .*betas"):
        optim.AdamW({"a": np.ones(3)}, betas=betas)


@pytest.mark.parametrize("kind", [int, bool, complex, object, list])
def test_non_float_parameters_are_refused(kind):
    found = "list" if kind is list else np.dtype(kind)
    with pytest.raises(InputError, match=rf"AdamW: a is {found}: give an array of floating-point numbers"):
        optim.AdamW({"a": [1.0] if kind is list else np.zeros(3, kind)})


@pytest.mark.parametrize("max_norm", [-1.0, math.nan, "1", None])
def test_unusable_norms_are_refused(max_norm):
    """A negative norm would reverse the gradients."""
    grads = {"a": np.ones(3)}
    with pytest.raises(InputError, match=r"^clip_grad_norm: max_norm must be a number of at least 0, not "):
        optim.clip_grad_norm(grads, max_norm)
    assert (grads["a"] == 1).all()


MAX = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("name", "array", "dtype", "words"),
    [
        ("t", np.array([1 << 53]), np.int64, None),
        ("t", np.array([7], np.uint8), np.int64, None),
        ("t", np.array([(1 << 53) + 1]), np.int64, f"t beyond 0 to {1 << 53}"),
        ("t", np.array([-1]), np.int64, f"t beyond 0 to {1 << 53}"),
        ("t", np.array([1.0]), np.int64, "t as float64"),
        ("t", np.array(["1"]), np.int64, "t as <U1"),
        ("m.w", np.array([MAX, -MAX], np.float32), np.float32, None),
        ("m.w", np.array([], np.float32), np.float32, None),
        ("m.w", np.array([np.inf], np.float32), np.float32, f"m.w beyond {-MAX} to {MAX}"),
        ("m.w", np.array([2 * MAX]), np.float32, f"m.w beyond {-MAX} to {MAX}"),
        ("m.w", np.array([1]), np.float32, "m.w as int64"),
        ("v.w", np.array([0.0]), np.float32, None),
        ("v.w", np.array([-1e-30]), np.float32, f"v.w beyond 0 to {MAX}"),
        ("v.w", np.array([math.nan]), np.float32, f"v.w beyond 0 to {MAX}"),
    ],
)
def test_state_is_checked_to_its_bounds(name, array, dtype, words):
    """t up to 2^53, which torch counts exactly; moments finite in the parameter's dtype; no negative square."""
    if words is None:
        check_state(name, array, np.dtype(dtype))
        return
    message = f"the optimiser's state has {words}: start from the model with --init"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_state(name, array, np.dtype(dtype))
