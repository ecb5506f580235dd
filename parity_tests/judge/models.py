"""Checks of a model against torch: logits, loss, every gradient by name, with dropout, in float64 and float32."""

import math
from dataclasses import replace

import numpy as np
import torch
from hypothesis import reject

from numpy_gpt import Generator, GPTConfig
from parity_tests.judge import compare, strategies
from parity_tests.judge.compare import check, check_exact
from parity_tests.judge.strategies import ModelCase
from torch_gpt.model import from_params, loss_and_grads

SMALL = GPTConfig(vocab_size=11, context_length=6, emb_dim=12, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True)


VARIANTS = [(tied, bias) for tied in (False, True) for bias in (False, True)]


DROP_RATES = (0.1, 0.5, 0.9, 1.0)


class RecordedMasks:
    """A stand-in for Generator: draws with NumPy and keeps its draws."""

    def __init__(self, seed):
        self._rng, self.drawn = np.random.default_rng(seed), []

    def bernoulli(self, shape, p):
        keep = self._rng.random(shape) < p
        self.drawn.append(keep)
        return keep


def dropout_factors(case, keeps):
    """The factors for torch, 0 or 1 / (1 − rate), after checking that the draws have torch's number and order.

    The order: embeddings; per block the attention probabilities, the attention branch, the feed-forward branch.
    """
    x, probabilities = (case.B, case.T, case.config.emb_dim), (case.B, case.config.n_heads, case.T, case.T)
    shapes, rate = [x] + case.config.n_layers * [probabilities, x, x], case.config.drop_rate
    if rate == 1:
        assert keeps == [], "dropout masks: rate 1 keeps nothing, so nothing is drawn"
        return [np.zeros(shape, case.dtype) for shape in shapes]
    assert [keep.shape for keep in keeps] == shapes, f"dropout masks: {[keep.shape for keep in keeps]} for {shapes}"
    return [keep.astype(case.dtype) / (1 - rate) for keep in keeps]


def torch_logits(reference, tokens, factors=None):
    """The reference's logits, without dropout or with these factors."""
    device = reference.tok_emb.weight.device
    reference.train(factors is not None)
    reference.use_masks(None if factors is None else [torch.from_numpy(factor).to(device) for factor in factors])
    with torch.no_grad():
        logits = reference(torch.from_numpy(tokens).to(device)).cpu().numpy()
    reference.use_masks(None)
    return logits


def check_loss(name, got, want, logits):
    """Compare losses, each a log-sum-exp (at most max + log V) minus a logit. See reject_certain."""
    __tracebackhide__ = True
    reject_certain(want)
    scale = float(np.abs(logits).max()) + math.log(logits.shape[-1])
    check(name, got, np.asarray(want, logits.dtype), scale, compare.MODEL)


def reject_certain(loss):
    """Reject a case whose true loss is under 1e-3: its gradients all stem from p − 1 with p nearly 1.

    Rounding alone is then eps / loss relative to G, in torch as here.
    """
    if loss < 1e-3:
        reject()


def reject_cancelled(case, logits, targets, grads):
    """Reject a case whose sums over the batch cancel: all rows alike, and every id equally often a target.

    Then d logits = (p − onehot) / N sums to 0 over the rows, and G is only the rounding of both sides. The measure is
    Σ |d logits| · |head|, which bounds d final_norm.shift without the cancellation. With a tied table of constant rows
    the gradient cancels again below the last LayerNorm, so the measure is then also multiplied by rstd. One operation
    may be off by 64 eps of it, and the model by 2^16 eps G: G must be at least a thousandth of it.
    """
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    dlogits = np.abs(p - np.eye(logits.shape[-1])[targets]).mean(axis=(0, 1))
    head = case.params()["tok_emb.weight" if case.config.tie_weights else "out_head.weight"]
    below = last_rstd(case) if case.fill == "constant rows" and case.config.tie_weights else 1.0
    if largest(grads) < 1e-3 * max(1.0, below) * float((dlogits @ np.abs(head)).max()):
        reject()


def last_rstd(case):
    """The largest 1 / sqrt(var + eps) of the last LayerNorm's rows, computed by torch."""
    reference, seen = from_params(case.config, case.params(), attention="plain"), []
    reference.final_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch_logits(reference, case.batch()[0])
    return float((seen[0].var(-1, unbiased=False) + 1e-5).rsqrt().max())


def largest(grads):
    """G, the largest |gradient| of the model."""
    return max(float(np.abs(g).max()) for g in grads.values())


