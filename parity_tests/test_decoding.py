"""Generation against a plain loop over model(tokens) without a cache, and against torch's draws."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from numpy_gpt import GPT, Generator, GPTConfig, generate
from numpy_gpt.block import KVCache
from numpy_gpt.decoding import Sampling, at_temperature, keep_top_p, softmax, stream
from numpy_gpt.errors import InputError
from numpy_gpt.parameters import parameter_shapes
from parity_tests.judge import strategies
from parity_tests.judge.compare import check, check_exact
from parity_tests.judge.decoding import (
    GREEDY,
    SAMPLINGS,
    TIES,
    Draws,
    check_generate,
    check_ties,
    drawn_from,
    fixed_logits_model,
    kept,
    probabilities,
)
from parity_tests.judge.strategies import ModelCase
from torch_gpt.model import from_params

CONFIG = GPTConfig(vocab_size=23, context_length=7, emb_dim=12, n_heads=3, n_layers=2, drop_rate=0.4, qkv_bias=True)


@settings(max_examples=80)
@given(
    case=strategies.model_cases(drop_rates=(0.0, 0.5), scales=st.sampled_from((0.1, 0.3, 1.0))),
    max_new_tokens=st.integers(0, 16),
    sampling=st.sampled_from(SAMPLINGS),
)
@example(case=ModelCase(CONFIG, B=3, T=5), max_new_tokens=12, sampling=GREEDY)
@example(case=ModelCase(CONFIG, B=3, T=11), max_new_tokens=3, sampling=SAMPLINGS[2])  # a prompt over the context
@example(case=ModelCase(CONFIG, B=1, T=7), max_new_tokens=1, sampling=SAMPLINGS[1])  # exactly full
def test_generate_matches_loop_without_cache(case, max_new_tokens, sampling):
    check_generate(case, max_new_tokens, sampling)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLINGS[4]])
def test_generate_matches_loop_without_cache_on_long_text(sampling):
    """A cache with more rows than one block of work holds, then past its end."""
    config = GPTConfig(101, 140, 32, 4, 2, 0.0, tie_weights=True)
    check_generate(ModelCase(config, B=2, T=60, scale=0.3), 90, sampling)


def torch_generate(reference, tokens, max_new_tokens, temperature=0.0, top_k=None):
    """The book's generate in torch: crop, top-k by comparison, softmax of logits / temperature, torch.multinomial."""
    ids, context = torch.from_numpy(tokens), reference.config.context_length
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = reference.eval()(ids[:, -context:])[:, -1]
        if top_k is not None:
            logits = logits.masked_fill(logits < torch.topk(logits, top_k).values[:, -1:], -torch.inf)
        if temperature > 0:
            chosen = torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)
        else:
            chosen = logits.argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, chosen], dim=1)
    return ids.numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, None), (1.0, None), (1.4, 5), (0.5, 2)])
def test_generated_text_matches_torch(temperature, top_k, B, dtype):
    """For each seed, the ids equal torch.manual_seed and torch.multinomial's, also past the context length."""
    for seed in range(5):
        case = ModelCase(CONFIG, B=B, T=4, seed=seed, dtype=dtype)
        tokens = case.batch()[0]
        torch.manual_seed(seed)
        want = torch_generate(from_params(CONFIG, case.params()), tokens, 15, temperature, top_k)
        got = generate(case.model(), tokens, 15, temperature=temperature, top_k=top_k, rng=Generator(seed))
        assert got.tolist() == want.tolist()


# Chosen distributions


def test_top_k_keeps_exactly_k_among_ties():
    check_ties()


