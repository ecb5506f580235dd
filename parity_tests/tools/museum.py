"""The museum of faults: errors that published GPTs shipped, made here deliberately in numpy_gpt's own functions.

A fault replaces functions of numpy_gpt and uses only their arguments and results, not their internals, so it survives a
rewrite of the operation. Each fault names the check of this suite that must fail, the start of its message (so that it
blames the tensor that is wrong), and the naive check under which such faults were shipped. test_museum.py asserts this;
`pytest parity_tests --fault NAME` runs the suite with one fault in place; `python -m parity_tests museum --out
parity_tests/museum.md` does so for all faults and writes the page.
"""

import difflib
import math
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import numpy_gpt.model
from numpy_gpt import GPT, Generator, GPTConfig, block, decoding, load, optim, save
from numpy_gpt.ops import attention, cross_entropy, dropout, embedding, gelu, layernorm, linear
from numpy_gpt.parameters import join, separate
from numpy_gpt.runs.learner import NumpyLearner
from numpy_gpt.train import Position
from numpy_gpt.weights import gpt2
from parity_tests.judge import checkpoints, laws, learners, models, operations, training, weights
from parity_tests.judge.decoding import SAMPLINGS, check_generate, check_ties
from parity_tests.judge.gpt2_files import gpt2_tensors, huggingface_folder
from parity_tests.judge.strategies import ModelCase, OperationCase, Source
from torch_gpt.model import from_params, loss_and_grads

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


def around(module, name, change):
    """A fault: replaces module.name with change(real, *args). -> the function that applies it."""

    def apply(monkeypatch):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: change(real, *args, **kwargs))

    return apply


def scores_by(factor):
    """Multiply the scores by factor(q), by scaling q in the forward and dq in the backward."""

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
    """Attention by its formula, with any mask and any replacement for -inf: p and y."""
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
    """Qᵀ · dscores, which is dK transposed, (HS, S), reshaped to (S, HS) instead of transposed."""
    dq, dk, dv = real(dy, cache)
    return dq, np.ascontiguousarray(dk.swapaxes(-1, -2)).reshape(dk.shape), dv


def dv_before_dropout(monkeypatch):
    """Compute dV = pᵀ dy with the probabilities before dropout."""
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
    """embedding_backward with accumulate(dw, ids, dy) to write rows into dw."""

    def apply(monkeypatch):
        forward, backward = embedding.embedding_forward, embedding.embedding_backward
        kept = []

        def wrong_forward(ids, w):
            kept.append(ids)
            return forward(ids, w)

        def wrong_backward(dy, cache, dw=None):
            dw = np.zeros_like(backward(dy, cache)) if dw is None else dw
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
    """dx = rstd (g − mean(g) − x̂ mean(g x̂)) without one of its three terms: 0, 1 or 2."""

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

    def change(real, logits, targets, out=None):
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        p = np.take_along_axis(e / e.sum(axis=-1, keepdims=True), targets[..., None], axis=-1)
        return per_token(p).sum() / over(targets), real(logits, targets, out)[1]

    return around(cross_entropy, "cross_entropy_forward", change)


def without_mean(monkeypatch):
    """The backward pass of the sum, not of the mean."""
    forward, backward = cross_entropy.cross_entropy_forward, cross_entropy.cross_entropy_backward
    sizes = []

    def wrong_forward(logits, targets, out=None):
        sizes.append(targets.size)
        return forward(logits, targets, out)

    monkeypatch.setattr(cross_entropy, "cross_entropy_forward", wrong_forward)
    monkeypatch.setattr(
        cross_entropy, "cross_entropy_backward", lambda *args, **kwargs: backward(*args, **kwargs) * sizes[-1]
    )


def tied_without(use):
    """A tied model's token gradient without one of its two parts, the untied model's out_head or tok_emb."""

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
    """Weight decay added to the gradient, as in Adam before AdamW."""
    decay, self.weight_decay = self.weight_decay, 0.0
    real(self, {name: grad + decay * self.params[name] for name, grad in grads.items()})
    self.weight_decay = decay


