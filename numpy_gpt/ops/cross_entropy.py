"""Mean cross-entropy of softmax(logits) with target ids."""

from typing import Any

import numpy as np

from numpy_gpt.typing import Array

Cache = tuple[Array, Array, Array]


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Any, Cache]:
    """loss = mean_n (log Σ_v exp z_nv − z_{n, targets_n}), in nats per token, a scalar of the logits' dtype.

    logits z (..., V), targets (...) ints in [0, V). Raises ValueError on shapes that do not fit and on no targets.
    cache: exp(z − max z), its row sums, targets.

    d loss / dz_nv = (softmax(z)_nv − [v = targets_n]) / N: each row sums to 0.
    """
    if logits.shape[:-1] != targets.shape or not targets.size:
        raise ValueError(f"cross_entropy: logits {logits.shape} need targets {logits.shape[:-1]}, not {targets.shape}")
    z = logits - logits.max(axis=-1, keepdims=True)  # the loss does not change, and exp cannot overflow
    at_target = np.take_along_axis(z, targets[..., None], axis=-1)
    e = np.exp(z, out=z)
    total = e.sum(axis=-1, keepdims=True)
    return (np.log(total) - at_target).mean(), (e, total, targets)


def cross_entropy_backward(dloss: float, cache: Cache) -> Array:
    """dloss, the gradient of the scalar (1 when the loss is the end of the line) -> dlogits (..., V)."""
    e, total, targets = cache
    dlogits = e / total
    index = targets[..., None]
    np.put_along_axis(dlogits, index, np.take_along_axis(dlogits, index, axis=-1) - 1, axis=-1)
    dlogits *= dloss / targets.size
    return dlogits