@settings(max_examples=50)
@given(
    logits=st.lists(st.floats(-20, 20), min_size=2, max_size=12),
    temperature=st.sampled_from((0.2, 1.0, 3.0)),
    top_k=st.none() | st.integers(1, 12),
)
@example(logits=[1e4, -1e4, 0.0], temperature=0.01, top_k=None)
def test_probabilities_are_softmax_of_logits_over_temperature(logits, temperature, top_k):
    p = drawn_from(logits, temperature=temperature, top_k=top_k)
    want = probabilities(logits, temperature, top_k, None)
    exponents = np.abs(np.array(logits) - max(logits)) / temperature
    check("temperature: probabilities", p, want, want * (1 + exponents) + np.finfo(np.float64).tiny)


@settings(max_examples=100)
@given(
    logits=st.lists(st.floats(-8, 8), min_size=2, max_size=12, unique=True),
    top_p=st.floats(1e-6, 1),
    dtype=st.sampled_from(("float32", "float64")),
)
def test_top_p_keeps_the_smallest_nucleus(logits, top_p, dtype):
    """Kept tokens are the likeliest; they hold p, but not without the last; their ratios are unchanged."""
    full, p = drawn_from(logits, dtype), drawn_from(logits, dtype, top_p=top_p)
    inside = p > 0
    slack = 64 * np.finfo(dtype).eps
    assert inside[full.argmax()], "the likeliest stays"
    assert full[inside].min() >= full[~inside].max(initial=0), "the nucleus is the likeliest part"
    assert full[inside].sum(dtype=np.float64) >= top_p - slack, "it holds p"
    assert full[inside].sum(dtype=np.float64) - full[inside].min() < top_p + slack, "and no token more"
    check("top_p: kept probabilities are rescaled", p[inside], full[inside] / full[inside].sum(), p[inside])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_top_p_of_1_keeps_the_distribution(dtype):
    """A running sum of many rounded probabilities can reach 1 early, so it must not decide here."""
    for seed in range(8):
        logits = 2 * np.random.default_rng(seed).standard_normal(50257)
        p, full = drawn_from(logits, dtype, top_p=1.0), drawn_from(logits, dtype)
        dropped = int(((p == 0) & (full > 0)).sum())
        assert not dropped, f"top_p 1 drops {dropped} tokens that hold {full[p == 0].sum():.3g}"
        check("top_p of 1", p, full, full)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scalar", [np.float32, np.float64])
def test_numpy_scalar_temperature_equals_python_float(scalar, dtype):
    """The probabilities keep the model's dtype and equal torch's for the same Python float."""
    logits, temperature = np.random.default_rng(0).standard_normal(50), scalar(0.7)
    p = drawn_from(logits, dtype, temperature=temperature)
    check_exact("probabilities", p, drawn_from(logits, dtype, temperature=float(temperature)))
    want = torch.softmax(torch.from_numpy(logits.astype(dtype)) / float(temperature), dim=-1).numpy()
    check("probabilities", p, want, want * (1 + np.abs(logits).max() / 0.7))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-40, 1e-39, 1e-30, 1e38, 1e39, 1e300, 1.7e308])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("logits", [[3.0, -2.5, 3.0, 0.0], [-1e4, 5.0, 4.5, 1e4], [0.0, 0.0, 0.0, 0.0]])
def test_extreme_temperatures_tend_to_greedy_and_to_uniform(logits, top_k, temperature, dtype):
    """Judged in fractions, which neither overflow nor underflow. Equally likely tokens share the mass."""
    p = drawn_from(logits, dtype, temperature=temperature, top_k=top_k)
    kept_ids = sorted(range(4), key=lambda v: (-logits[v], v))[:top_k]
    exponents = [Fraction(x - max(logits)) / Fraction(temperature) for x in logits]
    weights = [math.exp(max(exponents[v], -1000)) if v in kept_ids else 0.0 for v in range(4)]
    check("probabilities", p, (np.array(weights) / sum(weights)).astype(dtype), np.ones(4))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("temperature", [5e-324, 1e-40])
def test_tiny_temperature_is_greedy(temperature, dtype):
    model = ModelCase(CONFIG, dtype=dtype).model()
    drawn = generate(model, [[1, 2, 3]], 9, temperature=temperature, top_k=3, top_p=0.5, rng=Generator(1))
    check_exact("ids", drawn, generate(model, [[1, 2, 3]], 9))


