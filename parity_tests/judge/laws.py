"""Mathematical laws, checked without torch."""

import math
from dataclasses import replace

import numpy as np

from numpy_gpt import GPT
from numpy_gpt.ops import attention, cross_entropy, dropout, embedding, gelu, layernorm, linear
from parity_tests.judge import compare, strategies
from parity_tests.judge.compare import check, check_exact

EPS = float(np.finfo(np.float64).eps)


MODEL = compare.MODEL._replace(title="laws of the model")


def largest(grads):
    """G, the largest |gradient| of the model."""
    return max(float(np.abs(g).max()) for g in grads.values())


class GivenMasks:
    """A stand-in for Generator that draws the same masks in every pass."""

    def __init__(self, seed):
        self._seed = seed
        self.restart()

    def restart(self):
        self._rng = np.random.default_rng(self._seed)
        return self

    def bernoulli(self, shape, p):
        return self._rng.random(shape) < p


def check_first_query(score):
    """Assert that the first query, which sees one key, returns that key's value exactly, whatever the score."""
    v = np.random.default_rng(0).standard_normal((2, 3, 5, 4))
    size = np.full_like(v, math.sqrt(abs(score) / 2))  # q · k / √4 is ± the score
    y, _ = attention.attention_forward(size, size * math.copysign(1, score), v)
    check_exact(f"y of the first query at scores of {score:g}", y[:, :, 0], v[:, :, 0])


def check_slope(name, f, slope, terms):
    """Compare slope, the claimed d f(h) / dh at h = 0, with central differences.

    Two of them, with h and h / 2, give Richardson's (4 D(h/2) − D(h)) / 3. Its error is of order h⁴, well below the
    difference of the two, of order h². Rounding adds 64 eps · terms / h, where terms is the sum of the absolute values
    that f adds up. The h with the smallest allowance is used; the allowance must be small relative to terms.
    """
    best = None
    for h in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4):
        d1, d2 = ((f(e) - f(-e)) / (2 * e) for e in (h, h / 2))
        allowance = abs(d1 - d2) + 64 * EPS * terms / h
        if best is None or allowance < best[0]:
            best = (allowance, (4 * d2 - d1) / 3)
    allowance, want = best
    assert allowance <= 1e-6 * terms, f"{name}: no step is small enough, allowance {allowance:.2g} of {terms:.2g}"
    assert abs(slope - want) <= allowance, f"{name}: {slope:.12e}, differences give {want:.12e} ± {allowance:.1e}"


def check_model_slopes(case):
    """Check every parameter's gradient along a random direction, with fixed dropout masks."""
    tokens, targets = case.batch()
    params, masks = case.params(), GivenMasks(case.seed)
    loss, grads = GPT.from_params(case.config, params).loss_and_grads(tokens, targets, masks)
    rng = np.random.default_rng([case.seed, 2])
    for name, grad in grads.items():
        direction = rng.standard_normal(grad.shape)
        direction /= np.sqrt((direction**2).sum())

        def moved(h, name=name, direction=direction):
            model = GPT.from_params(case.config, params | {name: params[name] + h * direction})
            return float(model.loss_and_grads(tokens, targets, masks.restart())[0])

        check_slope(f"d {name}", moved, float((grad * direction).sum()), abs(float(loss)) + 1.0)


def check_tied_is_the_sum(case):
    """Assert that the tied table's gradient is the sum of the untied model's two, with the same weights."""
    tied = replace(case.config, tie_weights=True)
    params = replace(case, config=tied).params()
    tokens, targets = case.batch()
    loss, grads = GPT.from_params(tied, params).loss_and_grads(tokens, targets)
    untied = replace(tied, tie_weights=False)
    apart = params | {"out_head.weight": params["tok_emb.weight"].copy()}
    want_loss, want = GPT.from_params(untied, apart).loss_and_grads(tokens, targets)
    G = largest(want)
    check("tied is the sum: loss", loss, want_loss, 1.0, MODEL)
    both = want["tok_emb.weight"] + want.pop("out_head.weight")
    for name, grad in (want | {"tok_emb.weight": both}).items():
        check(f"tied is the sum: d {name}", grads[name], grad, G, MODEL)


