"""Counts the file operations below a folder, and injects an error at one of them, or an interrupt after it.

The functions of os, the file objects returned by open, and the libraries that open files without either (safetensors,
numpy.fromfile) are wrapped to count. An error replaces the operation (a write writes half of its bytes first); an
interrupt follows it.
"""

import builtins
import errno
import fcntl
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import safetensors
import safetensors.numpy

ERRORS = {name: getattr(errno, name) for name in ("EIO", "ENOSPC", "EACCES", "EINVAL", "EROFS")}

PATHS = {
    **dict.fromkeys(("open", "stat", "lstat", "access", "listdir", "scandir", "mkdir", "rmdir", "unlink", "remove"), 1),
    **dict.fromkeys(("chmod", "utime", "truncate"), 1),
    **dict.fromkeys(("rename", "replace", "link", "symlink"), 2),
}
"""Functions of os -> the number of paths they take."""

HANDLES = ("fsync", "fdatasync", "ftruncate", "fchmod", "write", "sendfile")
"""Functions of os that take a file descriptor."""

READING = {"stat", "lstat", "access", "listdir", "scandir", "read", "open to read", "close to read", "lock"}
"""Operations that change nothing."""


@dataclass(frozen=True)
class Fault:
    """The fault at the operation of this number, counted from 0.

    code: that of an OSError; None for a KeyboardInterrupt. lasting: every later operation that changes files fails too,
    as on a full disk. again: the number of operations until another interrupt; 0: none.
    """

    number: int
    code: int | None = None
    lasting: bool = False
    again: int = 0


@dataclass
class Operations:
    """The operations below a folder so far, and where the fault struck."""

    folder: str
    fault: Fault | None = None
    seen: list[str] = field(default_factory=list)
    """Each operation's name and path."""
    struck: list[str] = field(default_factory=list)
    open: dict[int, str] = field(default_factory=dict)
    """Descriptors of open files -> their paths."""
    inside: bool = False
    """Whether an operation is in progress: its own inner operations do not count."""

    def do(self, name: str, path: Any, real: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        """Do one operation: real, or at the fault half of it and the error, or all of it and an interrupt."""
        where = None if self.inside else self.path(path)
        if where is None:
            return real()
        number = len(self.seen)
        self.seen.append(f"{name} {where}")
        strikes = self._strikes(number, name)
        self.inside = True
        try:
            if not strikes:
                return real()
            self.struck.append(f"{number}: {self.seen[-1]}")
            if self.fault.code is not None:
                half()
                raise OSError(self.fault.code, os.strerror(self.fault.code), str(path))
            real()
            raise KeyboardInterrupt
        finally:
            self.inside = False

    def path(self, path: Any) -> str | None:
        """The path, or an open descriptor's path, relative to the folder; None if outside it."""
        if isinstance(path, int):
            path = self.open.get(path)
        if path is None:
            return None
        full = os.path.abspath(os.fsdecode(path))
        return full[len(self.folder) + 1 :] if full.startswith(self.folder + os.sep) else None

    def _strikes(self, number: int, name: str) -> bool:
        if self.fault is None:
            return False
        first, again = self.fault.number, self.fault.again
        lasts = self.fault.lasting and number > first and name not in READING
        return lasts or number == first or (again > 0 and number == first + again)


class _File:
    """A file object whose operations count."""

    def __init__(self, file, operations: Operations, path: Any):
        self._file, self._operations, self._path = file, operations, path

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __iter__(self):
        return self

    def __next__(self):
        return self._operations.do("read", self._path, lambda: next(self._file))

    def read(self, *args):
        return self._operations.do("read", self._path, lambda: self._file.read(*args))

    def readline(self, *args):
        return self._operations.do("read", self._path, lambda: self._file.readline(*args))

    def write(self, data):
        def half():
            self._file.write(data[: len(data) // 2])

        return self._operations.do("write", self._path, lambda: self._file.write(data), half)

    def flush(self):
        return self._operations.do("flush", self._path, self._file.flush)

    def close(self):
        if not self._file.closed:
            name = "close" if self._file.writable() else "close to read"
            self._operations.open.pop(self._file.fileno(), None)
            self._operations.do(name, self._path, self._file.close, self._file.close)


@contextmanager
def watched(folder: Path, fault: Fault | None = None) -> Iterator[Operations]:
    """In the block, record the operations below folder, and inject the fault."""
    operations = Operations(os.path.abspath(folder), fault)
    with ExitStack() as stack:
        for name, paths in PATHS.items():
            stack.enter_context(patch.object(os, name, _of_paths(operations, name, paths, getattr(os, name))))
        for name in HANDLES:
            stack.enter_context(patch.object(os, name, _of_handle(operations, name, getattr(os, name))))
        stack.enter_context(patch.object(os, "close", _closing(operations, os.close)))
        stack.enter_context(patch.object(fcntl, "flock", _of_handle(operations, "lock", fcntl.flock)))
        opening = _opening(operations, io.open)
        stack.enter_context(patch.object(io, "open", opening))
        stack.enter_context(patch.object(builtins, "open", opening))
        stack.enter_context(patch.object(safetensors.numpy, "save_file", _saving(operations)))
        stack.enter_context(patch.object(safetensors, "safe_open", _safe_opening(operations)))
        stack.enter_context(patch.object(np, "fromfile", _reading(operations)))
        yield operations


def _of_paths(operations, name, paths, real):
    def call(*args, **kwargs):
        places = [_at(operations, path, kwargs.get("dir_fd")) for path in args[:paths] or (".",)]
        kind = name
        if name == "open":
            kind = "open" if args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else "open to read"
        inside = next((place for place in reversed(places) if operations.path(place) is not None), places[0])
        result = operations.do(kind, inside, lambda: real(*args, **kwargs))
        if name == "open":
            operations.open[result] = places[0]
        return result

    return call


def _at(operations, path, handle):
    """A path given relative to an open folder (dir_fd)."""
    return path if handle is None else os.path.join(os.fsdecode(operations.open.get(handle, "")), os.fsdecode(path))


def _of_handle(operations, name, real):
    def call(handle, *args):
        number = handle if isinstance(handle, int) else handle.fileno()
        return operations.do(name, number, lambda: real(handle, *args))

    return call


def _closing(operations, real):
    def call(handle):
        operations.open.pop(handle, None)
        real(handle)

    return call


def _opening(operations, real):
    def call(path, mode="r", *args, **kwargs):
        name = operations.open.get(path) if isinstance(path, int) else path
        if operations.path(name) is None:
            return real(path, mode, *args, **kwargs)
        kind = "open to read" if mode in ("r", "rb") else "open"
        file = _File(operations.do(kind, name, lambda: real(path, mode, *args, **kwargs)), operations, name)
        operations.open[file.fileno()] = name
        return file

    return call


def _saving(operations):
    real = safetensors.numpy.save_file

    def call(tensors, path, metadata=None):
        def half():
            real(tensors, path, metadata)
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)

        try:
            return operations.do("save", path, lambda: real(tensors, path, metadata), half)
        except OSError as error:  # reworded as the library does
            text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            raise safetensors.SafetensorError(text) from error

    return call


def _safe_opening(operations):
    real = safetensors.safe_open

    def call(path, *args, **kwargs):
        return operations.do("open to read", path, lambda: real(path, *args, **kwargs))

    return call


def _reading(operations):
    real = np.fromfile

    def call(file, *args, **kwargs):
        path = file._path if isinstance(file, _File) else file
        return operations.do("read", path, lambda: real(file, *args, **kwargs))

    return call