def stepped(update):
    """AdamW's step with update(optimiser, t, m, v) as the quantity to subtract; t, m and v are kept here."""

    def apply(monkeypatch):
        states = weakref.WeakKeyDictionary()

        def wrong(self, grads):
            state = states.setdefault(self, {})
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
    """Keep everything at or above the k-th largest: more than k if there are ties."""
    kth = np.sort(logits, axis=-1)[:, -min(k, logits.shape[-1])]
    return np.where(logits >= kth[:, None], logits, -np.inf)


def first_rows_threshold(real, logits, k):
    """Use the first row's k-th largest for all rows: the effect of (B, V) against (B,) where it broadcasts."""
    kth = np.sort(logits[0])[-min(k, logits.shape[-1])]
    return np.where(logits >= kth, logits, -np.inf)


def dropped(real, self, *args):
    """Dropout where none belongs: on the logits, the easiest place to add it from outside."""
    logits, rate = real(self, *args), self.config.drop_rate
    return logits * (np.random.default_rng(0).random(logits.shape) >= rate) / (1 - rate)


def positions_off_by(n):
    """Give later decoded tokens their neighbours' position rows; the first pass starts at 0, correctly."""

    def change(real, x, w, start=0):
        return real(x, w, min(start + n, len(w) - x.shape[1]) if start else 0)

    return around(embedding, "position_embedding_forward", change)


def query_and_key_swapped(real, self, tokens):
    """Read the three projections in another order than they were stored in."""
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
    laws.check_gradients_are_slopes(0)


def model_slopes():
    laws.check_model_slopes(UNTIED)


def from_the_first_key(s):
    """Query t sees keys 0 … t, although the T queries are the last of the S positions."""
    return np.triu(np.ones(s.shape[-2:], bool), k=1)


def zeros_too(s):
    """Mask the future and scores of exactly 0, except a query's own key."""
    return future()(s) | ((s == 0) & ~np.eye(*s.shape[-2:], dtype=bool))


def erf_cdf(x):
    return np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))(x)


def untied_by_a_copy(real, config, params):
    """Build a tied model with two tables that start out equal."""
    if not config.tie_weights:
        return real(config, params)
    return real(replace(config, tie_weights=False), params | {"out_head.weight": np.array(params["tok_emb.weight"])})


def thirds_in_another_order(real, name):
    """c_attn read as key, query, value."""
    theirs, third = real(name)
    return theirs, (None, 1, 0, 2)[0 if third is None else third + 1]


def squares_unturned(real, array, turned, third):
    """Transpose a Conv1D weight only if its shape requires it."""
    return real(array, turned and array.shape[0] != array.shape[1], third)


def half_precision(real, self, layer, k, v):
    return tuple(a.astype(np.float16).astype(a.dtype) for a in real(self, layer, k, v))


def fails_past_the_context(real, model, tokens, max_new_tokens, *args):
    context = model.config.context_length
    if np.shape(tokens)[1] + max_new_tokens > context:
        raise IndexError(f"position {context} of a context of {context}")
    return real(model, tokens, max_new_tokens, *args)


def seed_again(real, self, state):
    real(self, state)
    self.rng.set_state(Generator(self._settings.seed).get_state())


def moments_lost(real, self, state):
    real(self, {k: np.zeros_like(a) if k.startswith("optimizer.") else a for k, a in state.items()})


def epoch_again(real, state):
    """Start the epoch again, with the same order."""
    return replace(real(state), batch=0)


def in_eight_bits(real, what, tokens, vocab_size):
    return real(what, tokens, vocab_size).astype(np.int8)


# The naive check: how such faults came to be shipped


@dataclass(frozen=True)
class NaiveCase(OperationCase):
    """Weights times 0.02, every token id once, no dropout, and 1 as the upstream gradient: that of `.sum()`."""

    def source(self):
        return NaiveSource(self)