def check_gradients(got, want):
    """Compare every gradient by name, within 2^16 eps G; a key bias with exact 0. The message names all wrong ones.

    (A wrong gradient spoils those of all layers below it; the list shows where the error begins.)
    """
    __tracebackhide__ = True
    assert list(got) == list(want), "the gradients' names, in the order of torch's parameters"
    G, wrong = largest(want), []
    for name, answer in want.items():
        try:
            check(f"d {name}", got[name], answer, G, compare.MODEL)
            if name.endswith("W_key.bias"):  # it shifts all of a query's scores alike: the true gradient is 0
                check(f"d {name} is 0", got[name], np.zeros_like(answer), G, compare.MODEL)
        except AssertionError as error:
            wrong.append(str(error))
    if wrong:
        raise AssertionError("\n".join(wrong))


def check_model(case, attention="plain", device="cpu"):
    """Compare logits, loss and all gradients of one case; also with dropout if configured (then "plain" only).

    device: torch's.
    """
    __tracebackhide__ = True
    config, params, (tokens, targets) = case.config, case.params(), case.batch()
    before = {name: a.copy() for name, a in params.items()}
    model, reference = case.over(params), from_params(config, params, attention=attention, device=device)

    layout = "C" if case.layout == "gaps" else case.layout  # the gaps are filled with NaN
    ids, want_ids = (strategies.arrange(a, layout) for a in (tokens, targets))
    logits = torch_logits(reference, tokens)
    check("logits", model(ids), logits, float(np.abs(logits).max()), compare.MODEL)
    want, want_grads = loss_and_grads(reference, tokens, targets)
    check_loss("loss", model.loss(ids, want_ids), want, logits)
    loss, grads = model.loss_and_grads(ids, want_ids)
    check_loss("loss with gradients", loss, want, logits)
    reject_cancelled(case, logits, targets, want_grads)
    check_gradients(grads, want_grads)

    if config.drop_rate:
        rng = RecordedMasks(case.seed)
        loss, grads = model.loss_and_grads(ids, want_ids, rng)
        factors = dropout_factors(case, rng.drawn)
        want, want_grads = loss_and_grads(reference, tokens, targets, factors)
        logits = torch_logits(reference, tokens, factors)
        check_loss("loss with dropout", loss, want, logits)
        reject_cancelled(case, logits, targets, want_grads)
        check_gradients(grads, want_grads)
    for name, a in params.items():
        check_exact(f"parameter {name} after a pass", a, before[name])


