"""The suite is itself tested: faults that published GPTs shipped, made here on purpose, must turn its checks red.

Each fault replaces one function of numpy_gpt while the very check functions of the other modules run, and the
AssertionError must name the tensor that is wrong, not merely some tensor. A fault is written around the function's
arguments and results and knows nothing of its insides, so rewriting an operation does not retire its mutants.
"""

import math

import numpy as np
import pytest

from numpy_gpt import GPT, GPTConfig, decoding, optim
from numpy_gpt.ops import attention, cross_entropy, dropout, embedding, gelu, layernorm, linear
from parity_tests import compare, test_decoding, test_laws, test_model, test_operations, test_optim
from parity_tests.strategies import ModelCase, OperationCase

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


LINEAR = OperationCase({"B": 2, "T": 3, "I": 4, "O": 5})
ROWS = OperationCase({"B": 2, "T": 5, "C": 8})
TABLE = OperationCase({"B": 3, "T": 6, "V": 5, "C": 4})
POSITIONS = OperationCase({"B": 3, "T": 4, "C": 4, "start": 1, "rest": 2})
HEADS = OperationCase({"B": 2, "NH": 3, "T": 5, "past": 0, "HS": 4})
DROPPED_HEADS = OperationCase({"B": 2, "NH": 3, "T": 5, "past": 2, "HS": 4}, options={"rate": 0.5})
LOGITS = OperationCase({"B": 2, "T": 4, "V": 6})
HALF = OperationCase({"B": 2, "T": 5, "C": 8}, options={"rate": 0.5})
CONFIG = GPTConfig(13, 6, 12, 3, 2, drop_rate=0.0, qkv_bias=True)
UNTIED, TIED, DROPPED = (
    ModelCase(GPTConfig(**CONFIG.to_dict() | keys), B=2, T=6)
    for keys in ({}, {"tie_weights": True}, {"drop_rate": 0.3})
)


@pytest.fixture(autouse=True)
def not_recorded(monkeypatch):
    """A broken model's shares are none of the summary's business."""
    monkeypatch.setattr(compare, "record", lambda *_: None)


def around(module, name, change):
    """A fault: module.name becomes a function of the real one and the arguments. -> what applies it."""

    def apply(monkeypatch):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: change(real, *args, **kwargs))

    return apply


def scores_by(factor):
    """Scores multiplied by factor(q): by scaling q, on its way in and back out."""

    def apply(monkeypatch):
        forward, backward = attention.attention_forward, attention.attention_backward
        factors = []

        def wrong_forward(q, k, v, mask=None):
            factors.append(factor(q))
            return forward(q * factors[-1], k, v, mask)

        def wrong_backward(dy, cache):
            dq, dk, dv = backward(dy, cache)
            return dq * factors[0], dk, dv

        monkeypatch.setattr(attention, "attention_forward", wrong_forward)
        monkeypatch.setattr(attention, "attention_backward", wrong_backward)

    return apply


def plain_attention(q, k, v, mask, hidden, hide=-np.inf):
    """The formula, with whatever mask and stand-in for -inf: p and y."""
    s = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    s = np.where(hidden(s), hide, s)
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    return p, (p if mask is None else p * mask) @ v


def future(shift=0):
    return lambda s: np.triu(np.ones(s.shape[-2:], bool), k=1 + s.shape[-1] - s.shape[-2] + shift)


def masked(hidden, hide=-np.inf):
    """Attention's forward with another mask."""

    def change(real, q, k, v, mask=None):
        return plain_attention(q, k, v, mask, hidden, hide)[1], real(q, k, v, mask)[1]

    return around(attention, "attention_forward", change)


def scrambled_dk(real, dy, cache):
    """Qᵀ · dscores has dK's numbers in (HS, S); reshaped to (S, HS) instead of transposed."""
    dq, dk, dv = real(dy, cache)
    return dq, np.ascontiguousarray(dk.swapaxes(-1, -2)).reshape(dk.shape), dv