class NaiveSource(Source):
    """A NaiveCase's numbers instead of scaled, repeated and random ones."""

    def normal(self, *shape):
        return 0.02 * super().normal(*shape)

    def gain(self, *shape):
        return np.ones(shape, self._case.dtype)

    def upstream(self, *shape):
        return np.ones(shape, self._case.dtype)

    def ids(self, high, *shape):
        return np.random.default_rng(0).permutation(high)[: math.prod(shape)].reshape(shape)


NAIVE_SHAPE = {"B": 1, "T": 6, "C": 12, "I": 12, "O": 12, "V": 20, "NH": 3, "HS": 4, "past": 0, "start": 0, "rest": 0}
NAIVE_ATOL = 1e-4
NAIVE_MODEL = ModelCase(GPTConfig(20, 8, 12, 3, 2, drop_rate=0.0), B=1, T=6, scale=0.02, dtype="float32")


def naive_difference(got, want):
    """The largest |got − want| over all tensors; nan if a shape differs or a number is NaN."""
    differences = [0.0]
    for name, answer in want.items():
        if np.shape(got.get(name)) != np.shape(answer):
            return math.nan
        differences.append(float(np.abs(got[name] - np.asarray(answer, np.float64)).max()))
    return float(np.max(differences))


def naive_operation(name):
    """Compare one operation on a NaiveCase, in float32, without checking that its arguments are unchanged."""

    def difference():
        one = operations.OPERATIONS[name]
        inputs = one.inputs(NaiveCase(NAIVE_SHAPE, dtype="float32"))
        want = next(iter(operations.torch_answers(name, inputs).values()))
        got, cache = one.forward(inputs)
        return naive_difference(got | one.backward(inputs, cache), want)

    return difference


def naive_attention():
    """Compare the attention branch alone, with the gradient of its output's `.sum()`."""
    config, params = NAIVE_MODEL.config, NAIVE_MODEL.params()
    prefix = "trf_blocks.0."
    own = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
    x = np.random.default_rng(0).standard_normal((1, 6, config.emb_dim)).astype(np.float32)
    y, cache = block.attention_branch_forward(
        x, join(own), config.n_heads, block.Dropout(0.0, None, np.float32), None, 0
    )
    grads = {}
    dx = block.attention_branch_backward(np.ones_like(y), cache, grads)
    module = from_params(config, params, attention="plain").trf_blocks[0].att
    leaf = torch.from_numpy(x).requires_grad_()
    ty = module(leaf)
    ty.sum().backward()
    want = {f"att.{name}": p.grad.numpy() for name, p in module.named_parameters()}
    return naive_difference(
        {"y": y, "dx": dx} | separate(grads), {"y": ty.detach().numpy(), "dx": leaf.grad.numpy()} | want
    )


def naive_batch():
    """Six different ids and their targets."""
    ids = np.random.default_rng(0).permutation(NAIVE_MODEL.config.vocab_size)[:7]
    return ids[None, :-1], ids[None, 1:]


def naive_model():
    """Compare loss and all gradients of a small GPT with weights times 0.02."""
    model, (tokens, targets) = NAIVE_MODEL.model(), naive_batch()
    loss, grads = model.loss_and_grads(tokens, targets)
    reference = from_params(NAIVE_MODEL.config, NAIVE_MODEL.params())
    want, want_grads = loss_and_grads(reference, tokens, targets)
    return naive_difference({"loss": loss, "logits": model(tokens)} | grads, {"loss": want} | want_grads)


def naive_tied():
    """Check only that a tied model's gradients have its parameters' names and shapes."""
    case = replace(NAIVE_MODEL, config=TIED.config)
    grads, params = case.model().loss_and_grads(*case.batch())[1], case.params()
    return 0.0 if {n: g.shape for n, g in grads.items()} == {n: p.shape for n, p in params.items()} else math.nan


TOKENS = np.array([[3, 1, 4, 0, 5, 9]])


def naive_loaded():
    """Check that a loaded model gives the saved one's logits."""
    model = replace(NAIVE_MODEL, config=TIED.config).model()
    with tempfile.TemporaryDirectory() as place:
        save(model, place)
        return naive_difference({"y": load(place)(TOKENS)}, {"y": model(TOKENS)})