def test_top_p_applies_after_temperature_and_top_k():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept(drawn_from(logits, top_p=0.65)) == [0, 1]
    assert kept(drawn_from(logits, top_p=0.65, temperature=100.0)) == [0, 1, 2]  # nearly uniform
    assert kept(drawn_from(logits, top_p=0.65, top_k=2)) == [0, 1]  # 4/7, then 1
    assert kept(drawn_from(logits, top_p=0.55, top_k=2)) == [0]


def test_softmax_rows_are_independent():
    """A row's softmax does not depend on the size of another row's logits."""
    p = softmax(np.array([[0.0, 1.0, -1.0], [-1e4, -1e4 + 2, -1e4]]))
    want = torch.softmax(torch.tensor([[0.0, 1.0, -1.0], [0.0, 2.0, 0.0]], dtype=torch.float64), dim=-1).numpy()
    check("softmax", p, want, 1 + 2.0)


def test_full_nucleus_takes_no_more():
    """0.5 and 0.25 hold exactly p = 0.75: the next token stays out."""
    p = np.array([[0.25, 0.125, 0.5, 0.125], [0.5, 0.5, 0.0, 0.0]])
    check_exact("nucleus of 0.75", keep_top_p(p, 0.75), np.array([[0.25, 0, 0.5, 0], [0.5, 0.5, 0, 0]]))
    check_exact("nucleus of 0.5", keep_top_p(p, 0.5), np.array([[0, 0, 0.5, 0], [0.5, 0, 0, 0]]))


@pytest.mark.parametrize("seed", range(20))
def test_nucleus_size_at_and_just_above_a_running_sum(seed):
    """If p is the running sum of the first k tokens, k are kept; for the next larger p, k + 1."""
    p = np.random.default_rng(seed).dirichlet(np.ones(12))
    mass = 0.0
    for k, share in enumerate(sorted(p.tolist(), reverse=True)[:-2], start=1):
        mass += share
        for top_p, count in ((mass, k), (math.nextafter(mass, 1), k + 1)):
            got = int(np.count_nonzero(keep_top_p(p[None], top_p)))
            assert got == count, f"top_p {top_p!r} keeps {got} tokens, {k} hold {mass!r}"


def test_nucleus_is_summed_in_float64():
    """In float32 a running sum of 2^17 equal terms would be off by hundreds of them."""
    V = 2**17
    p = np.full((1, V), 1 / (V - 1), np.float32)
    mass, count = 0.0, 0
    while mass < 0.7:
        mass, count = mass + float(p[0, 0]), count + 1
    assert np.count_nonzero(keep_top_p(p, 0.7)) == count


def test_cache_is_used_until_the_context_is_full(monkeypatch):
    """One new position per token while there is room; then the window slides and is recomputed."""
    read, real = [], GPT.next_logits
    monkeypatch.setattr(GPT, "next_logits", lambda self, ids, past: read.append(ids.shape[1]) or real(self, ids, past))
    generate(ModelCase(CONFIG).model(), [[1, 2, 3]], 8)
    assert read == [3, 1, 1, 1, 1, 7, 7, 7]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_probabilities_have_the_models_dtype(dtype, monkeypatch):
    """Also past the context length, where the cache is rebuilt; its keys and values have that dtype too."""
    rng, cached, real = Draws(), [], KVCache.extend
    monkeypatch.setattr(KVCache, "extend", lambda *args: cached.append(real(*args)) or cached[-1])
    generate(ModelCase(CONFIG, dtype=dtype).model(), [[1, 2, 3]], 9, temperature=1.0, top_p=0.9, rng=rng)
    assert {p.dtype.name for p in rng.seen} == {dtype}
    assert {a.dtype.name for kv in cached for a in kv} == {dtype}