def dv_before_dropout(monkeypatch):
    """dV = pᵀ dy with the probabilities before dropout."""
    forward, backward = attention.attention_forward, attention.attention_backward
    kept = []

    def wrong_forward(q, k, v, mask=None):
        kept.append(plain_attention(q, k, v, None, future())[0])
        return forward(q, k, v, mask)

    def wrong_backward(dy, cache):
        dq, dk, _ = backward(dy, cache)
        return dq, dk, kept.pop().swapaxes(-1, -2) @ dy

    monkeypatch.setattr(attention, "attention_forward", wrong_forward)
    monkeypatch.setattr(attention, "attention_backward", wrong_backward)


def remembering_ids(accumulate):
    """embedding_backward with another way of writing rows into dw: accumulate(dw, ids, dy)."""

    def apply(monkeypatch):
        forward, backward = embedding.embedding_forward, embedding.embedding_backward
        kept = []

        def wrong_forward(ids, w):
            kept.append(ids)
            return forward(ids, w)

        def wrong_backward(dy, cache):
            dw = np.zeros_like(backward(dy, cache))
            accumulate(dw, kept[-1], dy)
            return dw

        monkeypatch.setattr(embedding, "embedding_forward", wrong_forward)
        monkeypatch.setattr(embedding, "embedding_backward", wrong_backward)

    return apply


def assign(dw, ids, dy):
    dw[ids] = dy


def add_once(dw, ids, dy):
    dw[ids] += dy


def one_row_of_the_batch(real, dy, cache):
    return real(dy, cache)[0], real(dy[:1], cache)[1]


def layernorm_without(term):
    """One of dx = rstd (g − mean(g) − x̂ mean(g x̂))'s three terms missing: 0, 1 or 2."""

    def apply(monkeypatch):
        forward, backward = layernorm.layernorm_forward, layernorm.layernorm_backward
        kept = []

        def wrong_forward(x, scale, shift):
            kept.append((x.copy(), scale))
            return forward(x, scale, shift)

        def wrong_backward(dy, cache):
            _, dscale, dshift = backward(dy, cache)
            x, scale = kept.pop()
            rstd = 1 / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
            x_hat, g = (x - x.mean(axis=-1, keepdims=True)) * rstd, dy * scale
            terms = [g, -g.mean(axis=-1, keepdims=True), -x_hat * (g * x_hat).mean(axis=-1, keepdims=True)]
            terms[term] = 0
            return rstd * (terms[0] + terms[1] + terms[2]), dscale, dshift

        monkeypatch.setattr(layernorm, "layernorm_forward", wrong_forward)
        monkeypatch.setattr(layernorm, "layernorm_backward", wrong_backward)

    return apply


def normalised_by(std):
    """LayerNorm's forward with another denominator."""

    def change(real, x, scale, shift):
        return (x - x.mean(axis=-1, keepdims=True)) / std(x) * scale + shift, real(x, scale, shift)[1]

    return around(layernorm, "layernorm_forward", change)


def gelu_with(cdf):
    """y = x · cdf(x) in the forward pass."""
    return around(gelu, "gelu_forward", lambda real, x: (x * cdf(x), real(x)[1]))


def tanh_cdf(cubic, root=SQRT_2_OVER_PI):
    return lambda x: 0.5 * (1 + np.tanh(root * (x + cubic * x**3)))


def loss_with(per_token, over):
    """Cross-entropy's forward as sum(per_token(p_target)) / over(targets)."""

    def change(real, logits, targets):
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        p = np.take_along_axis(e / e.sum(axis=-1, keepdims=True), targets[..., None], axis=-1)
        return per_token(p).sum() / over(targets), real(logits, targets)[1]

    return around(cross_entropy, "cross_entropy_forward", change)


