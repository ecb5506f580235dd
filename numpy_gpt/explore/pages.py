"""The pass that the page shows now, and the one thread that computes the next; arrays are read meanwhile."""

import json
import threading
from asyncio import wrap_future
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from starlette.exceptions import HTTPException

from numpy_gpt.errors import InputError, install
from numpy_gpt.explore.payload import Page, read_text
from numpy_gpt.typing import Params

T = TypeVar("T")
Torch = Callable[[Page, Callable[[], None]], dict[str, Params]]

ANOTHER_TEXT = "another text has been run since: reload the page"


class StoppedError(Exception):
    """The server ends: whatever is being computed may stop."""


class Worker:
    """One thread that computes. The process does not wait for it at its end, as it does for an executor's."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name="explore", daemon=True).start()

    def submit(self, work: Callable[..., T], *args: Any) -> "Future[T]":
        future: Future[T] = Future()
        self._tasks.put((future, partial(work, *args)))
        return future

    def _run(self) -> None:
        while True:
            future, work = self._tasks.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def close(self) -> None:
        """Cancel the tasks that are still queued."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()[0].cancel()


class Pages:
    """The pass that is shown now, and the thread that computes the next one.

    torch: computes PyTorch's values and gradients of a page, by group, calling its second argument regularly, which
    raises to cancel; None where it is not installed.
    """

    def __init__(self, page: Page, torch: Torch | None = None):
        self._worker = Worker()
        self._torch, self.run, self._ended = torch, 0, False
        self.progress: tuple[int, int] | None = None
        self._worker.submit(self.show, page).result()

    def show(self, page: Page) -> None:
        """Make this the page that is shown."""
        summary = {"run": self.run + 1, **page.summary(served=True, torch=self._torch is not None)}
        self.page, self.summary, self.run = page, json.dumps(summary, allow_nan=False).encode(), self.run + 1
        self._heads: dict[str, Any] | None = summary["heads"]
        self._reference: dict[str, Params] | InputError | None = None

    async def compute(self, work: Callable[..., T], *args: Any) -> T:
        """Run this in the one thread that computes."""
        return await wrap_future(self._worker.submit(work, *args))

    def read(self, text: str, following: str | None) -> bytes:
        """Show another text's pass and return its summary."""
        old = self.page
        ids = read_text(old.encoding, old.model.config, text, following, "the field beside the text")
        self.show(Page(old.model, old.encoding, old.checkpoint, ids))
        return self.summary

    def heads(self, page: Page) -> dict[str, Any]:
        """The loss with each head of this page's pass zeroed, computed once."""
        self._check_shown(page)
        if self._heads is None:
            try:
                self._heads = page.zeroed_heads(self._tick)
            finally:
                self.progress = None
        return self._heads

    def reference(self, page: Page) -> dict[str, Params]:
        """PyTorch's arrays of this page's pass by group, computed once."""
        self._check_shown(page)
        if self._torch is None:
            raise HTTPException(404, f"PyTorch is not installed: {install('torch')}")
        if self._reference is None:
            try:
                self._reference = self._torch(page, self._check)
            except InputError as error:  # asking again would fail again
                self._reference = error
        if isinstance(self._reference, InputError):
            raise self._reference
        return self._reference

    def _check_shown(self, page: Page) -> None:
        """Raise HTTPException if another text has been shown since the request came."""
        if page is not self.page:
            raise HTTPException(409, ANOTHER_TEXT)

    def _tick(self, done: int, of: int) -> None:
        self.progress = done, of
        self._check()

    def _check(self) -> None:
        if self._ended:
            raise StoppedError

    def close(self) -> None:
        self._ended = True
        self._worker.close()
