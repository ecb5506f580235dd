"""The loss of a model on a text, over all its tokens."""

from collections.abc import Callable, Iterable, Sequence
from typing import SupportsFloat

from numpy_gpt.tokens.file import TokenFile
from numpy_gpt.typing import Array

Range = tuple[int, int]
Loss = Callable[[Array, Array], SupportsFloat]
"""tokens (B, T), targets (B, T) -> mean loss in nats per token, without dropout; of any backend."""


def mean_loss(
    loss: Loss,
    ids: Array | TokenFile,
    T: int,
    batch_size: int,
    track: Callable[[Sequence[Range]], Iterable[Range]] = iter,
) -> float:
    """Mean loss in nats per token over ids (n,), all but the first, in consecutive windows of T tokens.

    batch_size: windows at a time; the last window may be shorter. track: passes the batches' ranges through, showing
    progress.
    """
    n = len(ids) - 1
    full = n // T * T  # tokens in full windows
    batches = [(start, min(start + batch_size * T, full)) for start in range(0, full, batch_size * T)]
    if full < n:
        batches.append((full, n))
    total = 0.0
    for start, stop in track(batches):
        part, shape = ids[start : stop + 1], (-1, min(T, stop - start))  # (windows, T)
        total += float(loss(part[:-1].reshape(shape), part[1:].reshape(shape))) * (stop - start)
    return total / n
