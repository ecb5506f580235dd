"""Checks of decoding against a naive loop without a cache."""

import math

import numpy as np

from numpy_gpt import GPT, GPTConfig, generate
from numpy_gpt.parameters import parameter_shapes
from parity_tests.judge import compare
from parity_tests.judge.compare import check, check_exact

GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None}


class Draws:
    """A stand-in for Generator: keeps the probabilities it draws from, and draws from a NumPy stream."""

    def __init__(self, seed=0):
        self._rng, self.seen = np.random.default_rng(seed), []

    def multinomial(self, p):
        self.seen.append(p.copy())
        return np.array([[pick(row, u)] for row, u in zip(p, self._rng.random(len(p)), strict=True)])


def pick(probs, u):
    """The first id at which the cumulative probability exceeds u."""
    mass = 0.0
    for i, p in enumerate(probs):
        mass += float(p)
        if mass > u:
            return i
    return int(np.flatnonzero(probs)[-1])


def probabilities(logits, temperature, top_k, top_p):
    """One row's distribution, following generate's docstring one id at a time."""
    row = [float(z) for z in logits]
    likeliest_first = sorted(range(len(row)), key=lambda v: (-row[v], v))[:top_k]
    weights = {v: math.exp((row[v] - row[likeliest_first[0]]) / temperature) for v in likeliest_first}
    probs = {v: weight / sum(weights.values()) for v, weight in weights.items()}
    if top_p is not None and top_p < 1:
        nucleus, mass = {}, 0.0
        for v in likeliest_first:
            if mass >= top_p:
                break
            nucleus[v], mass = probs[v], mass + probs[v]
        probs = {v: p / mass for v, p in nucleus.items()}
    return np.array([probs.get(v, 0.0) for v in range(len(row))])


def naive(model, tokens, max_new_tokens, rng, temperature, top_k, top_p):
    """The book's loop: crop, rerun the model, take the last position's logits, append."""
    ids, seen = np.asarray(tokens), []
    for _ in range(max_new_tokens):
        logits = model(ids[:, -model.config.context_length :])[:, -1]
        if temperature == 0:
            chosen = logits.argmax(axis=-1, keepdims=True)
        else:
            seen.append((logits, np.stack([probabilities(row, temperature, top_k, top_p) for row in logits])))
            chosen = rng.multinomial(seen[-1][1])
        ids = np.concatenate([ids, chosen], axis=1)
    return ids, seen


def check_generate(case, max_new_tokens, sampling):
    """Compare generate, which caches, with naive: the same tokens, and distributions within the model's budget."""
    model, (tokens, _) = case.model(), case.batch()
    kept, rng = tokens.copy(), Draws(case.seed)
    got = generate(model, tokens, max_new_tokens, **sampling, rng=rng)
    want, distributions = naive(model, tokens, max_new_tokens, Draws(case.seed), **sampling)
    assert got.dtype == np.int64
    assert got.tolist() == want.tolist(), f"generated ids: {got.tolist()}, without a cache {want.tolist()}"
    check_exact("tokens, after generate", tokens, kept)
    assert len(rng.seen) == len(distributions)
    for p, (logits, answer) in zip(rng.seen, distributions, strict=True):
        scale = 1 + np.abs(logits).max() / sampling["temperature"]  # the exponent's rounding, as in compare.py
        check("generate: probabilities", p, answer.astype(p.dtype), scale, compare.MODEL)


SAMPLINGS = [
    GREEDY,
    {"temperature": 1.0, "top_k": None, "top_p": None},
    {"temperature": 1.5, "top_k": 3, "top_p": None},
    {"temperature": 0.7, "top_k": None, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 5, "top_p": 0.6},
    {"temperature": 0.3, "top_k": 1, "top_p": 1.0},
]


def fixed_logits_model(logits, dtype="float64"):
    """A model with exactly these logits after any token: its last LayerNorm returns (1, 0, 0, 0)."""
    config = GPTConfig(len(logits), 5, 4, 2, 1, 0.0)
    params = {name: np.zeros(shape, dtype) for name, shape in parameter_shapes(config).items()}
    params["final_norm.shift"][0] = 1
    params["out_head.weight"][:, 0] = logits
    return GPT.from_params(config, params)


def drawn_from(logits, dtype="float64", **sampling):
    """The probabilities (B, V) that generate draws from."""
    rng = Draws()
    generate(fixed_logits_model(logits, dtype), np.zeros((3, 2), int), 1, rng=rng, **{"temperature": 1.0} | sampling)
    (p,) = rng.seen
    assert p.shape == (3, len(logits))
    assert p.dtype == dtype
    assert (p == p[0]).all(), "equal rows have equal distributions"
    return p[0]


def kept(p):
    return np.flatnonzero(p).tolist()


TIES = [1.0, 3.0, 3.0, -2.0, 3.0, 1.0, 3.0, 1.0]


def check_ties():
    """Assert that top_k keeps exactly k ids, and among equal logits the lower ids."""
    for k, want in enumerate([[1], [1, 2], [1, 2, 4], [1, 2, 4, 6], [0, 1, 2, 4, 6], [0, 1, 2, 4, 5, 6]], start=1):
        got = kept(drawn_from(TIES, top_k=k))
        assert got == want, f"top_k {k} keeps ids {got}, should keep {want}"
    assert kept(drawn_from(TIES, top_k=8)) == kept(drawn_from(TIES, top_k=100)) == list(range(8))
