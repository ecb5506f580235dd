"""Work shared among threads: NumPy releases the interpreter lock inside its loops and products.

There are as many threads as NumPy's BLAS may use, and while they work, BLAS itself is limited to one thread in each.
The same cores then run both the products and the loops between them, whereas BLAS's own threads keep spinning after a
product on the cores that the next loop needs. Limiting BLAS, by OPENBLAS_NUM_THREADS or threadpoolctl, limits both.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from numpy_gpt.typing import Array

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

BLOCK = 2**17
"""Array elements in one pass: small enough that a few blocks fit in a core's cache, large enough that threads seldom
wait for the interpreter lock, which each pass takes at its end."""

LEAST = 2 * BLOCK
"""Elements per thread below which waking a thread (about 0.1 ms) costs more than it saves."""

LEAST_PRODUCT = 2**23
"""The same limit in a product's multiplications."""


class _Team(threading.local):
    """The number of threads that may share this thread's work."""

    size = 1


_team = _Team()
_taken = threading.Lock()


@cache
def _blas() -> "ThreadpoolController":
    from threadpoolctl import ThreadpoolController  # here, so that `import numpy_gpt` stays light

    return ThreadpoolController().select(user_api="blas")


@cache
def _pool(pid: int) -> ThreadPoolExecutor:
    """The threads of the process pid: a forked child inherits none and needs its own."""
    return ThreadPoolExecutor(max(4, os.cpu_count() or 1), thread_name_prefix="numpy_gpt")


def thread_count() -> int:
    """The number of threads of NumPy's BLAS, 1 if unknown."""
    return max((library.num_threads or 1 for library in _blas().lib_controllers), default=1)


@contextmanager
def all_cores() -> Iterator[None]:
    """Inside the block, BLAS is limited to one thread, and `share` uses as many as BLAS had.

    Nested in the same thread, it changes nothing. While another thread is inside, this thread's work is not shared:
    the limit on BLAS is process-wide. Nor is it shared if BLAS ignores the limit: threadpoolctl can limit some
    libraries from only one thread of a process.
    """
    if not _taken.acquire(blocking=False):
        yield
        return
    try:
        size = thread_count()
        with _blas().limit(limits=1):
            _team.size = size if thread_count() == 1 else 1
            yield
    finally:
        _team.size = 1
        _taken.release()


