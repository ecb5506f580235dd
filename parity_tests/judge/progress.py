"""What is at work, on stderr: a bar in a terminal, elsewhere a line whenever something else begins; and who does it."""

import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from rich.console import Console
from rich.progress import Progress, track


def shown(items, what, kind):
    """The items, one after the other. kind names the sort of an item; those of one sort follow each other."""
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
    """Gives tick(), to be called for each of `total` (None: nobody knows how many)."""
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
    """counted, for who wants nothing shown."""
    yield lambda: None


@contextmanager
def workers():
    """A pool of processes, one a core, that a Ctrl-C ends without a word of theirs."""
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