def check_parts(case, parts):
    """Compare a batch given in equal parts, each with its own masks, with torch's loss and gradients of all at once."""
    __tracebackhide__ = True
    part, (tokens, targets) = replace(case, B=case.B // parts), case.batch()
    params, factors, rng = case.params(), None, RecordedMasks(case.seed)
    loss, grads = case.over(params).loss_and_grads(tokens, targets, rng, parts=parts)
    if case.config.drop_rate:
        each = len(rng.drawn) // parts
        drawn = [dropout_factors(part, rng.drawn[i * each : (i + 1) * each]) for i in range(parts)]
        factors = [np.concatenate(of_site) for of_site in zip(*drawn, strict=True)]
    reference = from_params(case.config, params, attention="plain")
    want, want_grads = loss_and_grads(reference, tokens, targets, factors)
    logits = torch_logits(reference, tokens, factors)
    check_loss("loss of the parts", loss, want, logits)
    reject_cancelled(case, logits, targets, want_grads)
    check_gradients(grads, want_grads)


def float32_case(i, scale=None, drop_rate=0.0):
    """The i-th of a fixed set of middle-sized float32 models; scale None: log-uniform from 1e-2 to 1."""
    rng = np.random.default_rng([32, i])
    T, n_heads = int(rng.integers(4, 49)), int(rng.integers(1, 5))
    config = GPTConfig(
        vocab_size=int(rng.integers(20, 200)),
        context_length=T,
        emb_dim=n_heads * int(rng.integers(4, 25)),
        n_heads=n_heads,
        n_layers=int(rng.integers(1, 4)),
        drop_rate=drop_rate,
        qkv_bias=i % 2 == 0,
        tie_weights=i % 4 < 2,
    )
    scale = 10 ** rng.uniform(-2, 0) if scale is None else scale
    return ModelCase(config, B=int(rng.integers(1, 5)), T=T, scale=scale, seed=i, dtype="float32")


def torch_answers(case, attention, dtype, device="cpu"):
    """Logits, loss and gradients of the case's parameters, computed by torch in this dtype on this device.

    With dropout (on the CPU), the masks are those that torch draws after manual_seed(case.seed).
    """
    tokens, targets = case.batch()
    reference = from_params(case.config, case.params(), attention=attention, dtype=dtype, device=device)
    if case.config.drop_rate:
        torch.manual_seed(case.seed)
        loss = reference.train().loss(torch.from_numpy(tokens), torch.from_numpy(targets))
        loss.backward()
        loss, grads = loss.item(), {name: p.grad.numpy() for name, p in reference.named_parameters()}
    else:
        loss, grads = loss_and_grads(reference, tokens, targets)
    return {"logits": torch_logits(reference, tokens), "loss": np.asarray(loss)} | {
        f"d {n}": g for n, g in grads.items()
    }


def errors_by_kind(got, want):
    """Largest |got − want| of each tensor kind."""
    errors = {}
    for name, answer in want.items():
        error = float(np.abs(got[name].astype(np.float64) - answer).max())
        errors[compare.kind(name)] = float(np.maximum(error, errors.get(compare.kind(name), 0.0)))  # a NaN stays one
    return errors


def numpy_answers(case):
    """The model's logits, loss and gradients, all in the case's dtype; with dropout, it draws its own masks."""
    model, (tokens, targets) = case.model(), case.batch()
    loss, grads = model.loss_and_grads(tokens, targets, Generator(case.seed) if case.config.drop_rate else None)
    got = {"logits": model(tokens), "loss": loss} | {f"d {name}": grad for name, grad in grads.items()}
    for name, value in got.items():
        assert np.asarray(value).dtype == case.dtype, f"{name} is {np.asarray(value).dtype} in a {case.dtype} model"
    return got


def float32_budget(case, want):
    """Per tensor kind, the larger error of torch's two attentions in float32 on the CPU, plus 4 ulp of G.

    want: the answers in float64. G is the largest |gradient| of the model for gradients, the largest |logit| for
    logits, and the loss for the loss.
    """
    torchs = [errors_by_kind(torch_answers(case, path, torch.float32), want) for path in ("plain", "sdpa")]
    G = max(float(np.abs(answer).max()) for name, answer in want.items() if name.startswith("d "))
    G = dict.fromkeys(torchs[0], G) | {name: float(np.abs(want[name]).max()) for name in ("logits", "loss")}
    worst = {name: float(np.max([errors[name] for errors in torchs])) for name in G}
    return {name: worst[name] + 4 * float(np.spacing(np.float32(G[name]))) for name in G}


def float32_ratios(case):
    """NumPy's float32 error over float32_budget, per tensor kind; the judge is float64."""
    want = torch_answers(case, "plain", torch.float64)
    budget = float32_budget(case, want)
    return {name: error / budget[name] for name, error in errors_by_kind(numpy_answers(case), want).items()}


def float32_percentiles(cases):
    """Tensor kind -> the 95th percentile of its ratio over the cases that contain it."""
    ratios = {}
    for case in cases:
        for name, ratio in float32_ratios(case).items():
            ratios.setdefault(name, []).append(ratio)
    return {name: float(np.percentile(values, 95)) for name, values in ratios.items()}


def check_float32(cases, which="weights <= 1"):
    """Apply the rule for float32: errors at most twice torch's, not closeness to torch."""
    __tracebackhide__ = True
    percentiles = float32_percentiles(cases)
    for name, value in percentiles.items():
        compare.record(f"whole model, float32, {which}: 95th percentile of error / torch's, at most 2", name, value)
    worse = {name: round(value, 2) for name, value in percentiles.items() if not value <= 2}
    assert not worse, f"float32 worse than torch's: {worse}"


def check_own_masks(case, attention):
    """Compare loss and all gradients in training, where each side draws its own masks from the case's seed."""
    __tracebackhide__ = True
    tokens, targets = case.batch()
    want = torch_answers(case, attention, torch.float64)
    loss, grads = case.model().loss_and_grads(tokens, targets, Generator(case.seed))
    torch.manual_seed(case.seed)
    with torch.no_grad():
        logits = from_params(case.config, case.params(), attention=attention).train()(torch.from_numpy(tokens)).numpy()
    check_loss("loss with own masks", loss, want["loss"], logits)
    want_grads = {name[2:]: answer for name, answer in want.items() if name.startswith("d ")}
    reject_cancelled(case, logits, targets, want_grads)
    check_gradients(grads, want_grads)