def without_mean(monkeypatch):
    """The backward pass of the sum, not of the mean."""
    forward, backward = cross_entropy.cross_entropy_forward, cross_entropy.cross_entropy_backward
    sizes = []

    def wrong_forward(logits, targets):
        sizes.append(targets.size)
        return forward(logits, targets)

    monkeypatch.setattr(cross_entropy, "cross_entropy_forward", wrong_forward)
    monkeypatch.setattr(
        cross_entropy, "cross_entropy_backward", lambda dloss, cache: backward(dloss, cache) * sizes[-1]
    )


def tied_without(use):
    """A tied model's token gradient short of one of its two uses: what the untied model calls out_head or tok_emb."""

    def change(real, self, tokens, targets, rng=None):
        loss, grads = real(self, tokens, targets, rng)
        if self.config.tie_weights:
            config = GPTConfig(**self.config.to_dict() | {"tie_weights": False})
            apart = GPT.from_params(config, self.params | {"out_head.weight": self.params["tok_emb.weight"]})
            grads = dict(grads) | {
                "tok_emb.weight": grads["tok_emb.weight"] - real(apart, tokens, targets, rng)[1][use]
            }
        return loss, grads

    return around(GPT, "loss_and_grads", change)


def another_mask(real, dy, mask):
    return real(dy, None if mask is None else np.roll(mask, 1, axis=-1))


def l2_decay(real, self, grads):
    """Weight decay added to the gradient, as Adam had it before AdamW."""
    decay, self.weight_decay = self.weight_decay, 0.0
    real(self, {name: grad + decay * self.params[name] for name, grad in grads.items()})
    self.weight_decay = decay


def stepped(update):
    """AdamW's step for step, out of update(optimiser, m, v) -> what is subtracted; m and v kept here."""

    def apply(monkeypatch):
        state = {}

        def wrong(self, grads):
            t, (b1, b2) = state.get("t", 0) + 1, self.betas
            state["t"] = t
            for name, p in self.params.items():
                m, v = state.get(name, (0, 0))
                g = grads[name].astype(np.float64)
                state[name] = m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
                p *= 1 - self.lr * self.weight_decay
                p -= (self.lr * update(self, t, m, v)).astype(p.dtype)

        monkeypatch.setattr(optim.AdamW, "step", wrong)

    return apply


def eps_inside_the_root(self, t, m, v):
    b1, b2 = self.betas
    return m / (1 - b1**t) / np.sqrt(v / (1 - b2**t) + self.eps)


def no_bias_correction(self, t, m, v):
    return m / (np.sqrt(v) + self.eps)


def clip_each_alone(real, grads, max_norm):
    return math.sqrt(sum(real({name: grad}, max_norm) ** 2 for name, grad in grads.items()))


def ties_kept(real, logits, k):
    """Everything at or above the k-th largest, so more than k where there are equals."""
    kth = np.sort(logits, axis=-1)[:, -min(k, logits.shape[-1])]
    return np.where(logits >= kth[:, None], logits, -np.inf)


def first_rows_threshold(real, logits, k):
    """One row's k-th largest for all rows: what (B, V) against (B,) comes to where it does not fail."""
    kth = np.sort(logits[0])[-min(k, logits.shape[-1])]
    return np.where(logits >= kth, logits, -np.inf)


def dropped(real, self, *args):
    """Dropout where there ought to be none: on the logits, the easiest place to put it from outside."""
    logits, rate = real(self, *args), self.config.drop_rate
    return logits * (np.random.default_rng(0).random(logits.shape) >= rate) / (1 - rate)


def positions_off_by(n):
    """Decoding's later tokens get the position rows of their neighbours; the first pass starts at 0 as it should."""

    def change(real, x, w, start=0):
        return real(x, w, min(start + n, len(w) - x.shape[1]) if start else 0)

    return around(embedding, "position_embedding_forward", change)


def query_and_key_swapped(real, self, tokens):
    """The three projections taken in another order than they were stored in."""
    params, names = self.params, {"W_query": "W_key", "W_key": "W_query", "W_value": "W_value"}
    self.params = dict(params)
    for name in params:
        for one, other in names.items():
            if f"att.{one}." in name:
                self.params[name] = params[name.replace(one, other)]
    logits = real(self, tokens)
    self.params = params
    return logits


