"""The outermost layer of every command: streams that may fail, and exceptions that nothing else has caught."""

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
"""Exit codes: after a Ctrl-C, as a shell reports it, and EX_SOFTWARE of sysexits.h."""


class Output(io.TextIOBase):
    """A text stream around another (None where the process was started with it closed).

    Characters that its encoding lacks are written as backslash escapes. Once the stream cannot be written (its reader
    or terminal is gone, the disk is full), a required one raises OutputError, always on the main thread; any other
    says so on stderr, once, and drops what follows.
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
        if self._stream is not None:  # a stream that was closed from the start has nothing to lose
            self._attempt(lambda stream: stream.flush())

    def close(self) -> None:
        """Nothing: the stream belongs to the process."""

    def _attempt(self, action: Callable[[TextIO], object]) -> None:
        if self._error is None and self._stream is not None:
            try:
                action(self._stream)
            except (OSError, ValueError) as error:  # ValueError: closed by now
                self._error = error
                _discard(self._stream)
                if not self.required and self is not sys.stderr:
                    say(f"the output cannot be written any more ({_words(error)}): the work goes on without it")
        if self._error is not None and self.required and threading.current_thread() is threading.main_thread():
            message = f"the output cannot be written ({_words(self._error)}): direct it to where there is room"
            raise OutputError(message, isinstance(self._error, BrokenPipeError)) from self._error


def optional_output() -> None:
    """Output that cannot be written must not end this command: its result is in files or in an exit code."""
    if isinstance(sys.stdout, Output):
        sys.stdout.required = False


def say(line: str) -> None:
    """One line on stderr, if that can be written."""
    if sys.stderr is not None:
        try:
            print(line, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            _discard(sys.stderr)


@contextmanager
def outermost() -> Iterator[None]:
    """Around a whole command: stdout and stderr become Outputs, and what ends the command becomes one sentence.

    Exit codes: 130 after a Ctrl-C; 70 after an exception that was not foreseen, whose traceback goes to a file that the
    sentence names, or with --debug on the command line to stderr; for an output that cannot be written 2, or 1 and no
    word where its reader has closed the pipe. SystemExit passes. SIGTERM and SIGHUP end the process as they always do,
    once the command has cleaned up as after an exception.
    """
    if isinstance(sys.stdout, Output):  # there is one around this already
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
    """SIGTERM and SIGHUP raise in the block, so that it removes what is unfinished; then they end the process."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        raise _Ended(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # others may not handle signals
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # ignored by nohup
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
    """One sentence that says where the traceback is; the traceback itself with --debug, or if no file can be made."""
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
    """Let what a stream still holds go to the null device: Python writes it out again at exit, and would fail."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # no file of the system's
        pass


def _occupy_standard_streams() -> None:
    """Give the descriptors 0 to 2 to the null device where they are closed, lest a checkpoint's file becomes stdout."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
