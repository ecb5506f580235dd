"""Checks of optimisers and training steps against torch."""

import math

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from numpy_gpt import GPTConfig, optim
from parity_tests.judge import compare
from parity_tests.judge.compare import check, check_exact
from parity_tests.judge.models import RecordedMasks, check_gradients, dropout_factors
from parity_tests.judge.strategies import ModelCase, arrange
from torch_gpt.model import from_params, loss_and_grads, to_params

STEPS = 12


RUN = 24


TRAJECTORY = compare.Budget("training run, parameters after every step", 1)


SHAPES = {"table": (7, 5), "weight": (4, 6), "bias": (6,), "one": (1,)}


def draw_params(seed, dtype, layout="C"):
    rng = np.random.default_rng(seed)
    params = {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}
    if layout not in ("C", "read-only"):
        params = {name: arrange(p, layout) for name, p in params.items()}
    return params


def draw_grads(rng, params):
    """Gradients of every size, about half with an exactly zero part, as unread rows of a table have."""
    grads = {}
    for name, p in params.items():
        g = rng.standard_normal(p.shape) * 10 ** rng.uniform(-4, 2)
        g[..., :1] *= rng.random() < 0.5
        grads[name] = np.asarray(g, p.dtype)
    return grads


class AdamWScales:
    """S of the parameters after t steps: the update's formula on absolute values, subtractions turned into sums.

    θ ← θ (1 + lr λ) + lr / (1 − β₁ᵗ) · M / (√v / √(1 − β₂ᵗ) + eps), M ← β₁ M + (1 − β₁) |g|; v subtracts nothing.
    """

    def __init__(self, params):
        self.S = {name: np.abs(p.astype(np.float64)) for name, p in params.items()}
        self.M = {name: np.zeros(p.shape) for name, p in params.items()}
        self.v = {name: np.zeros(p.shape) for name, p in params.items()}
        self.t = 0

    def step(self, grads, lr, betas, eps, weight_decay):
        self.t += 1
        (b1, b2), t = betas, self.t
        for name, g in grads.items():
            g = np.abs(g.astype(np.float64))
            self.M[name] = b1 * self.M[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
            root = np.sqrt(self.v[name] / (1 - b2**t)) + eps
            self.S[name] = self.S[name] * (1 + lr * weight_decay) + lr / (1 - b1**t) * self.M[name] / root


def check_adamw(
    seed=0,
    dtype="float64",
    layout="C",
    weight_decay=0.1,
    betas=(0.9, 0.999),
    eps=1e-8,
    steps=STEPS,
    optimizer=optim.AdamW,
):
    """Compare parameters after every step with torch.optim.AdamW in the same dtype, changing lr between steps."""
    __tracebackhide__ = True
    rng = np.random.default_rng([seed, 1])
    params = draw_params(seed, dtype, layout)
    scales = AdamWScales(params)
    leaves = {name: torch.from_numpy(np.array(p)).requires_grad_() for name, p in params.items()}
    arrays = dict(params)
    settings_ = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    ours, torchs = optimizer(params, lr=0.1, **settings_), torch.optim.AdamW(leaves.values(), lr=0.1, **settings_)
    for _ in range(steps):
        lr = 10 ** rng.uniform(-4, -0.5)
        ours.lr = torchs.param_groups[0]["lr"] = lr
        grads = draw_grads(rng, params)
        for name, leaf in leaves.items():
            leaf.grad = torch.from_numpy(np.array(grads[name]))
        kept = {name: g.copy() for name, g in grads.items()}
        ours.step(grads)
        torchs.step()
        scales.step(grads, lr, **settings_)
        for name, leaf in leaves.items():
            check(f"AdamW {name}", params[name], leaf.detach().numpy(), scales.S[name])
            check_exact(f"AdamW's argument, the gradient of {name},", grads[name], kept[name])
            assert params[name] is arrays[name], f"AdamW replaced the array of {name}"


def check_clipping(seed=0, dtype="float64", share=0.5, layout="C"):
    """Compare the norm and clipped gradients with torch's; max_norm is this share of the true norm."""
    __tracebackhide__ = True
    rng = np.random.default_rng(seed)
    grads = {name: arrange(g, layout) for name, g in draw_grads(rng, draw_params(seed, dtype)).items()}
    leaves = {name: torch.zeros(g.shape, dtype=getattr(torch, dtype)) for name, g in grads.items()}
    for name, leaf in leaves.items():
        leaf.grad = torch.from_numpy(np.array(grads[name]))
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
    arrays, before = dict(grads), {name: g.copy() for name, g in grads.items()}
    got = optim.clip_grad_norm(grads, share * norm)
    want = clip_grad_norm_(leaves.values(), share * norm).numpy()
    check("clip_grad_norm norm", np.asarray(got, dtype), want, norm)
    for name, g in grads.items():
        check(f"clip_grad_norm {name}", g, leaves[name].grad.numpy(), np.abs(before[name]))
        assert g is arrays[name], f"clip_grad_norm replaced the array of {name}"
        if share > 1.01:
            check_exact(f"clip_grad_norm {name}, under the limit", g, before[name])


def torch_schedule(optimizer, warmup_steps, total_steps):
    """warmup_cosine from torch's schedulers: 1 / (W + 1), 2 / (W + 1) … 1 at step W; then a cosine to a tenth.

    LinearLR's factor is start + (1 − start) · step / W, with start = 1 / (W + 1): (step + 1) / (W + 1).
    """
    floor, rest = optimizer.param_groups[0]["lr"] / 10, total_steps - 1 - warmup_steps
    if not warmup_steps:
        return CosineAnnealingLR(optimizer, T_max=rest, eta_min=floor)
    linear = LinearLR(optimizer, 1 / (warmup_steps + 1), 1.0, warmup_steps)
    cosine = CosineAnnealingLR(optimizer, T_max=rest, eta_min=floor)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup_steps])