@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_generated_ids_are_int64(dtype, new):
    got = generate(ModelCase(CONFIG).model(), np.array([[1, 2]], dtype), new)
    assert (got.dtype, got.shape) == (np.int64, (1, 2 + new))


def test_next_logits_needs_room_in_the_cache():
    model = ModelCase(CONFIG).model()
    past = KVCache(CONFIG, 1, np.float64)
    model.next_logits([[1, 2, 3, 4, 5]], past)
    message = "tokens: T = 3 is over the 2 positions left of context_length 7: shorten the input"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        model.next_logits([[1, 2, 3]], past)


def test_greedy_takes_the_lowest_tied_id_without_rng():
    assert generate(fixed_logits_model(TIES), [[0], [5]], 3).tolist() == [[0, 1, 1, 1], [5, 1, 1, 1]]


# Where a text ends


def chain_model(following):
    """A model that always follows token v with token following[v]."""
    V = len(following)
    config = GPTConfig(V, 3, V, 1, 1, 0.0)
    params = {name: np.zeros(shape) for name, shape in parameter_shapes(config).items()}
    params["tok_emb.weight"][:] = np.eye(V)
    params["final_norm.scale"][:] = 1
    for v, after in enumerate(following):
        params["out_head.weight"][after, v] = 1
    return GPT.from_params(config, params)


CHAIN = [1, 2, 3, 4, 5, 0]


def check_eos():
    """Assert that each row ends separately and is padded, and that the last row's end token is not appended."""
    model = chain_model(CHAIN)
    for tokens, max_new_tokens, want in [
        ([[0]], 10, [[0, 1, 2]]),
        ([[2]], 10, [[2]]),
        ([[0], [2]], 10, [[0, 1, 2], [2, 3, 3]]),
        ([[1], [0], [2]], 10, [[1, 2, 3], [0, 1, 2], [2, 3, 3]]),
        ([[2], [2]], 10, [[2], [2]]),
        ([[3, 0], [3, 3]], 3, [[3, 0, 1, 2, 3], [3, 3, 4, 5, 0]]),  # an end token in the prompt ends nothing
    ]:
        got = generate(model, tokens, max_new_tokens, eos_id=3).tolist()
        assert got == want, f"eos: {tokens} became {got}, should become {want}"


def test_rows_end_at_eos_independently():
    check_eos()


def test_without_eos_text_continues_past_the_context():
    assert generate(chain_model(CHAIN), [[3]], 7).tolist() == [[3, 4, 5, 0, 1, 2, 3, 4]]
    assert generate(chain_model(CHAIN), [[3]], 7, eos_id=99).tolist() == [[3, 4, 5, 0, 1, 2, 3, 4]]


def test_zero_new_tokens_returns_the_prompt():
    got = generate(chain_model(CHAIN), [[3, 4]], 0)
    assert got.tolist() == [[3, 4]]
    assert got.dtype == np.int64


def test_stream_yields_generates_tokens():
    case = ModelCase(CONFIG, B=2, T=3)
    tokens = case.batch()[0]
    columns = list(stream(case.model(), tokens, 9, Sampling(1.0, rng=Generator(3))))
    whole = generate(case.model(), tokens, 9, temperature=1.0, rng=Generator(3))
    assert [column.tolist() for column in columns] == whole[:, 3:].T.tolist()
    first = next(stream(case.model(), tokens, 10**9))  # tokens are generated lazily
    assert first.tolist() == generate(case.model(), tokens, 1)[:, -1].tolist()


