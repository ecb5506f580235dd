"""AdamW, global-norm clipping and the learning-rate schedule: everything between a gradient and a parameter."""

import math

import numpy as np

from numpy_gpt.errors import InputError
from numpy_gpt.typing import Array, Params

BLOCK = 1 << 17
"""Floats updated at a time: the five arrays of an update then stay in the cache between its passes."""


class AdamW:
    """Adam with decoupled weight decay (Loshchilov, Hutter 2019), with torch.optim.AdamW's arithmetic and defaults.

    For step t = 1, 2, … and each parameter θ with gradient g:
        θ ← θ · (1 − lr · weight_decay)
        m ← m + (1 − β₁) (g − m),   v ← β₂ v + (1 − β₂) g²
        θ ← θ − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)

    Every parameter decays, biases and LayerNorms too, as in the book. lr may be changed between steps. State:
    t, and m and v under the parameters' names.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        self.params = params
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.t = 0
        self.m: Params = {name: np.zeros_like(p) for name, p in params.items()}
        self.v: Params = {name: np.zeros_like(p) for name, p in params.items()}

    def step(self, grads: Params) -> None:
        """Update every parameter in place. grads has params' keys and shapes and is not written to.

        Raises ValueError naming the parameter whose gradient is missing or of another shape; nothing is updated then.
        """
        for name, p in self.params.items():
            if name not in grads or grads[name].shape != p.shape:
                found = grads[name].shape if name in grads else "no gradient"
                raise ValueError(f"AdamW: {name} has shape {p.shape}, its gradient: {found}")
        self.t += 1
        for name, p in self.params.items():
            arrays = [p, grads[name], self.m[name], self.v[name]]
            if not p.flags.c_contiguous:  # a view with gaps has no flat view to cut into blocks
                self._update(*arrays)
                continue
            flat = [a.reshape(-1) for a in arrays]
            for start in range(0, p.size, BLOCK):
                self._update(*(a[start : start + BLOCK] for a in flat))

    def state(self) -> Params:
        """t, and every m and v as "m.NAME" and "v.NAME": the arrays themselves, to be written to a checkpoint."""
        moments = {f"{kind}.{name}": a for kind in "mv" for name, a in getattr(self, kind).items()}
        return {"t": np.array([self.t])} | moments

    def restore(self, state: Params) -> None:
        """Go on from a state, which is copied. Raises InputError if it is not one of these parameters."""
        own = self.state()
        for name in own:
            if name not in state or state[name].shape != own[name].shape:
                raise InputError(
                    f"the optimiser's state has no {name} of shape {own[name].shape}: is it another model's?"
                )
        self.t = int(state["t"][0])
        for name, array in own.items():
            array[...] = state[name]

    def _update(self, p: Array, g: Array, m: Array, v: Array) -> None:
        beta1, beta2 = self.betas
        step_size = self.lr / (1 - beta1**self.t)
        p *= 1 - self.lr * self.weight_decay
        d = g - m
        d *= 1 - beta1
        m += d
        np.multiply(g, g, out=d)
        d *= 1 - beta2
        v *= beta2
        v += d
        np.sqrt(v, out=d)
        d /= math.sqrt(1 - beta2**self.t)
        d += self.eps
        np.divide(m, d, out=d)
        d *= step_size
        p -= d


def clip_grad_norm(grads: Params, max_norm: float) -> float:
    """Scale all gradients, in place, so that their common norm is at most max_norm; returns the norm before.

    torch.nn.utils.clip_grad_norm_'s formula: one factor min(1, max_norm / (norm + 1e-6)) for all tensors.
    """
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in grads.values()))
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1:  # a NaN norm must not pass for a small one
        for g in grads.values():
            g *= factor
    return norm


def warmup_cosine(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of step 0, 1, …: linear up to peak, then half a cosine down to a tenth of it.

    Step s < warmup_steps gets peak · (s + 1) / (warmup_steps + 1); step warmup_steps gets peak; the last one,
    total_steps − 1, gets peak / 10 (Brown et al. 2020, GPT-3, appendix B).
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