def naive_foreign():
    """Check that a model imported from GPT-2's tensors gives finite logits of the right shape."""
    tensors = gpt2_tensors()
    with tempfile.TemporaryDirectory() as place:
        logits = weights.model_of(huggingface_folder(Path(place), tensors))(weights.TOKENS)
    return 0.0 if logits.shape == (2, 5, 11) and np.isfinite(logits).all() else math.inf


def naive_adamw():
    """Compare one step with torch's defaults on one weight."""
    rng = np.random.default_rng(0)
    w, g = (0.02 * rng.standard_normal((4, 4)).astype(np.float32) for _ in range(2))
    leaf = torch.from_numpy(w.copy()).requires_grad_()
    leaf.grad = torch.from_numpy(g)
    torch.optim.AdamW([leaf]).step()
    optim.AdamW({"w": w}).step({"w": g})
    return naive_difference({"w": w}, {"w": leaf.detach().numpy()})


def naive_clipping():
    """Compare clipping of a single tensor, whose norm is the global norm."""
    g = np.random.default_rng(0).standard_normal((4, 4))
    leaf = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    leaf.grad = torch.from_numpy(g.copy())
    torch.nn.utils.clip_grad_norm_([leaf], 1.0)
    optim.clip_grad_norm(grads := {"w": g}, 1.0)
    return naive_difference(grads, {"w": leaf.grad.numpy()})


def naive_schedule():
    """Check the learning rate at the end of warm-up."""
    return abs(optim.warmup_cosine(10, 1.0, 10, 100) - 1.0)


def naive_generation(**sampling):
    """Check one row within the context: ids in range or, if greedy, the likeliest first token."""

    def difference():
        model, (tokens, _) = NAIVE_MODEL.model(), naive_batch()
        rng = Generator(0) if sampling else None
        got = decoding.generate(model, tokens[:, :3], 2, **sampling, rng=rng)
        if sampling:
            return 0.0 if got.shape == (1, 5) and got.max() < NAIVE_MODEL.config.vocab_size else math.nan
        return float(got[0, 3] != model(tokens[:, :3])[0, -1].argmax())

    return difference


def naive_resume():
    """Check that a resumed model has the saved one's parameters."""
    learner = learners.small_learner()
    again = learners.resumed(learner)
    return naive_difference(again.params(), learner.params())


# The exhibits


@dataclass(frozen=True)
class Fault:
    """One fault: what is wrong, where it was found, the check that fails, and the naive check."""

    where: str
    """The part of a GPT in which a published project had the fault; "" for a fault of our own choice."""
    what: str
    apply: Callable[[pytest.MonkeyPatch], None]
    check: Callable[[], None]
    """Passes without the fault, fails with it; a part of `suite`."""
    message: str
    """The start of the failure's message (a regular expression)."""
    suite: str
    """The test file that must find it."""
    naive: Callable[[], float]
    """The naive check's largest difference; anything below NAIVE_ATOL counts as a match."""
    operation: str | None = None
    """The operation with the fault, for diagnosing users' own functions."""
    fix: str = ""
    """The correction, shown to the author of such a function."""

    def __str__(self):
        return f"{self.where or 'our own'}: {self.what}"


SAMPLED = SAMPLINGS[2]
ONLY = r"d {}\.weight\[[^\n]*$"  # one gradient is wrong, and the message has one line
DK = around(attention, "attention_backward", scrambled_dk)
SHARED_MASK = around(dropout, "dropout_backward", another_mask)
NO_RESCALING = around(dropout, "dropout_mask", lambda real, keep, rate, dtype: keep.astype(dtype))
ONE_ROW = around(embedding, "position_embedding_backward", one_row_of_the_batch)
SQRT_C = scores_by(lambda q: 1 / math.sqrt(q.shape[1]))


def of(operation, where, what, apply, case, tensor, fix, message=None):
    """A fault found by one operation's comparison with torch."""
    message = message or rf"{operation}\.{tensor}\["
    check = partial(operations.check_operation, operation, case)
    naive = naive_attention if operation == "attention" else naive_operation(operation)
    return Fault(where, what, apply, check, message, "test_operations.py", naive, operation, fix)


