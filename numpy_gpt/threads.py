"""Work shared out among threads: NumPy lets go of the interpreter lock inside its loops and its products.

There are as many threads as NumPy's BLAS may use, and while they work each has a BLAS of one thread: the same cores
then do the products and the loops between them. (BLAS's own threads keep spinning for a while after a product, on the
very cores that the next loop needs.) Whoever limits BLAS, by OPENBLAS_NUM_THREADS or threadpoolctl, limits these too.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from numpy_gpt.typing import Array

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

BLOCK = 2**17
"""Numbers of an array in one pass: a handful of such blocks fit in a core's second-level cache."""

_SHARE = 2**15
"""Numbers, or a product's multiplications / 2**5, below which waking a thread costs more than it does."""

_sharing = threading.Lock()


@cache
def _blas() -> "ThreadpoolController":
    from threadpoolctl import ThreadpoolController  # only a model that runs needs it

    return ThreadpoolController().select(user_api="blas")


@cache
def _pool(pid: int) -> ThreadPoolExecutor:
    """The threads of this process; a forked child has a process number of its own, and none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="numpy_gpt")


def thread_count() -> int:
    """How many threads may share the work: those of NumPy's BLAS, 1 if it cannot be asked."""
    return max((library.num_threads or 1 for library in _blas().lib_controllers), default=1)


def share(work: Callable[[int, int], None], n: int, least: int = 1) -> None:
    """work(start, stop) for parts that make up range(n), each of at least `least`, side by side.

    Who comes while another thread is sharing does all of it alone: the limit on BLAS is the whole process's.
    """
    threads = min(thread_count(), n // least)
    if threads <= 1 or not _sharing.acquire(blocking=False):
        work(0, n)
        return
    edges = [n * i // threads for i in range(threads + 1)]
    try:
        with _blas().limit(limits=1):
            # each in a copy of the caller's context: np.errstate belongs to it
            rest = [
                _pool(os.getpid()).submit(copy_context().run, work, start, stop) for start, stop in pairwise(edges[1:])
            ]
            try:
                work(edges[0], edges[1])
            finally:
                for each in rest:
                    each.exception()  # waits: the arrays are in use until then
            for each in rest:
                each.result()
    finally:
        _sharing.release()


def in_blocks(work: Callable[[slice], None], n: int, row: int = 1) -> None:
    """work(rows) for slices that make up range(n), each of about BLOCK numbers, row of them a row; shared out."""
    step = max(1, BLOCK // row)

    def part(start: int, stop: int) -> None:
        for i in range(start, stop, step):
            work(slice(i, min(i + step, stop)))

    share(part, n, least=max(1, _SHARE // row))


def matmul(a: Array, b: Array, out: Array | None = None, add: bool = False) -> Array:
    """a (M, K) @ b (K, N) -> (M, N), into out if given (add: onto it): cut along the longer of M and N, shared out."""
    M, K, N = *a.shape, b.shape[1]
    if out is None:
        out = np.empty((M, N), np.result_type(a, b))
    if add:

        def part(start: int, stop: int) -> None:
            step = max(1, 4 * BLOCK // N)
            for i in range(start, stop, step):
                rows = slice(i, min(i + step, stop))
                out[rows] += a[rows] @ b

        share(part, M)
        return out
    if N > M:

        def part(start: int, stop: int) -> None:
            np.matmul(a, b[:, start:stop], out=out[:, start:stop])
    else:

        def part(start: int, stop: int) -> None:
            np.matmul(a[start:stop], b, out=out[start:stop])

    share(part, max(M, N), least=max(1, 2**5 * _SHARE // max(1, K * min(M, N))))
    return out
