"""Checks, before anything is timed, that all backends compute the same: loss and every gradient against float64."""

import math
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.contenders.backends import EPS, Backend
from numpy_gpt import GPTConfig
from numpy_gpt.typing import Array, Params
from torch_gpt.model import from_params, loss_and_grads


class DisagreementError(AssertionError):
    """A backend's result is too far from the truth; the message names the backend and the tensor."""


class Truth(NamedTuple):
    """The reference in float64: the loss in nats per token, and every gradient by name."""

    loss: float
    grads: Params


class Errors(NamedTuple):
    """Errors relative to the true loss, and to the largest element of all true gradients."""

    loss: float
    gradient: float


def truth(config: GPTConfig, params: Params, tokens: Array, targets: Array) -> Truth:
    """torch_gpt in float64 on these weights, without dropout."""
    return Truth(*loss_and_grads(from_params(config, params, dtype=torch.float64), tokens, targets))


def check(backend: Backend, config: GPTConfig, tokens: Array, targets: Array, want: Truth) -> Errors:
    """The backend's errors. Raises DisagreementError if one exceeds its bound.

    eps is the precision's, G the model's largest gradient, g that of one tensor, n = 12 L + 3 the products on the path
    from a weight through the loss and back. A gradient may be off by

        float64, float32    2^16 eps g + 64 eps G    the suite's rule, tensor by tensor; the second term is for
                                                     tensors whose true gradient is 0
        TF32, bf16          4 √n eps G               each product rounds its operands, and the squares of independent
                                                     errors add up: four standard deviations

    and the loss by 64 √n eps (float64, float32) or 4 √n eps of its value.
    """
    loss, grads = backend.loss_and_grads(tokens, targets)
    if missing := want.grads.keys() ^ grads.keys():
        raise DisagreementError(f"{backend.name}: {', '.join(sorted(missing))} has a gradient on one side only")
    eps, n = EPS[backend.precision], 12 * config.n_layers + 3
    full = backend.precision in ("float64", "float32")
    G = max(_largest(grad) for grad in want.grads.values())
    loss_error = abs(loss - want.loss) / want.loss
    _judge(backend, "loss", loss_error, (64 if full else 4) * math.sqrt(n) * eps)
    worst = 0.0
    for name, true in want.grads.items():
        if grads[name].shape != true.shape:
            raise DisagreementError(f"{backend.name}: d {name} has shape {grads[name].shape}, should be {true.shape}")
        error = _largest(grads[name] - true) / G
        _judge(backend, f"d {name}", error, eps * (2**16 * _largest(true) / G + 64 if full else 4 * math.sqrt(n)))
        worst = max(worst, error)
    return Errors(loss_error, worst)


def check_logits(backends: list[Backend], config: GPTConfig, params: Params, tokens: Array) -> dict[str, float]:
    """Largest error of each backend's logits, by name, as a share of the largest logit.

    Raises DisagreementError above 2^16 eps (float64, float32: the suite's rule) or 4 √n eps (TF32, bf16), with
    n = 6 L + 1 products on the path.
    """
    with torch.no_grad():
        want = from_params(config, params, dtype=torch.float64).eval()(torch.from_numpy(tokens)).numpy()
    errors = {}
    for backend in backends:
        got = backend.forward(tokens)
        got = got if isinstance(got, np.ndarray) else got.float().cpu().numpy()
        errors[backend.name] = _largest(got - want) / _largest(want)
        full = backend.precision in ("float64", "float32")
        factor = 2**16 if full else 4 * math.sqrt(6 * config.n_layers + 1)
        _judge(backend, "logits", errors[backend.name], factor * EPS[backend.precision])
    return errors


def check_training(losses: dict[str, list[float]]) -> None:
    """Check that after the same batches the losses agree to 1 %; an AdamW that did nothing is 10 % off in ten steps.

    losses: of every float32 backend, step by step, without dropout. Raises DisagreementError naming backend and step.
    """
    (first, want), *others = losses.items()
    for name, got in others:
        for step, (a, b) in enumerate(zip(got, want, strict=True)):
            if not abs(a - b) <= 0.01 * abs(b):
                raise DisagreementError(
                    f"{name}: the loss of step {step} is {a:.4f}, {first}'s {b:.4f}: other training"
                )


def _largest(x: Array) -> float:
    return float(np.abs(x).max())


def _judge(backend: Backend, tensor: str, error: float, bound: float) -> None:
    if not error <= bound:  # a NaN exceeds every bound
        raise DisagreementError(f"{backend.name}: {tensor} is off by {error:.2e} of the largest, allowed {bound:.2e}")