def share(work: Callable[[int, int], None], n: int, least: int = 1) -> None:
    """Call work(start, stop) in parallel on ranges that make up range(n), each of at least `least`."""
    if n < 2 * least:
        work(0, n)
        return
    with all_cores():
        _share(work, n, min(_team.size, n // least))


def _share(work: Callable[[int, int], None], n: int, size: int) -> None:
    edges = [n * i // size for i in range(size + 1)]
    mine, rest = [(edges[0], edges[1])], []
    _team.size, team = 1, _team.size  # nested calls find no idle thread
    try:
        for start, stop in pairwise(edges[1:]):
            try:  # in a copy of the caller's context, which holds np.errstate
                rest.append(_pool(os.getpid()).submit(copy_context().run, _elsewhere, work, start, stop))
            except RuntimeError as error:
                if "cannot schedule" not in str(error):
                    raise
                mine.append((start, stop))  # the main thread has ended, which stops every executor
        for start, stop in mine:
            work(start, stop)
    finally:
        for future in rest:
            future.exception()  # waits: the arrays are in use until then
        _team.size = team
    for future in rest:
        future.result()


def _elsewhere(work: Callable[[int, int], None], start: int, stop: int) -> None:
    """Run work in a pool thread, where BLAS may have a separate thread limit (MKL, and OpenBLAS with OpenMP)."""
    for library in _blas().lib_controllers:
        if library.num_threads != 1:
            library.set_num_threads(1)
    work(start, stop)


def share_all(tasks: Iterable[Callable[[], object]]) -> None:
    """Run every task; each thread takes the next task when it finishes one."""
    left = deque(tasks)

    def take(start: int, stop: int) -> None:
        while True:
            try:
                task = left.popleft()
            except IndexError:  # none left, or another thread has just taken the last
                return
            task()

    share(take, len(left))


def blocks(n: int, row: int = 1, start: int = 0) -> list[slice]:
    """Slices that make up range(start, n), each of about BLOCK elements at `row` elements per row."""
    count = max(1, round((n - start) * row / BLOCK))
    edges = [start + (n - start) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def in_blocks(work: Callable[..., None], *arrays: Array) -> None:
    """Call work(*rows) on the same block of rows of every array (N, ...), until all N are done, in parallel.

    A call gets views with about BLOCK elements of the widest array, and writes its results into them.
    """
    n = len(arrays[0])
    row = max(a.size for a in arrays) // max(1, n)
    if n * row <= BLOCK:
        work(*arrays)
        return

    def work_on(start: int, stop: int) -> None:
        for rows in blocks(stop, row, start):
            work(*(a[rows] for a in arrays))

    share(work_on, n, least=max(1, LEAST // row))


def as_rows(*arrays: Array) -> list[Array]:
    """Each (..., F) as (N, F), all leading axes being batch: a view if contiguous, as arrays for results must be."""
    return [a.reshape(-1, a.shape[-1]) for a in arrays]


_ignoring_flags = np.errstate(divide="ignore", over="ignore", invalid="ignore")


@_ignoring_flags
def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """np.matmul, without its warnings.

    Some BLAS libraries (Apple's Accelerate, OpenBLAS on other ARM processors) set floating-point flags although all
    factors and results are finite, so that NumPy warns of a division by zero. A result that really is not finite stays
    so and shows in the loss.
    """
    result: Array = np.matmul(a, b, out=out)
    return result


@_ignoring_flags
def dots(a: Array, b: Array, out: Array | None = None) -> Array:
    """np.vecdot, the dot product of each row of a with that of b, without its warnings (see product)."""
    result: Array = np.vecdot(a, b, out=out)
    return result


class Product(NamedTuple):
    """out = a @ b, or out += a @ b with add: a (M, K), b (K, N), out (M, N)."""

    a: Array
    b: Array
    out: Array
    add: bool = False


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a (M, K) @ b (K, N) -> (M, N), into out if given, in parallel.

    For a single row of a and contiguous columns of b, N dot products read b at memory speed; BLAS's matrix-vector
    product does not.
    """
    if out is None:
        out = np.empty((len(a), b.shape[1]), np.result_type(a, b))
    if len(a) == 1 and b.strides[0] == b.itemsize:
        share(partial(_dot_products, Product(a, b, out)), b.shape[1], least=max(1, LEAST_PRODUCT // max(1, len(b))))
    else:
        matmuls([Product(a, b, out)])
    return out


@all_cores()
def matmuls(products: Sequence[Product], also: Sequence[Callable[[], object]] = ()) -> None:
    """Compute the products in parallel, together with the small tasks in `also`.

    Products are split only if there are more threads than products: two halves take longer, as both read one operand.
    """
    multiplications = sum(p.out.size * len(p.b) for p in products)
    size = min(_team.size, multiplications // LEAST_PRODUCT)
    tasks = [piece for p in products for piece in _pieces(p, max(1, size // len(products)))]
    if size > 1:
        share_all([*tasks, *also])
    else:
        for task in [*tasks, *also]:
            task()


def _pieces(of: Product, pieces: int) -> Iterator[Callable[[], None]]:
    """The product in pieces along the longer axis of out."""
    longer = int(of.out.shape[1] > len(of.out) and not of.add)
    edges = [of.out.shape[longer] * i // pieces for i in range(pieces + 1)]
    work = _add_product if of.add else _columns if longer else _rows
    return (partial(work, of, start, stop) for start, stop in pairwise(edges))


def _columns(of: Product, start: int, stop: int) -> None:
    product(of.a, of.b[:, start:stop], out=of.out[:, start:stop])


def _rows(of: Product, start: int, stop: int) -> None:
    product(of.a[start:stop], of.b, out=of.out[start:stop])


def _dot_products(of: Product, start: int, stop: int) -> None:
    dots(of.b.T[start:stop], of.a[0], out=of.out[0, start:stop])


def _add_product(of: Product, start: int, stop: int) -> None:
    for rows in blocks(stop, max(1, of.b.shape[1] // 4), start):  # four blocks at a time: BLAS is faster with more rows
        of.out[rows] += product(of.a[rows], of.b)