def of_the_model(where, what, apply, case, message, check=models.check_model, naive=naive_model):
    """A fault found by comparing the complete model; the message lists every wrong gradient from top to bottom."""
    return Fault(where, what, apply, partial(check, case), message, "test_model.py", naive)


def of_a_law(where, what, apply, check, message, naive=naive_model):
    """A fault found without torch."""
    return Fault(where, f"{what}, without torch", apply, check, message, "test_laws.py", naive)


def of_training(where, what, apply, check, message, naive):
    return Fault(where, what, apply, check, message, "test_optim.py", naive)


def of_a_run(where, what, apply, message, naive):
    """A fault in the optimiser found by a training run."""
    return of_training(where, f"{what}, in a run", apply, training.check_trajectory, message, naive)


def of_generation(where, what, apply, naive, message="generate|generated ids", sampling=SAMPLED):
    """A fault found by comparing generation with the loop without a cache, past the context length."""
    check = partial(check_generate, ModelCase(DROPPED.config, B=3, T=4), 9, sampling)
    return Fault(where, what, apply, check, message, "test_decoding.py", naive)


def of_a_loader(where, what, name, wrong):
    """A fault in reading GPT-2's own layout."""
    check, apply = weights.check_loaded, around(gpt2, name, wrong)
    return Fault(where, what, apply, check, "logits: ", "test_weights.py", naive_foreign)


def of_resume(what, apply, message):
    check = learners.check_resume
    return Fault("resume", what, apply, check, message, "test_state_machine.py", naive_resume)


LOSSES = (  # what, p_target -> the token's loss, targets -> the count, the fix
    (
        "eps inside the logarithm",
        lambda p: -np.log(p + 1e-9),
        np.size,
        "take log-softmax, z − max z − log Σ exp(z − max z): it needs no eps",
    ),
    ("mean over the wrong count", lambda p: -np.log(p), len, "the mean is over every target, B · T of them"),
)

