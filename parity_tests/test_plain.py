"""The textbook: plain.py under the fast path's strategies and budgets, against torch and against the fast path.

The checks are the fast path's, with plain.py's functions in place of numpy_gpt.ops' and with cases that build their
model from them. The used shares of the budgets are printed under separate headings.
"""

import inspect
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from numpy_gpt import GPT, Generator, GPTConfig, generate, plain
from numpy_gpt.block import Dropout
from parity_tests.judge import compare, strategies
from parity_tests.judge.compare import check, check_exact, recorded_for
from parity_tests.judge.models import (
    DROP_RATES,
    SMALL,
    VARIANTS,
    RecordedMasks,
    check_float32,
    check_gradients,
    check_loss,
    check_model,
    check_own_masks,
    dropout_factors,
    float32_case,
    reject_cancelled,
    torch_logits,
)
from parity_tests.judge.operations import OPERATIONS, check_operation, check_tensor, in_place, names, our_answer
from parity_tests.judge.strategies import SEEDS, ModelCase, OperationCase
from parity_tests.judge.training import check_adamw, check_trajectory
from torch_gpt.model import from_params


class PlainModel:
    """plain.py's functions behind GPT's methods, so that one check serves both."""

    def __init__(self, config, params):
        self.config, self.params = config, params

    def __call__(self, tokens):
        return plain.forward(self.params, tokens, self.config)

    def loss(self, tokens, targets):
        return plain.cross_entropy_forward(self(tokens), targets)[0]

    def loss_and_grads(self, tokens, targets, rng=None):
        masks = None if rng is None else self._masks(*tokens.shape, rng)
        return plain.loss_and_grads(self.params, tokens, targets, self.config, masks)

    def _masks(self, B, T, rng):
        """Masks with the fast path's shapes, in its order."""
        x, p = (B, T, self.config.emb_dim), (B, self.config.n_heads, T, T)
        drop = Dropout(self.config.drop_rate, rng, self.params["tok_emb.weight"].dtype)
        return [drop.mask(shape) for shape in [x] + self.config.n_layers * [p, x, x]]


@dataclass(frozen=True)
class PlainCase(ModelCase):
    """A case that tests the textbook's model."""

    def over(self, params):
        return PlainModel(self.config, params)


class PlainAdamW:
    """adamw_step with AdamW's state and methods."""

    def __init__(self, params, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8):
        assert (betas, eps) == ((0.9, 0.999), 1e-8), "the textbook supports only these"
        self.params, self.lr, self.weight_decay, self.t = params, lr, weight_decay, 0
        self.m, self.v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))

    def step(self, grads):
        self.t += 1
        plain.adamw_step(self.params, grads, self.m, self.v, self.t, self.lr, self.weight_decay)


@pytest.fixture(autouse=True)
def _headings_of_its_own():
    with recorded_for("plain.py"):
        yield


def plain_cases(**keys):
    """Model cases for the textbook."""
    return strategies.model_cases(**keys).map(lambda case: PlainCase(**vars(case)))


def plain_functions():
    """plain.py's functions that have a fast twin."""
    return {name: getattr(plain, name) for name in names()}


def check_plain(operation, case):
    """Compare the plain operation with torch, then the fast operation with it, within the same budget."""
    __tracebackhide__ = True
    with in_place(plain_functions()):
        check_operation(operation, case)
        inputs = OPERATIONS[operation].inputs(case)
        twin = our_answer(operation, inputs)
    fast, scales = our_answer(operation, inputs), OPERATIONS[operation].scales(**inputs)
    assert fast.keys() == twin.keys()
    for tensor, answer in fast.items():
        check_tensor(f"{operation}.{tensor}, fast and plain", answer, np.asarray(twin[tensor]), scales[tensor])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_matches_torch_and_its_fast_twin(operation, dtype):
    @settings(max_examples=50)
    @given(case=OPERATIONS[operation].cases(dtype))
    def holds(case):
        check_plain(operation, case)

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=500)
@given(data=st.data())
def test_operation_matches_torch_and_its_fast_twin_over_many_cases(operation, dtype, data):
    check_plain(operation, data.draw(OPERATIONS[operation].cases(dtype)))


@pytest.mark.parametrize(("operation", "case"), strategies.LARGE)
def test_larger_shapes_match_torch_and_the_fast_twin(operation, case):
    check_plain(operation, case)


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_memory_layout_matches_torch_and_the_fast_twin(operation, layout):
    axes = ("B", "T", "C", "I", "O", "V", "NH", "HS", "past", "start", "rest")
    check_plain(operation, OperationCase(dict.fromkeys(axes, 3), layout=layout, options={"rate": 0.5}))


def test_constant_rows_normalise_to_the_shift():
    """However large the numbers: the mean has no rounding error for rstd to enlarge."""
    x = np.array([[1e6 / 3], [0.1], [-7e5 / 11], [1e5 / 7]]) * np.ones(13)
    y, _ = plain.layernorm_forward(x, np.ones(13), np.full(13, 2.5))
    check("layernorm.y of equal numbers", y, np.full(x.shape, 2.5), 2.5)


@pytest.mark.parametrize("name", sorted(names()))
def test_twins_take_the_same_arguments(name):
    """Fast functions may have further parameters with defaults: arrays to write into."""
    fast = inspect.signature(getattr(names()[name][0], name)).parameters
    own = inspect.signature(getattr(plain, name)).parameters
    assert list(own) == list(fast)[: len(own)]
    assert all(fast[extra].default is not inspect.Parameter.empty for extra in list(fast)[len(own) :])