def check_schedule(peak, warmup_steps, total_steps):
    """Compare every step's learning rate with torch's, which derives each from the previous one."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = torch_schedule(optimizer, warmup_steps, total_steps)
    for step in range(total_steps):
        got, want = optim.warmup_cosine(step, peak, warmup_steps, total_steps), optimizer.param_groups[0]["lr"]
        check("warmup_cosine", np.float64(got), np.float64(want), peak)
        optimizer.step()
        scheduler.step()


class TrajectoryBudget:
    """A derived bound on how far the parameters of two correct float64 runs may diverge, step by step.

    At every step the two runs' gradients agree within δ = 2^16 eps G; so do m̂, a weighted mean of gradients, and √v̂,
    a weighted norm of them. With r = |m̂| / (√v̂ + eps), the quotient of the update is then off by at most
    (1 + r) δ / (√v̂ + eps), with the largest δ so far. The parameter is off by lr times that, summed over the steps
    (decay only shrinks it). Rounding of the update itself adds 64 eps (|θ| + lr r) a step. √v̂ and r are torch's.
    """

    def __init__(self, params):
        self._delta, self._allowed = 0.0, {name: np.zeros(p.shape) for name, p in params.items()}

    def step(self, model, optimizer):
        """Account for the step that torch's AdamW, with default betas and eps, has just made on model's gradients."""
        machine, lr = float(np.finfo(np.float64).eps), optimizer.param_groups[0]["lr"]
        G = max(float(p.grad.abs().max()) for p in model.parameters())
        self._delta = max(self._delta, compare.MODEL.factor * machine * G)
        for name, p in model.named_parameters():
            state = optimizer.state[p]
            t = int(state["step"])
            root = np.sqrt(state["exp_avg_sq"].numpy() / (1 - 0.999**t)) + 1e-8
            r = np.abs(state["exp_avg"].numpy()) / (1 - 0.9**t) / root
            rounding = 64 * machine * (np.abs(p.detach().numpy()) + lr * r)
            self._allowed[name] = self._allowed[name] + lr * (1 + r) * self._delta / root + rounding

    def check(self, what, got, want):
        """Compare every parameter with torch's."""
        machine = float(np.finfo(np.float64).eps)
        for name, answer in want.items():
            check(f"{what} {name}", got[name], answer, self._allowed[name] / machine, TRAJECTORY)

    def copy(self):
        """A copy of the current bound."""
        other = TrajectoryBudget({})
        other._delta, other._allowed = self._delta, dict(self._allowed)
        return other


def check_trajectory(tied=False, bias=True, seed=0, make_case=ModelCase, optimizer=optim.AdamW):
    """Compare parameters after every step of a float64 run with dropout, clipping and the schedule."""
    config = GPTConfig(13, 7, 12, 3, 2, drop_rate=0.2, qkv_bias=bias, tie_weights=tied)
    case = make_case(config, B=3, T=7, scale=0.3, seed=seed)
    peak, warmup_steps, weight_decay, clipped = 0.005, 3, 0.1, 0
    model, reference = case.model(), from_params(config, case.params(), attention="plain")
    ours = optimizer(model.params, lr=peak, weight_decay=weight_decay)
    torchs = torch.optim.AdamW(reference.parameters(), lr=peak, weight_decay=weight_decay)
    scheduler = torch_schedule(torchs, warmup_steps, RUN)
    budget = TrajectoryBudget(model.params)
    for step in range(RUN):
        tokens, targets = ModelCase(config, B=3, T=7, seed=seed + step).batch()
        rng = RecordedMasks([seed, step])
        loss, grads = model.loss_and_grads(tokens, targets, rng)
        want, want_grads = loss_and_grads(reference, tokens, targets, dropout_factors(case, rng.drawn))
        check("loss of a training run", loss, np.float64(want), max(want, 1.0), compare.MODEL)
        check_gradients(grads, want_grads)

        max_norm = 0.5 if step % 3 else 50.0  # every third step is not clipped
        norm, want = optim.clip_grad_norm(grads, max_norm), clip_grad_norm_(reference.parameters(), max_norm).item()
        check("norm in a training run", np.float64(norm), np.float64(want), want, compare.MODEL)
        clipped += want > max_norm
        ours.lr = optim.warmup_cosine(step, peak, warmup_steps, RUN)
        ours.step(grads)
        torchs.step()
        budget.step(reference, torchs)
        scheduler.step()
        budget.check("trained", model.params, to_params(reference))
    assert 0 < clipped < RUN, f"clipped in {clipped} steps of {RUN}: the test needs clipped and unclipped ones"
