"""torch_gpt's decoding: the tokens of numpy_gpt's for the same seed, and distributions worked out one id at a time."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from numpy_gpt import Generator, GPTConfig, generate
from numpy_gpt.decoding import keep_top_p as numpys_keep_top_p
from parity_tests.judge import strategies
from parity_tests.judge.compare import check
from parity_tests.judge.decoding import TIES, fixed_logits_model, kept, probabilities
from parity_tests.judge.strategies import ModelCase
from torch_gpt.decoding import choose, keep_top_p, stream
from torch_gpt.model import from_params

CONFIG = GPTConfig(vocab_size=23, context_length=7, emb_dim=12, n_heads=3, n_layers=2, drop_rate=0.4, qkv_bias=True)
GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None}


def torch_generate(case, tokens, max_new_tokens, seed, **settings_):
    """numpy_gpt.generate's ids, from torch_gpt's model and stream; the model is left in training mode, with dropout."""
    model = from_params(case.config, case.params()).train()
    generator = torch.Generator().manual_seed(seed)
    columns = stream(model, torch.from_numpy(tokens), max_new_tokens, **settings_, generator=generator)
    return np.concatenate([tokens, *(column[:, None].numpy() for column in columns)], axis=1)


def check_same_tokens(case, max_new_tokens, seed, **settings_):
    tokens = case.batch()[0]
    want = generate(case.model(), tokens, max_new_tokens, **settings_, rng=Generator(seed))
    got = torch_generate(case, tokens, max_new_tokens, seed, **settings_)
    assert got.tolist() == want.tolist(), f"torch's ids {got.tolist()}, NumPy's {want.tolist()}"
    return want


SAMPLINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from((0.0, 1e-300, 0.7, 1.5, 1e300)),
        "top_k": st.none() | st.integers(1, 30),
        "top_p": st.none() | st.floats(1e-6, 1),
        "eos_id": st.none() | st.integers(0, 8),
        "n_vocab": st.none() | st.integers(1, 30),
    }
)


@settings(max_examples=80)
@given(
    case=strategies.model_cases(drop_rates=(0.0, 0.5), scales=st.sampled_from((0.3, 1.0))),
    max_new_tokens=st.integers(0, 16),
    seed=st.integers(-(2**63), 2**64 - 1),
    sampling=SAMPLINGS,
)
@example(ModelCase(CONFIG, B=3, T=11), 12, 7, {"temperature": 1.2, "top_k": 5, "top_p": 0.6})  # a long prompt
def test_ids_equal_numpys(case, max_new_tokens, seed, sampling):
    check_same_tokens(case, max_new_tokens, seed, **sampling)


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, {"temperature": 1.0}, {"temperature": 1.4, "top_k": 5}, {"temperature": 0.8, "top_p": 0.7}],
)
def test_ids_equal_numpys_in_float32(sampling):
    texts = {str(check_same_tokens(ModelCase(CONFIG, seed=1, dtype="float32"), 30, s, **sampling)) for s in range(5)}
    assert len(texts) == (1 if sampling is GREEDY else 5), "seeds must matter if tokens are drawn, and only then"


def test_rows_end_independently():
    """Rows that end are padded with the end token, and the step at which the last row ends is not yielded."""
    for seed in range(20):
        case = ModelCase(CONFIG, B=4, T=2)
        ids = check_same_tokens(case, 40, seed, temperature=1.0, eos_id=1, n_vocab=4)[:, 2:]
        ends = [row.tolist().index(1) if 1 in row else len(row) for row in ids]
        if len(set(ends)) == 4 and max(ends) == ids.shape[1] < 40:
            return
    pytest.fail("no seed ended all four rows at different steps")


def drawn_from(logits, monkeypatch, dtype="float64", **settings_):
    """The probabilities that choose draws from, for one row of logits (V,)."""
    seen = []

    def multinomial(probs, num_samples, *, generator):
        seen.append(probs.clone().numpy())
        return torch.zeros(len(probs), num_samples, dtype=torch.int64)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        rows = torch.tensor([logits, logits[::-1]], dtype=getattr(torch, dtype))
        choose(rows, **GREEDY | {"temperature": 1.0} | settings_, generator=None)
    ((p, _),) = seen
    assert p.dtype == dtype
    return p


def test_top_k_keeps_exactly_k_among_ties(monkeypatch):
    """The lower ids, as in NumPy."""
    for k, want in enumerate([[1], [1, 2], [1, 2, 4], [1, 2, 4, 6], [0, 1, 2, 4, 6], [0, 1, 2, 4, 5, 6]], start=1):
        assert kept(drawn_from(TIES, monkeypatch, top_k=k)) == want
    assert kept(drawn_from(TIES, monkeypatch, top_k=2**63 - 1)) == list(range(8))
    many = drawn_from([0.0, 1.0] * 2048, monkeypatch, top_k=3000)  # an unstable sort mixes up so many equals
    assert kept(many) == sorted([*range(1, 4096, 2), *range(0, 2 * 952, 2)])
    model = fixed_logits_model(TIES)
    column = next(stream(from_params(model.config, model.params), torch.zeros(2, 3, dtype=torch.int64), 1))
    assert column.tolist() == [1, 1], "greedy takes the lowest of equals"


@given(
    logits=st.lists(st.sampled_from((-3.0, 0.0, 0.5, 2.0)), min_size=2, max_size=12),
    temperature=st.sampled_from((0.2, 1.0, 3.0)),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.sampled_from((0.1, 0.37, 0.61, 0.93, 1.0)),
)
@example(logits=[1e4, -1e4, 0.0], temperature=0.01, top_k=None, top_p=None)
def test_probabilities_follow_the_definition(logits, temperature, top_k, top_p):
    with pytest.MonkeyPatch.context() as patch:
        p = drawn_from(logits, patch, temperature=temperature, top_k=top_k, top_p=top_p)
    want = probabilities(logits, temperature, top_k, top_p)
    exponents = np.abs(np.array(logits) - max(logits)) / temperature
    check("torch's probabilities", p, want, want * (1 + exponents) + np.finfo(np.float64).tiny)


def test_nucleus_ends_where_its_sum_reaches_p(monkeypatch):
    assert kept(drawn_from([0.0] * 4, monkeypatch, top_p=0.5)) == [0, 1]
    assert kept(drawn_from([0.0] * 4, monkeypatch, "float32", top_p=0.5 + 1e-9)) == [0, 1, 2]  # p is not rounded


def test_nucleus_of_a_large_vocabulary_equals_numpys():
    probs = np.random.default_rng(0).dirichlet(np.ones(50257), 2).astype(np.float32).round(6)  # with ties
    for p in (0.1, 0.5, 0.9, 0.99):
        assert np.array_equal(keep_top_p(torch.from_numpy(probs), p).numpy(), numpys_keep_top_p(probs, p))


def test_top_p_of_1_keeps_every_token(monkeypatch):
    """Rounded probabilities may sum to 1 before the last token."""
    logits = np.random.default_rng(3).normal(0, 12, 400).tolist()
    for dtype in ("float32", "float64"):
        assert np.array_equal(drawn_from(logits, monkeypatch, dtype, top_p=1.0), drawn_from(logits, monkeypatch, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_temperatures_have_their_limits(monkeypatch, dtype):
    for tiny in (5e-324, 1e-300, 1e-45):
        assert drawn_from([1.0, 2.0, -1e3, 2.0], monkeypatch, dtype, temperature=tiny).tolist() == [0, 0.5, 0, 0.5]
    for huge in (1e308, 1e300):
        assert drawn_from([1.0, 2.0, -1e3, 2.0], monkeypatch, dtype, temperature=huge).tolist() == [0.25] * 4


def test_tokens_are_generated_lazily_and_on_one_stream():
    """Two continuations from one generator are those of one Generator in NumPy: nothing is drawn in between."""
    case, generator, rng = ModelCase(CONFIG, B=1), torch.Generator().manual_seed(5), Generator(5)
    tokens = case.batch()[0]
    model = from_params(CONFIG, case.params())
    for _ in range(3):
        columns = islice(stream(model, torch.from_numpy(tokens), 10**9, 1.0, generator=generator), 4)
        want = generate(case.model(), tokens, 4, temperature=1.0, rng=rng)[0, -4:]
        assert [int(column) for column in columns] == want.tolist()
