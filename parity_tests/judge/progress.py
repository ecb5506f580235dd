"""Progress on stderr: a bar in a terminal, elsewhere one line per kind of work; and a pool of worker processes."""

import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from rich.console import Console
from rich.progress import Progress, track


def shown(items, what, kind):
    """Yield the items and show progress. kind(item) names an item's kind; items of one kind are adjacent."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(list(items), what, console=console)
        return
    last = None
    for item in items:
        if kind(item) != last:
            last = kind(item)
            _say(f"{what} {last}")
        yield item


@contextmanager
def counted(what, total=None):
    """Yield tick(), to be called once for each of `total` items (None: unknown)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        _say(what)
        yield lambda: None
        return
    with Progress(console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def unseen(what, total=None):
    """The same as counted, but silent."""
    yield lambda: None


@contextmanager
def workers():
    """A pool of processes, one per core, that Ctrl-C ends without tracebacks."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _end_at_ctrl_c) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_at_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _say(what):
    print(f"{what} …", file=sys.stderr, flush=True)
