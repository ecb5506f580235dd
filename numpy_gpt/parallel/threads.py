"""Work shared out among threads: NumPy lets go of the interpreter lock inside its loops and its products.

There are as many threads as NumPy's BLAS may use, and while they are at it each has a BLAS of one thread: the same
cores then do the products and the loops between them. (BLAS's own threads keep spinning for a while after a product, on
the very cores that the next loop needs.) Whoever limits BLAS, by OPENBLAS_NUM_THREADS or threadpoolctl, limits these.
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
"""Numbers of an array in one pass: a handful of such blocks fit in a core's cache, and the interpreter lock, which a
pass takes at its end, is not asked for too often."""

LEAST = 2 * BLOCK
"""Numbers for each thread below which waking it, some 0.1 ms, costs more than it does."""

LEAST_PRODUCT = 2**23
"""The same in a product's multiplications."""


class _Team(threading.local):
    """The number of threads that may share this thread's work."""

    size = 1


_team = _Team()
_taken = threading.Lock()


@cache
def _blas() -> "ThreadpoolController":
    from threadpoolctl import ThreadpoolController  # only a model that runs needs it

    return ThreadpoolController().select(user_api="blas")


@cache
def _pool(pid: int) -> ThreadPoolExecutor:
    """The threads of this process; a forked child has a process number of its own, and none of its parent's."""
    return ThreadPoolExecutor(max(4, os.cpu_count() or 1), thread_name_prefix="numpy_gpt")


def thread_count() -> int:
    """How many threads NumPy's BLAS has, 1 if it cannot be asked."""
    return max((library.num_threads or 1 for library in _blas().lib_controllers), default=1)


@contextmanager
def all_cores() -> Iterator[None]:
    """Until the end, BLAS keeps to one thread, and `share` has as many as BLAS had.

    Within another one of the same thread it changes nothing. Where one is open in another thread, this one's work is
    not shared: the limit on BLAS is the whole process's. Nor is it where BLAS does not obey, as threadpoolctl lets only
    one thread of a process limit some.
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
    """work(start, stop) for parts that make up range(n), each of at least `least`, side by side."""
    if n < 2 * least:
        work(0, n)
        return
    with all_cores():
        _share(work, n, min(_team.size, n // least))


def _share(work: Callable[[int, int], None], n: int, size: int) -> None:
    edges = [n * i // size for i in range(size + 1)]
    mine, rest = [(edges[0], edges[1])], []
    _team.size, team = 1, _team.size  # they are all at work
    try:
        for start, stop in pairwise(edges[1:]):
            try:  # in a copy of the caller's context: np.errstate belongs to it
                rest.append(_pool(os.getpid()).submit(copy_context().run, _elsewhere, work, start, stop))
            except RuntimeError as error:
                if "cannot schedule" not in str(error):
                    raise
                mine.append((start, stop))  # the main thread has ended, and with it every executor
        for start, stop in mine:
            work(start, stop)
    finally:
        for each in rest:
            each.exception()  # waits: the arrays are in use until then
        _team.size = team
    for each in rest:
        each.result()


def _elsewhere(work: Callable[[int, int], None], start: int, stop: int) -> None:
    """work in a thread of the pool, where BLAS may have a limit of its own (MKL, and OpenBLAS on OpenMP)."""
    for library in _blas().lib_controllers:
        if library.num_threads != 1:
            library.set_num_threads(1)
    work(start, stop)


def share_all(tasks: Iterable[Callable[[], object]]) -> None:
    """Run every task; each thread takes the next one when it has finished its last."""
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
    """Slices that make up range(start, n), each of about BLOCK numbers, row of them a row."""
    count = max(1, round((n - start) * row / BLOCK))
    edges = [start + (n - start) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def in_blocks(work: Callable[..., None], *arrays: Array) -> None:
    """Call work(*rows), rows being the same few rows of each array (N, ...), until all N are done; shared out.

    A call gets about BLOCK numbers of the widest array, as views: work writes its results into them.
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
    """Each (..., F) as (N, F), every leading axis being batch: a view, if it is contiguous as results must be."""
    return [a.reshape(-1, a.shape[-1]) for a in arrays]


_ignoring_flags = np.errstate(divide="ignore", over="ignore", invalid="ignore")


@_ignoring_flags
def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """np.matmul, without its warnings.

    Some BLAS libraries (Apple's Accelerate, OpenBLAS on other ARM processors) raise floating-point flags while they
    multiply finite numbers into finite ones, and NumPy warns of a division by zero in a product. What is not finite in
    earnest stays so, and shows in the loss.
    """
    result: Array = np.matmul(a, b, out=out)
    return result


@_ignoring_flags
def dots(a: Array, b: Array, out: Array | None = None) -> Array:
    """np.vecdot, the dot product of each row of a with that of b, without its warnings, as product."""
    result: Array = np.vecdot(a, b, out=out)
    return result


class Product(NamedTuple):
    """out = a @ b, or out += a @ b with add: a (M, K), b (K, N), out (M, N)."""

    a: Array
    b: Array
    out: Array
    add: bool = False


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a (M, K) @ b (K, N) -> (M, N), into out if given, shared out.

    A single row with the columns of b is N dot products: they read b at the memory's speed, as BLAS's product of a
    matrix and a vector does not.
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
    """Compute the products side by side, and the small tasks in `also` with them.

    Products are cut only where there are more threads: two halves take longer than the whole, as both read one operand.
    """
    multiplications = sum(each.out.size * len(each.b) for each in products)
    size = min(_team.size, multiplications // LEAST_PRODUCT)
    tasks = [piece for each in products for piece in _pieces(each, max(1, size // len(products)))]
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
    for rows in blocks(stop, max(1, of.b.shape[1] // 4), start):  # four blocks at a time: BLAS is faster at more rows
        of.out[rows] += product(of.a[rows], of.b)