def test_seed_determines_the_text():
    model, tokens = ModelCase(CONFIG).model(), [[1, 2, 3]]
    texts = [generate(model, tokens, 20, temperature=2.0, rng=Generator(seed)).tolist() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, not -1"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens must be a whole number, not 2\.5"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number, not None"),
        ({"eos_id": "2"}, "eos_id must be a whole number, not '2'"),
        ({"eos_id": 2.5}, r"eos_id must be a whole number, not 2\.5"),
        ({"n_vocab": 2.0}, r"n_vocab must be a whole number, not 2\.0"),
        ({"n_vocab": 0}, "n_vocab must be at least 1, not 0"),
        ({"top_k": 2.0}, r"top_k must be a whole number, not 2\.0"),
        ({"temperature": 1.0, "top_k": 2.0, "rng": Draws()}, r"top_k must be a whole number, not 2\.0"),
        ({"temperature": "1"}, "temperature must be a number, not '1'"),
        ({"temperature": None}, "temperature must be a number, not None"),
        ({"temperature": np.array([0.5])}, "temperature must be a number, not array"),
        ({"temperature": 1.0, "top_p": "0.5", "rng": Draws()}, "top_p must be a number, not '0.5'"),
        ({"temperature": -0.5}, r"temperature must be 0 .* not -0\.5"),
        ({"temperature": math.nan}, "temperature must be .* not nan"),
        ({"temperature": math.inf}, "temperature must be .* not inf"),
        ({"temperature": 1.0}, r"temperature 1\.0 draws at random: give rng"),
        ({"temperature": 1.0, "top_k": 0, "rng": Draws()}, "top_k must be at least 1, not 0"),
        ({"temperature": 1.0, "top_p": 0.0, "rng": Draws()}, r"top_p .* not 0\.0"),
        ({"temperature": 1.0, "top_p": 1.1, "rng": Draws()}, r"top_p .* not 1\.1"),
        ({"temperature": 1.0, "top_p": math.nan, "rng": Draws()}, "top_p .* not nan"),
    ],
)
def test_invalid_settings_are_named(settings_, message):
    with pytest.raises(InputError, match=message):
        generate(ModelCase(CONFIG).model(), [[1]], **{"max_new_tokens": 3} | settings_)


@pytest.mark.parametrize("max_new_tokens", [0, 1])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, 23]], "id 23 is outside the vocabulary of 23"),
        ([[-1]], "id -1 is outside the vocabulary of 23"),
        ([[23, 0, 0, 0, 0, 0, 0, 0]], "id 23 is outside the vocabulary"),  # even if cropped away
        ([0, 1], "tokens must be a non-empty"),
        ([[0.5]], "tokens must be a non-empty .* whole numbers"),
        (np.zeros((1, 0), int), "tokens must be a non-empty"),
        (np.zeros((0, 1), int), "tokens must be a non-empty"),
    ],
)
def test_invalid_tokens_are_refused(tokens, message, max_new_tokens):
    with pytest.raises(InputError, match=message):
        generate(ModelCase(CONFIG).model(), tokens, max_new_tokens)


@pytest.mark.parametrize(("dtype", "temperature"), [(np.float32, 1e-20), (np.float64, 1e-300)])
def test_rows_far_apart_do_not_disturb_one_another(dtype, temperature):
    """Divided by the temperature, the first row overflows to −inf and the second does not."""
    logits = np.array([[-1e30, -2e30], [0, 1]], dtype)
    check_exact("probabilities", at_temperature(logits, temperature), np.array([[1, 0], [0, 1]], dtype))
    check_exact("probabilities", at_temperature(-logits[:1], temperature), np.array([[0, 1]], dtype))


def test_nucleus_of_equal_probabilities_keeps_the_lowest_ids():
    """Two sizes in turn, the larger ones enough: an unstable sort mixes ids up among so many equals."""
    probs = np.full((3, 4096), 1 / 8192)
    probs[:, ::2] = 3 / 8192
    check_exact("nucleus", keep_top_p(probs, 0.375), np.where((np.arange(4096) < 2048) & (probs > 2 / 8192), probs, 0))


def test_one_token_and_a_whole_float_as_end_are_allowed():
    model = chain_model(CHAIN)
    assert generate(model, [[0]], 3, n_vocab=1).tolist() == [[0] * 4]
    assert generate(model, [[3]], 7, eos_id=1.0).tolist() == generate(model, [[3]], 7, eos_id=1).tolist()