def check_batch_is_the_mean(case):
    """Assert that a batch's loss and gradients are the means over its rows."""
    model, (tokens, targets) = case.model(), case.batch()
    total, sums, G = 0.0, {}, 0.0
    for b in range(case.B):
        loss, grads = model.loss_and_grads(tokens[b : b + 1], targets[b : b + 1])
        total += float(loss) / case.B
        sums = {name: sums.get(name, 0) + g / case.B for name, g in grads.items()}
        G = max(G, largest(grads))  # over the rows: their mean may cancel
    loss, grads = model.loss_and_grads(tokens, targets)
    check("batch is the mean: loss", loss, np.float64(total), max(total, 1.0), MODEL)
    for name, grad in grads.items():
        check(f"batch is the mean: d {name}", grad, sums[name], G, MODEL)


def check_operation_slopes(operation, forward, backward, inputs, rng):
    """Compare d <dy, forward(inputs)> along a random direction in each input with <gradient, direction>."""
    y, cache = forward(*inputs.values())
    dy = rng.standard_normal(np.shape(y))
    grads = backward(dy if np.ndim(y) else float(dy), cache)
    grads = grads if isinstance(grads, tuple) else (grads,)
    assert len(grads) == len(inputs)
    for (name, value), grad in zip(inputs.items(), grads, strict=True):
        direction = rng.standard_normal(value.shape)

        def moved(h, name=name, value=value, direction=direction):
            return float((dy * forward(*(inputs | {name: value + h * direction}).values())[0]).sum())

        terms = float(np.abs(dy * y).sum() + np.abs(grad * direction).sum())
        check_slope(f"{operation} d{name}", moved, float((grad * direction).sum()), terms)


def operation_slopes(seed):
    """Every operation with its differentiable inputs: (name, forward, backward, inputs)."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    ids, targets = strategies.repeated_ids(rng, 6, (2, 5)), strategies.repeated_ids(rng, 6, (2, 5))
    keep = rng.random((2, 3, 4, 6)) < 0.7
    mask = dropout.dropout_mask(keep, 0.3, np.float64)
    yield (
        "linear",
        linear.linear_forward,
        linear.linear_backward,
        {
            "x": normal((2, 3, 4)),
            "w": normal((5, 4)),
            "b": normal(5),
        },
    )
    yield (
        "layernorm",
        layernorm.layernorm_forward,
        layernorm.layernorm_backward,
        {
            "x": normal((2, 3, 8)),
            "scale": normal(8),
            "shift": normal(8),
        },
    )
    yield "gelu", gelu.gelu_forward, gelu.gelu_backward, {"x": 2 * normal((4, 5))}
    factors = mask[0, 0]
    yield "dropout", lambda x: dropout.dropout_forward(x, factors), dropout.dropout_backward, {"x": normal((4, 6))}
    yield (
        "embedding",
        lambda w: embedding.embedding_forward(ids, w),
        embedding.embedding_backward,
        {"w": normal((6, 3))},
    )
    yield (
        "position_embedding",
        lambda x, w: embedding.position_embedding_forward(x, w, 2),
        embedding.position_embedding_backward,
        {"x": normal((2, 4, 3)), "w": normal((7, 3))},
    )
    for name, factors in (("attention", None), ("attention with dropout", mask)):
        yield (
            name,
            lambda q, k, v, factors=factors: attention.attention_forward(q, k, v, factors),
            attention.attention_backward,
            {
                "q": normal((2, 3, 4, 5)),
                "k": normal((2, 3, 6, 5)),
                "v": normal((2, 3, 6, 5)),
            },
        )
    yield (
        "cross_entropy",
        lambda z: cross_entropy.cross_entropy_forward(z, targets),
        cross_entropy.cross_entropy_backward,
        {"logits": normal((2, 5, 6))},
    )


def check_gradients_are_slopes(seed):
    """Check every operation's gradients along random directions."""
    for operation, forward, backward, inputs in operation_slopes(seed):
        check_operation_slopes(operation, forward, backward, inputs, np.random.default_rng([seed, 1]))
