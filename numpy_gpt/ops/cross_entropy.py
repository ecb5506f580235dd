"""Mean cross-entropy of softmax(logits) with target ids.

Computes the same as cross_entropy_forward and cross_entropy_backward in numpy_gpt/plain.py, but in blocks of rows, and
may overwrite the logits: at 50,257 per token, a second array of their size would mean 100 MB of memory traffic.
"""

from typing import Any

import numpy as np

from numpy_gpt.parallel.threads import as_rows, in_blocks
from numpy_gpt.typing import Array

Cache = tuple[Array, Array, Array]


def cross_entropy_forward(logits: Array, targets: Array, out: Array | None = None) -> tuple[Any, Cache]:
    """loss = mean_n (log Σ_v exp z_nv − z_{n, targets_n}), in nats per token, a scalar of the logits' dtype.

    logits z (..., V), targets (...) ints in [0, V). Raises ValueError if the shapes do not fit or there are no targets.
    cache: exp(z − max z), its row sums, targets. out: where to write exp(z − max z), if given; may be logits itself.

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
    """dloss, the gradient of the scalar (1 if nothing follows the loss) -> dlogits (..., V).

    out: where to write dlogits, if given; may be the cached exp(z − max z), which is then overwritten.
    """
    e, total, targets = cache
    dlogits = np.empty_like(e) if out is None else out
    share = dloss / targets.size  # each position's share of the mean

    def subtract_target(e: Array, dlogits: Array, targets: Array, total: Array) -> None:
        np.multiply(e, (share / total)[:, None], out=dlogits)  # softmax(z) / N
        dlogits[np.arange(len(targets)), targets] -= share

    in_blocks(subtract_target, *as_rows(e, dlogits), targets.ravel(), total)
    return dlogits