def operation_slopes():
    test_laws.test_gradients_of_operations_are_the_slopes(0)


def model_slopes():
    test_laws.check_model_slopes(UNTIED)


def from_the_first_key(s):
    """Query t sees keys 0 … t, although its T are the last of the S positions."""
    return np.triu(np.ones(s.shape[-2:], bool), k=1)


def zeros_too(s):
    """The future, and scores that are exactly 0, but for a query's own key."""
    return future()(s) | ((s == 0) & ~np.eye(*s.shape[-2:], dtype=bool))


def erf_cdf(x):
    return np.vectorize(lambda each: 0.5 * (1 + math.erf(each / math.sqrt(2))))(x)


SAMPLED = test_decoding.SAMPLINGS[2]
ONLY = r"d {}\.weight\[[^\n]*$"  # one gradient is wrong, and the message has one line


def operation(name, case):
    """The check of one operation on one case."""
    return lambda: test_operations.OPERATIONS[name][0](case)


def model(case):
    """The check of a whole model."""
    return lambda: test_model.check_model(case)


def generation(sampling):
    """The check of generation against the loop without a cache, past the context length."""
    return lambda: test_decoding.check_generate(ModelCase(DROPPED.config, B=3, T=4), 9, sampling)


DK = around(attention, "attention_backward", scrambled_dk)
SHARED_MASK = around(dropout, "dropout_backward", another_mask)
NO_RESCALING = around(dropout, "dropout_mask", lambda real, keep, rate, dtype: keep.astype(dtype))
ONE_ROW = around(embedding, "position_embedding_backward", one_row_of_the_batch)
SQRT_C = scores_by(lambda q: 1 / math.sqrt(q.shape[1]))
ATTENTION, DROPPED_ATTENTION = operation("attention", HEADS), operation("attention", DROPPED_HEADS)
LAYERNORM, GELU, LOSS = operation("layernorm", ROWS), operation("gelu", ROWS), operation("cross_entropy", LOGITS)

