"""The loss of a model on a text, over all its tokens."""

from collections.abc import Callable, Iterable, Sequence
from typing import SupportsFloat

from numpy_gpt.typing import Array

Batch = tuple[Array, Array]
Loss = Callable[[Array, Array], SupportsFloat]
"""tokens (B, T), targets (B, T) -> mean loss in nats per token, without dropout; of any backend."""


def mean_loss(
    loss: Loss, ids: Array, T: int, batch_size: int, track: Callable[[Sequence[Batch]], Iterable[Batch]] = iter
) -> float:
    """Mean loss in nats per token over ids (n,), all but the first, in consecutive windows of T tokens.

    batch_size: windows at a time; the last window may be shorter. track: passes the batches through, showing progress.
    """
    full = (len(ids) - 1) // T * T  # tokens in full windows
    tokens, targets = ids[:full].reshape(-1, T), ids[1 : full + 1].reshape(-1, T)  # (windows, T)
    batches = [(tokens[i : i + batch_size], targets[i : i + batch_size]) for i in range(0, full // T, batch_size)]
    if full < len(ids) - 1:
        batches.append((ids[None, full:-1], ids[None, full + 1 :]))
    return sum(float(loss(x, y)) * y.size for x, y in track(batches)) / (len(ids) - 1)