FAULTS = [
    of(
        "attention",
        "attention backward",
        "dK scrambled by a reshape",
        DK,
        HEADS,
        "dk",
        "dscores must be transposed, dk = dsᵀ @ q / √HS; a reshape of qᵀ @ ds has the shape and not the content",
    ),
    of_a_law("attention backward", "dK scrambled by a reshape", DK, operation_slopes, "attention dk: "),
    of_a_law("attention backward", "dK scrambled in the model", DK, model_slopes, r"d tok_emb\.weight: "),
    of(
        "attention",
        "attention backward",
        "dV from the probabilities before dropout",
        dv_before_dropout,
        DROPPED_HEADS,
        "dv",
        "y = (p · mask) @ v, so dv = (p · mask)ᵀ @ dy, with the mask",
    ),
    of(
        "attention",
        "",
        "dQ and dK exchanged",
        around(attention, "attention_backward", lambda real, *args: [real(*args)[i] for i in (1, 0, 2)]),
        HEADS,
        "dq",
        "s = q @ kᵀ / √HS, so dq comes from ds @ k and dk from dsᵀ @ q",
    ),
    of(
        "attention",
        "attention",
        "scores over sqrt(C)",
        SQRT_C,
        HEADS,
        "y",
        "the divisor is √HS, the root of one head's size",
    ),
    of_the_model("attention", "scores over sqrt(C) in the model", SQRT_C, UNTIED, r"logits\["),
    of(
        "attention",
        "",
        "scores not divided at all",
        scores_by(lambda q: math.sqrt(q.shape[-1])),
        HEADS,
        "y",
        "s = q @ kᵀ / √HS",
    ),
    of(
        "attention",
        "attention",
        "exact zeros among the scores masked",
        masked(zeros_too),
        OperationCase(HEADS.shape, fill="zeros"),
        "y",
        "mask by position: a score may be 0 without lying in the future",
    ),
    of(
        "attention",
        "attention",
        "mask shifted by one",
        masked(future(1)),
        HEADS,
        "y",
        "query t sees keys 0 … t + S − T, its own among them, and none beyond",
    ),
    of(
        "attention",
        "",
        "mask aligned to the first key",
        masked(from_the_first_key),
        DROPPED_HEADS,
        "y",
        "the T queries are the last of the S positions: shift the triangle by S − T",
    ),
    Fault(
        "attention",
        "-1e10 for -inf",
        masked(future(), -1e10),
        partial(laws.check_first_query, -1e12),
        "y of the first query at scores of -1e",
        "test_laws.py",
        naive_attention,
    ),
    of_the_model(
        "attention",
        "query and key exchanged",
        around(GPT, "__call__", query_and_key_swapped),
        UNTIED,
        r"logits\[",
    ),
    of(
        "embedding",
        "embedding backward",
        "rows assigned to dw",
        remembering_ids(assign),
        TABLE,
        "dw",
        "an id may repeat, and dw[ids] = dy keeps its last row only, as does dw[ids] += dy: use np.add.at",
    ),
    of(
        "embedding",
        "embedding backward",
        "dw[ids] += dy",
        remembering_ids(add_once),
        TABLE,
        "dw",
        "NumPy's dw[ids] += dy counts a repeated id once: use np.add.at, or sums over sorted ids",
    ),
    of_the_model(
        "embedding backward",
        "rows assigned to dw in the model",
        remembering_ids(assign),
        UNTIED,
        ONLY.format("tok_emb"),
    ),
    of_a_law("embedding backward", "dw[ids] += dy", remembering_ids(add_once), operation_slopes, "embedding dw: "),
    of(
        "position_embedding",
        "position embedding",
        "gradient of one row of the batch",
        ONE_ROW,
        POSITIONS,
        "dw",
        "every row of the batch reads the same positions: sum dy over the batch",
    ),
    of_the_model("position embedding", "positions not summed in the model", ONE_ROW, UNTIED, ONLY.format("pos_emb")),
    of_the_model(
        "tied head",
        "the head's gradient dropped",
        tied_without("out_head.weight"),
        TIED,
        ONLY.format("tok_emb"),
        naive=naive_tied,
    ),
    of_the_model(
        "tied head",
        "the table's gradient dropped",
        tied_without("tok_emb.weight"),
        TIED,
        ONLY.format("tok_emb"),
        naive=naive_tied,
    ),
    of_a_law(
        "tied head",
        "the head's gradient dropped",
        tied_without("out_head.weight"),
        partial(laws.check_tied_is_the_sum, TIED),
        r"tied is the sum: d tok_emb\.weight\[",
        naive=naive_tied,
    ),
    Fault(
        "tied head",
        "the loader unties by a copy",
        around(GPT, "from_params", untied_by_a_copy),
        checkpoints.check_tied,
        "a tied model, loaded",
        "test_checkpoint.py",
        naive_loaded,
    ),
    of_a_loader("attention", "the loader reads c_attn as key, query, value", "_theirs", thirds_in_another_order),
    of_a_loader("attention", "the loader leaves square weights unturned", "_part", squares_unturned),
    of(
        "layernorm",
        "layernorm backward",
        "dx without g",
        layernorm_without(0),
        ROWS,
        "dx",
        "dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)) with g = dy · scale",
    ),
    of(
        "layernorm",
        "layernorm backward",
        "dx without mean(g)",
        layernorm_without(1),
        ROWS,
        "dx",
        "dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)): the mean of x depends on x",
    ),
    of(
        "layernorm",
        "layernorm backward",
        "dx without the part along x_hat",
        layernorm_without(2),
        ROWS,
        "dx",
        "dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)): the variance of x depends on x",
    ),
    of_a_law(
        "layernorm backward",
        "dx without the part along x_hat",
        layernorm_without(2),
        operation_slopes,
        "layernorm dx: ",
    ),
    of(
        "layernorm",
        "layernorm backward",
        "variance with n - 1",
        normalised_by(lambda x: np.sqrt(x.var(axis=-1, ddof=1, keepdims=True) + 1e-5)),
        ROWS,
        "y",
        "the variance's divisor is C, not C − 1",
    ),
    of(
        "layernorm",
        "layernorm backward",
        "eps outside the root",
        normalised_by(lambda x: x.std(axis=-1, keepdims=True) + 1e-5),
        ROWS,
        "y",
        "rstd = 1 / √(var + eps)",
    ),
    of(
        "gelu",
        "gelu",
        "0.0044715 for 0.044715",
        gelu_with(tanh_cdf(0.0044715)),
        ROWS,
        "y",
        "u = √(2/π) (x + 0.044715 x³)",
    ),
    of_the_model("gelu", "0.0044715 in the model", gelu_with(tanh_cdf(0.0044715)), UNTIED, r"logits\["),
    of(
        "gelu",
        "gelu",
        "a six-digit constant",
        gelu_with(tanh_cdf(0.044715, 0.797885)),
        ROWS,
        "y",
        "√(2/π) is math.sqrt(2 / math.pi): six digits are not enough",
    ),
    of("gelu", "gelu", "the exact erf for tanh", gelu_with(erf_cdf), ROWS, "y", "GPT-2's GELU is the tanh form"),
    of(
        "gelu",
        "",
        "dx off by 1e-10 of itself",
        around(gelu, "gelu_backward", lambda real, *args: real(*args) * (1 + 1e-10)),
        ROWS,
        "dx",
        "a constant with too few digits",
    ),
    *(
        of("cross_entropy", "cross-entropy", what, loss_with(per_token, over), LOGITS, "loss", fix)
        for what, per_token, over, fix in LOSSES
    ),
    of(
        "cross_entropy",
        "cross-entropy",
        "backward without 1/N",
        without_mean,
        LOGITS,
        "dlogits",
        "the loss is a mean: its gradient has the factor 1 / N",
    ),
    of_a_law(
        "cross-entropy",
        "backward without 1/N",
        without_mean,
        partial(laws.check_batch_is_the_mean, UNTIED),
        r"batch is the mean: d tok_emb\.weight\[",
    ),
    of(
        "cross_entropy",
        "",
        "dloss assumed to be 1",
        around(cross_entropy, "cross_entropy_backward", lambda real, dloss, cache, out=None: real(1.0, cache, out)),
        LOGITS,
        "dlogits",
        "the gradient from above is dloss: multiply by it",
    ),
    of_the_model(
        "dropout", "active in evaluation", around(GPT, "__call__", dropped), DROPPED, r"logits\[", naive=naive_model
    ),
    of_generation(
        "dropout", "active in generation", around(GPT, "next_logits", dropped), naive_generation(temperature=1.0)
    ),
    of("dropout", "dropout", "not rescaled", NO_RESCALING, HALF, "mask", "what is kept is divided by 1 − drop_rate"),
    of_the_model("dropout", "not rescaled in the model", NO_RESCALING, DROPPED, r"loss with dropout\["),
    of(
        "dropout",
        "dropout",
        "another mask in backward",
        SHARED_MASK,
        HALF,
        "dx",
        "the backward pass uses the mask of the forward pass",
    ),
    of_the_model("dropout", "another mask in the model's backward", SHARED_MASK, DROPPED, r"d tok_emb\.weight\["),
    *(
        family("AdamW", what, apply, *rest, naive_adamw)
        for what, apply in (
            ("weight decay added to the gradient", around(optim.AdamW, "step", l2_decay)),
            ("eps inside the root", stepped(eps_inside_the_root)),
            ("no bias correction", stepped(no_bias_correction)),
        )
        for family, rest in (
            (of_training, (training.check_adamw, r"AdamW table\[")),
            (of_a_run, ("trained ",)),
        )
    ),
    of_training(
        "clipping",
        "each tensor by its own norm",
        around(optim, "clip_grad_norm", clip_each_alone),
        training.check_clipping,
        r"clip_grad_norm (table|weight|bias|one)\[",
        naive_clipping,
    ),
    of_a_run(
        "clipping",
        "each tensor by its own norm",
        around(optim, "clip_grad_norm", clip_each_alone),
        "trained ",
        naive_clipping,
    ),
    of_training(
        "",
        "no warm-up",
        around(
            optim, "warmup_cosine", lambda real, step, peak, warmup, total: real(max(step, warmup), peak, warmup, total)
        ),
        partial(training.check_schedule, 0.1, 3, 10),
        r"warmup_cosine\[",
        naive_schedule,
    ),
    of_a_run(
        "",
        "the schedule a step late",
        around(optim, "warmup_cosine", lambda real, step, *rest: real(max(step - 1, 0), *rest)),
        "trained ",
        naive_schedule,
    ),
    of_generation(
        "generation",
        "one row's top-k threshold for all",
        around(decoding, "keep_top_k", first_rows_threshold),
        naive_generation(temperature=1.0, top_k=3),
    ),
    Fault(
        "generation",
        "ties keep more than k",
        around(decoding, "keep_top_k", ties_kept),
        check_ties,
        "top_k 1 keeps ids",
        "test_decoding.py",
        naive_generation(temperature=1.0, top_k=3),
    ),
    of_generation("key-value cache", "a position off by one", positions_off_by(1), naive_generation()),
    of_generation(
        "key-value cache",
        "not exactly the same as without it",
        around(block.KVCache, "extend", half_precision),
        naive_generation(),
    ),
    of_generation(
        "key-value cache",
        "fails past the context length",
        around(decoding, "stream", fails_past_the_context),
        naive_generation(),
        message="position 6 of a context of 6",
    ),
    of_resume("the seed used again", around(NumpyLearner, "restore", seed_again), "resumed: (batches|losses)"),
    of_resume("the same batches drawn again", around(Position, "restored", epoch_again), "resumed: batches"),
    of_resume("the optimiser's state lost", around(NumpyLearner, "restore", moments_lost), "resumed: losses"),
    of(
        "gelu",
        "dtype",
        "np.sqrt(int) turns float32 into float64",
        around(gelu, "gelu_forward", lambda real, x: (real(x)[0] / np.sqrt(np.int64(1)), real(x)[1])),
        OperationCase(ROWS.shape, dtype="float32"),
        "y",
        "np.sqrt of an int is float64 and widens the rest: use math.sqrt",
        r"gelu\.y: dtype float64",
    ),
    of_the_model(
        "dtype",
        "token ids of eight bits",
        around(numpy_gpt.model, "checked_ids", in_eight_bits),
        ModelCase(GPTConfig(300, 8, 12, 3, 1, drop_rate=0.0), B=4, T=8),
        r"logits\[|embedding: id -",
    ),
    of(
        "linear",
        "",
        "a bias gradient averaged",
        around(
            linear, "linear_backward", lambda real, dy, *args, **kw: (*real(dy, *args, **kw)[:2], dy.mean(axis=(0, 1)))
        ),
        LINEAR,
        "db",
        "db is the sum of dy over every leading axis",
    ),
    of(
        "linear",
        "",
        "a weight gradient transposed",
        around(
            linear,
            "linear_backward",
            lambda real, dy, cache, *args, **kw: [real(dy, cache)[0], real(dy, cache)[1].T, real(dy, cache)[2]],
        ),
        LINEAR,
        "dw",
        "w is (out, in), so dw = dyᵀ @ x",
        r"linear\.dw: shape \(4, 5\)",
    ),
    of(
        "gelu",
        "",
        "an argument written into",
        around(gelu, "gelu_backward", lambda real, dy, cache: np.positive(real(dy, cache), out=dy)),  # right numbers
        ROWS,
        "dx",
        "others still need the argument: work on a copy",
        "gelu wrote into its argument dy",
    ),
]


def find(name):
    """The fault of this name. If unknown, raises KeyError with the names that contain it or are nearest."""
    faults = {str(fault): fault for fault in FAULTS}
    if name not in faults:
        near = [fault for fault in faults if name.lower() in fault.lower()]
        near = near or difflib.get_close_matches(name, faults, n=5, cutoff=0)
        raise KeyError(f"no fault {name!r} among the {len(faults)} of museum.md; near it: {', '.join(near)}")
    return faults[name]
