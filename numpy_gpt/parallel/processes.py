"""Work shared among processes, for code that keeps the interpreter lock, which threads cannot share.

Each process has its own pipe, whose end says that the process is gone. concurrent.futures' pool (Python 3.11.7)
sometimes hung when its processes had been killed.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from numpy_gpt.errors import InputError

T = TypeVar("T")
R = TypeVar("R")


def usable_cores() -> int:
    """Cores this process may run on, fewer than the machine has in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Map(Protocol):
    """Like the builtin map of one iterable."""

    def __call__(self, work: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]: ...


@contextmanager
def in_processes(count: int) -> Iterator[Map]:
    """Gives a map whose work is done by `count` new processes; by this one if count is 1.

    Results come in order, and at most `count` items are read ahead, so memory does not grow with their number. `work`
    must be a module's function or a partial of one; a map must end before the next begins. The processes end with the
    block, and if this one is killed. Raises InputError if one of them is killed.
    """
    if count == 1:
        yield map
        return
    spawn = get_context("spawn")
    try:
        pipes = [spawn.Pipe() for _ in range(count)]
    except OSError as error:
        raise InputError(f"cannot start {count} processes ({error.strerror}): give fewer --processes") from error
    workers = [spawn.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pipes]
    connections = [ours for ours, _ in pipes]

    def ordered(work: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        waiting, turns = deque[Connection](), cycle(connections)
        for item in items:
            done = [_received(waiting.popleft())] if len(waiting) == count else []
            waiting.append(next(turns))
            _send(waiting[-1], (work, item))
            yield from done
        while waiting:
            yield _received(waiting.popleft())

    try:
        with _interrupts_held_back():
            resource_tracker.ensure_running()  # started by the first process otherwise, which would undo the mask
        for worker, (_, theirs) in zip(workers, pipes, strict=True):
            try:
                with _interrupts_held_back():
                    worker.start()
            except OSError as error:
                raise InputError(
                    f"cannot start {count} processes ({error.strerror}): give fewer --processes"
                ) from error
            theirs.close()  # else its end would not be noticed
        yield ordered
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join(5)
                worker.kill()  # if it has been stopped, it did not notice
                worker.join()
        for ours, theirs in pipes:
            ours.close()
            theirs.close()


def _send(connection: Connection, message: Any) -> None:
    try:
        connection.send(message)
    except OSError as error:
        raise _lost() from error


def _received(connection: Connection) -> Any:
    try:
        result = connection.recv()
    except (EOFError, OSError) as error:
        raise _lost() from error
    if isinstance(result, Exception):
        raise result
    return result


def _lost() -> InputError:
    return InputError(
        "a process sharing the work was killed, perhaps for lack of memory: free some, or give fewer --processes"
    )


def _serve(connection: Connection) -> None:
    """Do the work that comes through the connection until its other end is closed or gone."""
    with suppress(EOFError, OSError):
        while True:
            work, item = connection.recv()
            try:
                result = work(item)
            except Exception as error:
                result = error
            connection.send(result)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Hold back Ctrl-C in this block, and for good in the processes started in it.

    A terminal sends it to all of its processes, but this one alone should respond, and end the others.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
