"""The tests' inputs: Hypothesis strategies named for a relation. Shapes first, then data from a drawn seed.

A case is a small frozen description (shapes, scale, a seed): a failure prints in one line, and pasting it into @example
reproduces it exactly. Its arrays come from the seed, in NumPy: nothing here needs torch.

The cases include those that published suites omit: weights from 1e-2 to 3, repeated ids, T = 1, B = 1, V = 2, constant
rows, huge values, non-contiguous and read-only arrays. Upstream gradients are normal, never ones.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from numpy_gpt.config import GPTConfig
from numpy_gpt.model import GPT
from numpy_gpt.parameters import parameter_shapes

LAYOUTS = ("C", "transposed", "gaps", "reversed", "read-only")
FILLS = ("normal", "constant rows", "huge", "tiny", "zeros")
MODEL_FILLS = ("normal", "constant rows", "huge logits", "tiny logits")

SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.integers(0, 100).map(lambda i: 1e-2 * 300 ** (i / 100))
"""1e-2 … 3, log-uniform."""


def arrange(a, layout):
    """The same numbers in another memory layout; writing to a "read-only" array raises."""
    if layout == "transposed":
        return np.asfortranarray(a)
    if layout == "gaps":
        wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), np.nan, a.dtype)  # a NaN shows if the gaps are read
        wide[..., ::2] = a
        return wide[..., ::2]
    if layout == "reversed":
        return a[..., ::-1].copy()[..., ::-1]
    a = a.copy()
    a.setflags(write=layout != "read-only")
    return a


@dataclass(frozen=True)
class OperationCase:
    """One operation's input: shapes by name, how x is filled, and every array's memory layout."""

    shape: dict[str, int]
    fill: str = "normal"
    scale: float = 1.0
    layout: str = "C"
    seed: int = 0
    dtype: str = "float64"
    options: dict[str, Any] = field(default_factory=dict)

    def source(self):
        """A fresh Source: the same case always yields the same arrays, asked for in the same order."""
        return Source(self)


class Source:
    """The arrays of one case, one after the other."""

    def __init__(self, case):
        self._case, self._rng = case, np.random.default_rng(case.seed)

    def x(self, *shape):
        """The main input, filled by case.fill: huge means ±1e4, tiny 1e-30, constant rows have all features equal.

        Zeros as queries make every score exactly 0, to be distinguished from a masked position.
        """
        a = self._rng.standard_normal(shape) * self._case.scale
        if self._case.fill == "constant rows":
            a = np.broadcast_to(a[..., :1], shape)
        elif self._case.fill == "huge":
            a = a + 1e4 * np.sign(self._rng.standard_normal(shape))
        elif self._case.fill == "tiny":
            a = 1e-30 * a
        elif self._case.fill == "zeros":
            a = 0 * a
        return self._finish(a)

    def normal(self, *shape):
        """A weight: normal, of the case's scale."""
        return self._finish(self._rng.standard_normal(shape) * self._case.scale)

    def gain(self, *shape):
        """LayerNorm's scale: a weight like any other."""
        return self.normal(*shape)

    def upstream(self, *shape):
        """The upstream gradient: normal, with its own scale between 1e-3 and 1e3 (a loss divides by N)."""
        return self._finish(self._rng.standard_normal(shape) * 10 ** self._rng.uniform(-3, 3))

    def ids(self, high, *shape):
        """Token ids in [0, high), drawn from a few values so that they repeat."""
        return repeated_ids(self._rng, high, shape)

    def factors(self, rate, *shape):
        """Dropout's factors: 0 or 1 / (1 − rate)."""
        return self._finish((self._rng.random(shape) >= rate) / (1 - rate))

    def _finish(self, a):
        return arrange(np.asarray(a).astype(self._case.dtype), self._case.layout)