FAULTS = {  # what is done -> how, the check it must turn red, and how the message must begin
    # one operation
    "dK scrambled by a reshape": (DK, ATTENTION, r"attention\.dk\["),
    "dQ and dK exchanged": (
        around(attention, "attention_backward", lambda real, *args: [real(*args)[i] for i in (1, 0, 2)]),
        ATTENTION,
        r"attention\.dq\[",
    ),
    "dV from the probabilities before dropout": (dv_before_dropout, DROPPED_ATTENTION, r"attention\.dv\["),
    "scores over sqrt(C)": (SQRT_C, ATTENTION, r"attention\.y\["),
    "scores not divided at all": (scores_by(lambda q: math.sqrt(q.shape[-1])), ATTENTION, r"attention\.y\["),
    "mask shifted by one": (masked(future(1)), ATTENTION, r"attention\.y\["),
    "mask aligned to the first key": (masked(from_the_first_key), DROPPED_ATTENTION, r"attention\.y\["),
    "exact zeros among the scores masked": (
        masked(zeros_too),
        operation("attention", OperationCase(HEADS.shape, fill="zeros")),
        r"attention\.y\[",
    ),
    "-1e10 for -inf": (
        masked(future(), -1e10),
        lambda: test_laws.check_first_query(-1e12),
        "y of the first query at scores of -1e",
    ),
    "rows assigned to dw": (remembering_ids(assign), operation("embedding", TABLE), r"embedding\.dw\["),
    "dw[ids] += dy": (remembering_ids(add_once), operation("embedding", TABLE), r"embedding\.dw\["),
    "position gradient of one row": (
        ONE_ROW,
        operation("position_embedding", POSITIONS),
        r"position_embedding\.dw\[",
    ),
    "layernorm's dx without g": (layernorm_without(0), LAYERNORM, r"layernorm\.dx\["),
    "layernorm's dx without mean(g)": (layernorm_without(1), LAYERNORM, r"layernorm\.dx\["),
    "layernorm's dx without the part along x_hat": (layernorm_without(2), LAYERNORM, r"layernorm\.dx\["),
    "variance with n - 1": (
        normalised_by(lambda x: np.sqrt(x.var(axis=-1, ddof=1, keepdims=True) + 1e-5)),
        LAYERNORM,
        r"layernorm\.y\[",
    ),
    "eps outside the root": (
        normalised_by(lambda x: x.std(axis=-1, keepdims=True) + 1e-5),
        LAYERNORM,
        r"layernorm\.y\[",
    ),
    "gelu 0.0044715": (gelu_with(tanh_cdf(0.0044715)), GELU, r"gelu\.y\["),
    "gelu with a six-digit constant": (gelu_with(tanh_cdf(0.044715, 0.797885)), GELU, r"gelu\.y\["),
    "gelu exact": (gelu_with(erf_cdf), GELU, r"gelu\.y\["),
    "gelu's dx off by 1e-10": (
        around(gelu, "gelu_backward", lambda real, *args: real(*args) * (1 + 1e-10)),
        GELU,
        r"gelu\.dx\[",
    ),
    "eps inside the logarithm": (loss_with(lambda p: -np.log(p + 1e-9), np.size), LOSS, r"cross_entropy\.loss\["),
    "mean over the wrong count": (loss_with(lambda p: -np.log(p), len), LOSS, r"cross_entropy\.loss\["),
    "cross-entropy's backward without 1/N": (without_mean, LOSS, r"cross_entropy\.dlogits\["),
    "dloss taken for 1": (
        around(cross_entropy, "cross_entropy_backward", lambda real, dloss, cache: real(1.0, cache)),
        LOSS,
        r"cross_entropy\.dlogits\[",
    ),
    "dropout not rescaled": (NO_RESCALING, operation("dropout", HALF), r"dropout\.mask\["),
    "dropout's backward with another mask": (SHARED_MASK, operation("dropout", HALF), r"dropout\.dx\["),
    "a bias gradient averaged": (
        around(linear, "linear_backward", lambda real, dy, cache: (*real(dy, cache)[:2], dy.mean(axis=(0, 1)))),
        operation("linear", LINEAR),
        r"linear\.db\[",
    ),
    "a weight gradient transposed": (
        around(linear, "linear_backward", lambda real, *args: [real(*args)[0], real(*args)[1].T, real(*args)[2]]),
        operation("linear", LINEAR),
        r"linear\.dw: shape \(4, 5\)",
    ),
    "float32 turned into float64": (
        around(gelu, "gelu_forward", lambda real, x: (real(x)[0] / np.sqrt(np.int64(1)), real(x)[1])),
        operation("gelu", OperationCase(ROWS.shape, dtype="float32")),
        r"gelu\.y: dtype float64",
    ),
    "an argument written into": (
        around(gelu, "gelu_backward", lambda real, dy, cache: np.negative(real(dy, cache), out=dy)),
        GELU,
        "gelu wrote into its argument dy",
    ),
    # the whole model: the message lists every wrong gradient, in the order of the parameters
    "model: sqrt(C)": (SQRT_C, model(UNTIED), r"logits\["),
    "model: query and key swapped": (around(GPT, "__call__", query_and_key_swapped), model(UNTIED), r"logits\["),
    "model: gelu 0.0044715": (gelu_with(tanh_cdf(0.0044715)), model(UNTIED), r"logits\["),
    "model: dropout in evaluation": (around(GPT, "__call__", dropped), model(DROPPED), r"logits\["),
    "model: dropout not rescaled": (NO_RESCALING, model(DROPPED), r"loss with dropout\["),
    "model: another mask in backward": (SHARED_MASK, model(DROPPED), r"d tok_emb\.weight\["),
    "model: a token gradient of unique ids": (remembering_ids(assign), model(UNTIED), ONLY.format("tok_emb")),
    "model: positions not summed": (ONE_ROW, model(UNTIED), ONLY.format("pos_emb")),
    "model: the tied head's gradient dropped": (tied_without("out_head.weight"), model(TIED), ONLY.format("tok_emb")),
    "model: the tied table's gradient dropped": (tied_without("tok_emb.weight"), model(TIED), ONLY.format("tok_emb")),
    # laws that need no torch
    "law: dK scrambled, by slopes": (DK, operation_slopes, "attention dk: "),
    "law: dw[ids] += dy, by slopes": (remembering_ids(add_once), operation_slopes, "embedding dw: "),
    "law: layernorm without a term, by slopes": (layernorm_without(2), operation_slopes, "layernorm dx: "),
    "law: dK scrambled, by the model's slopes": (DK, model_slopes, r"d tok_emb\.weight: "),
    "law: the tied head's gradient dropped": (
        tied_without("out_head.weight"),
        lambda: test_laws.check_tied_is_the_sum(TIED),
        r"tied is the sum: d tok_emb\.weight\[",
    ),
    "law: the loss's gradient without 1/N": (
        without_mean,
        lambda: test_laws.check_batch_is_the_mean(UNTIED),
        r"batch is the mean: d tok_emb\.weight\[",
    ),
    # the optimiser
    "L2 decay": (around(optim.AdamW, "step", l2_decay), test_optim.check_adamw, r"AdamW table\["),
    "eps inside the root": (stepped(eps_inside_the_root), test_optim.check_adamw, r"AdamW table\["),
    "no bias correction": (stepped(no_bias_correction), test_optim.check_adamw, r"AdamW table\["),
    "clipping each tensor": (
        around(optim, "clip_grad_norm", clip_each_alone),
        test_optim.check_clipping,
        r"clip_grad_norm (table|weight|bias|one)\[",
    ),
    "no warm-up": (
        around(
            optim, "warmup_cosine", lambda real, step, peak, warmup, total: real(max(step, warmup), peak, warmup, total)
        ),
        lambda: test_optim.check_schedule(0.1, 3, 10),
        r"warmup_cosine\[",
    ),
    "a run: L2 decay": (around(optim.AdamW, "step", l2_decay), test_optim.check_trajectory, r"trained "),
    "a run: clipping each tensor": (
        around(optim, "clip_grad_norm", clip_each_alone),
        test_optim.check_trajectory,
        "trained ",
    ),
    "a run: the schedule a step late": (
        around(optim, "warmup_cosine", lambda real, step, *rest: real(max(step - 1, 0), *rest)),
        test_optim.check_trajectory,
        "trained ",
    ),
    # generation
    "a cached position off by one": (positions_off_by(1), generation(SAMPLED), "generate|generated ids"),
    "dropout in generation": (around(GPT, "next_logits", dropped), generation(SAMPLED), "generate|generated ids"),
    "one row's top-k threshold for all": (
        around(decoding, "keep_top_k", first_rows_threshold),
        generation(SAMPLED),
        "generate: probabilities|generated ids",
    ),
    "ties keep more than k": (around(decoding, "keep_top_k", ties_kept), test_decoding.check_ties, "top_k 1 keeps ids"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_turns_its_check_red(fault, monkeypatch):
    apply, check, message = FAULTS[fault]
    check()
    apply(monkeypatch)
    with pytest.raises(AssertionError, match=f"^({message})"):
        check()


@pytest.mark.parametrize(
    ("apply", "case", "first", "spared"),
    [
        (
            DK,
            UNTIED,
            "att.W_key.weight",
            ("att.W_query.weight", "att.W_value.weight", "att.out_proj.weight", "norm2.scale"),
        ),
        (dv_before_dropout, DROPPED, "att.W_value.weight", ("att.W_query.weight", "att.W_key.weight", "norm2.scale")),
        (layernorm_without(1), UNTIED, "ff.layers.2.weight", ()),
        (layernorm_without(2), UNTIED, "ff.layers.2.weight", ()),
    ],
)
def test_the_models_check_shows_where_a_gradient_goes_wrong(apply, case, first, spared, monkeypatch):
    """The last block is where the backward pass begins: what lies above the fault there is right, and not blamed."""
    apply(monkeypatch)
    with pytest.raises(AssertionError) as error:
        test_model.check_model(case)
    message, last = str(error.value), f"d trf_blocks.{case.config.n_layers - 1}."
    assert f"{last}{first}[" in message
    assert "d tok_emb.weight[" in message, "what lies below is wrong too"
    for name in (*(f"{last}{each}" for each in spared), "d final_norm.scale", "d out_head.weight"):
        assert f"{name}[" not in message


def test_the_float32_rule_sees_a_four_digit_constant(monkeypatch):
    """√(2/π) off by 2e-5 of itself, and the loss by far less: under a tolerance of 1e-4 nobody would know."""
    cases = [test_model.float32_case(i) for i in range(12)]
    test_model.check_float32(cases)
    gelu_with(tanh_cdf(0.044715, 0.7979))(monkeypatch)
    with pytest.raises(AssertionError, match=r"float32 worse than torch's: .*'logits'"):
        test_model.check_float32(cases)


# The judge itself


@pytest.mark.parametrize("sign", [1, -1])
def test_check_names_the_tensor_the_index_both_values_and_the_share(sign):
    want = np.zeros((2, 3))
    got = want.copy()
    got[1, 2] = sign * 100 * np.finfo(np.float64).eps
    assert compare.check("x", got, want, 2.0) == pytest.approx(100 / 128)
    with pytest.raises(AssertionError, match=r"^x\[1, 2\]: -?2\.220446049e-14 vs 0\.000000000e\+00, 1\.56x the budget"):
        compare.check("x", got, want, 1.0)


def test_check_takes_the_scale_of_each_element():
    want = np.array([1.0, 1e-9])
    got = want + np.array([0, 1e-12])
    with pytest.raises(AssertionError, match=r"^x\[1\]"):
        compare.check("x", got, want, np.abs(want))
    assert compare.check("x", got, want, 1e3) < 1


@pytest.mark.parametrize(
    ("got", "want", "scale"),
    [
        (np.nan, 1.0, 1.0),
        (1.0, np.nan, 1.0),
        (np.nan, np.nan, 1.0),
        (1.0, 1.0, np.nan),
        (np.inf, 1.0, 1.0),
        (np.inf, np.inf, 1.0),
        (1.0, 1.0 + 1e-15, 0.0),
    ],
)
def test_check_fails_on_nan_on_infinity_and_on_any_error_at_scale_0(got, want, scale):
    with pytest.raises(AssertionError, match=r"x the budget|nan"):
        compare.check("x", np.array([0.0, got]), np.array([0.0, want]), scale)


def test_check_fails_on_another_shape_or_dtype():
    with pytest.raises(AssertionError, match=r"x: shape \(1, 2\), should be \(2,\)"):
        compare.check("x", np.zeros((1, 2)), np.zeros(2), 1.0)
    with pytest.raises(AssertionError, match="x: dtype float32, should be float64"):
        compare.check("x", np.zeros(2, np.float32), np.zeros(2), 1.0)


def test_check_exact_tells_minus_zero_from_zero_and_one_ulp():
    one = np.array([0.0, 1.0])
    compare.check_exact("x", one, one.copy())
    for other in (np.array([-0.0, 1.0]), np.array([0.0, np.nextafter(1, 2)])):
        with pytest.raises(AssertionError, match=r"^x\[[01]\]: .* 1 of 2 differ"):
            compare.check_exact("x", other, one)


def test_the_largest_share_of_each_kind_is_kept_for_the_summary(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(compare, "_largest", {})
    got, eps = np.zeros(1), np.finfo(np.float64).eps
    for block, error in ((0, 8.0), (1, 32.0), (2, 16.0)):
        compare.check(f"d trf_blocks.{block}.norm1.scale", got + error * eps, got, 1.0)
    assert [line.split() for line in compare.summary()][-1] == ["0.5", "d", "trf_blocks.*.norm1.scale"]
