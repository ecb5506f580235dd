"""The outermost layer of every command: failing streams, and exceptions not caught elsewhere."""

import io
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from numpy_gpt.errors import OutputError

INTERRUPTED, UNFORESEEN = 130, 70
"""Exit codes: 130 after Ctrl-C, as shells report it, and EX_SOFTWARE of sysexits.h."""


class Output(io.TextIOBase):
    """A text stream around another (None if it was closed when the process started).

    Characters that its encoding lacks are written as backslash escapes. Once the stream cannot be written (its reader
    or terminal is gone, the disk is full), a required one raises OutputError, on the main thread only. Any other
    reports it once on stderr and drops further output.
    """

    def __init__(self, stream: TextIO | None, required: bool):
        self.required = required
        self._stream = stream
        self._error: Exception | None = None if stream else ValueError("it is closed")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._error is None and self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"a text stream takes str, not {type(text).__name__}")
        shown = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._attempt(lambda stream: stream.write(shown))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:  # closed from the start: nothing to flush
            self._attempt(lambda stream: stream.flush())

    def close(self) -> None:
        """Nothing: the stream belongs to the process."""

    def _attempt(self, action: Callable[[TextIO], object]) -> None:
        if self._error is None and self._stream is not None:
            try:
                action(self._stream)
            except (OSError, ValueError) as error:  # ValueError: closed
                self._error = error
                _discard(self._stream)
                if not self.required and self is not sys.stderr:
                    say(f"the output can no longer be written ({_words(error)}): continuing without it")
        if self._error is not None and self.required and threading.current_thread() is threading.main_thread():
            message = f"the output cannot be written ({_words(self._error)}): redirect it to a writable place"
            raise OutputError(message, isinstance(self._error, BrokenPipeError)) from self._error


def optional_output() -> None:
    """Let this command continue if stdout cannot be written: its result is in files or the exit code."""
    if isinstance(sys.stdout, Output):
        sys.stdout.required = False


def say(line: str) -> None:
    """Print one line to stderr, if it can be written."""
    if sys.stderr is not None:
        try:
            print(line, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            _discard(sys.stderr)


@contextmanager
def outermost() -> Iterator[None]:
    """Wrap a command: make stdout and stderr Outputs, and report what ends the command in one sentence.

    Exit codes:
        130 after Ctrl-C.
        70 after an unexpected exception; its traceback goes to a file named in the sentence, or to stderr with --debug.
        2 if the output cannot be written; 1, silently, if its reader has closed the pipe.
    SystemExit passes. SIGTERM and SIGHUP end the process as usual, after the command has cleaned up.
    """
    if isinstance(sys.stdout, Output):  # already wrapped
        yield
        return
    before = sys.stdout, sys.stderr
    _occupy_standard_streams()
    sys.stdout, sys.stderr = Output(before[0], required=True), Output(before[1], required=False)
    out = sys.stdout
    try:
        with _ending_signals():
            try:
                yield
            finally:
                out.flush()
    except OutputError as error:
        if not error.reader_gone:
            say(f"Error: {error}")
        raise SystemExit(1 if error.reader_gone else 2) from error
    except KeyboardInterrupt as error:
        say("interrupted")
        raise SystemExit(INTERRUPTED) from error
    except Exception as error:
        report_unforeseen(error)
        raise SystemExit(UNFORESEEN) from error
    finally:
        sys.stdout, sys.stderr = before


class _Ended(BaseException):
    """A signal that ends the process."""

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def _ending_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise in the block, so that it removes unfinished files before the process ends."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        raise _Ended(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                before[number] = signal.signal(number, end)
    try:
        yield
    except _Ended as error:
        signal.signal(error.number, signal.SIG_DFL)
        os.kill(os.getpid(), error.number)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report_unforeseen(error: Exception) -> None:
    """Write the traceback to a file and say where; with --debug, or if no file can be made, print it instead."""
    lines = "".join(traceback.format_exception(error))
    if "--debug" not in sys.argv:
        try:
            with tempfile.NamedTemporaryFile(
                "w", prefix="numpy-gpt-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
            ) as file:
                file.write(f"{' '.join(sys.argv)}\nPython {sys.version}\n{lines}")
            say(f"Error: {_one_line(error)}; this is a bug: its traceback is in {file.name} (--debug prints it)")
            return
        except OSError:
            pass
    say(lines.rstrip("\n"))


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:300] + "..."


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _discard(stream: TextIO) -> None:
    """Redirect a stream to the null device: Python flushes its buffer again at exit, which would fail."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # not a system file
        pass


def _occupy_standard_streams() -> None:
    """Open the null device on closed descriptors 0 to 2, so that no checkpoint file can become stdout."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