def repeated_ids(rng, high, shape):
    """int64 ids in [0, high) with few distinct values: some repeat, and most of the table stays unread."""
    few = rng.choice(high, size=rng.integers(1, min(high, 8) + 1), replace=False)
    return rng.choice(few, size=shape).astype(np.int64)


LARGE = [  # (operation, case): operations that work in blocks have a first, a middle and a last block here
    ("linear", OperationCase({"B": 2, "T": 130, "I": 96, "O": 384})),
    ("layernorm", OperationCase({"B": 2, "T": 300, "C": 96})),
    ("layernorm", OperationCase({"B": 1, "T": 130, "C": 768}, fill="constant rows")),
    ("gelu", OperationCase({"B": 2, "T": 130, "C": 1031})),
    ("embedding", OperationCase({"B": 4, "T": 150, "V": 2000, "C": 24})),
    ("position_embedding", OperationCase({"B": 3, "T": 200, "C": 24, "start": 3, "rest": 50})),
    ("attention", OperationCase({"B": 2, "NH": 3, "T": 63, "past": 0, "HS": 16})),
    ("attention", OperationCase({"B": 1, "NH": 2, "T": 64, "past": 0, "HS": 16}, fill="huge")),
    ("attention", OperationCase({"B": 2, "NH": 1, "T": 65, "past": 0, "HS": 16}, options={"rate": 0.1})),
    ("attention", OperationCase({"B": 1, "NH": 2, "T": 200, "past": 0, "HS": 64}, scale=3.0)),
    ("attention", OperationCase({"B": 2, "NH": 2, "T": 129, "past": 70, "HS": 8}, options={"rate": 0.5})),
    ("attention", OperationCase({"B": 2, "NH": 2, "T": 1, "past": 255, "HS": 64})),
    ("cross_entropy", OperationCase({"B": 2, "T": 70, "V": 1031}, scale=3.0)),
    ("cross_entropy", OperationCase({"B": 1, "T": 3, "V": 50257})),
]


@st.composite
def _cases(draw, dtype, shape, fills=("normal",), **options):
    return OperationCase(
        shape=draw(st.fixed_dictionaries(shape)),
        fill=draw(st.sampled_from(fills)),
        scale=draw(SCALES),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(SEEDS),
        dtype=dtype,
        options=draw(st.fixed_dictionaries(options)),
    )


def size(high):
    """1 … high."""
    return st.integers(1, high)


def linear_cases(dtype="float64"):
    """x (B, T, I) and w (O, I) share I; b (O,) or None."""
    return _cases(dtype, {"B": size(4), "T": size(9), "I": size(40), "O": size(40)}, FILLS, bias=st.booleans())


def layernorm_cases(dtype="float64"):
    """x (B, T, C), scale and shift (C,); C = 1 makes every row constant."""
    return _cases(dtype, {"B": size(4), "T": size(9), "C": size(64)}, FILLS)


def gelu_cases(dtype="float64"):
    """x (B, T, C)."""
    return _cases(dtype, {"B": size(4), "T": size(9), "C": size(40)}, FILLS)


def dropout_cases(dtype="float64"):
    """x (B, T, C) and a rate, both ends included."""
    rates = st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)) | st.floats(0.01, 0.99)
    return _cases(dtype, {"B": size(4), "T": size(9), "C": size(40)}, rate=rates)


def embedding_cases(dtype="float64"):
    """ids (B, T) are rows of w (V, C)."""
    return _cases(dtype, {"B": size(4), "T": size(9), "V": size(40), "C": size(16)})


def position_embedding_cases(dtype="float64"):
    """x (B, T, C) begins at row `start` of w (start + T + rest, C)."""
    shape = {"B": size(4), "T": size(9), "C": size(16), "start": st.integers(0, 5), "rest": st.integers(0, 5)}
    return _cases(dtype, shape, FILLS)