@pytest.mark.parametrize(("tied", "bias"), VARIANTS)
def test_model_matches_torch(tied, bias):
    @settings(max_examples=25)
    @given(case=plain_cases(tie_weights=tied, qkv_bias=bias, drop_rates=(0.0, *DROP_RATES)))
    def holds(case):
        check_model(case)

    holds()


@settings(max_examples=25)
@given(case=plain_cases(drop_rates=(0.0, 0.5), fills=strategies.MODEL_FILLS[1:]))
@example(PlainCase(GPTConfig(2, 7, 12, 2, 1, 0.0), B=1, T=3, scale=1.5130967698889795, fill="constant rows"))
def test_model_matches_torch_at_extremes(case):
    check_model(case)


@pytest.mark.slow
@settings(max_examples=500)
@given(case=plain_cases(drop_rates=(0.0, *DROP_RATES), fills=strategies.MODEL_FILLS))
def test_model_matches_torch_over_many_cases(case):
    check_model(case)


@settings(max_examples=15)
@given(case=plain_cases(drop_rates=(0.1, 0.5)))
def test_logits_with_masks_match_torch(case):
    """Masks are given in order of use."""
    rng, config = RecordedMasks(case.seed), case.config
    case.model().loss_and_grads(*case.batch(), rng)
    factors = dropout_factors(case, rng.drawn)
    want = torch_logits(from_params(config, case.params(), attention="plain"), case.batch()[0], factors)
    got = plain.forward(case.params(), case.batch()[0], config, factors)
    check("logits with dropout", got, want, float(np.abs(want).max()), compare.MODEL)


@settings(max_examples=15)
@given(case=plain_cases(drop_rates=(0.1,)))
def test_seeded_dropout_matches_torch(case):
    check_own_masks(case, "plain")


@pytest.mark.parametrize("drop_rate", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_float32_is_no_worse_than_torch(drop_rate):
    """On the fast path's cases: at least 64 per tensor kind."""
    cases = [PlainCase(**vars(float32_case(i, drop_rate=drop_rate))) for i in range(128)]
    check_float32(cases, f"dropout {drop_rate:g}, weights <= 1")


@pytest.mark.parametrize(("tied", "bias"), VARIANTS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_model_matches_the_fast_twin(tied, bias, dtype):
    """Loss and gradients of one batch with dropout. No gradient shares memory with another or with a parameter."""
    config = replace(SMALL, tie_weights=tied, qkv_bias=bias, drop_rate=0.3)
    case = PlainCase(config, B=3, T=6, dtype=dtype)
    model, fast = case.model(), GPT.from_params(config, case.params())
    want, want_grads = fast.loss_and_grads(*case.batch(), Generator(1))
    loss, grads = model.loss_and_grads(*case.batch(), Generator(1))
    check_loss("loss, fast and plain", loss, want, model(case.batch()[0]))
    reject_cancelled(case, model(case.batch()[0]), case.batch()[1], want_grads)
    check_gradients(grads, want_grads)
    assert np.asarray(loss).dtype == model(case.batch()[0]).dtype == dtype
    arrays = [*model.params.values(), *grads.values()]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


@settings(max_examples=25)
@given(case=plain_cases(), max_new_tokens=st.integers(0, 9))
@example(case=PlainCase(SMALL, seed=1), max_new_tokens=0)
def test_generate_matches_torch_and_the_fast_path(case, max_new_tokens):
    """Also beyond the context, with a prompt longer than it, and with ids of another integer type."""
    (tokens, _), params = case.batch(), case.params()
    prompt = np.concatenate([tokens, tokens], axis=1).astype(np.int32) if case.seed % 2 else tokens
    reference, ids = from_params(case.config, params).eval(), torch.from_numpy(prompt.astype(np.int64))
    for _ in range(max_new_tokens):
        with torch.no_grad():
            likeliest = reference(ids[:, -case.config.context_length :])[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, likeliest], dim=1)
    kept = prompt.copy()
    got = plain.generate(params, prompt, max_new_tokens, case.config)
    check_exact("ids", got, ids.numpy())
    check_exact("ids", got, generate(GPT.from_params(case.config, params), prompt, max_new_tokens))
    check_exact("tokens, after generate", prompt, kept)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_adamw_matches_torch(dtype):
    @settings(max_examples=15)
    @given(
        seed=SEEDS,
        layout=st.sampled_from(strategies.LAYOUTS),
        weight_decay=st.sampled_from((0.0, 0.01, 0.1, 1.0)),
    )
    def holds(**case):
        check_adamw(dtype=dtype, optimizer=PlainAdamW, **case)

    holds()


def test_adamw_has_torchs_defaults():
    p, g = np.array([1.0, -2.0]), np.array([3.0, 0.5])
    leaf, params = torch.from_numpy(p.copy()).requires_grad_(), {"p": p}
    leaf.grad = torch.from_numpy(g)
    torch.optim.AdamW([leaf]).step()
    plain.adamw_step(params, {"p": g}, {"p": np.zeros(2)}, {"p": np.zeros(2)}, 1)
    check("AdamW, its defaults", params["p"], leaf.detach().numpy(), 2.0)


@pytest.mark.parametrize("tied", [True, False])
def test_training_runs_match_torch(tied):
    check_trajectory(tied, make_case=PlainCase, optimizer=PlainAdamW)


def test_summary_has_separate_headings():
    check_plain("gelu", OperationCase({"B": 1, "T": 2, "C": 3}))
    assert any(line.startswith("plain.py: one operation, float64") for line in compare.summary())
