"""AdamW, global-norm clipping and the learning-rate schedule: everything between a gradient and a parameter."""

import math
import operator
from collections.abc import Callable, Collection
from functools import partial

import numpy as np

from numpy_gpt.errors import InputError
from numpy_gpt.parallel.aliasing import FOREIGN, check_updatable, memory
from numpy_gpt.parallel.threads import blocks, share_all
from numpy_gpt.parameters import check_state
from numpy_gpt.typing import Array, Params


class AdamW:
    """Adam with decoupled weight decay (Loshchilov, Hutter 2019), with torch.optim.AdamW's arithmetic and defaults.

    For step t = 1, 2, … and each parameter θ with gradient g:
        θ ← θ · (1 − lr · weight_decay)
        m ← m + (1 − β₁) (g − m),   v ← β₂ v + (1 − β₂) g²
        θ ← θ − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)

    Every parameter decays, biases and LayerNorms too, as in the book, unless `decayed` names those that do. lr may be
    changed between steps. State: t, and m and v under the parameters' names: read them here, write them with restore.

    Raises InputError (a ValueError), here and in `step`, if a β is not in [0, 1) or another setting is negative or NaN;
    if `decayed` names no parameter; and naming a parameter that cannot be updated in place: not an array of floats,
    read-only, or sharing memory with another.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decayed: Collection[str] | None = None,
    ):
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        if unknown := set(decayed or ()) - params.keys():
            raise InputError(f"AdamW: decayed has {min(unknown)!r:.80}, which is not a parameter")
        self._decayed = frozenset(params if decayed is None else decayed)
        self._check_settings()
        for name, p in params.items():
            if not isinstance(p, np.ndarray | np.generic) or p.dtype.kind != "f":
                found = getattr(p, "dtype", type(p).__name__)
                raise InputError(f"AdamW: {name} is {found}: give an array of floating-point numbers")
        check_updatable("AdamW", params)
        self.params = params
        self.t = 0
        self.m: Params = {name: np.zeros(p.shape, p.dtype) for name, p in params.items()}  # no memory yet
        self.v: Params = {name: np.zeros(p.shape, p.dtype) for name, p in params.items()}
        self._checked, self._memory = list(params.values()), memory(params.values())  # as last seen by check_updatable

    def step(self, grads: Params) -> None:
        """Update every parameter in place. grads has params' keys and shapes and is not written to.

        Raises InputError, before anything is updated, for unusable settings, and naming a parameter whose gradient is
        missing, is of another shape or dtype, or shares memory with a parameter; or a
        parameter that was replaced by one that does not fit.
        """
        self._check_settings()
        for name, p in self.params.items():
            m, g = self.m.get(name), grads.get(name)
            if not isinstance(p, np.ndarray | np.generic):
                raise InputError(f"AdamW: {name} is {type(p).__name__}: give an array of floating-point numbers")
            if m is None or m.shape != p.shape or m.dtype != p.dtype:
                began = "it was missing" if m is None else f"it was {m.dtype} {m.shape}"
                raise InputError(f"AdamW: {name} is {p.dtype} {p.shape}, {began} at first: make another optimiser")
            if not isinstance(g, np.ndarray | np.generic) or g.shape != p.shape:
                found = "no gradient" if g is None else getattr(g, "shape", type(g).__name__)
                raise InputError(f"AdamW: {name} has shape {p.shape}, its gradient: {found}")
            if g.dtype != p.dtype:
                raise InputError(f"AdamW: {name} is {p.dtype}, its gradient {g.dtype}: use one dtype")
        self._check_memory(grads)
        self.t += 1
        tasks: list[Callable[[], None]] = []
        for name, p in self.params.items():
            arrays = p, grads[name], self.m[name], self.v[name]
            update = partial(self._update, 1 - self.lr * self.weight_decay if name in self._decayed else 1.0)
            if all(a.flags.c_contiguous for a in arrays):
                flat = [a.ravel() for a in arrays]
                tasks += [partial(update, *(a[part] for a in flat)) for part in blocks(p.size)]
            else:  # a view with gaps has no flat view
                tasks.append(partial(update, *arrays))
        share_all(tasks)

    def _check_settings(self) -> None:
        """Make Python floats of the settings, as torch does: a NumPy scalar would take its dtype along."""
        try:
            beta1, beta2 = map(_float, self.betas)
        except (TypeError, ValueError) as error:
            raise InputError(f"AdamW: betas must be two numbers, not {self.betas!r:.80}") from error
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise InputError(f"AdamW: betas must be at least 0 and below 1, not {self.betas}")
        self.betas = beta1, beta2
        self.lr = _number("AdamW: lr", self.lr)
        self.eps = _number("AdamW: eps", self.eps)
        self.weight_decay = _number("AdamW: weight_decay", self.weight_decay)

    def _check_memory(self, grads: Params) -> None:
        """Call check_updatable, unless it has seen these very parameters and the gradients lie in other memory."""
        params, others = list(self.params.values()), memory(grads[name] for name in self.params)
        seen = len(params) == len(self._checked) and all(map(operator.is_, params, self._checked))
        apart = not self._memory & others and FOREIGN not in self._memory | others
        if not (seen and apart and all(p.flags.writeable for p in params)):
            check_updatable("AdamW", self.params, {name: grads[name] for name in self.params})
            self._checked, self._memory = params, memory(params)

    def state(self) -> Params:
        """t, and every m and v as "m.NAME" and "v.NAME": the arrays themselves, for a checkpoint."""
        moments = {f"{kind}.{name}": a for kind in "mv" for name, a in getattr(self, kind).items()}
        return {"t": np.array([self.t])} | moments

    def restore(self, state: Params) -> None:
        """Continue from a state, which is copied. Raises InputError if it does not fit these parameters."""
        own = self.state()
        for name in own:
            if name not in state or state[name].shape != own[name].shape:
                raise InputError(
                    f"the optimiser's state has no {name} of shape {own[name].shape}: use the one saved with this model"
                )
        for name, array in own.items():
            check_state(name, state[name], array.dtype)
        self.t = int(state["t"][0])
        for name, array in own.items():
            array[...] = state[name]

    def _update(self, kept: float, p: Array, g: Array, m: Array, v: Array) -> None:
        beta1, beta2 = self.betas
        root = math.sqrt(1 - beta2**self.t)
        p *= kept  # of the parameter, after its decay
        d = g - m
        weight = m.dtype.type(1 - beta1)
        if weight < 0.5:
            d *= weight
            m += d
        else:  # as torch.lerp: from the nearer end, and in float32 rounded once
            m[...] = g + (float(weight) - 1) * d.astype(np.float64)
        np.multiply(g, 1 - beta2, out=d)  # first, as in torch: g² may overflow where (1 − β₂) g² does not
        d *= g
        v *= beta2
        v += d
        np.sqrt(v, out=d)
        d += self.eps * root
        np.divide(m, d, out=d)  # m / (√v / root + eps), but for the factor root
        d *= self.lr / (1 - beta1**self.t) * root
        p -= d


def clip_grad_norm(grads: Params, max_norm: float) -> float:
    """Scale all gradients, in place, so that their common norm is at most max_norm; returns the norm before.

    torch.nn.utils.clip_grad_norm_'s formula: one factor min(1, max_norm / (norm + 1e-6)) for all tensors.
    Raises InputError, before anything is scaled, for a max_norm that is negative or NaN, and naming a gradient that is
    read-only or shares memory with another.
    """
    max_norm = _number("clip_grad_norm: max_norm", max_norm)
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in grads.values()))
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1:  # true for a NaN norm too
        check_updatable("clip_grad_norm", grads)
        for g in grads.values():
            g *= factor
    return norm


def _number(what: str, value: float) -> float:
    """The value as a Python float. Raises InputError, naming what it is, unless it is a number of at least 0."""
    number = _float(value)
    if not number >= 0:
        raise InputError(f"{what} must be a number of at least 0, not {value!r:.80}")
    return number


def _float(value: float) -> float:
    """The value as a Python float; NaN if it is not a number."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def warmup_cosine(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of step 0, 1, …: linear up to peak, then half a cosine down to a tenth of it.

    Step s < warmup_steps gets peak · (s + 1) / (warmup_steps + 1); step warmup_steps gets peak; the last one,
    total_steps − 1, gets peak / 10 (Brown et al. 2020, GPT-3, appendix B).
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