def attention_cases(dtype="float64"):
    """q (B, NH, T, HS) are the last T of the S = past + T positions of k and v; rate None: no dropout."""
    shape = {"B": size(3), "NH": size(4), "T": size(12), "past": st.integers(0, 6), "HS": size(24)}
    return _cases(dtype, shape, FILLS, rate=st.none() | st.sampled_from((0.1, 0.5, 0.9)))


def cross_entropy_cases(dtype="float64"):
    """logits (B, T, V), targets (B, T)."""
    return _cases(dtype, {"B": size(4), "T": size(9), "V": st.just(2) | size(60)}, FILLS)


@dataclass(frozen=True)
class ModelCase:
    """A model and a batch: a configuration, B and T <= context_length, and parameters of one scale from a seed.

    fill: "constant rows" makes all features of a token, and of a position, equal; huge logits are about 1e4, tiny ones
    1e-30. layout: every array's memory layout.
    """

    config: GPTConfig
    B: int = 2
    T: int = 5
    scale: float = 0.5
    seed: int = 0
    dtype: str = "float64"
    fill: str = "normal"
    layout: str = "C"

    def params(self):
        """Parameters by name: normal · scale, around 1 for LayerNorm's scales and around 0 for the rest."""
        params = self._filled()
        return {name: arrange(p.astype(self.dtype), self.layout) for name, p in params.items()}

    def _filled(self):
        rng = np.random.default_rng([self.seed, 0])
        params = {}
        for name, shape in parameter_shapes(self.config).items():
            centre = 1 if "norm" in name and name.endswith("scale") else 0
            params[name] = centre + self.scale * rng.standard_normal(shape)
        if self.fill == "constant rows":
            for name in ("tok_emb.weight", "pos_emb.weight"):
                params[name] = np.broadcast_to(params[name][:, :1], params[name].shape)
        elif self.fill != "normal":
            head = params["tok_emb.weight" if self.config.tie_weights else "out_head.weight"]
            size = 1e4 if self.fill == "huge logits" else 1e-30
            for name in ("final_norm.scale", "final_norm.shift"):
                params[name] *= size / (np.abs(head).mean() * self.config.emb_dim)
        return params

    def model(self):
        """The model under test, over fresh arrays."""
        return self.over(self.params())

    def over(self, params):
        """The model under test, over these arrays."""
        return GPT.from_params(self.config, params)

    def batch(self):
        """tokens and targets (B, T)."""
        rng = np.random.default_rng([self.seed, 1])
        V = self.config.vocab_size
        return repeated_ids(rng, V, (self.B, self.T)), repeated_ids(rng, V, (self.B, self.T))


@st.composite
def configs(draw, drop_rates=(0.0,), **fixed):
    """Small configurations in which n_heads divides emb_dim; fixed keys are used unchanged.

    emb_dim is at least 4. LayerNorm turns one number into 0, and two into their order: the gradients below it would be
    rounding noise.
    """
    n_heads = draw(st.integers(1, 4))
    head_size = draw(st.integers(-(-4 // n_heads), 8))
    keys = {
        "vocab_size": draw(st.just(2) | st.integers(2, 40)),
        "context_length": draw(st.integers(1, 12)),
        "emb_dim": n_heads * head_size,
        "n_heads": n_heads,
        "n_layers": draw(st.integers(1, 3)),
        "drop_rate": draw(st.sampled_from(drop_rates)),
        "qkv_bias": draw(st.booleans()),
        "tie_weights": draw(st.booleans()),
    }
    return GPTConfig(**keys | fixed)


@st.composite
def model_cases(draw, scales=SCALES, fills=("normal",), **keys):
    """A configuration, a batch that fits it (including T = 1 and B = 1), a scale, a seed and a memory layout."""
    config = draw(configs(**keys))
    return ModelCase(
        config=config,
        B=draw(st.integers(1, 4)),
        T=draw(st.integers(1, config.context_length)),
        scale=draw(scales),
        seed=draw(SEEDS),
        fill=draw(st.sampled_from(fills)),
        layout=draw(st.sampled_from(LAYOUTS)),
    )
