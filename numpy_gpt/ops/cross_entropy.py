"""Mean cross-entropy of softmax(logits) with target ids.

The same as the textbook's cross_entropy_forward and cross_entropy_backward (numpy_gpt/plain.py), but in blocks of rows,
and each step may overwrite the logits: with 50,257 of them a token, another array of their size is 100 MB of traffic.
"""

from typing import Any

import numpy as np

from numpy_gpt.parallel.threads import as_rows, in_blocks
from numpy_gpt.typing import Array

Cache = tuple[Array, Array, Array]


def cross_entropy_forward(logits: Array, targets: Array, out: Array | None = None) -> tuple[Any, Cache]:
    """loss = mean_n (log Σ_v exp z_nv − z_{n, targets_n}), in nats per token, a scalar of the logits' dtype.

    logits z (..., V), targets (...) ints in [0, V). Raises ValueError on shapes that do not fit and on no targets.
    cache: exp(z − max z), its row sums, targets. out: where to put the first, if given; it may be logits itself.

    d loss / dz_nv = (softmax(z)_nv − [v = targets_n]) / N: each row sums to 0.
    """
    if logits.shape[:-1] != targets.shape or not targets.size:
        raise ValueError(f"cross_entropy: logits {logits.shape} need targets {logits.shape[:-1]}, not {targets.shape}")
    e = np.empty(logits.shape, logits.dtype) if out is None else out
    total, loss = np.empty((2, targets.size), logits.dtype)

    def exponentiate(z: Array, e: Array, targets: Array, total: Array, loss: Array) -> None:
        np.subtract(z, z.max(axis=1, keepdims=True), out=e)  # the loss does not change, and exp cannot overflow
        at_target = e[np.arange(len(targets)), targets]
        total[...] = np.exp(e, out=e).sum(axis=1)
        loss[...] = np.log(total) - at_target

    in_blocks(exponentiate, *as_rows(logits, e), targets.ravel(), total, loss)
    return loss.mean(), (e, total, targets)


def cross_entropy_backward(dloss: float, cache: Cache, out: Array | None = None) -> Array:
    """dloss, the gradient of the scalar (1 when the loss is the end of the line) -> dlogits (..., V).

    out: where to put it, if given; it may be the cached exp(z − max z), which is then gone.
    """
    e, total, targets = cache
    dlogits = np.empty_like(e) if out is None else out
    share = dloss / targets.size  # of each position in the mean

    def subtract_target(e: Array, dlogits: Array, targets: Array, total: Array) -> None:
        np.multiply(e, (share / total)[:, None], out=dlogits)  # softmax(z) / N
        dlogits[np.arange(len(targets)), targets] -= share

    in_blocks(subtract_target, *as_rows(e, dlogits), targets.ravel(), total)
    return dlogits
